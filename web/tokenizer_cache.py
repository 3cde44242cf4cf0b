"""Tokenizers by artefact: loaded once, kept in memory, and on disk under the hash that the peers announce."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path

from shared.errors import ProtocolError
from shared.tokenizer_files import files_hash
from web.swarm import Swarm
from web.tokenizer import ModelTokenizer, load_tokenizer

log = logging.getLogger(__name__)

KEPT = 8
"""Tokenizers in memory; a large one takes some tens of megabytes."""


class TokenizerCache:
    """Gets a model's tokenizer from its peers; many askers at once wait for one fetch."""

    def __init__(self, swarm: Swarm, folder: Path) -> None:
        self._swarm = swarm
        self._folder = folder
        self._loaded: OrderedDict[str, ModelTokenizer] = OrderedDict()
        self._locks: dict[str, asyncio.Lock] = {}

    async def get(self, artefact: str) -> ModelTokenizer:
        """Raises NoRoute or ConnectionLost when no peer hands it out, ProtocolError when it is unusable."""
        async with self._locks.setdefault(artefact, asyncio.Lock()):
            tokenizer = self._loaded.get(artefact) or await self._load(artefact)
            self._loaded[artefact] = tokenizer
            self._loaded.move_to_end(artefact)
        while len(self._loaded) > KEPT:
            oldest, _ = self._loaded.popitem(last=False)
            self._locks.pop(oldest, None)
        return tokenizer

    async def _load(self, artefact: str) -> ModelTokenizer:
        if (announced := self._announced(artefact)) is not None:
            tokenizer = await asyncio.to_thread(self._from_disk, announced)
            if tokenizer is not None:
                return tokenizer
        files = await self._swarm.fetch_files(artefact)
        return await asyncio.to_thread(self._keep, files)

    def _announced(self, artefact: str) -> str | None:
        """The hash that most live peers of the artefact announce."""
        peers = [peer for peer in self._swarm.directory.live() if peer.artefact == artefact]
        counts = Counter(peer.tokenizer for peer in peers)
        return counts.most_common(1)[0][0] if counts else None

    def _from_disk(self, name: str) -> ModelTokenizer | None:
        folder = self._folder / name
        try:
            files = {path.name: path.read_bytes() for path in folder.iterdir()}
        except OSError:
            return None
        if files_hash(files) != name:
            log.warning("the tokenizer in %s was changed on disk; fetching it anew", folder)
            shutil.rmtree(folder, ignore_errors=True)
            return None
        return load_tokenizer(files)

    def _keep(self, files: Mapping[str, bytes]) -> ModelTokenizer:
        """Load the files, and put good ones on disk; there they appear all at once or not at all."""
        tokenizer = load_tokenizer(files)
        if {".", ".."} & files.keys():
            raise ProtocolError("a peer handed out a file that is named like a folder")
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._folder, prefix="new-") as new:
            folder = Path(new) / "files"
            folder.mkdir()
            for name, content in files.items():
                (folder / name).write_bytes(content)
            with contextlib.suppress(OSError):  # another gateway of this machine was first
                folder.rename(self._folder / files_hash(files))
        return tokenizer
