"""Which form a span's weights take: what `--quantize` may say, what a machine can do, its own choice."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from peer.model import block_quant, fp16, packed_fp16
from peer.model.bits_and_bytes import LlmInt8, Nf4
from peer.model.block_quant import BlockQuantized
from peer.model.errors import NoKernel
from peer.model.fp16 import Fp16
from peer.model.int8 import Int8
from peer.model.packed_fp16 import PackedFp16
from peer.model.unread import Matrix, Unread
from peer.model.weights import Rows, Weights
from shared.errors import SettingsError

log = logging.getLogger(__name__)

NAMES = ("auto", "none", "fp16", "int8", "int8-fast", "int4", "nf4")
"""What `--quantize` takes."""


@dataclass(frozen=True)
class Form:
    """One kind of Weights. `restore` makes them of the tensors that they kept: tensors, outputs, inputs.

    `name` stands in files on disk: when the layout of the tensors changes, so must it.
    """

    name: str
    pack: Callable[[Matrix], Weights]
    restore: Callable[[Mapping[str, torch.Tensor], int, int], Weights] | None = None


@dataclass(frozen=True)
class Quantization:
    """The forms of a whole span, under the name by which artefacts tell them apart.

    The embedding stays as it is read unless it has a form.
    """

    name: str
    layers: Form
    head: Form
    embedding: Form | None = None
    rounds: bool = False
    """Activations are rounded coarsely too: a difference in a last digit may become one of a whole step."""

    @property
    def cacheable(self) -> bool:
        """Whether its numbers are worth files of their own: those of fp16 are made as fast as read."""
        return self.layers.restore is not None


ROWS = Form("rows", Rows)


def choose(
    asked: str, dtype: torch.dtype, device: torch.device, kernels: Path, *, exact: bool = False
) -> Quantization | None:
    """The quantization that was asked for, or this device's default for `auto`; None keeps the weights exact.

    `exact` says that someone asked for this dtype; `kernels` is where a compiled kernel is kept. Raises
    SettingsError with one sentence for what this device cannot do.
    """
    if asked not in NAMES:
        raise SettingsError(f"--quantize {asked} is unknown: write {', '.join(NAMES[:-1])} or {NAMES[-1]}")
    if asked == "auto":
        fits = device.type == "cpu" and dtype == torch.float32 and packed_fp16.available()
        asked = "fp16" if fits and not exact else "none"
    if asked == "none":
        return None
    if device.type == "cuda":
        return _for_cuda(asked)
    if device.type != "cpu":
        raise SettingsError(f"--quantize {asked} is not for {device.type}: write none")
    if dtype != torch.float32:
        raise SettingsError(
            f"--quantize {asked} computes in float32 on a CPU: leave out --dtype {str(dtype)[6:]}"
        )
    return _for_cpu(asked, kernels)


def _for_cuda(asked: str) -> Quantization:
    forms: dict[str, Form] = {"int8": Form("llm-int8", LlmInt8), "nf4": Form("nf4", Nf4)}
    if asked not in forms:
        raise SettingsError(f"--quantize {asked} is for CPUs: on a GPU write int8 or nf4")
    return Quantization(forms[asked].name, forms[asked], forms[asked], rounds=asked == "int8")


def _for_cpu(asked: str, kernels: Path) -> Quantization:
    if asked == "fp16":
        form = _fp16_form(kernels)
        return Quantization("fp16", form, form, ROWS)
    if asked == "int8":
        form = Form("int8", Int8.pack, _restore_int8)
        return Quantization("int8", form, form, ROWS, rounds=True)
    if asked == "nf4":
        log.warning("nf4 is several times slower on a CPU than full precision: int4 takes as little memory")
        form = Form("nf4", Nf4)
        return Quantization("nf4", form, form, ROWS)
    try:
        eight, four = (_block_form(kernels, bits) for bits in (8, 4))
    except NoKernel as error:
        raise SettingsError(f"--quantize {asked} is not possible here: {error}; int8 needs none") from error
    # The head decides between tokens and is a small part of most models: it keeps 8 bits.
    return Quantization(asked, eight if asked == "int8-fast" else four, eight, ROWS, rounds=True)


def _fp16_form(kernels: Path) -> Form:
    """Our kernel's, or FBGEMM's where it cannot be built: both multiply with the same numbers."""
    try:
        return Form("fp16", partial(Fp16, fp16.kernel(kernels)))
    except NoKernel as error:
        if not packed_fp16.available():
            raise SettingsError(
                f"--quantize fp16 is not possible here: {error}; write none or int8"
            ) from error
        log.warning("weights are multiplied by FBGEMM; our own kernel would be half as fast again: %s", error)
        return Form("fp16", PackedFp16)


def _restore_int8(tensors: Mapping[str, torch.Tensor], _: int, inputs: int) -> Weights:
    return Int8(tensors["values"], tensors["scales"], inputs)


def _block_form(kernels: Path, bits: int) -> Form:
    kernel = block_quant.kernel(kernels)

    def restore(tensors: Mapping[str, torch.Tensor], outputs: int, inputs: int) -> Weights:
        return BlockQuantized(kernel, bits, outputs, inputs, tensors["values"], tensors["scales"])

    return Form(f"block{bits}", partial(BlockQuantized.pack, kernel, bits), restore)


def pack_matrices(form: Form, tensor: torch.Tensor, *, flipped: bool) -> Sequence[Weights]:
    """A matrix, or one for each expert, of a tensor [(experts,) outputs, inputs]; flipped: inputs before."""
    matrices: Iterable[Matrix]
    if isinstance(tensor, Unread):
        matrices = tensor.matrices
    else:
        matrices = tensor if tensor.dim() == 3 else tensor[None]
    return [form.pack(matrix[:].T if flipped else matrix) for matrix in matrices]
