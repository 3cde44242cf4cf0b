"""Layers [start, end) of any family, ready to compute: ids or hidden states in, hidden states or logits out.

The family's own forward pass does the work, so masks, position embeddings and all that is special about a
family stay its own. What is not in the span has no weights and is skipped:

- each layer's entry is a gate. Layers before the ones asked for are passed by; the first one gets the hidden
  states that arrived; after the last one the forward pass is left at once;
- what a family does before its layers (embedding, learned positions, first norm) is played by stand-ins when
  the span does not hold layer 0; what it does after them (last norm, head) is simply never reached.

So one loaded structure serves any run of layers inside the span, and layers keep their own numbers.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import nn
from torch.utils import _pytree as trees
from transformers import PreTrainedModel

from peer.model import allocator, family
from peer.model.anatomy import (
    Anatomy,
    Anything,
    Reached,
    find_layers,
    replace_hidden_states,
    split_arguments,
    stand_in,
    survey,
)
from peer.model.checkpoint import Checkpoint
from peer.model.cuda_graphs import CudaGraphs, Graphs
from peer.model.errors import BadInputs, CacheFull, UnsupportedModel, first_line
from peer.model.extras import NOTHING, Adapter, Extras, matrix_shape
from peer.model.joint import Joining, JointCache, may_join
from peer.model.kv_cache import Buffer, Int8Buffer, KVCache
from peer.model.packing import Joiner, Packer
from peer.model.quantization import Quantization
from peer.model.quantized_cache import QuantizedCache
from peer.model.source import Progress
from peer.model.steps import Steps
from peer.model.unread import Unread

log = logging.getLogger(__name__)

ROUNDED = 0.1
"""How far one session's numbers may lie from the same made in another order, where activations are rounded: a
last digit can change a rounding, and that an expert's choice. Looking at another session changes more."""

RECORDED = 16
"""Sessions of a pass, at most, whose calls of torch are recorded: in wider ones Python takes little time."""


@dataclass
class Visit:
    """The forward pass that runs now: which layers, from which hidden states, for which logits."""

    start: int = 0
    end: int = 0
    arrived: torch.Tensor | None = None
    wanted: slice | list[int] = field(default_factory=lambda: slice(None))
    """The positions whose logits are wanted, as an index of [count]."""
    narrowed: bool = False
    """The head computed only those."""
    extras: Extras = NOTHING
    position: int = 0
    """Of the first of the hidden states, in their text."""
    behind: list[torch.Tensor] | None = None
    """If given: what comes out of each layer goes here, and the model's ends are not reached."""
    brought: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Tensors that layers on other devices asked for, and what was copied there, by their ids."""


@dataclass(frozen=True)
class Row:
    """One session's part of a forward pass: checked inputs [1, count, ...], and the cache they go to."""

    inputs: torch.Tensor
    cache: KVCache
    wanted: int = 1
    """How many of the last positions' logits are wanted, where the model ends."""

    @property
    def count(self) -> int:
        return self.inputs.shape[1]


