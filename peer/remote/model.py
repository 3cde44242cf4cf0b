"""A Hugging Face model whose layers live in a swarm.

model = RemoteModel.from_swarm("meta-llama/Llama-3.1-8B", relays=["https://relay.example"])
model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=20)

Embedding, last norm and head are the family's own, on this machine; each layer is a gate to peers.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from peer.model.anatomy import split_arguments
from peer.model.artefact import artefact_id
from peer.model.checkpoint import Checkpoint, open_checkpoint
from peer.model.errors import BadInputs
from peer.model.extras import Pair
from peer.remote.background_loop import BackgroundLoop
from peer.remote.carried import Carried, Loan
from peer.remote.chain import Chain
from peer.remote.ends import Ends, Matrix, Task, load_ends
from peer.remote.layers import RemoteLayers, Swarm
from peer.remote.lora import Lora
from peer.remote.prompts import load_prompt
from peer.remote.session import RemoteSession
from peer.serving.passes import PROMPT
from shared.client.directory import ServedModel
from shared.client.swarm_client import SwarmClient
from shared.errors import NoRoute
from shared.identity import Identity, PeerId

APPEAR_S = 30.0
"""How long to wait until relays show all layers."""
SPARE = 1
"""Positions of a session beyond what `generate` says it will hold."""


@dataclass
class _Call:
    """The forward pass that runs now."""

    carried: Carried = field(default_factory=Carried)
    leaves: dict[str, torch.Tensor] = field(default_factory=dict)
    session: RemoteSession | None = None
    each: bool = False
    behind: list[torch.Tensor] = field(default_factory=list)


class RemoteModel:
    """Mixed into a family's own class by `from_swarm`; the result is a PreTrainedModel of that family.

    What learns is put on it: `lora`, `prompt` (virtual tokens before the text, [count, width]),
    `deep_prompts` ([layers, count, width], added at the entry of every layer), modules between `layers`, or a
    classifier's head. `hosted` names an adapter that peers host.
    """

    lora: Lora | None
    prompt: nn.Parameter | None
    deep_prompts: nn.Parameter | None
    hosted: str
    layers: RemoteLayers
    matrices: dict[str, Matrix]
    source: str

    @staticmethod
    def from_swarm(
        model_id: str,
        relays: Sequence[str],
        *,
        task: Task = "text",
        labels: int = 2,
        dtype: torch.dtype | None = None,
        direct: bool = True,
        identity: Identity | None = None,
    ) -> Any:  # noqa: ANN401 - a family's class, which is known only now
        """Join the swarm, and load the model's ends from a directory or the hub.

        Raises NoRoute when its layers are not served. `close()` it when done.
        """
        checkpoint = open_checkpoint(model_id)
        loop = BackgroundLoop()
        client = loop.run(_joined(identity or Identity.generate(), relays, direct=direct))
        try:
            served = loop.run(_served(client, checkpoint))
            numbers = served.peers[0].dtype.partition("/")[0]
            wire: torch.dtype = getattr(torch, numbers)
            ends = load_ends(checkpoint, dtype or wire, task, labels)
            return _made(ends, Swarm(loop, Chain(client, served.artefact, wire)), client, checkpoint.name)
        except BaseException:
            loop.run(client.__aexit__(None, None, None))
            loop.stop()
            raise

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.source}, layers {self.layers.start}:{self.layers.end} in a swarm)"
        )

    # ------------------------------------------------------------ using it

    def session(self, room: int) -> RemoteSession:
        """Keys and values for one batch of up to `room` positions, for `step`, `generate` or `forward`."""
        unseen = 0 if self.prompt is None else len(self.prompt)
        return RemoteSession(self.layers, room + unseen, unseen)

    def new_lora(self, *, rank: int = 8, alpha: float = 16.0, targets: Sequence[str] | None = None) -> Lora:
        """Put LoRA into the layers; its matrices are parameters of this model from now on."""
        options: dict[str, Any] = {} if targets is None else {"targets": targets}
        self.lora = Lora(self.matrices, rank=rank, alpha=alpha, **options)
        return self.lora

    def load_lora(self, directory: str | Path) -> Lora:
        """Put LoRA of PEFT's files into the layers."""
        self.lora = Lora.load(self.matrices, Path(directory))
        return self.lora

    def new_prompt(self, count: int) -> nn.Parameter:
        """Virtual tokens before every text, which begin as those of random words."""
        table = cast(Any, self).get_input_embeddings()
        rows = torch.randint(table.weight.shape[0], (count,))
        with torch.no_grad():
            began = table(rows).detach().float()
        self.prompt = nn.Parameter(began)
        return self.prompt

    def load_prompt(self, directory: str | Path) -> nn.Parameter:
        """Virtual tokens of PEFT's files."""
        self.prompt = nn.Parameter(load_prompt(Path(directory), self._width))
        return self.prompt

    def peer_name(self, peer: PeerId) -> str:
        """What a peer calls itself."""
        return self._client.directory.name(peer)

    def new_deep_prompts(self, count: int) -> nn.Parameter:
        """Something to add at the entry of every layer to the first `count` positions, zeros at first."""
        self.deep_prompts = nn.Parameter(torch.zeros(len(self.layers), count, self._width))
        return self.deep_prompts

    def host(self, adapter: str) -> None:
        """Use an adapter that peers host, by its name or id; "" for none. Raises NoRoute."""
        announced = {one.name: one.id for peer in self._client.directory.live() for one in peer.adapters}
        if adapter and adapter not in announced and adapter not in announced.values():
            raise NoRoute(f"no live peer hosts an adapter named {adapter}")
        self.hosted = announced.get(adapter, adapter)

    def close(self) -> None:
        """Leave the swarm."""
        loop = self.layers.swarm.loop
        loop.run(self._client.__aexit__(None, None, None))
        loop.stop()

    # ------------------------------------------------------------ what a family's own forward pass meets

    @contextmanager
    def _calling(self, call: _Call) -> Iterator[None]:
        before, self._now = self._now, call
        if call.session is not None:
            call.session.inside = True
        try:
            yield
        finally:
            self._now = before
            if call.session is not None:
                call.session.inside = False

    def _gate(self, index: int, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """What stands in the place of layer `index`: the first does the work of all of them."""
        arrived, _ = split_arguments(args, kwargs)
        call = self._now
        given = arrived
        if index == 0:
            given = self._through(call, arrived)
        if call.each:
            given = call.behind[index]
        return (given,) if self._tuples else given

    def _through(self, call: _Call, states: torch.Tensor) -> torch.Tensor:
        if call.session is not None:
            call.behind = call.session.step(states, call.carried, each=call.each)
        elif call.each:
            call.behind = self.layers.each(states, call.carried)
        else:
            return self.layers.run(states, call.carried, call.leaves)
        return call.behind[-1]

    def _carried(
        self, mask: torch.Tensor | None, positions: torch.Tensor | None
    ) -> tuple[Carried, dict[str, torch.Tensor]]:
        """What goes to the peers beside hidden states, and which of it learns."""
        leaves: dict[str, torch.Tensor] = {}
        prompts: dict[int, torch.Tensor] = {}
        if self.deep_prompts is not None:
            for layer, prompt in enumerate(self.deep_prompts):
                leaves[f"{PROMPT}{layer}"] = prompt
                prompts[layer] = prompt.detach()
        pairs: dict[str, Pair] = {}
        loans: dict[tuple[int, int], Loan | None] = {}
        if self.lora is not None:
            made = self.lora.pairs()
            for path, (down, up) in made.items():
                leaves |= {f"{path}.A": down, f"{path}.B": up}
                pairs[path] = down.detach(), up.detach()
            # The same loans as long as no matrix changed.
            versions = self.lora, self.lora.versions()
            if self._loans is None or self._loans[0] != versions:
                self._loans = versions, {}
            loans = self._loans[1]
        layer_of = {path: self.matrices[path].layer for path in pairs}
        carried = Carried(mask, positions, prompts, pairs, layer_of, self.hosted, loans)
        learning = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        return carried, learning if torch.is_grad_enabled() else {}

    _now: _Call
    _loans: tuple[Any, dict[tuple[int, int], Loan | None]] | None
    _client: SwarmClient
    _tuples: bool
    _width: int


def _made(ends: Ends, swarm: Swarm, client: SwarmClient, source: str) -> Any:  # noqa: ANN401
    """The family's model as a RemoteModel."""
    model: Any = ends.model
    model.__class__ = _remote_class(cast(Any, type(model)))
    model.layers = RemoteLayers(swarm, 0, len(ends.layers))
    model.matrices = ends.matrices
    model.source = source
    model.hosted = ""
    model.lora = model.prompt = model.deep_prompts = None
    model._client = client
    model._tuples = ends.tuples
    model._width = int(model.config.hidden_size)
    model._now = _Call()
    model._loans = None
    for index, layer in enumerate(ends.layers):
        layer.forward = partial(model._gate, index)
    return model


@functools.cache
def _remote_class(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A family's class with our `forward` and `generate` around its own."""
    own_forward: Any = kind.forward
    signature = inspect.signature(own_forward)
    catch_all = next(
        (name for name, one in signature.parameters.items() if one.kind is one.VAR_KEYWORD), None
    )

    @functools.wraps(own_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        told = signature.bind(self, *args, **kwargs).arguments
        told |= told.pop(catch_all, {}) if catch_all else {}
        told.pop("self", None)
        return _forward(self, own_forward, signature, told)

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        self._opened = []
        try:
            return cast(Any, kind).generate(self, *args, **kwargs)
        finally:
            for session in self._opened:
                session.close()

    def prepare_cache(
        self: Any,  # noqa: ANN401
        generation_config: Any,  # noqa: ANN401
        model_kwargs: dict[str, Any],
        generation_mode: Any,  # noqa: ANN401
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            session = model_kwargs["past_key_values"] = self.session(max_cache_length + SPARE)
            self._opened.append(session)

    members: dict[str, Any] = {"forward": forward}
    if hasattr(kind, "generate"):  # a classifier draws no tokens
        generate = functools.wraps(kind.generate)(generate)
        members |= {"generate": generate, "_prepare_cache_for_generation": prepare_cache}
    return type(f"Remote{kind.__name__}", (RemoteModel, kind), members)


def _forward(model: Any, own: Any, signature: inspect.Signature, told: dict[str, Any]) -> Any:  # noqa: ANN401
    session = told.get("past_key_values")
    if session is not None and not isinstance(session, RemoteSession):
        raise TypeError("past_key_values of a remote model come from its `session`")
    told["use_cache"] = session is not None
    ids, embeds = told.get("input_ids"), told.get("inputs_embeds")
    first = ids if ids is not None else embeds
    if first is None:
        raise ValueError("a forward pass needs input_ids or inputs_embeds")
    batch, count = first.shape[:2]
    unseen = 0
    if model.prompt is not None and (session is None or session.position == 0):
        unseen = len(model.prompt)
    before = 0 if session is None else session.position
    whole = (0 if model.prompt is None else len(model.prompt)) + before + count
    if model.prompt is not None:
        _lengthen(model, told, first, unseen, whole)
    if unseen and session is not None:
        session._length = 0
    mask = told.get("attention_mask")
    if mask is not None and (mask.dim() != 2 or mask.shape[1] != whole):
        raise ValueError(f"attention_mask has to be [batch, {whole}] for a remote model")
    positions = told.get("position_ids")
    usual = torch.arange(whole - count - unseen, whole)
    if positions is not None and torch.equal(positions.cpu(), usual.expand(positions.shape[0], -1)):
        positions = None
    if positions is not None:
        positions = positions.expand(batch, -1)
    asked = told.get("output_hidden_states")
    each = bool(model.config.output_hidden_states if asked is None else asked)
    seen = None if mask is None or bool(mask.all()) else mask
    carried, leaves = model._carried(seen, positions)
    with model._calling(_Call(carried, leaves, session, each)):
        outputs = own(model, **_known(signature, told))
    return _shorten(outputs, unseen, unseen + count)


def _lengthen(model: Any, told: dict[str, Any], first: torch.Tensor, unseen: int, whole: int) -> None:  # noqa: ANN401
    """Virtual tokens go before the text; mask, positions and labels are as long as both."""
    batch = first.shape[0]
    prompt_length = len(model.prompt)
    mask = told.get("attention_mask")
    if mask is None:
        mask = torch.ones(batch, whole - prompt_length, dtype=torch.int64)
    told["attention_mask"] = torch.cat([mask.new_ones(batch, prompt_length), mask], 1)
    if (positions := told.get("position_ids")) is not None:
        shifted = positions + prompt_length
        virtual = torch.arange(unseen).expand(positions.shape[0], -1)
        told["position_ids"] = torch.cat([virtual, shifted], 1) if unseen else shifted
    if not unseen:
        return
    embeds = told.get("inputs_embeds")
    if embeds is None:
        embeds = model.get_input_embeddings()(told["input_ids"])
    told["input_ids"] = None
    told["inputs_embeds"] = torch.cat([model.prompt.to(embeds.dtype).expand(batch, -1, -1), embeds], 1)
    if (labels := told.get("labels")) is not None and labels.dim() == 2:
        told["labels"] = torch.cat([labels.new_full((batch, unseen), -100), labels], 1)


def _shorten(outputs: Any, unseen: int, count: int) -> Any:  # noqa: ANN401
    """Nobody asked for logits or hidden states of virtual tokens."""
    if not unseen:
        return outputs
    logits = getattr(outputs, "logits", None)
    if logits is not None and logits.dim() == 3 and logits.shape[1] == count:
        outputs.logits = logits[:, unseen:]
    if getattr(outputs, "hidden_states", None):
        outputs.hidden_states = tuple(one[:, unseen:] for one in outputs.hidden_states)
    return outputs


def _known(signature: inspect.Signature, told: dict[str, Any]) -> dict[str, Any]:
    """What the family's forward takes."""
    takes_all = any(one.kind is one.VAR_KEYWORD for one in signature.parameters.values())
    return told if takes_all else {name: one for name, one in told.items() if name in signature.parameters}


async def _joined(identity: Identity, relays: Sequence[str], *, direct: bool) -> SwarmClient:
    client = SwarmClient(identity, list(relays), direct=direct)
    await client.__aenter__()
    return client


async def _served(client: SwarmClient, checkpoint: Checkpoint) -> ServedModel:
    """What peers serve of this model: these very weights if they can be told, else what has its name."""
    deadline = time.monotonic() + APPEAR_S
    while True:
        models = [model for model in client.directory.models() if model.name == checkpoint.name]
        covered = [model for model in models if model.covered]
        for model in covered:
            dtype, _, packed = model.peers[0].dtype.partition("/")
            if artefact_id(checkpoint, dtype, packed or None) == model.artefact:
                return model
        if covered:
            raise BadInputs(
                f"the swarm serves other weights by the name {checkpoint.name} than those given here"
            )
        if time.monotonic() > deadline:
            missing = ", ".join(str(gap) for gap in models[0].gaps) if models else "all"
            raise NoRoute(f"no live peer serves layers {missing} of {checkpoint.name}")
        await asyncio.sleep(0.1)
