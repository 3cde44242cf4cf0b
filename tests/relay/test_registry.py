"""What the relay remembers of announcements, told without a network: all times are passed in."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.registry import PAGE_BYTES, TOMBSTONE_S, Entry, Registry, entry_of, pages
from shared.announcement import read_announcement
from shared.errors import Refused, StaleRecord
from shared.identity import Identity
from shared.protocol import MAX_RELAY_MESSAGE_BYTES, Found, SignedRecord, encode
from tests.relay.parties import announced

NOW = 1_800_000_000.0
ANN, BOB, EVE = (Identity.generate() for _ in range(3))


def entry(identity: Identity = ANN, now: float = NOW, **changes: Any) -> Entry:  # noqa: ANN401
    record = announced(identity, now, **changes)
    return entry_of(record, read_announcement(record, now), now)


def test_an_announcement_lives_as_long_as_its_lease() -> None:
    registry = Registry(10)
    assert registry.accept(entry(expires_at=NOW + 45))

    assert [found.peer for found in registry.live(NOW + 44.9)] == [ANN.id]
    assert registry.live(NOW + 45) == []


def test_a_renewal_prolongs_the_lease() -> None:
    registry = Registry(10)
    registry.accept(entry())
    registry.accept(entry(now=NOW + 30))

    assert len(registry.live(NOW + 60)) == 1


def test_the_same_announcement_again_is_no_news() -> None:
    registry = Registry(10)
    assert registry.accept(entry())
    assert not registry.accept(entry())


def test_an_older_announcement_is_refused_with_both_numbers() -> None:
    registry = Registry(10)
    registry.accept(entry(sequence=7))
    with pytest.raises(StaleRecord, match=r"announcement 6 of .* not newer than 7"):
        registry.accept(entry(sequence=6))


def test_one_who_leaves_is_not_found_and_cannot_be_brought_back_by_an_old_record() -> None:
    registry = Registry(10)
    old = entry(sequence=1, expires_at=NOW + 300)
    registry.accept(old)
    registry.accept(entry(sequence=2, state="left"))

    assert registry.live(NOW) == []
    registry.forget(NOW + 299)  # the old record is still valid then
    with pytest.raises(StaleRecord):
        registry.accept(old)


def test_what_ran_out_is_forgotten_in_the_end() -> None:
    registry = Registry(10)
    registry.accept(entry())
    registry.departed.add(ANN.id)

    assert registry.forget(NOW + TOMBSTONE_S - 1) == []
    assert registry.forget(NOW + TOMBSTONE_S) == [ANN.id]
    assert len(registry) == 0 and not registry.departed


def test_a_full_registry_refuses_newcomers_but_lets_the_others_renew() -> None:
    registry = Registry(1)
    registry.accept(entry(sequence=1))
    with pytest.raises(Refused, match="already keeps 1"):
        registry.accept(entry(BOB))
    assert registry.accept(entry(sequence=2))


def test_a_lookup_may_be_for_one_model() -> None:
    registry = Registry(10)
    registry.accept(entry(ANN, model="small"))
    registry.accept(entry(BOB, model="large"))

    assert [found.peer for found in registry.live(NOW, "large")] == [BOB.id]
    assert len(registry.live(NOW)) == 2


some_entries = st.lists(
    st.builds(
        lambda identity, sequence, state, lease_s: entry(
            identity, sequence=sequence, state=state, expires_at=NOW + lease_s
        ),
        st.sampled_from([ANN, BOB, EVE]),
        st.integers(0, 4),
        st.sampled_from(["serving", "left"]),
        st.sampled_from([10.0, 100.0]),
    ),
    max_size=10,
)


def held(entries: list[Entry]) -> set[str]:
    registry = Registry(10)
    for one in entries:
        before = {found.peer: found for found in registry.live(NOW)}.get(one.peer)
        try:
            registry.accept(one)
        except StaleRecord:
            assert registry.get(one.peer) is not None
        after = registry.get(one.peer)
        assert after is not None
        if before is not None:
            assert after.announcement.sequence >= before.announcement.sequence
    return {registry.get(peer).record.body for peer in (ANN.id, BOB.id, EVE.id) if registry.get(peer)}  # type: ignore[union-attr]


@settings(deadline=None)
@given(entries=some_entries, data=st.data())
def test_relays_that_heard_the_same_hold_the_same(entries: list[Entry], data: st.DataObject) -> None:
    assert held(data.draw(st.permutations(entries + entries))) == held(entries)


@settings(deadline=None)
@given(entries=some_entries, later_s=st.floats(0, 500))
def test_nothing_expired_or_withdrawn_is_ever_found(entries: list[Entry], later_s: float) -> None:
    registry = Registry(10)
    for one in entries:
        try:
            registry.accept(one)
        except StaleRecord:
            continue
    for found in registry.live(NOW + later_s):
        assert found.announcement.expires_at > NOW + later_s
        assert found.announcement.state != "left"


@settings(deadline=None)
@given(st.lists(st.text(min_size=0, max_size=4000), max_size=40))
def test_pages_hold_everything_and_fit_in_a_message(bodies: list[str]) -> None:
    records = [SignedRecord(body, "0" * 128) for body in bodies]
    cut = list(pages(records))

    assert [record for page in cut for record in page] == records
    assert len(cut) >= 1
    assert all(
        sum(2 * len(record.body.encode()) for record in page) <= PAGE_BYTES or len(page) == 1 for page in cut
    )


def test_the_longest_announcements_fit_in_a_message() -> None:
    record = announced(ANN, NOW, name='"' * 64, model='"' * 200, relays=["\\" * 200] * 4)
    for page in pages([record] * 200):
        assert len(encode(Found(request=1 << 53, records=page, more=True))) < MAX_RELAY_MESSAGE_BYTES


def test_a_peer_that_changes_its_model_is_found_under_the_new_one_only() -> None:
    registry = Registry(10)
    for sequence, model in enumerate(["small", "large", "large", "small"]):
        newest = entry(sequence=sequence, model=model)
        registry.accept(newest)
        other = {"small": "large", "large": "small"}[model]
        assert registry.live(NOW, model) == [newest]
        assert registry.live(NOW, other) == []

    assert registry.forget(NOW + TOMBSTONE_S) == [ANN.id]
    assert registry._by_model == {} and len(registry) == 0
