"""Trainings wait when chats had to wait for them too long."""

from __future__ import annotations

import pytest

from peer.serving.courtesy import ALONE_MS, BESIDE_CHATS_MS, SAVED_MS, SHARE, Courtesy


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_without_chats_pieces_are_long_and_begin_at_once() -> None:
    courtesy = Courtesy(lambda: 1, Clock())

    assert courtesy.piece_ms == ALONE_MS
    assert courtesy.wait_s == 0


def test_only_steps_that_met_a_piece_count() -> None:
    clock = Clock()
    courtesy = Courtesy(lambda: 2, clock)
    courtesy.stepped()
    assert courtesy.piece_ms == BESIDE_CHATS_MS
    courtesy.began()
    clock.now += 0.5
    courtesy.ended()
    assert courtesy.wait_s == 0

    courtesy.began()
    courtesy.stepped()
    clock.now += 0.2
    courtesy.ended()

    # 200 ms were lost and so many were saved; on two hops each gives half of its share.
    assert courtesy.wait_s == pytest.approx((200 - SAVED_MS) / (1000 * SHARE / 2))


def test_who_was_delayed_often_is_left_alone_until_the_share_has_grown() -> None:
    clock = Clock()
    courtesy = Courtesy(lambda: 1, clock)
    waited_ms, passed_ms = 0.0, 0.0

    for _ in range(2000):
        if courtesy.wait_s == 0:
            courtesy.began()
            courtesy.stepped()
            clock.now += 0.015
            courtesy.ended()
            waited_ms += 15
        else:
            courtesy.stepped()
        clock.now += 0.03
        passed_ms = clock.now * 1000

    assert waited_ms <= SHARE * passed_ms + SAVED_MS + 15
