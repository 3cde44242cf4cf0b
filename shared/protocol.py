"""Every message of the swarm, as typed values, and their JSON. Pure: no sockets, no clocks.

There are three wires, each with one union, so one `match` per reader can be checked to be complete:

- the relay wire, between a participant and a relay (`ToRelay`, `FromRelay`);
- the channel wire, by which two ends of a channel keep it going (`ChannelMessage`);
- the peer wire, which rides in channels and carries sessions (`PeerMessage`), with a tensor body.

docs/protocol.md tells the flows; a test holds its table against this file.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal

import msgspec
import orjson
from msgspec import Meta, Struct

from shared.errors import ProtocolError
from shared.identity import PeerId

VERSION = 1

MAX_CHUNK_BYTES = 64 * 1024
"""No frame on any wire is longer than this, plus its header."""
MAX_RELAY_MESSAGE_BYTES = 96 * 1024
MAX_META_BYTES = 1024 * 1024
MAX_BODY_BYTES = 256 * 1024 * 1024
MAX_CONTEXT = 1 << 20
PREFILL_CHUNK = 256
"""Positions per step of a prompt or a replay: the next hop computes one while this one computes the next."""
PREFILL_WINDOW = 4 * PREFILL_CHUNK
"""Positions that a hop may have been sent beyond those that it has told to be `Consumed`."""

TEE_ROWS = 16
"""Positions of one copy for a standby, at least: it computes them in one pass, and lags behind by no more."""
TEE_WINDOW = 2 * PREFILL_CHUNK
"""Positions that a standby may have been sent beyond those that it has told to be `Consumed`."""
MAX_LIKELIEST = 20
"""Tokens of which a last hop tells how likely they were, beside the one in question."""
MAX_GRAMMAR_LENGTH = 256 * 1024

PREFIX_PAGE = 64
"""Positions of one page: sessions that begin alike share what was computed for them in whole pages."""

Id = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Hex = Annotated[str, Meta(pattern="^[0-9a-f]*$", max_length=256)]
Name = Annotated[str, Meta(max_length=64)]
ModelName = Annotated[str, Meta(min_length=1, max_length=200)]
Text = Annotated[str, Meta(max_length=1000)]
AdapterId = Annotated[str, Meta(pattern="^([0-9a-f]{64})?$")]
"""A hash over the numbers of an adapter; empty for none."""
SessionId = Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
Count = Annotated[int, Meta(ge=0, le=1 << 53)]
Layer = Annotated[int, Meta(ge=0, le=10_000)]
Position = Annotated[int, Meta(ge=0, le=MAX_CONTEXT)]
Logprob = Annotated[float, Meta(ge=-9999, le=0)]
TokenId = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
Seconds = Annotated[float, Meta(ge=0, le=1e12)]
Milliseconds = Annotated[float, Meta(ge=0, le=1e12)]

Pages = Annotated[
    list[Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]], Meta(max_length=MAX_CONTEXT // PREFIX_PAGE)
]
"""A name for each whole page of a text, in order; each covers all tokens up to the page's end."""

Path = Literal["direct", "relayed", "local"]
"""What carried a message: a link between the two, a relay, or no wire at all."""
PeerState = Literal["joining", "serving", "draining", "left"]


# ---------------------------------------------------------------- signed records


class SignedRecord(Struct, frozen=True, gc=False):
    """A JSON text and its signature. The text is kept as it was signed, so nobody has to re-create it."""

    body: Annotated[str, Meta(max_length=8192)]
    signature: Annotated[str, Meta(pattern="^[0-9a-f]{128}$")]


class HostedAdapter(Struct, frozen=True, gc=False):
    """An adapter that a peer holds for everyone."""

    name: Annotated[str, Meta(pattern="^[A-Za-z0-9._-]{1,64}$")]
    id: Id


