"""The steps of a fine-tuning, with what is needed to go on after an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peer.tuning.records import Example, batch_of, order
from shared.errors import SettingsError

STATE = "checkpoint.json"
TENSORS = "checkpoint.safetensors"


@dataclass(frozen=True)
class Plan:
    """What decides how a job goes. One that is resumed keeps it."""

    method: str
    steps: int
    batch: int
    rate: float
    seed: int
    examples: int


@dataclass
class Job:
    """A model, what of it learns, and how far it has come.

    `heard(step, loss)` is called after each step. A step that fails leaves everything as it was before it.
    """

    model: Any
    learning: Mapping[str, nn.Parameter]
    plan: Plan
    losses: list[float] = field(default_factory=list)
    heard: Callable[[int, float], None] = lambda step, loss: None

    def __post_init__(self) -> None:
        self._optimizer = torch.optim.AdamW(self.learning.values(), lr=self.plan.rate)

    def run(self, examples: Sequence[Example], directory: Path | None, every: int, blank: int = 0) -> None:
        """Go on to the last step; a checkpoint lies in `directory` after so many."""
        batches = order(len(examples), self.plan.batch, self.plan.seed)
        for chosen in islice(batches, len(self.losses), self.plan.steps):
            self.losses.append(self._step(batch_of([examples[index] for index in chosen], blank)))
            step = len(self.losses)
            self.heard(step, self.losses[-1])
            if directory is not None and (step % every == 0 or step == self.plan.steps):
                self.save(directory)

    def _step(self, batch: dict[str, torch.Tensor]) -> float:
        self._optimizer.zero_grad()
        loss: torch.Tensor = self.model(**batch).loss
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.learning.values(), 1.0)
        self._optimizer.step()
        return float(loss.detach())

    def save(self, directory: Path) -> None:
        """A checkpoint, in the place of the one before: complete, or not there."""
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {f"value/{name}": value.detach().contiguous() for name, value in self.learning.items()}
        for name, value in self.learning.items():
            for key, moment in self._optimizer.state[value].items():
                tensors[f"{key}/{name}"] = moment.detach().contiguous()
        # The state names its tensors by the step, so that the two always belong together.
        step = len(self.losses)
        save_file(tensors, directory / f"{step}-{TENSORS}")
        state = {"plan": asdict(self.plan), "losses": self.losses}
        part = directory / f"{STATE}.part"
        part.write_text(json.dumps(state), encoding="utf-8")
        part.replace(directory / STATE)
        for old in directory.glob(f"*-{TENSORS}"):
            if old.name != f"{step}-{TENSORS}":
                old.unlink()

    def resume(self, directory: Path) -> None:
        """Take up a checkpoint. Raises SettingsError when there is none, or one of another job."""
        try:
            state = json.loads((directory / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise SettingsError(f"{directory} holds no checkpoint to resume; leave out --resume") from None
        before, now = state["plan"], asdict(self.plan)
        changed = [name for name in now if name != "steps" and before.get(name) != now[name]]
        if changed:
            name = changed[0]
            raise SettingsError(f"the checkpoint was made with {name} {before.get(name)}, not {now[name]}")
        self.losses = list(state["losses"])
        tensors = load_file(directory / f"{len(self.losses)}-{TENSORS}")
        for name, value in self.learning.items():
            value.data.copy_(tensors[f"value/{name}"])
            found = {
                key.partition("/")[0]: one for key, one in tensors.items() if key.partition("/")[2] == name
            }
            self._optimizer.state[value] = found
