"""A session has all the memory that it may ever need, or none."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.serving.kv_budget import RETRY_S, KvBudget
from shared.errors import Busy


def test_what_does_not_fit_is_refused_whole_with_a_time_to_come_back() -> None:
    budget = KvBudget(10_000_000)
    budget.reserve("ann", 7_000_000)

    with pytest.raises(Busy, match=r"needs 4\.0 MB of KV memory and 3\.0 MB are free") as refusal:
        budget.reserve("bob", 4_000_000)

    assert refusal.value.retry_after_s == RETRY_S > 0
    assert (budget.reserved_bytes, budget.free_bytes) == (7_000_000, 3_000_000)
    budget.reserve("bob", 3_000_000)
    assert budget.free_bytes == 0


def test_a_session_that_reserves_again_is_counted_once() -> None:
    budget = KvBudget(100)
    budget.reserve("ann", 80)

    budget.reserve("ann", 100)
    budget.reserve("ann", 30)

    assert budget.reserved_bytes == 30


def test_a_refused_session_keeps_what_it_held() -> None:
    budget = KvBudget(100)
    budget.reserve("ann", 80)

    with pytest.raises(Busy):
        budget.reserve("ann", 101)

    assert budget.reserved_bytes == 80


def test_giving_back_twice_gives_back_once() -> None:
    budget = KvBudget(100)
    budget.reserve("ann", 60)
    budget.reserve("bob", 20)

    budget.release("ann")
    budget.release("ann")
    budget.release("nobody")

    assert budget.reserved_bytes == 20


@settings(deadline=None)
@given(
    total=st.integers(0, 1000),
    acts=st.lists(st.tuples(st.sampled_from("abcd"), st.none() | st.integers(0, 1200)), max_size=40),
)
def test_any_order_of_acts_never_lends_more_than_there_is(
    total: int, acts: list[tuple[str, int | None]]
) -> None:
    budget = KvBudget(total)
    held: dict[str, int] = {}
    for session, size in acts:
        if size is None:
            budget.release(session)
            held.pop(session, None)
            continue
        fits = sum(held.values()) - held.get(session, 0) + size <= total
        try:
            budget.reserve(session, size)
        except Busy:
            assert not fits
        else:
            assert fits
            held[session] = size
        assert budget.reserved_bytes == sum(held.values()) <= total
    for session in "abcd":
        budget.release(session)
    assert budget.free_bytes == total
