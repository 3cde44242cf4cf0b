"""What a person writes as a size is what the peer takes, exactly, or one sentence says how to write it."""

from __future__ import annotations

import os
import re
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peer.settings import DEMO_MODEL, PeerSettings, default_threads, memory_budget
from shared.errors import SettingsError
from shared.settings import parse_bytes

UNITS = {"": 1, "k": 10**3, "M": 10**6, "g": 10**9, "T": 10**12}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6GB", 6_000_000_000),
        ("500 MB", 500_000_000),
        ("1.5g", 1_500_000_000),
        ("0.1KB", 100),
        ("123", 123),
        ("123B", 123),
        ("0", 0),
        (" 2 tb ", 2_000_000_000_000),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_sizes_are_read_in_powers_of_ten(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@settings(deadline=None)
@given(
    number=st.integers(0, 10**12), unit=st.sampled_from(sorted(UNITS)), byte=st.sampled_from(["", "b", "B"])
)
def test_any_whole_number_of_units_is_read_exactly(number: int, unit: str, byte: str) -> None:
    assert parse_bytes(f"{number}{unit}{byte}") == number * UNITS[unit]


@settings(deadline=None)
@given(number=st.decimals(0, 10**6, places=3), unit=st.sampled_from(sorted(UNITS)))
def test_a_fraction_of_a_byte_is_dropped(number: object, unit: str) -> None:
    assert parse_bytes(f"{number} {unit}B") == Fraction(str(number)) * UNITS[unit] // 1


@pytest.mark.parametrize(
    "text", ["lots", "", " ", "GB", "-1GB", "6 GiB", "1e9", "6GB6", "1,5GB", "nan", "1.GB"]
)
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(SettingsError, match=f"^{re.escape(repr(text))} is not a size: write for example 6GB"):
        parse_bytes(text)


@settings(deadline=None)
@given(text=st.text(max_size=12) | st.text("0123456789.kKmMgGtTbB ", max_size=30) | st.integers().map(str))
@example(text="9" * 400)
@example(text="9" * 5000)
def test_any_text_is_a_size_or_refused_in_one_sentence(text: str) -> None:
    try:
        assert parse_bytes(text) >= 0
    except SettingsError as error:
        assert str(error) and "\n" not in str(error)


RELAYS = ("http://127.0.0.1:1",)


def test_by_default_a_peer_serves_what_helps_most_of_the_demo_model() -> None:
    settings = PeerSettings(relays=RELAYS)
    assert (settings.model, settings.layers, settings.kv_bytes) == (DEMO_MODEL, "auto", None)


def test_by_default_the_owner_keeps_a_core_and_a_quarter_of_the_free_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = {"SC_AVPHYS_PAGES": 4_000_000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    budget = memory_budget(PeerSettings(relays=RELAYS))
    assert (budget.layers_bytes, budget.kv_bytes) == (8_192_000_000, 4_096_000_000)
    assert default_threads() == 7

    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert default_threads() == 1


def test_a_system_that_does_not_tell_its_free_memory_gets_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "sysconf", unknown)
    assert memory_budget(PeerSettings(relays=RELAYS)).kv_bytes == 2_000_000_000


def test_memory_that_is_told_is_shared_between_layers_and_chats() -> None:
    told = memory_budget(PeerSettings(relays=RELAYS, memory_bytes=9_000))
    assert (told.layers_bytes, told.kv_bytes) == (6_000, 3_000)
    both = memory_budget(PeerSettings(relays=RELAYS, memory_bytes=9_000, kv_bytes=8_000))
    assert (both.layers_bytes, both.kv_bytes) == (1_000, 8_000)
    assert memory_budget(PeerSettings(relays=RELAYS, memory_bytes=1, kv_bytes=8)).layers_bytes == 0
