"""What token buckets let through, checked against arithmetic done here; all on clocks that the tests set."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import relay.limits
from relay.limits import Bucket, Buckets, LimitReached, Limits, OpenConnections, address_key, seen_address
from relay.settings import UNLIMITED, Rate, RelaySettings

MOMENTS = st.lists(st.floats(0, 10, allow_nan=False), max_size=60)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_lets_a_burst_through_and_then_its_rate() -> None:
    bucket = Bucket(Rate(per_s=10, burst=3), now=0)

    assert [bucket.take(0) for _ in range(3)] == [0, 0, 0]
    assert bucket.take(0) == pytest.approx(0.1)
    assert bucket.take(0.1) == pytest.approx(0.1)
    assert bucket.take(10) == 0


def test_a_refusal_takes_nothing_and_says_when_to_ask_again() -> None:
    bucket = Bucket(Rate(per_s=2, burst=1), now=0)

    assert bucket.take_if_there(0) == 0
    assert bucket.take_if_there(0) == bucket.take_if_there(0) == pytest.approx(0.5)
    assert bucket.take_if_there(0.49) > 0
    assert bucket.take_if_there(0.5) == 0


@given(pauses=MOMENTS, per_s=st.floats(0.1, 100), burst=st.floats(1, 50))
def test_nobody_gets_more_than_the_burst_and_the_rate(
    pauses: list[float], per_s: float, burst: float
) -> None:
    bucket, now, admitted = Bucket(Rate(per_s, burst), 0), 0.0, 0
    for pause in pauses:
        now += pause
        admitted += bucket.take_if_there(now) == 0

    assert admitted <= burst + per_s * now + 1e-6


@given(amounts=st.lists(st.floats(0, 1e6), max_size=50), per_s=st.floats(1, 1e6), burst=st.floats(0, 1e6))
def test_who_waits_as_told_sends_at_the_rate_and_not_more_slowly(
    amounts: list[float], per_s: float, burst: float
) -> None:
    """The last byte of all is due exactly when rate and burst together allow it."""
    bucket, now, waits = Bucket(Rate(per_s, burst), 0), 0.0, []
    for amount in amounts:
        waits.append(bucket.take(now, amount))
        now += waits[-1]

    if any(waits):
        last = max(number for number, wait in enumerate(waits) if wait)
        assert now == pytest.approx((sum(amounts[: last + 1]) - burst) / per_s)


@given(pauses=st.lists(st.floats(-100, 0), min_size=1, max_size=20))
def test_a_clock_that_is_set_back_gives_nothing_away(pauses: list[float]) -> None:
    bucket, now = Bucket(Rate(per_s=1, burst=1), 0), 0.0
    assert bucket.take_if_there(now) == 0
    for pause in pauses:
        now += pause
        assert bucket.take_if_there(now) > 0


def test_without_a_limit_nobody_waits() -> None:
    bucket = Bucket(UNLIMITED, now=0)
    assert all(bucket.take(0, 1e18) == bucket.take_if_there(0) == 0 for _ in range(5))


def test_each_key_has_its_own_bucket() -> None:
    buckets = Buckets(Rate(1, 1), Clock())
    assert buckets.take_if_there("ann") == 0
    assert buckets.take_if_there("ann") > 0
    assert buckets.take_if_there("bob") == 0


def test_full_buckets_are_forgotten_and_others_are_not() -> None:
    clock = Clock()
    buckets = Buckets(Rate(1, 10), clock)
    buckets.take("greedy", 5000)
    for number in range(5000):
        clock.now += 0.5
        buckets.take(f"one {number}")

    assert len(buckets) < 2000
    assert buckets.take_if_there("greedy") > 2000


def test_however_many_ask_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay.limits, "MAX_KEYS", 2000)
    buckets = Buckets(Rate(1, 10), Clock())
    for number in range(10_000):
        buckets.take(f"one {number}", 5)

    assert len(buckets) <= 2000


def test_an_address_holds_so_many_connections_and_no_more() -> None:
    open_ = OpenConnections(2)
    assert [open_.open("a"), open_.open("a"), open_.open("a"), open_.open("b")] == [True, True, False, True]
    open_.close("a")
    assert open_.open("a")
    for address in "aab":
        open_.close(address)
    assert not open_._open


def test_the_limits_name_who_asked_too_much_and_when_to_return() -> None:
    clock = Clock()
    settings = RelaySettings(
        address_connections=2,
        address_new_connections=Rate(0.5, 3),
        participant_announcements=Rate(1, 1),
        address_announcements=Rate(0.1, 2),
    )
    limits = Limits(settings, clock)
    limits.connect("home")
    limits.connect("home")
    with pytest.raises(LimitReached, match=r"holds 2 connections already; come back in 30 s"):
        limits.connect("home")
    with pytest.raises(LimitReached, match=r"opens connections too often; come back in 2 s"):
        limits.connect("home")
    limits.connect("elsewhere")

    limits.announce("ann", "home")
    with pytest.raises(LimitReached, match=r"this participant announces itself too often; come back in 1 s"):
        limits.announce("ann", "home")
    limits.announce("bob", "home")
    with pytest.raises(LimitReached, match=r"of this address announce themselves too often; .* 10 s") as full:
        limits.announce("eve", "home")
    assert full.value.retry_after_s == pytest.approx(10)
    clock.now += 10
    limits.announce("eve", "home")


def test_bytes_count_for_the_participant_and_for_its_address() -> None:
    settings = RelaySettings(participant_bytes=Rate(100, 1000), address_bytes=Rate(200, 1500))
    limits = Limits(settings, Clock())
    assert limits.take_bytes("ann", "home", 1000) == 0
    assert limits.take_bytes("bob", "home", 700) == pytest.approx(1.0)  # 200 too many at 200 per second
    assert limits.take_bytes("ann", "elsewhere", 50) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("address", "key"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("2001:db8:1:2:aaaa::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:bbbb::2", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("not an address", "not an address"),
    ],
)
def test_a_household_is_one_address(address: str, key: str) -> None:
    assert address_key(address) == key


def test_only_a_proxy_of_ours_is_believed_and_only_its_last_word() -> None:
    proxies = ("127.0.0.1", "10.0.0.9")
    assert seen_address("203.0.113.7", "198.51.100.1", proxies) == "203.0.113.7"
    assert seen_address("127.0.0.1", None, proxies) == "127.0.0.1"
    assert seen_address("10.0.0.9", "1.1.1.1, 198.51.100.1", proxies) == "198.51.100.1"
    assert seen_address("::ffff:127.0.0.1", "198.51.100.1", proxies) == "198.51.100.1"
    assert seen_address("127.0.0.1", "", proxies) == "127.0.0.1"