class Announcement(Struct, frozen=True, kw_only=True, gc=False):
    """What a peer says of itself. The newest valid one per peer wins; `left` withdraws it."""

    peer: Id
    sequence: Count
    issued_at: Seconds
    expires_at: Seconds
    state: PeerState
    name: Name
    model: ModelName
    artefact: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    tokenizer: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    """Hash of the tokenizer files that this peer hands out; see `Fetch`."""
    layer_count: Layer
    start: Layer
    end: Layer
    dtype: Name
    device: Name
    context_length: Position
    kv_tokens_free: Count
    """Positions that still fit in the peer's KV budget, for its whole span."""
    ms_per_layer: Milliseconds | None = None
    """One decode step through one layer, measured by the peer itself; None while unknown."""
    throughput: Annotated[float, Meta(ge=0, le=1e12)] | None = None
    """Positions through one layer in a second, with as many sessions as pay; None while unmeasured."""
    movable: bool = False
    """It chose its layers itself, and takes others when that helps the swarm; not again until anyone joins or
    leaves."""
    sessions: Count = 0
    """Sessions that it serves."""
    wait_ms: Milliseconds = 0.0
    """What a step of one position waits there before it is computed, measured over the last ones."""
    relays: Annotated[list[Annotated[str, Meta(max_length=200)]], Meta(max_length=4)] = []
    adapters: Annotated[list[HostedAdapter], Meta(max_length=8)] = []
    """LoRA that it applies for whoever asks for it."""


class Greeting(Struct, frozen=True, kw_only=True):
    """Half of a channel's handshake: an ephemeral X25519 key bound to both ids by the sender's signature."""

    kind: Literal["offer", "answer"]
    sender: Id
    receiver: Id
    channel: Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
    key: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    issued_at: Seconds
    answers: Annotated[str, Meta(pattern="^([0-9a-f]{64})?$")] = ""
    """In an answer, the SHA-256 of the offer's body."""
    seen: Name = ""
    """Where a relay sees the sender: only neighbours tell each other their addresses at home."""


# ---------------------------------------------------------------- relay wire


class Challenge(Struct, frozen=True, tag="challenge"):
    """The relay's first word: prove that you hold your key by signing this nonce."""

    nonce: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class Login(Struct, frozen=True, tag="login"):
    """Signature in the domain `corolla-login-1` over the nonce's bytes, a zero byte, and the relay's host.

    The host is the one dialled (the Host header), so a relay cannot pass this login on to another one.
    """

    peer: Id
    signature: Annotated[str, Meta(pattern="^[0-9a-f]{128}$")]
    version: int = VERSION


class Welcome(Struct, frozen=True, tag="welcome"):
    """Logged in. `address` is where the relay sees you; STUN answers at its host on two ports, 0 for none."""

    address: Name
    stun_port: Annotated[int, Meta(ge=0, le=65535)]
    second_stun_port: Annotated[int, Meta(ge=0, le=65535)] = 0


class Announce(Struct, frozen=True, tag="announce"):
    """Publish a signed announcement."""

    record: SignedRecord


class Lookup(Struct, frozen=True, tag="lookup"):
    """Ask for the live announcements, of one model or of all; `watch` also asks for every later change."""

    request: Count
    model: ModelName | None = None
    watch: bool = False


class Found(Struct, frozen=True, tag="found"):
    """Live announcements. Answers a lookup in one or more parts; `request` 0 marks a later change."""

    request: Count
    records: list[SignedRecord]
    more: bool = False


class Signal(Struct, frozen=True, tag="signal"):
    """A signed greeting on its way; the relay fills in nothing and reads only `receiver`."""

    receiver: Id
    record: SignedRecord


class Gone(Struct, frozen=True, tag="gone"):
    """A participant you watch or exchange frames with is not connected to this relay (any more)."""

    peer: Id


class Denied(Struct, frozen=True, tag="denied"):
    """The relay understood a message and refuses it; the connection stays unless `fatal`.

    With `peer`, a frame for that participant was dropped, since it reads more slowly than others send. With
    `retry_after_s`, the same may be asked again after that time.
    """

    reason: Text
    fatal: bool = False
    peer: Id | None = None
    retry_after_s: Seconds = 0.0


class Restarting(Struct, frozen=True, tag="restarting"):
    """The relay goes away on purpose; come back after about `retry_after_s`."""

    retry_after_s: Seconds