class Span:
    """Layers [start, end) of a model, and the ends where they touch them.

    They lie on one device, or runs of layers on several: a pass begins and ends on the first, where the
    model's ends are. One forward pass runs at a time; a second caller waits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        start: int,
        end: int,
        dtype: torch.dtype,
        device: torch.device,
        layer_devices: Mapping[int, torch.device] = MappingProxyType({}),
    ) -> None:
        self.start = start
        self.end = end
        self.dtype = dtype
        self.device = device
        self.layer_devices = {layer: layer_devices.get(layer, device) for layer in range(start, end)}
        """Where each layer lies."""
        self._spread = any(place != device for place in self.layer_devices.values())
        """Whether they lie on several devices."""
        self.layer_count = int(model.config.num_hidden_layers)
        self.hidden_size = int(model.config.hidden_size)
        self.vocab_size = int(model.config.vocab_size)
        self.context_length: int | None = getattr(model.config, "max_position_embeddings", None)
        """Positions that the model was made for, if its config tells."""
        self.bytes_read = 0
        """Bytes of tensors that loading this span read."""
        self._model = model
        self._visit = Visit()
        self._running = threading.RLock()
        self._matrices: dict[str, tuple[int, int]] = {}
        """Inputs and outputs of what an adapter may change."""
        self._adaptable: set[str] = set()
        """Modules that have asked the adapter of a pass before."""
        self._windows = family.attention_windows(model.config)
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._token_bytes: list[int] = []
        self._joining: Joining | None = None
        self._apart: dict[str, torch.device] = {}
        """The paths of the layers, and where they lie."""
        # A graph is of one device.
        self.record_steps(CudaGraphs(device) if device.type == "cuda" and not self._spread else None)
        self._buffer: type[Buffer] = Buffer

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        start: int,
        end: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        layer_devices: Mapping[int, torch.device] = MappingProxyType({}),
        quantization: Quantization | None = None,
        quantized: QuantizedCache | None = None,
        int8_kv: bool = False,
        progress: Progress | None = None,
    ) -> Span:
        """Read layers [start, end), and the ends when they touch them. Nothing else is read.

        All lie on `device` but for what `layer_devices` says.

        Weights are as exact as `dtype` unless a `quantization` packs them; `quantized` keeps such on disk.
        With `int8_kv` sessions keep their keys and values in eight bits.
        `progress` hears of the bytes fetched from the hub, if any, and then of the bytes read. Raises
        UnsupportedModel when the family cannot be cut into spans, before any weight is fetched.
        """
        if not 0 <= start < end <= checkpoint.layer_count:
            raise ValueError(
                f"layers {start}:{end} are not in a model with layers 0:{checkpoint.layer_count}"
            )
        model = family.skeleton(checkpoint.config, dtype)
        family.check_rollback(checkpoint.config, model)
        span = cls(model, start, end, dtype, torch.device(device), layer_devices)
        span._buffer = Int8Buffer if int8_kv else Buffer
        span._cut()
        read_before = checkpoint.bytes_read
        with allocator.loading():
            span._fill(checkpoint, quantization, quantized, progress)
        span.bytes_read = checkpoint.bytes_read - read_before
        span._token_bytes = span._try_out()
        span._try_joining(rounds=quantization is not None and quantization.rounds)
        return span

    @property
    def joins_sessions(self) -> bool:
        """True when one forward pass can serve several sessions; else they are computed one by one."""
        return self._joining is not None

    @property
    def recorded_steps(self) -> int:
        """Kinds of steps that are run from recordings by now."""
        return self._steps.trusted

    def record_steps(self, graphs: Graphs | None, clock: Callable[[], float] = time.perf_counter) -> None:
        """Forget all recordings; from now on, capture new ones in such graphs, or in none."""
        self._steps = Steps(self.device, partial(_tensors, self._model), self._same, graphs, clock)

    @property
    def weights_bytes(self) -> int:
        """Memory that the weights take; tied ones count once."""
        return sum(weight.nbytes for weight in {*self._model.parameters(), *self._model.buffers()})

    def kv_bytes_per_token(self, start: int, end: int) -> int:
        """Memory that one position of one session takes in layers [start, end)."""
        self._check_range(start, end)
        return sum(self._token_bytes[start - self.start : end - self.start])

    def new_cache(self, start: int, end: int, capacity: int) -> KVCache:
        """A cache for a session on layers [start, end) of this span. Memory is taken as positions come."""
        self._check_range(start, end)
        return KVCache(start, end, capacity, self._windows, buffer=self._buffer)

    @torch.inference_mode()
    def forward(
        self, inputs: torch.Tensor, cache: KVCache, position: int, *, all_logits: bool = False
    ) -> torch.Tensor:
        """Truncate `cache` to `position`, then append the inputs and compute the cache's layers for them.

        `inputs` are token ids [batch, count] when the cache's layers begin at 0, else hidden states
        [batch, count, hidden]. Gives hidden states [batch, count, hidden] in the span's dtype; or, when the
        cache's layers end where the model ends, float32 logits [batch, vocab] of the last position,
        [batch, count, vocab] with `all_logits`.
        """
        inputs = self._checked(inputs, cache)
        self._make_room(inputs, cache, position)
        result = self._alone(inputs, cache, slice(None) if all_logits else slice(-1, None))
        return result if all_logits or cache.end < self.layer_count else result[:, 0]

    def row(self, inputs: torch.Tensor, cache: KVCache, position: int, *, wanted: int = 1) -> Row:
        """Check one session's inputs [1, count, ...] and truncate its cache to `position`.

        For `forward_rows`, which comes next. Raises BadInputs or CacheFull: one session's mistake, which must
        not become the others'.
        """
        inputs = self._checked(inputs, cache)
        self._make_room(inputs, cache, position)
        return Row(inputs, cache, wanted)

    @torch.inference_mode()
    def forward_rows(self, rows: Sequence[Row]) -> list[torch.Tensor | None]:
        """Compute rows of several sessions, all through the same layers, in one pass if the family allows it.

        Gives for each row hidden states [1, count, hidden]; or, where the model ends, float32 logits
        [1, wanted, vocab] of its last positions, None for a row that wants none.

        A single position is computed in the same way alone and in company: with packed weights it gets the
        same bits.
        """
        if self._joining is not None and (
            len(rows) > 1 or (rows[0].count == 1 and not self._joining.gathers)
        ):
            return self._together(rows, self._joining)
        return [self._one_row(row) for row in rows]

    def differentiable(self, hidden_states: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """Layers [start, end) without a cache, such that the gradient flows back to `hidden_states`.

        Hidden states [batch, count, hidden] in and out; where the model ends, float32 logits
        [batch, count, vocab]. The weights get no gradient. Layer 0 takes what the embedding gives.
        """
        self._check_range(start, end)
        with self._running, torch.enable_grad():
            return self._run(hidden_states, Visit(start, end, hidden_states), None)

    def states(
        self,
        hidden_states: torch.Tensor,
        start: int,
        end: int,
        extras: Extras = NOTHING,
        cache: KVCache | None = None,
    ) -> list[torch.Tensor]:
        """The hidden states behind each of the layers [start, end), also where the model ends.

        With a cache, whose layers these are, they are appended to it. Without, and where gradients are
        enabled, they flow back to whatever asks for one: the hidden states, deep prompts, the adapter.
        """
        self._check_range(start, end)
        position = cache.length if cache is not None else 0
        batch, count = hidden_states.shape[:2]
        visit = Visit(start, end, hidden_states, extras=extras, position=position, behind=[])
        with self._running:
            self._run(hidden_states, visit, cache)
        if cache is not None:
            cache.commit(batch, count)
        assert visit.behind is not None
        return visit.behind

    def alone(self) -> threading.RLock:
        """While this is held no other thread computes with this span."""
        return self._running

    def prepare(self, adapter: Adapter) -> Adapter:
        """The adapter where the span computes. Raises BadInputs when it does not fit these layers."""
        for path, (down, up) in adapter.pairs.items():
            inputs, outputs = self._matrices.get(path, (0, 0))
            if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1]:
                raise BadInputs(f"the adapter's matrices for {path} have no common rank")
            if (down.shape[1], up.shape[0]) != (inputs, outputs):
                raise BadInputs(f"the adapter does not fit {path} of layers {self.start}:{self.end}")
        with self._running:
            for path in adapter.pairs.keys() - self._adaptable:
                self._model.get_submodule(path).register_forward_hook(partial(self._adapt, path))
                self._adaptable.add(path)
        places = {path: self._device_of(path) for path in adapter.pairs}
        return Adapter(
            {path: (a.to(places[path]), b.to(places[path])) for path, (a, b) in adapter.pairs.items()}
        )

    def adapter_part(self, adapter: Adapter) -> Adapter:
        """What of an adapter of the whole model is for the layers of this span."""
        return Adapter({path: pair for path, pair in adapter.pairs.items() if path in self._matrices})

    def _adapt(
        self, path: str, _: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor:
        adapter = self._visit.extras.adapter
        return output if adapter is None else adapter.apply(path, args[0], output)

    def _one_row(self, row: Row) -> torch.Tensor | None:
        at_the_end = row.cache.end == self.layer_count
        wanted = _places(list(range(row.count - row.wanted, row.count)))
        output = self._alone(row.inputs, row.cache, wanted)
        return None if at_the_end and not row.wanted else output

    def _make_room(self, inputs: torch.Tensor, cache: KVCache, position: int) -> None:
        cache.truncate(position)
        batch, count = inputs.shape[:2]
        cache.check_room(batch, count)
        if self.context_length and position + count > self.context_length:
            raise CacheFull(f"{position + count} positions are more than this model's {self.context_length}")

    def _alone(self, inputs: torch.Tensor, cache: KVCache, wanted: slice | list[int]) -> torch.Tensor:
        batch, count = inputs.shape[:2]
        with self._running:
            result = self._run(inputs, _visit(inputs, cache, wanted), cache)
        cache.commit(batch, count)
        return result

    def _together(self, rows: Sequence[Row], joining: Joining) -> list[torch.Tensor | None]:
        inputs = torch.cat([row.inputs for row in rows], 1)
        cache, counts = rows[0].cache, [row.count for row in rows]
        if any((row.cache.start, row.cache.end) != (cache.start, cache.end) for row in rows):
            raise ValueError("rows of one pass go through the same layers")
        ends = itertools.accumulate(counts)
        wanted = _places(
            [place for end, row in zip(ends, rows, strict=True) for place in range(end - row.wanted, end)]
        )
        joint = joining.cache([row.cache for row in rows], counts)

        def compute(inputs: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            result = self._run(inputs, _visit(inputs, cache, wanted), joint, positions)
            if (joint.written, joint.attended) != (cache.end - cache.start,) * 2:
                raise UnsupportedModel("its attention cannot be computed for several sessions at once")
            return result

        with self._running, joining.through(joint):
            positions = self._moved(joint.positions(len(counts)), torch.int64)[None]
            if self._comes_again(rows):
                kind = (cache.start, cache.end, len(rows), rows[0].wanted)
                result = self._steps.run(kind, compute, joint.start_over, inputs, positions)
            else:
                result = compute(inputs, positions)
        for row in rows:
            row.cache.commit(1, row.count)
        if cache.end < self.layer_count:
            return list(torch.split(result, counts, 1))
        if wanted == []:
            return [None] * len(rows)
        shares = torch.split(result, [row.wanted for row in rows], 1)
        return [share if row.wanted else None for share, row in zip(shares, rows, strict=True)]

    def _comes_again(self, rows: Sequence[Row]) -> bool:
        """Whether a pass differs by its numbers alone from others that come: one position of each session."""
        return (
            len(rows) <= RECORDED
            and self._joining is not None
            and not self._joining.gathers
            and rows[0].cache.adapter is None
            and all(row.count == 1 and row.wanted == rows[0].wanted for row in rows)
        )

    def _run(
        self,
        inputs: torch.Tensor,
        visit: Visit,
        cache: KVCache | JointCache | None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states, or float32 logits [batch, wanted, vocab] where the model ends.

        `positions` [1, count] are on the device; without them, they are those that follow in the cache.
        """
        self._visit = visit
        try:
            if visit.arrived is None:
                logits = self._call(cache, positions, input_ids=inputs)
            else:
                # Only its shape counts: the gate brings the true ones, and CTRL changes these in place.
                logits = self._call(cache, positions, inputs_embeds=torch.zeros_like(inputs))
        except Reached as reached:
            return reached.hidden_states
        # A family without a head of its own could not be told before.
        return (logits if visit.narrowed else logits[:, visit.wanted]).float()

    def _call(
        self, cache: KVCache | JointCache | None, positions: torch.Tensor | None, **inputs: torch.Tensor
    ) -> torch.Tensor:
        """The family's own forward pass, to logits. The inputs are [batch, count, ...]."""
        arguments: dict[str, Any] = {**inputs, "past_key_values": cache, "use_cache": cache is not None}
        if self._takes_positions:
            batch, count = next(iter(inputs.values())).shape[:2]
            if positions is None:
                positions = cache.positions(count) if cache is not None else torch.arange(count)
                if (told := self._visit.extras.positions) is not None:
                    positions = told
                positions = self._moved(positions, torch.int64).expand(batch, -1)
            arguments["position_ids"] = positions
        if (mask := self._visit.extras.mask) is not None:
            arguments["attention_mask"] = self._moved(mask, torch.int64)
        logits: torch.Tensor = self._model(**arguments).logits
        return logits

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=self.dtype, device=self.device)

    def _before(self, forward: Anything, playing: Anything, *args: Anything, **kwargs: Anything) -> Anything:
        """Stands for a part that runs before the layers: itself, or its stand-in when it has no say."""
        return (forward if self._visit.arrived is None else playing)(*args, **kwargs)

    def _gate(
        self, index: int, forward: Callable[..., Anything], *args: Anything, **kwargs: Anything
    ) -> Anything:
        """What stands at the entry of layer `index`, whose own forward is `forward`."""
        visit = self._visit
        if index < visit.start:
            # Whether the family takes this or its first element, the next gate ignores it.
            return visit.arrived
        if index == visit.start and visit.arrived is not None:
            args, kwargs = replace_hidden_states(args, kwargs, visit.arrived)
        if visit.extras.prompts:
            entering = visit.extras.enter(index, split_arguments(args, kwargs)[0], visit.position)
            args, kwargs = replace_hidden_states(args, kwargs, entering)
        if self._spread:
            args, kwargs = self._bring((args, kwargs), self.layer_devices[index])
        output = forward(*args, **kwargs)
        if self._spread and (index == visit.end - 1 or visit.behind is not None):
            output = self._bring(output, self.device)
        states = output if isinstance(output, torch.Tensor) else output[0]
        if visit.behind is not None:
            visit.behind.append(states)
        if index == visit.end - 1 and (visit.end < self.layer_count or visit.behind is not None):
            raise Reached(states)
        return output

    def _bring(self, values: Anything, device: torch.device) -> Anything:
        """A nest of tensors on a device. What all layers there ask for, masks and angles, is copied once."""
        brought = self._visit.brought

        def bring(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.device == device:
                return tensor
            key = id(tensor), device
            if key not in brought:
                # With the tensor itself, so that no other gets its id.
                brought[key] = tensor, tensor.to(device, non_blocking=True)
            return brought[key][1]

        return trees.tree_map_only(torch.Tensor, bring, values)

    def _narrow(self, _: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        """Before the head: of a long prompt, only the last position's logits are wanted, or none at all."""
        wanted = self._visit.wanted
        if not args:
            return None
        if wanted == []:
            raise Reached(args[0])
        self._visit.narrowed = True
        return (args[0][:, wanted], *args[1:])

    def _cut(self) -> None:
        """Take away what the span does not hold, and put the gates in."""
        model, device = self._model, self.device
        layers = find_layers(model)
        paths = {part: path for path, part in model.named_modules()}
        inner = {part for layer in layers for part in layer.modules()}
        family.make_buffers(model, (part for part in model.modules() if part not in inner), device)
        cache = KVCache(0, 0, 0, self._windows)
        with device, torch.inference_mode():
            anatomy = survey(model, layers, lambda **inputs: self._call(cache, None, **inputs))
        held = {part for layer in layers[self.start : self.end] for part in layer.modules()}
        for number, place in self.layer_devices.items():
            family.make_buffers(model, layers[number].modules(), place)
            self._apart[paths[layers[number]]] = place
        drop_weights(inner - held)
        self._cut_ends(anatomy)
        for path, part in model.named_modules():
            if part in held and (shape := matrix_shape(part)) is not None:
                self._matrices[path] = shape
        for index, layer in enumerate(layers):
            layer.forward = partial(self._gate, index, layer.forward)

    def _fill(
        self,
        checkpoint: Checkpoint,
        quantization: Quantization | None,
        quantized: QuantizedCache | None,
        progress: Progress | None,
    ) -> None:
        """Read what is left in the model, or take it from disk as it was packed before."""
        model = self._model
        packer = Packer(model, quantization, quantized) if quantization else None
        if packer:
            packer.restore()
            self._drop_tied_embedding(packer)
        names = family.names_to_read(model, checkpoint.tensor_names, packer.skipped if packer else set())
        checkpoint.fetch(names, progress)
        taker = packer or Joiner(model, self._device_of)
        # What GPUs pack is on them as a whole before.
        piecewise = {name for name, parameter in names.items() if taker.wants(parameter)}
        if packer and self.device.type != "cpu":
            piecewise = set()
        # Mapped files count as memory once they are read: only tensors that are used as they lie stay so.
        tensors = read_later(checkpoint, list(names), progress, None if packer else self.dtype, piecewise)
        wanting = taker if packer or piecewise else None
        family.fill(model, tensors, self.dtype, self.device, wanting, self._apart)
        if packer:
            self._drop_tied_embedding(packer)

    def _drop_tied_embedding(self, packer: Packer) -> None:
        """Away from layer 0 the embedding was there for the head alone."""
        if self.start > 0 and packer.head_packed:
            drop_weights(self._model.get_input_embeddings().modules())

    def _device_of(self, path: str) -> torch.device:
        """Where a module or parameter lies."""
        layers = (place for layer, place in self._apart.items() if path.startswith(f"{layer}."))
        return next(layers, self.device)

    def _cut_ends(self, anatomy: Anatomy) -> None:
        model = self._model
        embedding = model.get_input_embeddings()
        holds_head = self.end == self.layer_count
        others = [part for part in anatomy.before if part is not embedding]
        for part in others:
            part.forward = partial(self._before, part.forward, stand_in(part, self._zeros))
        if self.start > 0:
            for part in others:
                drop_weights(part.modules())
            # The head may have no weights but the embedding's.
            if not (holds_head and model.all_tied_weights_keys):
                drop_weights(embedding.modules())
        if holds_head:
            outputs: Callable[[], nn.Module | None] = model.get_output_embeddings
            if head := outputs():
                head.register_forward_pre_hook(self._narrow)
        else:
            model.all_tied_weights_keys = {}
            for part in anatomy.after:
                drop_weights(part.modules())

    def _try_out(self) -> list[int]:
        """Send two positions through, twice. Gives the bytes that each layer's cache takes per position.

        Raises UnsupportedModel when that fails, or when a position looks at what comes after it.
        """
        kind = self._model.config.model_type
        caches = [self.new_cache(self.start, self.end, 2) for _ in range(2)]
        try:
            one, other = (
                self.forward(inputs, cache, 0, all_logits=True)[0, 0].float()
                for inputs, cache in zip(self._trial_inputs(), caches, strict=True)
            )
        except Exception as error:
            raise UnsupportedModel(
                f"{kind} models cannot be served in spans ({first_line(error)})"
            ) from error
        difference = float((one - other).abs().max() / one.abs().max())
        if difference > max(1e-4, 4 * torch.finfo(self.dtype).eps):
            raise UnsupportedModel(f"{kind} models look ahead: only models that continue a text are served")
        kept = [caches[0].bytes_of(layer) // 2 for layer in range(self.start, self.end)]
        if not all(kept):
            raise UnsupportedModel(
                f"{kind} models have layers without keys and values: nothing can be taken back"
            )
        return kept

    def _try_joining(self, *, rounds: bool) -> None:
        """Find out whether one pass serves several sessions exactly, by two sessions and each of them alone.

        A family whose attention does not go through the registered function, or whose masks or positions are
        of another kind, gives other numbers here.
        """
        if not self._takes_positions or not may_join(self._model):
            return
        expected = [self.forward(inputs, cache, cache.length) for inputs, cache in self._trial_sessions()]
        tolerance = max(1e-4, 4 * torch.finfo(self.dtype).eps, ROUNDED if rounds else 0)
        for gathers in (False, True):
            joining = Joining(self._model, gathers=gathers)
            if self._joins_exactly(joining, expected, tolerance):
                self._joining = joining
                return

    def _joins_exactly(self, joining: Joining, expected: Sequence[torch.Tensor], tolerance: float) -> bool:
        try:
            rows = [self.row(inputs, cache, cache.length) for inputs, cache in self._trial_sessions()]
            with torch.inference_mode():
                outputs = self._together(rows, joining)
        except Exception as error:
            log.debug("sessions cannot be computed together: %s", first_line(error))
            return False
        pairs = zip(outputs, expected, strict=True)
        return all(
            output is not None and _close(output if one.dim() == 3 else output[:, -1], one, tolerance)
            for output, one in pairs
        )

    def _trial_sessions(self) -> list[tuple[torch.Tensor, KVCache]]:
        """Two sessions that hold three and five positions, and the next two and one of each."""
        sessions = []
        for seed, (held, count) in enumerate(((3, 2), (5, 1))):
            inputs = self.trial_inputs(held + count, seed)
            cache = self.new_cache(self.start, self.end, held + count)
            self.forward(inputs[:, :held], cache, 0)
            sessions.append((inputs[:, held:], cache))
        return sessions

    def trial_inputs(self, count: int, seed: int = 0) -> torch.Tensor:
        """Random inputs [1, count] or [1, count, hidden], to try this span out."""
        numbers = torch.Generator().manual_seed(seed)
        if self.start == 0:
            return torch.randint(self.vocab_size, (1, count), generator=numbers)
        return torch.randn(1, count, self.hidden_size, generator=numbers, dtype=self.dtype)

    def _trial_inputs(self) -> list[torch.Tensor]:
        """Two inputs of two positions each; they differ in the second position alone."""
        if self.start == 0:
            return [torch.tensor([[0, 1]]), torch.tensor([[0, 2]])]
        numbers = torch.Generator().manual_seed(0)
        first, *seconds = torch.randn(3, self.hidden_size, generator=numbers, dtype=self.dtype)
        return [torch.stack([first, second])[None] for second in seconds]

    def _same(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        """Whether two ways of computing a step gave the same: to the bit, where the same kernels run."""
        if self.device.type == "cpu":
            return torch.equal(one, other)
        return _close(one, other, max(1e-4, 4 * torch.finfo(self.dtype).eps))

    def _check_range(self, start: int, end: int) -> None:
        if not self.start <= start < end <= self.end:
            raise ValueError(
                f"layers {start}:{end} are not in this span, which holds {self.start}:{self.end}"
            )

    def _checked(self, inputs: torch.Tensor, cache: KVCache) -> torch.Tensor:
        if 0 in inputs.shape:
            raise BadInputs("a step brings at least one position")
        if cache.start > 0:
            if inputs.dim() != 3 or inputs.shape[2] != self.hidden_size or not inputs.is_floating_point():
                raise BadInputs(
                    f"layer {cache.start} takes hidden states [batch, count, {self.hidden_size}], "
                    f"not {inputs.dtype} {list(inputs.shape)}"
                )
            return self._moved(inputs, self.dtype)
        if inputs.dim() != 2 or inputs.is_floating_point():
            raise BadInputs(
                f"layer 0 takes token ids [batch, count], not {inputs.dtype} {list(inputs.shape)}"
            )
        # A token outside the embedding would stop a GPU for good.
        if not 0 <= int(inputs.min()) <= int(inputs.max()) < self.vocab_size:
            raise BadInputs(f"a token id is outside of this model's vocabulary of {self.vocab_size}")
        return self._moved(inputs, torch.int64)

    def _moved(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """On the span's device. From pinned memory a GPU copies beside what it still computes."""
        if self.device.type != "cuda":
            return values.to(self.device, dtype)
        if values.device.type == "cpu":
            values = values.pin_memory()
        return values.to(self.device, dtype, non_blocking=True)


def _places(wanted: list[int]) -> slice | list[int]:
    """The same as a slice if they follow one another: a list of places has to be brought to the device."""
    if wanted and wanted == list(range(wanted[0], wanted[-1] + 1)):
        return slice(wanted[0], wanted[-1] + 1)
    return wanted


def _visit(inputs: torch.Tensor, cache: KVCache, wanted: slice | list[int]) -> Visit:
    """Through the layers of a cache."""
    extras = NOTHING if cache.adapter is None else Extras(adapter=cache.adapter)
    return Visit(cache.start, cache.end, None if cache.start == 0 else inputs, wanted, extras=extras)


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """All that the parts of a model hold, as parameters, as buffers or otherwise."""
    for part in model.modules():
        held = {**vars(part), **part._parameters, **part._buffers}
        yield from (value for value in held.values() if isinstance(value, torch.Tensor))


def _close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    """Equal but for rounding: at each position, measured by the size of its own numbers."""
    one, other = one.float(), other.float()
    return bool(((one - other).norm(dim=-1) <= tolerance * other.norm(dim=-1)).all())


def drop_weights(parts: Iterable[nn.Module]) -> None:
    """Forget the tensors of parts, so that nothing is read for them; keep what they tell of themselves."""
    for part in parts:
        for tensors in (part._parameters, part._buffers):
            tensors.update(dict.fromkeys(tensors))


@dataclass(frozen=True)
class Later:
    """A tensor of a checkpoint that is read when it is indexed, as transformers' loader does."""

    read: Callable[[], torch.Tensor]

    def __getitem__(self, index: object) -> torch.Tensor:
        return self.read()[cast(Any, index)]


def read_later(
    checkpoint: Checkpoint,
    names: list[str],
    progress: Progress | None,
    in_place: torch.dtype | None,
    piecewise: set[str],
) -> dict[str, Later]:
    """The named tensors, each read on first use, or `piecewise` where that is asked; `progress` hears of all.

    Those stored in the dtype `in_place` stay in their files, mapped into memory; others are copied.
    """
    total = sum(checkpoint.tensor(name).bytes for name in names)
    before = checkpoint.bytes_read
    telling = threading.Lock()

    def tell() -> None:
        if progress is not None:
            with telling:
                # A head that shares the embedding's numbers reads them a second time.
                progress(min(total, checkpoint.bytes_read - before), total)

    def read_rows(name: str, start: int, end: int) -> torch.Tensor:
        rows = checkpoint.read_rows(name, start, end)
        tell()
        return rows

    def read(name: str) -> torch.Tensor:
        if name in piecewise and len(checkpoint.tensor(name).shape) in (2, 3):
            return Unread.stored(checkpoint, name, partial(read_rows, name))
        tensor = checkpoint.read(name, in_place=in_place)
        tell()
        return tensor

    return {name: Later(partial(read, name)) for name in names}
