"""What can go wrong with a model on this machine. Each text is one sentence that a person can act on."""

from shared.errors import CorollaError


class ModelNotFound(CorollaError):
    """The name is neither a directory with a model nor a model of the hub that can be reached."""


class UnsupportedModel(CorollaError):
    """The model is there, but its family cannot be cut into spans, or its weights are of an unknown kind."""


class CacheFull(CorollaError):
    """A step would make a session longer than its cache, or than the model itself."""


class BadInputs(CorollaError):
    """A step does not fit the span or its cache: wrong shape, unknown token, or a gap in the positions."""


class BadLogits(CorollaError):
    """The logits are not numbers that a token can be drawn from."""


class BadGrammar(CorollaError):
    """A grammar that no token can follow, or that takes more work than a peer lends to it."""


class NoKernel(CorollaError):
    """The C kernel of block-quantized weights cannot be built or does not run on this machine."""


def first_line(error: Exception) -> str:
    """Someone else's error as part of a sentence of ours: its kind, and the first line of its text."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"