ToRelay = Login | Announce | Lookup | Signal
FromRelay = Challenge | Welcome | Found | Signal | Gone | Denied | Restarting


# ---------------------------------------------------------------- channel wire


NatKind = Literal["unknown", "open", "cone", "restricted", "symmetric", "blocked"]
"""What the router before a machine does to UDP: hides nothing; gives each socket one public port, open to all
ports of those it wrote to; lets in only answers; uses another port for each destination; stops it all."""


class Describe(Struct, frozen=True, tag="describe", kw_only=True):
    """How to reach me directly: ICE credentials and candidates (RFC 8839), DTLS fingerprint (RFC 8122).

    Both sides send one for each attempt; the dialler counts the attempts. Without candidates: not at all.
    `nat` and `seen`, where the relay sees me, tell when an attempt would be in vain. `packet_bytes` is the
    longest SCTP packet that I read; 0 when only those that are safe everywhere.
    """

    attempt: Count
    ufrag: Name
    password: Name
    fingerprint: Annotated[str, Meta(max_length=200)]
    candidates: Annotated[list[Annotated[str, Meta(max_length=400)]], Meta(max_length=32)]
    nat: NatKind = "unknown"
    seen: Name = ""
    packet_bytes: Count = 0


class Listening(Struct, frozen=True, tag="listening"):
    """Where a socket of mine listens, for you alone: a hello there begins with what `ticket` leads to.

    A later one takes the place of this one. Numbers only: a name would make you ask for it.
    """

    ticket: Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
    addresses: Annotated[list[Annotated[str, Meta(max_length=64)]], Meta(max_length=8)]


class Ping(Struct, frozen=True, tag="ping"):
    """Are you there? Answered on the same link, so its time is that link's round trip.

    On the kind of direct link that `deaf` names I do not hear you any more: leave it, as I did.
    """

    number: Count
    deaf: Literal["data channel", "socket", "relayed"] | None = None


class Pong(Struct, frozen=True, tag="pong"):
    """I am, and here is how far I have come: links keep their order, so this tells which frames got lost."""

    number: Count
    received: Count
    """Every frame up to this one is here."""
    consumed: Count
    """As in `Credit`, should one have been lost."""


class Credit(Struct, frozen=True, tag="credit"):
    """Every frame up to and including `received` was consumed: forget them, and send that much more."""

    received: Count


class Bye(Struct, frozen=True, tag="bye"):
    """I close this channel on purpose."""

    reason: Text = ""


ChannelMessage = Describe | Listening | Ping | Pong | Credit | Bye


# ---------------------------------------------------------------- peer wire


WireDtype = Literal["float32", "float16", "bfloat16", "int32"]


class Tensor(Struct, frozen=True):
    """What the body holds: little-endian numbers, rows first. Checked against the body's length."""

    dtype: WireDtype
    shape: Annotated[list[Annotated[int, Meta(ge=0, le=1 << 31)]], Meta(max_length=3)]


class Bias(Struct, frozen=True):
    """A number that is added to one token's logit."""

    token: TokenId
    add: Annotated[float, Meta(ge=-100, le=100)]


class Likelihood(Struct, frozen=True):
    """How likely a token was after those before it, by the logits alone: a natural logarithm."""

    token: TokenId
    logprob: Logprob
    top: Annotated[list[tuple[TokenId, Logprob]], Meta(max_length=MAX_LIKELIEST)] = []
    """The likeliest tokens there, likeliest first."""


class Sampling(Struct, frozen=True, kw_only=True):
    """How a token is drawn. A draw depends on the logits, (seed, position), and at most the tokens so far."""

    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    """0, or so little that it makes no difference, takes the most likely token."""
    top_k: Annotated[int, Meta(ge=0)] = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] = 0
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-100, le=100)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-100, le=100)] = 0.0
    logit_bias: Annotated[list[Bias], Meta(max_length=1024)] = []
    grammar: Annotated[str, Meta(max_length=MAX_GRAMMAR_LENGTH)] = ""
    """All that is drawn follows it, up to a stop token; in the words of llguidance. None when empty."""
    likelihoods: Annotated[int, Meta(ge=0, le=MAX_LIKELIEST)] | None = None
    """Tell how likely each token was that is drawn, beside so many of the likeliest."""
    prompt_likelihoods: bool = False
    """Tell the same of the tokens of the prompt."""

    @property
    def needs_prompt(self) -> bool:
        """True when the last hop must know the tokens of the prompt, which else only the first hop does."""
        return self.repetition_penalty != 1.0 or self.prompt_likelihoods

    @property
    def needs_history(self) -> bool:
        """True when the last hop must know the tokens drawn so far, also of those before it."""
        penalizes = self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
        return self.needs_prompt or penalizes or bool(self.grammar)


