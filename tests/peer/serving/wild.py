"""Messages that the wire allows and that nobody honest would send: right types, any contents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from shared.protocol import (
    Bias,
    Close,
    Consumed,
    Decline,
    Failed,
    Fetch,
    Files,
    Grant,
    Hop,
    Likelihood,
    Load,
    Lost,
    Open,
    Opened,
    Probe,
    Renew,
    RouteSpan,
    Sampling,
    Scored,
    Step,
    Tee,
    Tensor,
    Token,
)
from shared.tensors import ITEM_BYTES
from tests.peer.serving.parties import HIDDEN, LAYERS, VOCABULARY


def wild_messages(
    sessions: Sequence[str], peers: Sequence[str], artefact: str
) -> st.SearchStrategy[tuple[Any, bytes]]:
    """Messages with their bodies, about these sessions and peers; the first peer is who gets them."""
    session = st.sampled_from(sessions)
    peer = st.sampled_from(peers)
    epoch = st.integers(0, 3) | st.just(1 << 53)
    position = st.integers(0, 50) | st.sampled_from([0, 512, 1 << 20])
    layer = st.integers(0, LAYERS) | st.just(10_000)
    token = st.integers(0, VOCABULARY - 1) | st.just((1 << 31) - 1)
    hops = st.lists(
        st.builds(Hop, peer, layer, layer, st.just(0.0), st.just(0.0), st.just("local")), max_size=3
    )
    pages = st.lists(st.sampled_from(["a" * 32, "b" * 32]), max_size=3)
    sampling = st.builds(
        Sampling,
        temperature=st.sampled_from([0.0, 0.01, 1.0, 100.0]),
        top_k=st.integers(0, 1 << 40),
        top_p=st.floats(0.001, 1),
        seed=st.integers(-(1 << 63), (1 << 63) - 1),
        repetition_penalty=st.floats(0.01, 100),
        logit_bias=st.lists(st.builds(Bias, token, st.floats(-100, 100)), max_size=2),
        grammar=st.sampled_from(["", "", "start: /a+/", "start: nothing"]),
        likelihoods=st.none() | st.integers(0, 20),
        prompt_likelihoods=st.booleans(),
    )
    here = st.just(RouteSpan(peers[0], 0, LAYERS))
    anywhere = st.builds(RouteSpan, peer, layer, layer)
    opened = st.builds(
        Open,
        session=session,
        epoch=epoch,
        artefact=st.sampled_from([artefact, "b" * 64]) | st.just(artefact),
        route=st.lists(here, min_size=1, max_size=1)
        | st.tuples(
            st.just(RouteSpan(peers[0], 0, 3)), st.builds(RouteSpan, peer, st.just(3), st.just(LAYERS))
        ).map(list)
        | st.lists(here | anywhere, min_size=1, max_size=3),
        index=st.integers(0, 2) | st.just(0),
        max_tokens=position,
        prompt_length=position,
        credit=position,
        sampling=sampling,
        stop_tokens=st.lists(token, max_size=2),
        history=st.lists(token, max_size=4),
        pages=pages,
        standby=st.booleans(),
    ).map(lambda message: (message, b""))
    others = st.one_of(
        st.builds(Opened, session, epoch, position),
        st.builds(Decline, session, epoch, st.just("busy"), st.just("no")),
        st.builds(Failed, session, epoch, st.just("no")),
        st.builds(Token, session, epoch, position, token, hops, st.booleans()),
        st.builds(Scored, session, epoch, position, st.just([Likelihood(1, -0.5)])),
        st.builds(Grant, session, epoch, position),
        st.builds(Renew, st.lists(session, max_size=3)),
        st.builds(Close, session, pages),
        st.builds(Lost, session, epoch, peer),
        st.builds(Tee, session, epoch, peer, position),
        st.builds(Consumed, session, epoch, position),
        st.builds(Probe, st.integers(0, 9), position),
        st.builds(
            Load,
            request=st.integers(0, 9),
            sessions=st.just(0),
            wait_ms=st.just(0.0),
            kv_tokens_free=st.just(0),
            kv_tokens=st.just(0),
        ),
        st.builds(Fetch, st.integers(0, 9), st.just("b" * 64)),
        st.builds(Files, st.integers(0, 9), st.just([]), st.just([])),
    )
    return st.one_of(opened, _steps(session, epoch, position, hops), st.tuples(others, st.binary(max_size=9)))


@st.composite
def _steps(
    draw: st.DrawFn,
    session: st.SearchStrategy[str],
    epoch: st.SearchStrategy[int],
    position: st.SearchStrategy[int],
    hops: st.SearchStrategy[list[Hop]],
) -> tuple[Step, bytes]:
    count = draw(st.integers(1, 5))
    shape = draw(st.sampled_from([[count], [count, HIDDEN], [count, 1], [count, 0], [1 << 20, 1 << 31]]))
    tensor = Tensor(draw(st.sampled_from(["int32", "float32", "bfloat16"])), shape)
    size = math.prod(shape) * ITEM_BYTES[tensor.dtype]
    body = (
        draw(st.sampled_from([b"\x01\0\0\0", b"\xff\xff\xff\xff", b"\0"])) * size if size < 1 << 16 else b""
    )
    asked = Step(
        session=draw(session),
        epoch=draw(epoch),
        position=draw(position),
        count=count,
        tensor=tensor,
        sample=draw(st.booleans()),
        held=draw(st.lists(position, max_size=4)),
        hops=draw(hops),
    )
    return asked, body[: draw(st.sampled_from([size, size, size, 3]))]
