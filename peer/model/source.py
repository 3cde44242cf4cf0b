"""Where a model's files lie: in a directory, or on the hub. From the hub, only what is needed is fetched.

First come the small files and the list of all files; a file with weights follows when a span needs one of its
tensors. Downloads resume where they stopped, and HF_HUB_OFFLINE=1 uses only what is on this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from huggingface_hub import get_cached_repo_tree, hf_hub_download, snapshot_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError, GatedRepoError, HFValidationError

from peer.model.errors import ModelNotFound

TOKENIZER_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes to do); may come from several threads, but never from two at once."""


@dataclass(frozen=True)
class StoredFile:
    """One file of a model. `fingerprint` names its content when the source knows it, else it is empty."""

    name: str
    bytes: int
    fingerprint: str = ""


@dataclass(frozen=True)
class Source:
    """A place with a model's files: what is there, and how to get one onto this machine."""

    name: str
    files: Mapping[str, StoredFile]
    locate: Callable[[str, Progress | None], Path]
    is_here: Callable[[str], bool]


def open_source(model: str) -> Source:
    """A directory, or else a model of the hub. Raises ModelNotFound when it is neither."""
    path = Path(model).expanduser()
    return directory_source(path) if path.is_dir() else hub_source(model)


def directory_source(path: Path) -> Source:
    """A directory with a model, as `save_pretrained` or a download leaves it."""
    files = {
        file.name: StoredFile(file.name, file.stat().st_size) for file in path.iterdir() if file.is_file()
    }
    if "config.json" not in files:
        raise ModelNotFound(f"{path} holds no model: there is no config.json in it")
    return Source(path.resolve().name, files, lambda name, _: path / name, lambda _: True)


def hub_source(name: str) -> Source:
    """A model of the hub, or of its cache on this machine."""
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*TOKENIZER_FILES, INDEX]))
        listing = get_cached_repo_tree(name, revision=folder.name)
    except HFValidationError:
        raise ModelNotFound(f"{name} is neither a directory here nor a model id of the hub") from None
    except GatedRepoError:
        raise ModelNotFound(
            f"{name} asks for consent: accept its terms on the hub, then run `hf auth login`"
        ) from None
    except CachedRepoTreeNotFoundError:
        raise ModelNotFound(
            f"the list of files of {name} is not on this machine: start once with access to the hub"
        ) from None
    except OSError as error:
        # Unknown, unreachable, or offline without a copy: all of the hub's own errors are OSErrors.
        raise ModelNotFound(
            f"{name} is not a directory here, and the hub gave no model of that name ({type(error).__name__})"
        ) from error
    files = {file.path: StoredFile(file.path, file.size, file.blob_id) for file in listing}

    def locate(file: str, progress: Progress | None) -> Path:
        if (folder / file).exists():
            return folder / file
        try:
            bar = cast(Any, progress_bar(progress or (lambda _, __: None)))
            return Path(hf_hub_download(name, file, revision=folder.name, tqdm_class=bar))
        except OSError as error:
            raise ModelNotFound(f"{file} of {name} could not be fetched from the hub: {error}") from error

    return Source(name, files, locate, lambda file: (folder / file).exists())


def progress_bar(progress: Progress) -> type[object]:
    """A class with as much of a progress bar as a download calls. It tells `progress` and draws nothing."""

    class Bar:
        def __init__(self, *_: object, total: int | None = None, initial: int = 0, **__: object) -> None:
            self.total = total
            self.n = initial

        def update(self, count: float | None = 1) -> None:
            self.n += int(count or 0)
            progress(self.n, self.total or self.n)

        def ignore(self, *_: object, **__: object) -> None:
            """Rates and traffic are for the eye."""

        update_transfer = set_postfix_str = set_transfer_postfix_str = close = __exit__ = ignore

        def __enter__(self) -> Bar:
            return self

    return Bar
