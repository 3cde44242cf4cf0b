"""Pack a span's weights while they are read, one after another, or take them from disk as they were."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from transformers import PreTrainedModel

from peer.model import family
from peer.model.quantization import Form, Quantization, pack_matrices
from peer.model.quantized_cache import QuantizedCache, layer_of
from peer.model.unread import Unread
from peer.model.weights import PackedWeight, Weights


class Joiner:
    """Keeps all weights as they are, and reads the experts of a layer into the memory that they stay in."""

    def __init__(self, model: PreTrainedModel, device_of: Callable[[str], torch.device]) -> None:
        """`device_of` tells where a parameter lies."""
        self._experts = family.fused_experts(model)
        self._device_of = device_of

    def wants(self, name: str) -> bool:
        """Whether this parameter may be made of many tensors."""
        return name in self._experts

    def pack(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The numbers of one parameter."""
        return tensor.dense(self._device_of(name)) if isinstance(tensor, Unread) else tensor


class Packer:
    """Packs the weights of one model that is being loaded. `cache` keeps them for the next time, if given.

    `restore` comes first; then `pack` gets what was not restored.
    """

    def __init__(
        self, model: PreTrainedModel, quantization: Quantization, cache: QuantizedCache | None = None
    ) -> None:
        self.restored: set[str] = set()
        """Parameters that came from disk."""
        self._model = model
        self._quantization = quantization
        self._cache = cache if quantization.cacheable else None
        self._flipped = family.packable(model)
        self._embedding = family.embedding_name(model)
        self._head = family.tied_head(model)
        if self._head is not None:
            # It gets packed weights of its own, made when the embedding is read.
            model.all_tied_weights_keys = {}
        self._unsaved: dict[str, dict[str, PackedWeight]] = {}
        family.compute_experts_one_by_one(model)

    @property
    def head_packed(self) -> bool:
        """Whether the head shared the embedding's weights, and now has its own."""
        if self._head is None:
            return False
        return isinstance(self._model.get_parameter(self._head), PackedWeight)

    def wants(self, name: str) -> bool:
        """Whether this parameter is to be packed when it is read."""
        return name == self._embedding or (name in self._flipped and name not in self.skipped)

    @property
    def skipped(self) -> set[str]:
        """Parameters for which nothing of the checkpoint need be read."""
        return self.restored | ({self._head} if self._head is not None else set())

    def pack(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The packed form of one parameter. A layer is saved when it is complete."""
        if name == self._embedding:
            return self._pack_embedding(tensor)
        flipped = self._flipped[name]
        matrices = pack_matrices(self._form(name), tensor, flipped=flipped)
        packed = PackedWeight.of(matrices, tensor.shape, tensor, flipped=flipped)
        self._save_later(name, packed)
        return packed

    def _pack_embedding(self, tensor: torch.Tensor) -> torch.Tensor:
        """The embedding, and of the same numbers the head if it has no others."""
        if self._head is not None and self._head not in self.restored:
            family.put(self._model, self._head, self.pack(self._head, tensor))
        form = self._quantization.embedding
        if form is None:
            return tensor.dense() if isinstance(tensor, Unread) else tensor
        return PackedWeight.of(pack_matrices(form, tensor, flipped=False), tensor.shape, tensor)

    def restore(self) -> None:
        """Take the layers that are on disk as a whole, and put them into the model."""
        if self._cache is None:
            return
        for layer in sorted({layer_of(name) for name in self._flipped}):
            tensors = self._cache.load(layer)
            found = {name: self._restored(name, tensors) for name in self._names(layer)}
            whole = {name: packed for name, packed in found.items() if packed is not None}
            if len(whole) < len(found):
                continue
            for name, packed in whole.items():
                family.put(self._model, name, packed)
                self.restored.add(name)

    def _restored(self, name: str, tensors: Mapping[str, torch.Tensor]) -> PackedWeight | None:
        like = self._model.get_parameter(name)
        form = self._form(name)
        *_, outputs, inputs = like.transpose(-1, -2).shape if self._flipped[name] else like.shape
        matrices: list[Weights] = []
        for number in range(like.shape[0] if like.dim() == 3 else 1):
            prefix = f"{name}#{number}#{form.name}#"
            kept = {key.removeprefix(prefix): kept for key, kept in tensors.items() if key.startswith(prefix)}
            if not kept or form.restore is None:
                return None
            matrices.append(form.restore(kept, outputs, inputs))
        return PackedWeight.of(matrices, like.shape, like, flipped=self._flipped[name])

    def _save_later(self, name: str, packed: PackedWeight) -> None:
        if self._cache is None:
            return
        layer = layer_of(name)
        unsaved = self._unsaved.setdefault(layer, {})
        unsaved[name] = packed
        if len(unsaved) == len(self._names(layer)):
            self._cache.save(layer, self._tensors(self._unsaved.pop(layer)))

    def _tensors(self, packed: Mapping[str, PackedWeight]) -> dict[str, torch.Tensor]:
        tensors = {
            f"{name}#{number}#{self._form(name).name}#{part}": tensor
            for name, weight in packed.items()
            for number, matrix in enumerate(weight.matrices)
            for part, tensor in matrix.tensors().items()
        }
        # The large ones first, whose lengths keep each other aligned.
        return dict(sorted(tensors.items(), key=lambda item: item[0].endswith("scales")))

    def _names(self, layer: str) -> list[str]:
        return [name for name in self._flipped if layer_of(name) == layer]

    def _form(self, name: str) -> Form:
        quantization = self._quantization
        return quantization.head if layer_of(name) == "ends" else quantization.layers