class RouteSpan(Struct, frozen=True):
    """One entry of a route: the layers [start, end) that `peer` computes in a session."""

    peer: Id
    start: Layer
    end: Layer


class Hop(Struct, frozen=True):
    """One span's visit by one token: what happened, with durations only, never clocks."""

    peer: Id
    start: Layer
    end: Layer
    waited_ms: Milliseconds
    """From the arrival of the inputs to the end of their computation, without `computed_ms`."""
    computed_ms: Milliseconds
    """All the time of the forward passes that the inputs were in, other sessions' inputs included."""
    path: Path
    """What carried the inputs here."""
    link_ms: Milliseconds | None = None
    """Half the measured round trip of what carried them; None while unmeasured, or when nothing did."""


class Open(Struct, frozen=True, tag="open", kw_only=True):
    """Reserve KV memory for a session's part of a route, or none of it.

    The same session with a higher epoch prepares a new route: a hop keeps its KV cache as long as its layers
    stay the same. It takes the route with the first step of that epoch, and drops older epochs from then on.
    """

    session: SessionId
    epoch: Count
    artefact: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    route: Annotated[list[RouteSpan], Meta(min_length=1, max_length=512)]
    index: Count
    """Which entry of the route is the receiver's."""
    max_tokens: Position
    """The most positions that the session will ever hold."""
    prompt_length: Position
    credit: Position
    """The ring may produce tokens up to, not including, this position without further credit."""
    sampling: Sampling = Sampling()
    """For the last hop."""
    stop_tokens: Annotated[list[TokenId], Meta(max_length=64)] = []
    history: list[TokenId] = []
    """For the last hop, and only when a draw needs them: the tokens drawn so far.

    When the draw needs the prompt too, it stands before them.
    """
    pages: Pages = []
    """Names of the tokens so far. A hop that is new to the session begins behind such pages of this asker."""
    standby: bool = False
    """The receiver stands by for its entry: it follows by copies when it has time, passes nothing on, draws
    nothing, and gives its memory to any session that wants it. A higher epoch without this makes it a hop."""
    adapter: AdapterId = ""
    """A hosted adapter that changes the layers for this session."""


class Opened(Struct, frozen=True, tag="opened"):
    """The hop is ready. `position` is how many positions of this session its KV cache and its input log hold.

    The asker begins there at the first hop, and tells the others by `held` of the first step.
    """

    session: SessionId
    epoch: Count
    position: Position


class Decline(Struct, frozen=True, tag="decline"):
    """The hop does not serve this session: `busy` may pass, the rest will not."""

    session: SessionId
    epoch: Count
    code: Literal["busy", "artefact", "layers", "context", "draining", "invalid"]
    message: Text
    retry_after_s: Seconds = 0.0


class Step(Struct, frozen=True, tag="step", kw_only=True):
    """Inputs for positions [position, position + count): token ids for the first hop, else hidden states.

    The hop truncates its KV cache to `position`, then appends `count`.
    """

    session: SessionId
    epoch: Count
    position: Position
    count: Annotated[int, Meta(ge=1, le=MAX_CONTEXT)]
    tensor: Tensor
    sample: bool = False
    """The last hop draws the next token after the last position."""
    held: Annotated[list[Position], Meta(max_length=512)] = []
    """In the first step of an epoch: what each hop of the route holds. A hop replays its input log to a next
    hop that holds less than it, and keeps to itself what the next hop holds already."""
    hops: Annotated[list[Hop], Meta(max_length=512)] = []


