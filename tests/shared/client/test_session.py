"""A session's life, told as events and effects: no clock, no socket."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from itertools import zip_longest

import pytest

from shared.client.session import (
    CLOSE,
    CREDIT_WINDOW,
    WORTH_A_STANDBY,
    ClientSession,
    Drawn,
    Effect,
    Emit,
    Finish,
    Leaving,
    PeerLost,
    Received,
    Request,
    Rerouted,
    Send,
)
from shared.client.standbys import Standbys
from shared.errors import Busy, NoRoute, ProtocolError, SessionFailed
from shared.framing import Priority
from shared.identity import PeerId
from shared.protocol import (
    PREFILL_CHUNK,
    PREFILL_WINDOW,
    PREFIX_PAGE,
    TEE_ROWS,
    TEE_WINDOW,
    Close,
    Consumed,
    Decline,
    Failed,
    Grant,
    Likelihood,
    Locate,
    Lost,
    Open,
    Opened,
    Renew,
    RouteSpan,
    Sampling,
    Scored,
    Step,
    Tee,
    Token,
)

SESSION = "5" * 32
ANN, BOB, EVE = PeerId("a" * 64), PeerId("b" * 64), PeerId("e" * 64)


class Plan:
    """A planner that knows who holds layers 4–8, first come first."""

    def __init__(self, *tails: PeerId) -> None:
        self.tails = list(tails)

    def __call__(
        self,
        survivors: Sequence[RouteSpan],
        avoid: frozenset[PeerId],
        held: Mapping[PeerId, int],
        replay: int,
    ) -> list[RouteSpan]:
        self.held = dict(held)
        self.replay = replay
        tail = next((peer for peer in self.tails if peer not in avoid), None)
        if tail is None or ANN in avoid:
            raise NoRoute("no live peer serves layers 4–8 of demo")
        return [RouteSpan(ANN, 0, 4), RouteSpan(tail, 4, 8)]


def session(plan: Plan, prompt: int = 3, new: int = 10) -> ClientSession:
    return ClientSession(SESSION, Request(artefact="0" * 64, prompt=range(prompt), max_new_tokens=new), plan)


def sends(effects: list[Effect], kind: type) -> list[Send]:
    return [effect for effect in effects if isinstance(effect, Send) and isinstance(effect.message, kind)]


def open_all(machine: ClientSession, *positions: int) -> list[Effect]:
    """Every hop answers; each holds so many positions, none unless told."""
    effects: list[Effect] = []
    for peer, position in zip_longest(machine.peers, positions, fillvalue=0):
        assert isinstance(peer, str)
        effects = machine.handle(Received(PeerId(peer), Opened(SESSION, machine.epoch, position)))
    return effects


def draw(machine: ClientSession, position: int, token: int = 7, *, stop: bool = False) -> list[Effect]:
    drawn = Token(SESSION, machine.epoch, position, token, stop=stop)
    return machine.handle(Received(machine.peers[-1], drawn))


def steps(effects: list[Effect]) -> list[tuple[int, int, bool]]:
    """Position, count and whether it draws, of each step."""
    messages = [send.message for send in sends(effects, Step)]
    return [(step.position, step.count, step.sample) for step in messages if isinstance(step, Step)]


def held(effects: list[Effect]) -> list[list[int]]:
    """What each step tells of the hops."""
    messages = [send.message for send in sends(effects, Step)]
    return [step.held for step in messages if isinstance(step, Step)]


def test_every_hop_is_opened_before_the_prompt_is_sent() -> None:
    machine = session(Plan(BOB))
    opening = machine.start()
    assert [send.peer for send in sends(opening, Open)] == [ANN, BOB]
    assert machine.handle(Received(ANN, Opened(SESSION, 0, 0))) == []
    effects = machine.handle(Received(BOB, Opened(SESSION, 0, 0)))
    assert steps(effects) == [(0, 3, True)]
    [step] = sends(effects, Step)
    assert step.peer == ANN
    assert array("i", step.body).tolist() == [0, 1, 2]


def test_a_long_prompt_goes_in_chunks_and_only_the_last_one_draws() -> None:
    machine = session(Plan(BOB), prompt=PREFILL_CHUNK + 5)
    machine.start()
    assert steps(open_all(machine)) == [(0, PREFILL_CHUNK, False), (PREFILL_CHUNK, 5, True)]


def test_a_prompt_goes_no_further_than_the_first_hop_has_made_room_for() -> None:
    chunks = PREFILL_WINDOW // PREFILL_CHUNK
    machine = session(Plan(BOB), prompt=PREFILL_WINDOW + 2 * PREFILL_CHUNK + 1)
    machine.start()

    assert len(steps(open_all(machine))) == chunks
    [further] = steps(machine.handle(Received(ANN, Consumed(SESSION, 0, PREFILL_CHUNK))))
    assert further == (PREFILL_WINDOW, PREFILL_CHUNK, False)
    assert machine.handle(Received(ANN, Consumed(SESSION, 0, PREFILL_CHUNK))) == []
    assert machine.handle(Received(BOB, Consumed(SESSION, 0, PREFILL_WINDOW))) == []
    assert steps(machine.handle(Received(ANN, Consumed(SESSION, 0, PREFILL_WINDOW)))) == [
        (PREFILL_WINDOW + PREFILL_CHUNK, PREFILL_CHUNK, False),
        (PREFILL_WINDOW + 2 * PREFILL_CHUNK, 1, True),
    ]


def test_tokens_come_out_in_order_until_the_limit() -> None:
    machine = session(Plan(BOB), new=2)
    machine.start()
    open_all(machine)
    assert draw(machine, 3) == [Emit(Drawn(3, 7, [], stop=False))]
    last = draw(machine, 4)
    assert [send.peer for send in sends(last, Close)] == [ANN, BOB]
    assert last[-1] == Finish(None)
    assert draw(machine, 5) == []


def test_a_stop_token_ends_the_answer() -> None:
    machine = session(Plan(BOB))
    machine.start()
    open_all(machine)
    assert draw(machine, 3, stop=True)[-1] == Finish(None)


def test_credit_is_granted_ahead_of_the_ring_and_never_past_the_limit() -> None:
    machine = session(Plan(BOB), new=CREDIT_WINDOW + 10)
    opened = sends(machine.start(), Open)[0].message
    assert isinstance(opened, Open)
    assert opened.credit == 3 + CREDIT_WINDOW
    open_all(machine)
    granted = [
        send.message.credit
        for position in range(3, 3 + CREDIT_WINDOW)
        for send in sends(draw(machine, position), Grant)
        if isinstance(send.message, Grant)
    ]
    assert granted == sorted(granted)
    assert granted[-1] == 3 + CREDIT_WINDOW + 10


def test_a_lost_hop_is_replaced_and_the_last_token_is_fed_again() -> None:
    machine = session(Plan(BOB, EVE))
    machine.start()
    open_all(machine)
    draw(machine, 3)
    draw(machine, 4)

    effects = machine.handle(PeerLost(BOB))

    [rerouted] = [effect.event for effect in effects if isinstance(effect, Emit)]
    assert isinstance(rerouted, Rerouted)
    assert (rerouted.lost, rerouted.lost_span) == (BOB, (4, 8))
    assert machine.epoch == 1
    assert machine.route == [RouteSpan(ANN, 0, 4), RouteSpan(EVE, 4, 8)]
    effects = open_all(machine, 6, 0)
    assert steps(effects) == [(4, 1, True)]
    assert held(effects) == [[4, 0]]
    assert Emit(Drawn(5, 7, [], stop=False)) in draw(machine, 5)


def test_a_lost_first_hop_gets_its_token_ids_replayed_by_the_asker() -> None:
    class AnyFirst(Plan):
        def __call__(
            self,
            survivors: Sequence[RouteSpan],
            avoid: frozenset[PeerId],
            held: Mapping[PeerId, int],
            replay: int,
        ) -> list[RouteSpan]:
            return [RouteSpan(EVE if ANN in avoid else ANN, 0, 4), RouteSpan(BOB, 4, 8)]

    machine = session(AnyFirst())
    machine.start()
    open_all(machine)
    draw(machine, 3)
    draw(machine, 4)
    machine.handle(PeerLost(ANN))
    assert machine.route == [RouteSpan(EVE, 0, 4), RouteSpan(BOB, 4, 8)]
    effects = open_all(machine, 0, 4)
    assert steps(effects) == [(0, 5, True)]
    assert held(effects) == [[0, 4]]


def test_a_loss_during_the_prompt_costs_only_what_the_lost_hop_held() -> None:
    machine = session(Plan(BOB, EVE), prompt=3 * PREFILL_CHUNK)
    machine.start()
    open_all(machine)
    machine.handle(PeerLost(BOB))
    effects = open_all(machine, 2 * PREFILL_CHUNK, 0)
    assert steps(effects) == [(2 * PREFILL_CHUNK, PREFILL_CHUNK, True)]
    assert held(effects) == [[2 * PREFILL_CHUNK, 0]]


def test_a_replacement_that_dies_during_its_replay_is_replaced() -> None:
    machine = session(Plan(BOB, EVE, PeerId("d" * 64)))
    machine.start()
    open_all(machine)
    draw(machine, 3)
    machine.handle(PeerLost(BOB))
    open_all(machine)
    machine.handle(PeerLost(EVE))
    assert machine.epoch == 2
    assert machine.peers == [ANN, PeerId("d" * 64)]
    effects = open_all(machine, 4, 0)
    assert steps(effects) == [(3, 1, True)]
    assert held(effects) == [[3, 0]]


def test_a_peer_that_the_route_left_may_go_once_the_new_route_has_drawn_a_token() -> None:
    machine = session(Plan(BOB, EVE))
    machine.start()
    open_all(machine)
    draw(machine, 3)
    assert sends(machine.handle(PeerLost(BOB)), Close) == []
    open_all(machine, 4, 0)
    assert [send.peer for send in sends(draw(machine, 4), Close)] == [BOB]
    assert sends(draw(machine, 5), Close) == []


def before(machine: ClientSession, position: int, token: int = 7) -> list[Effect]:
    """A token of the epoch before, from BOB."""
    return machine.handle(Received(BOB, Token(SESSION, machine.epoch - 1, position, token)))


def drawn(effects: list[Effect]) -> list[int]:
    """The positions of the tokens that the asker gets."""
    events = [effect.event for effect in effects if isinstance(effect, Emit)]
    return [event.position for event in events if isinstance(event, Drawn)]


def test_the_route_before_may_answer_until_the_new_one_does_and_each_token_comes_once() -> None:
    machine = session(Plan(BOB, EVE))
    machine.start()
    open_all(machine)
    draw(machine, 3)
    machine.handle(PeerLost(BOB))

    assert drawn(before(machine, 4)) == [4]
    effects = open_all(machine, 4, 0)
    assert steps(effects) == [(4, 1, True)]
    assert held(effects) == [[4, 0]]
    assert drawn(before(machine, 5)) == [5]
    assert drawn(before(machine, 7)) == [], "one is missing: the new route draws it"
    assert drawn(draw(machine, 5)) == [], "it was there already"
    assert drawn(before(machine, 6)) == [], "the new route has taken over"
    assert drawn(draw(machine, 6)) == [6]


def test_what_was_shown_counts_when_the_new_route_draws_another_token() -> None:
    machine = session(Plan(BOB, EVE))
    machine.start()
    open_all(machine)
    draw(machine, 3)
    machine.handle(PeerLost(BOB))
    open_all(machine, 4, 4)
    before(machine, 4, token=7)
    before(machine, 5, token=7)

    effects = draw(machine, 4, token=9)

    assert machine.epoch == 2
    assert [send.peer for send in sends(effects, Open)] == [ANN, EVE]
    effects = open_all(machine, 6, 6)
    assert steps(effects) == [(4, 2, True)], "the other token has no place in any cache"
    assert held(effects) == [[4, 4]]
    assert drawn(draw(machine, 6)) == [6]


def test_with_penalties_only_one_route_at_a_time_answers() -> None:
    sampling = Sampling(repetition_penalty=1.2)
    request = Request(artefact="0" * 64, prompt=range(3), max_new_tokens=10, sampling=sampling)
    machine = ClientSession(SESSION, request, Plan(BOB, EVE))
    machine.start()
    open_all(machine)
    draw(machine, 3)
    [*_, opened] = [send.message for send in sends(machine.handle(PeerLost(BOB)), Open)]
    assert isinstance(opened, Open)
    assert opened.history == [0, 1, 2, 7]
    assert drawn(before(machine, 4)) == []


def test_messages_of_an_older_epoch_change_nothing() -> None:
    machine = session(Plan(BOB, EVE))
    machine.start()
    open_all(machine)
    draw(machine, 3)
    machine.handle(PeerLost(BOB))
    open_all(machine)
    draw(machine, 4)
    stale = Token(SESSION, 0, 5, 9)
    assert machine.handle(Received(BOB, stale)) == []
    assert machine.handle(Received(ANN, Failed(SESSION, 0, "late"))) == []
    assert machine.handle(Received(ANN, Opened(SESSION, 0, 0))) == []


def test_with_no_replacement_the_asker_hears_which_layers_nobody_serves() -> None:
    machine = session(Plan(BOB))
    machine.start()
    open_all(machine)
    draw(machine, 3)
    machine.handle(PeerLost(BOB))  # still announced: perhaps only a link broke, so it gets one more try
    effects = machine.handle(PeerLost(BOB))
    finish = effects[-1]
    assert isinstance(finish, Finish)
    assert isinstance(finish.error, NoRoute)
    assert str(finish.error) == "no live peer serves layers 4–8 of demo"


def decline(machine: ClientSession, peer: PeerId) -> list[Effect]:
    return machine.handle(Received(peer, Decline(SESSION, machine.epoch, "busy", "full", 2.0)))


def test_a_busy_hop_is_passed_by_and_a_busy_swarm_says_when_to_retry() -> None:
    machine = session(Plan(BOB, EVE))
    machine.start()
    decline(machine, BOB)
    assert machine.peers == [ANN, EVE]
    *closes, finish = decline(machine, EVE)
    assert closes == [Send(ANN, Close(SESSION)), Send(EVE, Close(SESSION))], "nobody is asked twice at once"
    assert isinstance(finish, Finish)
    assert isinstance(finish.error, Busy)
    assert finish.error.retry_after_s == 2.0


def test_a_hop_that_was_full_may_take_over_later() -> None:
    machine = session(Plan(BOB, EVE))
    machine.start()
    decline(machine, BOB)
    open_all(machine)
    draw(machine, 3)
    machine.handle(PeerLost(EVE))
    assert machine.peers == [ANN, BOB]


def test_an_error_of_a_hop_surfaces_at_once() -> None:
    machine = session(Plan(BOB, EVE))
    machine.start()
    open_all(machine)
    finish = machine.handle(Received(BOB, Failed(SESSION, 0, "the logits are not numbers")))[-1]
    assert isinstance(finish, Finish)
    assert isinstance(finish.error, SessionFailed)
    assert "the logits are not numbers" in str(finish.error)


def test_cancelling_closes_every_hop_once() -> None:
    machine = session(Plan(BOB))
    machine.start()
    open_all(machine)
    assert [send.peer for send in sends(machine.cancel(), Close)] == [ANN, BOB]
    assert machine.cancel() == []


def test_only_the_last_hop_draws_and_only_the_route_is_heard() -> None:
    machine = session(Plan(BOB))
    machine.start()
    open_all(machine)
    token = Token(SESSION, 0, 3, 7)

    assert machine.handle(Received(ANN, token)) == []
    assert machine.handle(Received(EVE, token)) == []
    assert machine.handle(Received(EVE, Failed(SESSION, 0, "I say so"))) == []
    assert machine.handle(Received(EVE, Lost(SESSION, 0, BOB))) == []
    assert machine.handle(Received(BOB, token)) == [Emit(Drawn(3, 7, [], stop=False))]


# ---------------------------------------------------------------- sessions that begin alike


def named(prompt: int = 200) -> ClientSession:
    """One that names each page by how many tokens it ends behind."""

    def names(tokens: Sequence[int]) -> list[str]:
        return [f"{end:032x}" for end in range(PREFIX_PAGE, len(tokens) + 1, PREFIX_PAGE)]

    request = Request(artefact="0" * 64, prompt=range(prompt), max_new_tokens=10)
    return ClientSession(SESSION, request, Plan(BOB, EVE), names)


PAGES = [f"{end:032x}" for end in (64, 128, 192)]


def test_open_and_close_name_the_tokens_page_by_page() -> None:
    machine = named(prompt=190)
    opening = [send.message for send in sends(machine.start(), Open)]
    assert [message.pages for message in opening if isinstance(message, Open)] == [PAGES[:2]] * 2
    open_all(machine)
    draw(machine, 190)
    draw(machine, 191)

    closing = [send.message for send in sends(machine.cancel(), Close)]
    assert [message.pages for message in closing if isinstance(message, Close)] == [PAGES] * 2


def test_the_prompt_begins_behind_what_the_first_hop_has_kept() -> None:
    machine = named()
    machine.start()
    machine.handle(Received(ANN, Opened(SESSION, 0, 192)))
    effects = machine.handle(Received(BOB, Opened(SESSION, 0, 128)))
    assert steps(effects) == [(192, 8, True)]
    assert held(effects) == [[192, 128]]


def test_however_much_was_kept_the_last_token_is_computed_anew() -> None:
    machine = named()
    machine.start()
    assert steps(open_all(machine, 1 << 20, 1 << 20)) == [(199, 1, True)]


def test_nothing_is_to_be_kept_of_a_session_that_failed() -> None:
    machine = named()
    machine.start()
    effects = machine.handle(Received(ANN, Failed(SESSION, 0, "out of memory")))
    closing = [send.message for send in sends(effects, Close)]
    assert [message.pages for message in closing if isinstance(message, Close)] == [[], []]


# ---------------------------------------------------------------- standbys


ZOE, YVES = PeerId("f" * 64), PeerId("c" * 64)


def followed(*spares: PeerId, prompt: int = 40, tails: Sequence[PeerId] = (BOB, EVE)) -> ClientSession:
    """A session of which the first token has come, with these peers for any layers, first come first."""

    def spare(entry: RouteSpan, avoid: frozenset[PeerId]) -> PeerId | None:
        return next((peer for peer in spares if peer not in avoid), None)

    request = Request(artefact="0" * 64, prompt=range(prompt), max_new_tokens=100)
    machine = ClientSession(SESSION, request, Plan(*tails), spare=spare)
    machine.start()
    open_all(machine)
    return machine


def opens(effects: list[Effect]) -> list[tuple[PeerId, int, int, bool]]:
    """Who is asked, in which epoch, for which entry, and whether to stand by."""
    messages = [(send.peer, send.message) for send in sends(effects, Open)]
    return [(peer, each.epoch, each.index, each.standby) for peer, each in messages if isinstance(each, Open)]


def ready(machine: ClientSession, peer: PeerId, position: int = 0) -> list[Effect]:
    return machine.handle(Received(peer, Opened(SESSION, machine.epoch, position)))


def test_after_the_first_token_every_hop_gets_a_standby() -> None:
    machine = followed(ZOE, YVES)
    effects = draw(machine, 40)
    assert opens(effects) == [(ZOE, 0, 0, True), (YVES, 0, 1, True)]
    routes = [send.message.route for send in sends(effects, Open) if isinstance(send.message, Open)]
    assert routes == [
        [RouteSpan(ZOE, 0, 4), RouteSpan(BOB, 4, 8)],
        [RouteSpan(ANN, 0, 4), RouteSpan(YVES, 4, 8)],
    ]
    assert opens(draw(machine, 41)) == []


def test_the_asker_feeds_the_first_standby_and_a_hop_feeds_the_next() -> None:
    machine = followed(ZOE, YVES)
    draw(machine, 40)
    effects = ready(machine, ZOE)
    assert [(send.peer, send.lane) for send in sends(effects, Step)] == [(ZOE, Priority.BACKGROUND)]
    assert steps(effects) == [(0, 41, False)]
    assert ready(machine, YVES, 12) == [Send(ANN, Tee(SESSION, 0, YVES, 12))]
    later = [step for position in range(41, 41 + TEE_ROWS) for step in steps(draw(machine, position))]
    assert later == [(41, TEE_ROWS, False)]


def test_the_first_standby_is_sent_no_more_than_it_takes() -> None:
    machine = followed(ZOE, prompt=2 * TEE_WINDOW)
    draw(machine, 2 * TEE_WINDOW)
    first = steps(ready(machine, ZOE))
    assert first == [(0, PREFILL_CHUNK, False), (PREFILL_CHUNK, PREFILL_CHUNK, False)]
    effects = machine.handle(Received(ZOE, Consumed(SESSION, 0, PREFILL_CHUNK)))
    assert steps(effects) == [(TEE_WINDOW, PREFILL_CHUNK, False)]


def test_a_standby_takes_the_place_of_a_lost_hop_and_tells_what_it_holds() -> None:
    machine = followed(ZOE, YVES)
    draw(machine, 40)
    ready(machine, ZOE)
    ready(machine, YVES, 32)

    effects = machine.handle(PeerLost(BOB))

    [event] = [effect.event for effect in effects if isinstance(effect, Emit)]
    route = [RouteSpan(ANN, 0, 4), RouteSpan(YVES, 4, 8)]
    assert event == Rerouted(BOB, (4, 8), route, "lost", stood_by=True)
    assert opens(effects) == [(ANN, 1, 0, False), (YVES, 1, 1, False)]
    effects = open_all(machine, 41, 32)
    assert steps(effects) == [(40, 1, True)]
    assert held(effects) == [[40, 32]]
    # The other one follows the new epoch once that has shown that it works.
    assert opens(draw(machine, 41)) == [(ZOE, 1, 0, True)]


@pytest.mark.parametrize("heir", [EVE, YVES])
def test_of_a_standby_that_lags_far_behind_the_planner_decides(heir: PeerId) -> None:
    machine = followed(ZOE, YVES, tails=[BOB, heir])
    draw(machine, 40)
    ready(machine, YVES, 20)

    effects = machine.handle(PeerLost(BOB))

    assert machine._plan.held == {YVES: 20}  # type: ignore[attr-defined]
    [event] = [effect.event for effect in effects if isinstance(effect, Emit)]
    assert isinstance(event, Rerouted)
    assert (machine.peers, event.stood_by) == ([ANN, heir], heir == YVES)


def test_a_standby_that_lags_is_better_than_nobody() -> None:
    machine = followed(ZOE, YVES, tails=[BOB])
    draw(machine, 40)
    ready(machine, YVES)
    machine.handle(PeerLost(BOB))
    assert machine.peers == [ANN, YVES]


def test_a_standby_that_has_not_answered_is_no_better_than_any_other() -> None:
    machine = followed(ZOE, YVES)
    draw(machine, 40)
    machine.handle(PeerLost(BOB))
    assert machine.peers == [ANN, EVE]


def test_a_standby_that_is_lost_or_has_no_room_is_replaced_in_silence() -> None:
    third = PeerId("d" * 64)
    machine = followed(ZOE, YVES, third)
    draw(machine, 40)
    effects = machine.handle(Received(ZOE, Decline(SESSION, 0, "busy", "full", 2.0)))
    assert opens(effects) == [(third, 0, 0, True)]
    ready(machine, YVES)
    effects = machine.handle(Received(ANN, Lost(SESSION, 0, YVES)))
    assert [send.peer for send in sends(effects, Close)] == [YVES]
    assert machine.standbys == []
    assert not any(isinstance(effect, Emit) for effect in effects)
    assert machine.epoch == 0


def draw_until(machine: ClientSession, end: int) -> list[Effect]:
    return [effect for position in range(len(machine.tokens), end) for effect in draw(machine, position)]


def test_a_standby_that_gets_no_closer_is_exchanged_for_another_one() -> None:
    third = PeerId("d" * 64)
    machine = followed(ZOE, YVES, third)
    draw(machine, 40)
    ready(machine, YVES)
    looks = [draw_until(machine, end) for end in (95, 96, 160)]
    # At 64 it was looked at for the first time.
    assert [opens(effects) for effects in looks[:2]] == [[], [(third, 0, 1, True)]]
    assert [send.peer for send in sends(looks[1], Close)] == [YVES]
    assert opens(looks[2]) == []


def test_a_standby_that_lags_and_comes_closer_may_go_on_and_so_may_the_only_one() -> None:
    machine = followed(ZOE, YVES, PeerId("d" * 64), prompt=200)
    draw(machine, 200)
    ready(machine, YVES)
    for end, position in ((224, 64), (256, 128), (288, 192)):
        assert opens(draw_until(machine, end)) == []
        machine.handle(Received(YVES, Consumed(SESSION, 0, position)))

    machine = followed(YVES, prompt=200)
    draw(machine, 200)
    ready(machine, YVES)
    assert opens(draw_until(machine, 290)) == []


def test_what_hops_compute_first_after_a_loss_is_told_until_a_token_comes() -> None:
    machine = followed(ZOE, YVES)
    assert machine.replaying == {ANN: 40, BOB: 40}
    draw(machine, 40)
    ready(machine, YVES, 32)
    assert machine.replaying == {}
    machine.handle(PeerLost(BOB))
    assert machine.replaying == {ANN: 0, YVES: 9}
    open_all(machine, 41, 16)
    assert machine.replaying == {ANN: 0, YVES: 25}
    draw(machine, 41)
    assert machine.replaying == {}
    machine.cancel()
    assert machine.replaying == {}


def test_the_planner_hears_how_much_somebody_new_has_to_compute() -> None:
    machine = followed(ZOE, YVES)
    assert machine._plan.replay == 0  # type: ignore[attr-defined]
    draw_until(machine, 50)
    machine.handle(PeerLost(BOB))
    assert machine._plan.replay == 50  # type: ignore[attr-defined]


def test_in_the_end_standbys_are_closed_too() -> None:
    machine = followed(ZOE, YVES)
    draw(machine, 40)
    ready(machine, ZOE)
    assert [send.peer for send in sends(machine.renew(), Renew)][:2] == [ANN, BOB]
    assert {send.peer for send in sends(machine.renew(), Renew)} == {ANN, BOB, ZOE, YVES}
    assert {send.peer for send in sends(machine.cancel(), Close)} == {ANN, BOB, ZOE, YVES}


def test_for_a_few_tokens_nobody_is_asked_to_follow() -> None:
    request = Request(artefact="0" * 64, prompt=range(3), max_new_tokens=WORTH_A_STANDBY)
    machine = ClientSession(SESSION, request, Plan(BOB), spare=lambda entry, avoid: ZOE)
    machine.start()
    open_all(machine)
    assert opens(draw(machine, 3)) == []


# ---------------------------------------------------------------- what the last hop must know


def asking(plan: Plan, sampling: Sampling) -> ClientSession:
    request = Request(artefact="0" * 64, prompt=range(3), max_new_tokens=10, sampling=sampling)
    return ClientSession(SESSION, request, plan, lambda tokens: ["f" * 32])


def opened(effects: list[Effect]) -> list[Open]:
    return [send.message for send in sends(effects, Open) if isinstance(send.message, Open)]


def test_only_the_last_hop_learns_how_tokens_are_drawn() -> None:
    sampling = Sampling(temperature=0.5, grammar="start: /[ab]+/")
    first, last = opened(asking(Plan(BOB), sampling).start())
    assert (first.sampling, last.sampling) == (Sampling(), sampling)


def test_a_last_hop_that_takes_over_learns_what_was_drawn_and_the_prompt_only_if_it_must() -> None:
    for sampling, expected in (
        (Sampling(), []),
        (Sampling(grammar="start: /[ab]+/"), [7]),
        (Sampling(presence_penalty=1.0), [7]),
        (Sampling(repetition_penalty=1.5), [0, 1, 2, 7]),
    ):
        machine = asking(Plan(BOB, EVE), sampling)
        machine.start()
        open_all(machine)
        draw(machine, 3)
        first, last = opened(machine.handle(PeerLost(BOB)))
        assert (first.history, last.history) == ([], expected)


SCORING = Sampling(likelihoods=1, prompt_likelihoods=True)
SCORES = [Likelihood(1, -0.5), Likelihood(2, -1.5)]


def test_how_likely_the_prompt_was_comes_with_the_first_token() -> None:
    machine = asking(Plan(BOB), SCORING)
    assert [each.pages for each in opened(machine.start())] == [[], []]
    open_all(machine)
    for position, score in enumerate(SCORES, 1):
        assert machine.handle(Received(BOB, Scored(SESSION, 0, position, [score]))) == []
    likely = Likelihood(7, -0.1)
    drawn = machine.handle(Received(BOB, Token(SESSION, 0, 3, 7, likelihood=likely)))
    assert drawn[0] == Emit(Drawn(3, 7, [], False, likely, SCORES))
    assert draw(machine, 4)[0] == Emit(Drawn(4, 7, [], False))


def test_scores_of_a_route_that_was_lost_are_told_once() -> None:
    machine = asking(Plan(BOB, EVE), SCORING)
    machine.start()
    open_all(machine)
    machine.handle(Received(BOB, Scored(SESSION, 0, 1, SCORES[:1])))
    machine.handle(PeerLost(BOB))
    open_all(machine)
    machine.handle(Received(BOB, Scored(SESSION, 0, 2, SCORES[1:])))
    machine.handle(Received(EVE, Scored(SESSION, 1, 1, SCORES)))
    assert Emit(Drawn(3, 7, [], False, None, SCORES)) in draw(machine, 3)


def test_what_was_computed_but_never_scored_is_computed_again() -> None:
    machine = asking(Plan(BOB, BOB), SCORING)
    machine.start()
    open_all(machine)
    machine.handle(Received(BOB, Scored(SESSION, 0, 1, SCORES[:1])))
    machine.handle(PeerLost(ANN))
    effects = open_all(machine, 2, 2)
    assert steps(effects) == [(1, 2, True)]


def test_scores_that_are_missing_or_of_other_tokens_end_the_session() -> None:
    for scored in (
        Scored(SESSION, 0, 1, SCORES[:1]),
        Scored(SESSION, 0, 0, SCORES),
        Scored(SESSION, 0, 2, SCORES),
        Scored(SESSION, 0, 1, [Likelihood(9, -0.5)]),
    ):
        machine = asking(Plan(BOB), SCORING)
        machine.start()
        open_all(machine)
        effects = machine.handle(Received(BOB, scored)) or draw(machine, 3)
        finish = effects[-1]
        assert isinstance(finish, Finish) and isinstance(finish.error, ProtocolError)


# ---------------------------------------------------------------- hops that leave, are late, or come back


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def timed(clock: Clock, *, is_there: bool = True, tails: Sequence[PeerId] = (BOB, EVE)) -> ClientSession:
    """A session of ten tokens, one each 0.2 s, with a standby for both hops that holds all."""
    request = Request(artefact="0" * 64, prompt=range(40), max_new_tokens=400)
    machine = ClientSession(
        SESSION,
        request,
        Plan(*tails),
        spare=lambda entry, avoid: next((peer for peer in (ZOE, YVES) if peer not in avoid), None),
        is_there=lambda peer: is_there,
        clock=clock,
    )
    machine.start()
    open_all(machine)
    draw(machine, 40)
    ready(machine, ZOE)
    ready(machine, YVES)
    for position in range(41, 50):
        clock.now += 0.2
        draw(machine, position)
    return machine


def follow(machine: ClientSession, peer: PeerId, position: int) -> list[Effect]:
    return machine.handle(Received(peer, Consumed(SESSION, machine.epoch, position)))


def located(machine: ClientSession, **positions: int) -> list[Effect]:
    """Hops answer how far they are."""
    effects: list[Effect] = []
    names = {"ann": ANN, "bob": BOB}
    for name, position in positions.items():
        effects += machine.handle(Received(names[name], Consumed(SESSION, machine.epoch, position)))
    return effects


def reroutes(effects: list[Effect]) -> list[Rerouted]:
    events = [effect.event for effect in effects if isinstance(effect, Emit)]
    return [event for event in events if isinstance(event, Rerouted)]


def test_a_late_step_makes_the_asker_look_for_the_late_hop() -> None:
    clock = Clock()
    machine = timed(clock)
    assert machine.wake_at is not None
    assert abs(machine.wake_at - clock.now - 0.4) < 1e-6
    assert machine.wake() == []
    clock.now += 0.41
    assert machine.wake() == [Send(ANN, Locate(SESSION)), Send(BOB, Locate(SESSION))]


def test_the_standby_of_the_late_hop_is_asked_too_and_the_late_one_follows() -> None:
    clock = Clock()
    machine = timed(clock)
    follow(machine, YVES, 48)
    clock.now += 0.41
    machine.wake()

    effects = located(machine, ann=50, bob=49)

    route = [RouteSpan(ANN, 0, 4), RouteSpan(YVES, 4, 8)]
    assert reroutes(effects) == [Rerouted(BOB, (4, 8), route, "late", stood_by=True)]
    assert sends(effects, Close) == []
    open_all(machine, 50, 48)
    # The late answer may still be the first.
    assert drawn(before(machine, 50)) == [50]
    effects = draw(machine, 50)
    assert sends(effects, Close) == []
    effects = draw(machine, 51)
    assert (BOB, 1, 1, True) in opens(effects)
    assert reroutes(machine.handle(PeerLost(BOB))) == [], "nobody misses one that only follows"


def test_a_hop_that_does_not_say_how_far_it_is_is_the_late_one() -> None:
    clock = Clock()
    machine = timed(clock)
    follow(machine, YVES, 48)
    clock.now += 0.41
    machine.wake()
    assert located(machine, ann=50) == []
    clock.now += 0.3
    assert [event.lost for event in reroutes(machine.wake())] == [BOB]


def test_the_first_hop_that_is_behind_is_the_late_one() -> None:
    clock = Clock()
    machine = timed(clock)
    follow(machine, ZOE, 48)
    clock.now += 0.41
    machine.wake()
    assert [event.lost for event in reroutes(located(machine, ann=49, bob=49))] == [ANN]


def test_nothing_is_done_about_a_late_step_when_all_have_done_theirs_or_nobody_followed() -> None:
    clock = Clock()
    machine = timed(clock)
    follow(machine, YVES, 48)
    clock.now += 0.41
    machine.wake()
    assert located(machine, ann=50, bob=50) == []

    machine = timed(clock)
    machine._standbys.find(YVES).position = -CLOSE  # type: ignore[union-attr]
    clock.now += 0.41
    machine.wake()
    assert located(machine, ann=50, bob=49) == []


def test_a_token_ends_the_search() -> None:
    clock = Clock()
    machine = timed(clock)
    follow(machine, YVES, 48)
    clock.now += 0.41
    machine.wake()
    draw(machine, 50)
    assert located(machine, ann=50, bob=49) == []


def test_hedges_are_few_and_fewer_when_they_were_in_vain() -> None:
    clock = Clock()
    machine = timed(clock)
    follow(machine, YVES, 48)
    clock.now += 0.41
    machine.wake()
    located(machine, ann=50, bob=49)
    open_all(machine, 50, 48)
    before(machine, 50)
    draw(machine, 50)
    position, hedges = 51, 0
    while position < 300:
        clock.now += 0.2
        draw(machine, position)
        position += 1
        hedges += machine.wake_at is not None and machine.wake_at - clock.now < 0.75
    assert hedges == 0, "0.8 s, not 0.4"


def test_a_peer_that_leaves_hands_over_once_somebody_follows_closely() -> None:
    clock = Clock()
    machine = timed(clock)
    machine._standbys.find(YVES).position = -CLOSE  # type: ignore[union-attr]
    assert machine.handle(Leaving(BOB)) == []

    effects = follow(machine, YVES, 48)

    [event] = reroutes(effects)
    assert (event.lost, event.reason, event.stood_by) == (BOB, "leaving", True)
    assert sends(effects, Close) == [], "it goes on until the new route has shown that it works"
    open_all(machine, 50, 48)
    assert drawn(before(machine, 50)) == [50]
    assert [send.peer for send in sends(draw(machine, 50), Close)] == [BOB]


def test_when_a_peer_leaves_that_nobody_follows_one_is_found_first() -> None:
    spares: list[PeerId] = []
    request = Request(artefact="0" * 64, prompt=range(140), max_new_tokens=100)

    def spare(entry: RouteSpan, avoid: frozenset[PeerId]) -> PeerId | None:
        return next((peer for peer in spares if peer not in avoid), None)

    machine = ClientSession(SESSION, request, Plan(BOB, EVE), spare=spare)
    machine.start()
    open_all(machine)
    draw(machine, 140)
    spares.append(ZOE)
    assert opens(machine.handle(Leaving(ANN))) == [(ZOE, 0, 0, True)]
    assert steps(ready(machine, ZOE)) == [(0, 141, False)]
    assert [event.reason for event in reroutes(follow(machine, ZOE, 141))] == ["leaving"]


def test_a_standby_that_leaves_is_replaced() -> None:
    machine = timed(Clock())
    third = PeerId("d" * 64)
    machine._spare = lambda entry, avoid: third
    effects = machine.handle(Leaving(YVES))
    assert [send.peer for send in sends(effects, Close)] == [YVES]
    assert opens(effects) == [(third, 0, 1, True)]
    assert reroutes(effects) == []


def test_a_hop_whose_channel_broke_keeps_what_it_holds() -> None:
    machine = session(Plan(BOB, EVE))
    machine.start()
    open_all(machine)
    draw(machine, 3)

    effects = machine.handle(PeerLost(BOB, alive=True))

    assert machine.peers == [ANN, BOB]
    assert [event.lost for event in reroutes(effects)] == [BOB]
    effects = open_all(machine, 4, 4)
    assert steps(effects) == [(3, 1, True)]
    assert held(effects) == [[3, 3]]
    machine.handle(PeerLost(BOB, alive=True))
    assert machine.peers == [ANN, EVE], "twice without a token between is too much"


def test_a_hop_that_another_cannot_reach_is_tried_again_before_it_is_replaced() -> None:
    machine = session(Plan(BOB, EVE))
    machine.start()
    open_all(machine)
    draw(machine, 3)
    machine.handle(Received(ANN, Lost(SESSION, 0, BOB)))
    assert machine.peers == [ANN, BOB]
    machine.handle(Received(ANN, Lost(SESSION, 1, BOB)))
    assert machine.peers == [ANN, EVE]


def test_a_hop_that_has_left_the_swarm_is_not_tried_again() -> None:
    machine = timed(Clock(), is_there=False)
    machine._standbys = Standbys()
    machine.handle(PeerLost(BOB, alive=True))
    assert machine.peers == [ANN, EVE]


def test_hops_that_do_not_answer_for_a_while_are_tried_again_and_not_for_ever() -> None:
    clock = Clock()
    machine = timed(clock, tails=[BOB])
    machine._standbys = Standbys()
    tries = 0
    effects: list[Effect] = []
    while not any(isinstance(effect, Finish) for effect in effects):
        clock.now += 5
        tries += 1
        effects = machine.handle(PeerLost(BOB))
    assert 4 <= tries <= 7
    finish = effects[-1]
    assert isinstance(finish, Finish)
    assert isinstance(finish.error, NoRoute)
