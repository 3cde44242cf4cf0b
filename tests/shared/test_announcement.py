"""Which announcements are believed, and that everyone who heard the same ones holds the same one."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.announcement import CLOCK_SKEW_S, MAX_LEASE_S, newer, read_announcement, sign_announcement
from shared.errors import BadSignature, ProtocolError, StaleRecord
from shared.identity import Identity
from shared.protocol import SignedRecord
from tests.relay.parties import announced, announcement

NOW = 1_800_000_000.0
ANN = Identity.generate()
EVE = Identity.generate()


def signed_by(identity: Identity, body: str) -> SignedRecord:
    """A signature over any text at all."""
    return SignedRecord(body=body, signature=identity.sign("corolla-announce-1", body.encode()).hex())


def read(now: float = NOW, **changes: Any) -> None:  # noqa: ANN401 - any field of an announcement
    read_announcement(announced(ANN, NOW, **changes), now)


def test_what_was_signed_is_what_is_read() -> None:
    assert read_announcement(announced(ANN, NOW), NOW) == announcement(ANN, NOW)


def test_a_signature_by_another_key_is_refused() -> None:
    record = announced(ANN, NOW)
    forged = SignedRecord(record.body.replace(ANN.id, EVE.id), record.signature)
    with pytest.raises(BadSignature, match=EVE.id[:8]):
        read_announcement(forged, NOW)


def test_a_signature_made_for_something_else_is_refused() -> None:
    body = announced(ANN, NOW).body
    with pytest.raises(BadSignature):
        read_announcement(SignedRecord(body, ANN.sign("corolla-login-1", body.encode()).hex()), NOW)


def test_only_the_peer_itself_can_sign() -> None:
    with pytest.raises(ProtocolError, match="own key"):
        sign_announcement(EVE, announcement(ANN, NOW))


def test_a_clock_may_be_two_minutes_ahead_and_no_more() -> None:
    read(now=NOW - CLOCK_SKEW_S)
    with pytest.raises(StaleRecord, match="ahead"):
        read(now=NOW - CLOCK_SKEW_S - 1)


def test_an_expired_announcement_is_not_believed() -> None:
    read(now=NOW + 44)
    with pytest.raises(StaleRecord, match="expired"):
        read(now=NOW + 45)


def test_a_lease_is_at_most_five_minutes() -> None:
    read(expires_at=NOW + MAX_LEASE_S)
    for expires_at in (NOW, NOW - 1, NOW + MAX_LEASE_S + 1):
        with pytest.raises(ProtocolError, match="lease"):
            read(expires_at=expires_at)


def test_a_sequence_number_cannot_run_ahead_of_the_clock() -> None:
    read(sequence=int((NOW + CLOCK_SKEW_S) * 1000))
    with pytest.raises(StaleRecord, match="sequence"):
        read(sequence=int((NOW + CLOCK_SKEW_S) * 1000) + 1)


@pytest.mark.parametrize(("start", "end"), [(4, 4), (5, 4), (0, 9), (8, 9)])
def test_layers_must_lie_in_the_model_unless_the_peer_leaves(start: int, end: int) -> None:
    with pytest.raises(ProtocolError, match="not a run of layers"):
        read(start=start, end=end)
    read(start=start, end=end, state="left")


@pytest.mark.parametrize(
    "changes",
    [
        {"issued_at": float("nan")},
        {"expires_at": float("inf")},
        {"artefact": "x"},
        {"sequence": -1},
        {"state": "dancing"},
        {"name": "n" * 65},
        {"relays": ["r"] * 5},
        {"relays": ["\N{ROSE}" * 200] * 4, "model": "\N{ROSE}" * 200},
        {"name": "\ud800"},
    ],
)
def test_nobody_can_sign_what_nobody_would_believe(changes: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        announced(ANN, NOW, **changes)


@pytest.mark.parametrize("body", ["", "{}", "null", "[1]", '{"peer":"x"}', "\ud800", "[" * 9999, "0" * 9999])
def test_bodies_that_are_no_announcement_are_refused(body: str) -> None:
    with pytest.raises(ProtocolError):
        read_announcement(SignedRecord(body, "0" * 128), NOW)


def test_a_signature_that_is_none_is_refused() -> None:
    with pytest.raises(ProtocolError, match="hexadecimal"):
        read_announcement(SignedRecord(announced(ANN, NOW).body, "xyz"), NOW)


@settings(deadline=None)
@given(place=st.integers(0, 10_000), change=st.integers(1, 255), now=st.floats(0, 4e9))
def test_a_changed_record_is_never_believed(place: int, change: int, now: float) -> None:
    record = announced(ANN, NOW)
    raw = bytearray(record.body.encode() + bytes.fromhex(record.signature))
    raw[place % len(raw)] ^= change
    body, signature = bytes(raw[:-64]), bytes(raw[-64:])
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return
    with pytest.raises(ProtocolError):
        read_announcement(SignedRecord(text, signature.hex()), now)


@settings(deadline=None)
@given(body=st.text(), signature=st.text(alphabet="0123456789abcdef", max_size=130), now=st.floats())
def test_reading_never_fails_in_any_other_way(body: str, signature: str, now: float) -> None:
    with pytest.raises(ProtocolError):
        read_announcement(SignedRecord(body, signature), now)


# ---------------------------------------------------------------- which of two is newer

# Few sequences and names, so that ties are common.
records = st.builds(
    lambda sequence, name: announced(ANN, NOW, sequence=sequence, name=name),
    st.integers(0, 3),
    st.sampled_from(["ann", "anna", "anne"]),
)


def merged(heard: list[SignedRecord]) -> SignedRecord:
    return functools.reduce(newer, heard)


def test_the_higher_sequence_is_newer() -> None:
    first, second = announced(ANN, NOW, sequence=1), announced(ANN, NOW, sequence=2)
    assert newer(first, second) == newer(second, first) == second


def test_a_record_without_a_sequence_is_refused() -> None:
    with pytest.raises(ProtocolError):
        newer(signed_by(ANN, "{}"), announced(ANN, NOW))


@settings(deadline=None)
@given(records, records, records)
def test_newer_is_a_choice_by_a_total_order(
    one: SignedRecord, two: SignedRecord, three: SignedRecord
) -> None:
    assert newer(one, one) == one
    assert newer(one, two) == newer(two, one)
    assert newer(newer(one, two), three) == newer(one, newer(two, three))


@settings(deadline=None)
@given(heard=st.lists(records, min_size=1, max_size=8), data=st.data())
def test_order_repetition_and_partition_do_not_matter(heard: list[SignedRecord], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(heard + heard))
    cut = data.draw(st.integers(1, len(shuffled) - 1))
    by_way_of_two_relays = newer(merged(shuffled[:cut]), merged(shuffled[cut:]))

    assert merged(heard) == merged(shuffled) == by_way_of_two_relays


@settings(deadline=None)
@given(heard=st.lists(records, min_size=2, max_size=8))
def test_hearing_more_never_goes_back(heard: list[SignedRecord]) -> None:
    for count in range(1, len(heard)):
        before, after = merged(heard[:count]), merged(heard[: count + 1])
        assert newer(before, after) == after