class Consumed(Struct, frozen=True, tag="consumed"):
    """Prompt or replay steps up to, not including, `position` are done: as many more may come.

    From a hop to whoever feeds it, who may be `PREFILL_WINDOW` positions ahead of this and no more. So a long
    prompt waits where it is, and not in a channel that others' tokens pass through. A standby tells its asker
    too, and may be sent `TEE_WINDOW`.
    """

    session: SessionId
    epoch: Count
    position: Position


class Token(Struct, frozen=True, tag="token"):
    """The token at `position`, from the last hop to the asker and to the first hop, with all its hops."""

    session: SessionId
    epoch: Count
    position: Position
    token: TokenId
    hops: Annotated[list[Hop], Meta(max_length=512)] = []
    stop: bool = False
    """The token is one of the stop tokens: the ring ends here."""
    likelihood: Likelihood | None = None
    """For the asker, when it wants to know."""


class Scored(Struct, frozen=True, tag="scored"):
    """How likely the prompt's tokens from `position` on were, each after those before it.

    From the last hop to the asker, ahead of the first token.
    """

    session: SessionId
    epoch: Count
    position: Position
    likelihoods: Annotated[list[Likelihood], Meta(max_length=PREFILL_WINDOW)]


class Grant(Struct, frozen=True, tag="grant"):
    """From the asker to the first hop: tokens up to, not including, position `credit` may be produced."""

    session: SessionId
    epoch: Count
    credit: Position


class Renew(Struct, frozen=True, tag="renew"):
    """The asker still wants these sessions: their leases start anew."""

    sessions: Annotated[list[SessionId], Meta(max_length=1024)]


class Close(Struct, frozen=True, tag="close"):
    """The session is over: free its KV cache and its input log, or keep what `pages` name for another."""

    session: SessionId
    pages: Pages = []


class Failed(Struct, frozen=True, tag="failed"):
    """A hop met an error of its own; the session cannot go on, and repeating it would not help."""

    session: SessionId
    epoch: Count
    message: Text


class Lost(Struct, frozen=True, tag="lost"):
    """A hop cannot reach the next one, or no longer knows the session (`peer` is then itself)."""

    session: SessionId
    epoch: Count
    peer: Id


class Tee(Struct, frozen=True, tag="tee"):
    """From the asker to a hop: send copies of what the next hop is sent to its standby too.

    From `position` on, as steps of this epoch that are never sampled. Ends with the epoch or the session.
    """

    session: SessionId
    epoch: Count
    peer: Id
    position: Position


class Locate(Struct, frozen=True, tag="locate"):
    """From the asker to each hop when a step is late: how far are you? Answered by `Consumed`."""

    session: SessionId


class Probe(Struct, frozen=True, tag="probe"):
    """Ask a peer how busy it is at this moment: an announcement may be many seconds old."""

    request: Count
    tokens: Position
    """Positions that the session will need which the asker wants to open."""


class Load(Struct, frozen=True, tag="load", kw_only=True):
    """Answers `Probe`: what a session that opened now would meet. Nothing is held for it."""

    request: Count
    sessions: Count
    wait_ms: Milliseconds
    """What a step of one position waits before it is computed."""
    ms_per_layer: Milliseconds | None = None
    kv_tokens_free: Count
    """Positions that fit now; 0 from a peer that takes no new session."""
    kv_tokens: Count
    """Positions that would fit if no other session were here."""
    retry_after_s: Seconds = 0.0
    """When running sessions will have made room for so many positions, as far as known; 0 when it is here."""


