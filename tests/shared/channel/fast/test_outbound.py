"""Sending over simulated paths: fast where the path is, patient where it is not, on virtual time."""

from __future__ import annotations

import statistics
from functools import partial

import pytest

from shared.channel.fast.chunks import PAYLOAD_BYTES, Envelope, Sack
from shared.channel.fast.congestion import LEAST_TIMEOUT_S, Congestion
from shared.channel.fast.outbound import BURST_PACKETS, LEAST_REORDERING, Outbound
from tests.harness.simulated_association import SimulatedAssociation

MESSAGE = b"m" * 16_400
# 25 ms there and back, 100 Mbit/s, with the queue of a usual router.
home = partial(SimulatedAssociation, delay_s=0.0125, bytes_per_s=12.5e6, queue_bytes=375_000)
TRIP_S = 0.025
FIRST_TSN = 100


def mbit_per_s(association: SimulatedAssociation, mib: int = 16) -> float:
    messages = mib * 64
    return messages * len(MESSAGE) * 8 / association.deliver_all(*[MESSAGE] * messages) / 1e6


def test_a_decode_message_takes_one_flight() -> None:
    association = home()
    association.deliver_all(MESSAGE)
    trips_s = [association.deliver_all(MESSAGE) + TRIP_S / 2 for _ in range(50)]

    assert statistics.median(trips_s) < 1.25 * TRIP_S


@pytest.mark.parametrize(("loss", "least"), [(0.0, 75), (0.001, 60), (0.01, 45), (0.04, 25)])
def test_bulk_survives_losses(loss: float, least: float) -> None:
    assert mbit_per_s(home(loss=loss)) > least


def test_a_short_queue_is_not_run_over_for_long() -> None:
    association = SimulatedAssociation(delay_s=0.0125, bytes_per_s=12.5e6, queue_bytes=125_000)

    assert mbit_per_s(association) > 70
    assert association.dropped_packets < 0.05 * association.sent_packets


def test_packets_that_overtake_each_other_are_sent_again_rarely() -> None:
    association = home(jitter_s=0.004)

    assert mbit_per_s(association) > 50
    assert association.sent_packets < 1.1 * 16 * 64 * 15


def test_a_slow_uplink_is_used_without_storms() -> None:
    association = SimulatedAssociation(delay_s=0.02, bytes_per_s=125_000, queue_bytes=60_000)

    assert mbit_per_s(association, mib=1) > 0.8
    assert association.dropped_packets < 0.1 * association.sent_packets


def test_a_lost_tail_is_asked_for_before_the_timeout() -> None:
    outbound = sender()
    outbound.append(0, 0, 53, bytes(3 * PAYLOAD_BYTES))
    outbound.transmit(0.0)
    outbound.acknowledged(acknowledges(FIRST_TSN + 2), 0.01)
    outbound.append(0, 1, 53, bytes(3 * PAYLOAD_BYTES))
    outbound.transmit(1.0)
    assert outbound.deadline is not None

    assert outbound.deadline < 1.0 + LEAST_TIMEOUT_S
    assert len(outbound.expired(outbound.deadline)) == 1
    outbound.acknowledged(acknowledges(FIRST_TSN + 3), 1.1)
    assert len(outbound.transmit(1.1)) == 2, "what left before the question and was not heard is lost"


def test_everything_is_sent_again_when_nothing_is_answered() -> None:
    outbound = sender()
    outbound.append(0, 0, 53, bytes(3 * PAYLOAD_BYTES))
    outbound.transmit(0.0)
    outbound.acknowledged(acknowledges(FIRST_TSN + 2), 0.01)
    outbound.append(0, 1, 53, bytes(3 * PAYLOAD_BYTES))
    first = outbound.transmit(1.0)
    assert outbound.deadline is not None
    now = outbound.deadline
    assert outbound.expired(now) == first[:1], "first it only asks"
    pauses = []
    for _ in range(6):
        assert outbound.deadline is not None
        pauses.append(outbound.deadline - now)
        now = outbound.deadline
        assert outbound.expired(now) == first

    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0])


def test_one_packet_asks_whether_a_closed_window_has_opened() -> None:
    outbound = sender()
    outbound.append(0, 0, 53, bytes(3 * PAYLOAD_BYTES))
    outbound.transmit(0.0)
    outbound.acknowledged(acknowledges(FIRST_TSN + 2, window=0), 0.01)
    outbound.append(0, 1, 53, bytes(9 * PAYLOAD_BYTES))

    assert len(outbound.transmit(0.02)) == 1
    assert outbound.transmit(0.03) == []
    outbound.acknowledged(acknowledges(FIRST_TSN + 3), 0.04)
    assert len(outbound.transmit(0.04)) == 8


def test_no_more_than_a_burst_leaves_after_a_pause() -> None:
    association = home()
    mbit_per_s(association, mib=4)
    outbound = association.outbound
    assert outbound.congestion.window_bytes > 2 * BURST_PACKETS * PAYLOAD_BYTES
    now = association.now + 1.0
    association.run_until(lambda: outbound.flight_bytes == 0)
    for _ in range(20):
        outbound.append(0, 0, 53, MESSAGE)

    leaving = outbound.transmit(now) + outbound.transmit(now)
    assert sum(map(len, leaving)) < 1.1 * BURST_PACKETS * PAYLOAD_BYTES


@pytest.mark.parametrize("cumulative", [FIRST_TSN - 50, FIRST_TSN + 3, FIRST_TSN + 2**30])
def test_an_acknowledgement_of_the_past_or_the_future_changes_nothing(cumulative: int) -> None:
    outbound = sender()
    outbound.append(0, 0, 53, bytes(3 * PAYLOAD_BYTES))
    outbound.transmit(0.0)
    outbound.acknowledged(Sack(cumulative, 1 << 20, [(1, 0xFFFF)] * 100, 0), 0.01)

    assert outbound.flight_bytes == 3 * PAYLOAD_BYTES


def test_gaps_without_order_and_beyond_everything_are_harmless() -> None:
    outbound = sender()
    outbound.append(0, 0, 53, bytes(9 * PAYLOAD_BYTES))
    outbound.transmit(0.0)
    outbound.acknowledged(Sack(FIRST_TSN - 1, 1 << 20, [(9, 2), (0xFFFF, 1), (5, 5), (3, 4)], 0), 0.01)
    outbound.acknowledged(Sack(FIRST_TSN - 1, 1 << 20, [(1, 0xFFFF)] * 200, 0), 0.02)

    assert outbound.flight_bytes == 0
    assert outbound.deadline is None


def test_sending_again_needlessly_teaches_patience() -> None:
    outbound = sender()
    outbound.append(0, 0, 53, bytes(9 * PAYLOAD_BYTES))
    outbound.transmit(0.0)
    outbound.acknowledged(Sack(FIRST_TSN - 1, 1 << 20, [(2, 9)], 0), 0.01)
    assert len(outbound.transmit(0.01)) == 1
    outbound.acknowledged(Sack(FIRST_TSN + 8, 1 << 20, [], 1), 0.02)

    assert outbound._reordering == 2 * LEAST_REORDERING


def sender() -> Outbound:
    return Outbound(Envelope(5000, 5000, 1), FIRST_TSN, 1 << 20, Congestion(1 << 20))


def acknowledges(tsn: int, window: int = 1 << 20) -> Sack:
    return Sack(tsn, window, [], 0)
