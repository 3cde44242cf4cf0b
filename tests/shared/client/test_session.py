"""A session's life, told as events and effects: no clock, no socket."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from shared.client.session import (
    CREDIT_WINDOW,
    ClientSession,
    Drawn,
    Effect,
    Emit,
    Finish,
    PeerLost,
    Received,
    Request,
    Rerouted,
    Send,
)
from shared.errors import Busy, NoRoute, SessionFailed
from shared.identity import PeerId
from shared.protocol import (
    PREFILL_CHUNK,
    PREFILL_WINDOW,
    PREFIX_PAGE,
    Close,
    Consumed,
    Decline,
    Failed,
    Grant,
    Lost,
    Open,
    Opened,
    RouteSpan,
    Step,
    Token,
)

SESSION = "5" * 32
ANN, BOB, EVE = PeerId("a" * 64), PeerId("b" * 64), PeerId("e" * 64)


class Plan:
    """A planner that knows who holds layers 4–8, first come first."""

    def __init__(self, *tails: PeerId) -> None:
        self.tails = list(tails)

    def __call__(self, survivors: Sequence[RouteSpan], avoid: frozenset[PeerId]) -> list[RouteSpan]:
        tail = next((peer for peer in self.tails if peer not in avoid), None)
        if tail is None or ANN in avoid:
            raise NoRoute("no live peer serves layers 4–8 of demo")
        return [RouteSpan(ANN, 0, 4), RouteSpan(tail, 4, 8)]


def session(plan: Plan, prompt: int = 3, new: int = 10) -> ClientSession:
    return ClientSession(SESSION, Request(artefact="0" * 64, prompt=range(prompt), max_new_tokens=new), plan)


def sends(effects: list[Effect], kind: type) -> list[Send]:
    return [effect for effect in effects if isinstance(effect, Send) and isinstance(effect.message, kind)]


def open_all(machine: ClientSession, position: int = 0) -> list[Effect]:
    effects: list[Effect] = []
    for peer in machine.peers:
        effects = machine.handle(Received(peer, Opened(SESSION, machine.epoch, position)))
    return effects


def draw(machine: ClientSession, position: int, token: int = 7, *, stop: bool = False) -> list[Effect]:
    drawn = Token(SESSION, machine.epoch, position, token, stop=stop)
    return machine.handle(Received(machine.peers[-1], drawn))


def steps(effects: list[Effect]) -> list[tuple[int, int, bool, bool]]:
    messages = [send.message for send in sends(effects, Step)]
    return [
        (step.position, step.count, step.sample, step.replay) for step in messages if isinstance(step, Step)
    ]


def test_every_hop_is_opened_before_the_prompt_is_sent() -> None:
    machine = session(Plan(BOB))
    opening = machine.start()
    assert [send.peer for send in sends(opening, Open)] == [ANN, BOB]
    assert machine.handle(Received(ANN, Opened(SESSION, 0, 0))) == []
    effects = machine.handle(Received(BOB, Opened(SESSION, 0, 0)))
    assert steps(effects) == [(0, 3, True, False)]
    [step] = sends(effects, Step)
    assert step.peer == ANN
    assert array("i", step.body).tolist() == [0, 1, 2]


def test_a_long_prompt_goes_in_chunks_and_only_the_last_one_draws() -> None:
    machine = session(Plan(BOB), prompt=PREFILL_CHUNK + 5)
    machine.start()
    assert steps(open_all(machine)) == [(0, PREFILL_CHUNK, False, False), (PREFILL_CHUNK, 5, True, False)]


def test_a_prompt_goes_no_further_than_the_first_hop_has_made_room_for() -> None:
    chunks = PREFILL_WINDOW // PREFILL_CHUNK
    machine = session(Plan(BOB), prompt=PREFILL_WINDOW + 2 * PREFILL_CHUNK + 1)
    machine.start()

    assert len(steps(open_all(machine))) == chunks
    [further] = steps(machine.handle(Received(ANN, Consumed(SESSION, 0, PREFILL_CHUNK))))
    assert further == (PREFILL_WINDOW, PREFILL_CHUNK, False, False)
    assert machine.handle(Received(ANN, Consumed(SESSION, 0, PREFILL_CHUNK))) == []
    assert machine.handle(Received(BOB, Consumed(SESSION, 0, PREFILL_WINDOW))) == []
    assert steps(machine.handle(Received(ANN, Consumed(SESSION, 0, PREFILL_WINDOW)))) == [
        (PREFILL_WINDOW + PREFILL_CHUNK, PREFILL_CHUNK, False, False),
        (PREFILL_WINDOW + 2 * PREFILL_CHUNK, 1, True, False),
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
    assert machine.route == [RouteSpan(ANN, 0, 4, fresh=False), RouteSpan(EVE, 4, 8, fresh=True)]
    assert steps(open_all(machine)) == [(4, 1, True, False)]
    assert draw(machine, 5) == [Emit(Drawn(5, 7, [], stop=False))]


def test_a_lost_first_hop_gets_its_token_ids_replayed_by_the_asker() -> None:
    class AnyFirst(Plan):
        def __call__(self, survivors: Sequence[RouteSpan], avoid: frozenset[PeerId]) -> list[RouteSpan]:
            return [RouteSpan(EVE if ANN in avoid else ANN, 0, 4), RouteSpan(BOB, 4, 8)]

    machine = session(AnyFirst())
    machine.start()
    open_all(machine)
    draw(machine, 3)
    draw(machine, 4)
    machine.handle(PeerLost(ANN))
    assert machine.route == [RouteSpan(EVE, 0, 4, fresh=True), RouteSpan(BOB, 4, 8, fresh=False)]
    assert steps(open_all(machine)) == [(0, 4, False, True), (4, 1, True, False)]


def test_a_loss_before_the_first_token_starts_the_prompt_anew() -> None:
    machine = session(Plan(BOB, EVE))
    machine.start()
    open_all(machine)
    machine.handle(PeerLost(BOB))
    assert all(span.fresh for span in machine.route)
    assert steps(open_all(machine)) == [(0, 3, True, False)]


def test_a_replacement_that_dies_before_its_first_token_counts_as_fresh_again() -> None:
    machine = session(Plan(BOB, EVE, PeerId("d" * 64)))
    machine.start()
    open_all(machine)
    draw(machine, 3)
    machine.handle(PeerLost(BOB))
    open_all(machine)
    machine.handle(PeerLost(EVE))
    assert machine.epoch == 2
    assert [span.fresh for span in machine.route] == [False, True]
    assert steps(open_all(machine)) == [(3, 1, True, False)]


def test_messages_of_an_older_epoch_change_nothing() -> None:
    machine = session(Plan(BOB, EVE))
    machine.start()
    open_all(machine)
    draw(machine, 3)
    machine.handle(PeerLost(BOB))
    stale = Token(SESSION, 0, 4, 9)
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


def test_the_prompt_begins_behind_what_every_hop_has_kept() -> None:
    machine = named()
    machine.start()
    machine.handle(Received(ANN, Opened(SESSION, 0, 192)))
    effects = machine.handle(Received(BOB, Opened(SESSION, 0, 128)))
    assert steps(effects) == [(128, 72, True, False)]


def test_without_a_part_at_every_hop_the_prompt_begins_at_its_beginning() -> None:
    machine = named()
    machine.start()
    machine.handle(Received(ANN, Opened(SESSION, 0, 192)))
    assert steps(machine.handle(Received(BOB, Opened(SESSION, 0, 0)))) == [(0, 200, True, False)]


def test_however_much_was_kept_the_last_token_is_computed_anew() -> None:
    machine = named()
    machine.start()
    assert steps(open_all(machine, position=1 << 20)) == [(199, 1, True, False)]


def test_a_loss_in_mid_answer_is_replayed_from_the_beginning_whatever_the_new_hop_kept() -> None:
    machine = named()
    machine.start()
    open_all(machine, position=64)
    draw(machine, 200)
    machine.handle(Received(ANN, Lost(SESSION, 0, BOB)))
    assert steps(open_all(machine, position=128)) == [(200, 1, True, False)]

    machine = named()
    machine.start()
    open_all(machine)
    assert machine.route[1].peer == BOB
    machine.handle(PeerLost(BOB))
    effects = open_all(machine, position=128)
    assert steps(effects) == [(128, 72, True, False)], "nothing was drawn yet: all hops are fresh"


def test_nothing_is_to_be_kept_of_a_session_that_failed() -> None:
    machine = named()
    machine.start()
    effects = machine.handle(Received(ANN, Failed(SESSION, 0, "out of memory")))
    closing = [send.message for send in sends(effects, Close)]
    assert [message.pages for message in closing if isinstance(message, Close)] == [[], []]
