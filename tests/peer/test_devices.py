"""What `--device` means on a machine, and which layers lie on which of its GPUs."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peer import devices
from peer.devices import choose_devices, compute_dtype, in_words, spread
from peer.settings import PeerSettings
from shared.errors import SettingsError

CPU = torch.device("cpu")
GIB = 1 << 30


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has them, as far as choosing goes."""

    def found(name: str) -> torch.device:
        device = torch.device(name)
        if device.type == "mps" or (device.index or 0) > 2:
            raise RuntimeError("not there")
        return device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device.index}")
    monkeypatch.setattr(devices, "_device", found)


@pytest.mark.usefixtures("three_gpus")
def test_all_gpus_are_taken_unless_some_are_named() -> None:
    all_three = tuple(torch.device("cuda", number) for number in range(3))
    assert choose_devices("auto") == choose_devices("cuda") == all_three
    assert choose_devices("cuda:1") == all_three[1:2]
    assert choose_devices("cuda:2, cuda:0,cuda:2") == (all_three[2], all_three[0])
    assert choose_devices("cpu") == (CPU,)
    assert in_words(choose_devices("cuda:2,cuda:0")) == "cuda (Card 2, Card 0)"


@pytest.mark.usefixtures("three_gpus")
def test_a_card_that_does_not_compute_is_left_out_unless_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert len(choose_devices("auto")) == 3
    with pytest.raises(SettingsError, match="--device cuda:3 is not on this machine"):
        choose_devices("cuda:3")


@pytest.mark.usefixtures("three_gpus")
def test_what_does_not_go_together_is_told() -> None:
    with pytest.raises(SettingsError, match="--device cpu,cuda:1: only GPUs go together"):
        choose_devices("cpu,cuda:1")
    with pytest.raises(SettingsError, match="--device cuda:0,cuda:3 is not on this machine"):
        choose_devices("cuda:0,cuda:3")


@pytest.mark.parametrize("asked", ["cuda", "cuda:0,cuda:1", "cpu,meta", ",", "cpu,"])
def test_what_this_machine_lacks_is_told_in_the_words_of_who_asked(asked: str) -> None:
    with pytest.raises(SettingsError, match=f"--device {asked} is not on this machine; leave it out"):
        choose_devices(asked)


def test_gpus_compute_in_bfloat16_unless_told_otherwise() -> None:
    usual, exact = PeerSettings(relays=()), PeerSettings(relays=(), dtype="float32")
    assert compute_dtype(usual, torch.device("cuda", 0)) == torch.bfloat16
    assert compute_dtype(usual, CPU) == compute_dtype(exact, torch.device("cuda", 0)) == torch.float32


def test_equal_gpus_get_equal_runs_of_layers() -> None:
    assert spread([GIB] * 6, 0, [8 * GIB] * 3) == [0, 0, 1, 1, 2, 2]


def test_the_ends_take_the_place_of_layers_on_the_first_gpu() -> None:
    assert spread([GIB] * 6, 2 * GIB, [8 * GIB] * 2) == [0, 0, 1, 1, 1, 1]


def test_a_gpu_that_is_half_full_gets_fewer_layers() -> None:
    assert spread([GIB] * 9, 0, [24 * GIB, 12 * GIB]) == [0] * 6 + [1] * 3
    assert spread([GIB] * 4, 0, [0, 8 * GIB]) == [1] * 4
    assert spread([GIB] * 4, 0, [0, 0]) == [1] * 4  # who has no room anywhere hears so when it loads


@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=60),
    st.integers(0, 500),
    st.lists(st.integers(100, 10_000), min_size=1, max_size=8),
)
def test_runs_follow_one_another_and_none_is_filled_much_more_than_all(
    layers: list[int], ends: int, free: list[int]
) -> None:
    places = spread(layers, ends, free)
    assert len(places) == len(layers)
    assert all(0 <= one <= other < len(free) for one, other in pairwise([*places, places[-1]]))
    full = (ends + sum(layers)) / sum(free)
    for number, room in enumerate(free):
        held = sum(size for size, place in zip(layers, places, strict=True) if place == number)
        # Half a layer at each edge of a run; the ends cannot be shared out.
        if number or ends <= full * room:
            assert held + (0 if number else ends) <= full * room + max(layers)