class Fetch(Struct, frozen=True, tag="fetch"):
    """Ask a peer for the tokenizer files of the model that it serves."""

    request: Count
    artefact: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class Files(Struct, frozen=True, tag="files"):
    """Answers `Fetch`: names and sizes; the body holds the files one after another."""

    request: Count
    names: Annotated[list[Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,80}$")]], Meta(max_length=16)]
    sizes: Annotated[list[Count], Meta(max_length=16)]


class Part(Struct, frozen=True):
    """One of several tensors of a message; their numbers follow one another in the body."""

    name: Annotated[str, Meta(pattern="^[A-Za-z0-9_.]{1,200}$")]
    tensor: Tensor


Parts = Annotated[list[Part], Meta(max_length=8192)]


class Forward(Struct, frozen=True, tag="forward", kw_only=True):
    """Compute layers [start, end) for the hidden states of a batch, and give what comes out.

    Without `session` nothing is kept of it. With one, keys and values are: the peer truncates them to
    `position`, puts the rows of the batch in the `order` that came, if any, then appends.
    """

    request: Count
    artefact: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    start: Layer
    end: Layer
    parts: Parts
    """`hidden` [batch, count, width]; if needed `mask` [batch, positions so far], `positions` [batch, count],
    `order` [batch], and `prompt.N` [length, width], which is added at the entry of layer N."""
    adapter: AdapterId = ""
    """LoRA to apply: one that the peer announces, or that the asker lent to it."""
    each: bool = False
    """Give the hidden states behind each of the layers, not only those behind the last."""
    session: Annotated[str, Meta(pattern="^([0-9a-f]{32})?$")] = ""
    position: Position = 0
    room: Position = 0
    """The most positions that the session will ever hold."""


class Backward(Struct, frozen=True, tag="backward", kw_only=True):
    """Compute layers [start, end) anew, and give the gradients of what went in.

    Any peer with the layers and the adapter can do it: nothing of the forward pass is needed but its inputs.
    """

    request: Count
    artefact: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    start: Layer
    end: Layer
    parts: Parts
    """As in `Forward`, and `gradient` of what came out [batch, count, width]."""
    adapter: AdapterId = ""
    learns: bool = False
    """The gradients of the adapter are wanted too."""


class Lend(Struct, frozen=True, tag="lend"):
    """Here is an adapter, for the requests of mine that name it. It is kept while they come, no longer."""

    request: Count
    adapter: Id
    parts: Parts
    """`PATH.A` [rank, inputs] and `PATH.B` [outputs, rank] for each matrix of a layer that it changes."""


class Outputs(Struct, frozen=True, tag="outputs"):
    """Answers `Forward`, `Backward` and `Lend`: what came out, as parts with the names of what went in.

    Behind each layer, the parts are named `hidden.N`. Gradients of an adapter are named as its matrices.
    """

    request: Count
    parts: Parts
    computed_ms: Milliseconds = 0.0


class Refusal(Struct, frozen=True, tag="refusal"):
    """The peer does not do what was asked. `invalid` would be so everywhere, the rest is so only here."""

    request: Count
    code: Literal["busy", "lost", "adapter", "artefact", "layers", "draining", "invalid"]
    """`lost`: the session is not known up to that position. `adapter`: lend it first."""
    message: Text
    retry_after_s: Seconds = 0.0


PeerMessage = (
    Open
    | Opened
    | Decline
    | Step
    | Consumed
    | Scored
    | Token
    | Grant
    | Renew
    | Close
    | Failed
    | Lost
    | Tee
    | Locate
    | Probe
    | Load
    | Fetch
    | Files
    | Forward
    | Backward
    | Lend
    | Outputs
    | Refusal
)


# ---------------------------------------------------------------- JSON


def encode(message: Struct) -> bytes:
    """A message as JSON."""
    return orjson.dumps(msgspec.to_builtins(message))


def decode(data: bytes | bytearray | memoryview | str, kind: Any) -> Any:  # noqa: ANN401 - a union is no type
    """JSON as a message of the given struct or union. Raises ProtocolError for anything else."""
    try:
        return _decoder(kind).decode(data)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"a message is not as the protocol says: {error}") from None
    except (msgspec.DecodeError, UnicodeError):
        raise ProtocolError("a message is not valid JSON") from None
    except RecursionError:
        raise ProtocolError("a message is nested too deeply") from None


@cache
def _decoder(kind: Any) -> msgspec.json.Decoder[Any]:  # noqa: ANN401 - a union is no type
    # Kept: working out a union anew for each message takes 11 µs, more than all else we do with a token.
    return msgspec.json.Decoder(kind)


def peer_id(value: str) -> PeerId:
    """A validated `Id` as the type that identities use."""
    return PeerId(value)
