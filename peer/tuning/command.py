"""`python -m peer tune`: teach a model in a swarm from a file of records."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from transformers import AutoTokenizer

from peer.model.checkpoint import open_checkpoint, tokenizer_files
from peer.remote import RemoteModel
from peer.remote.prompts import save_prompt
from peer.settings import DEMO_MODEL
from peer.tuning.job import Job, Plan
from peer.tuning.plot import write_plot
from peer.tuning.records import Example, examples, read_records
from shared.errors import SettingsError
from shared.identity import PeerId
from shared.logs import configure_logs
from shared.settings import LogLevelOption, RelayOption, relay_urls

RATES = {"lora": 1e-3, "prompt": 3e-2}
"""Steps of this size suit most models: a prompt has far fewer numbers to move."""
LOSSES = "loss.svg"


def tune(
    data: Annotated[
        Path,
        typer.Option(metavar="FILE", help='Lines of {"messages": [{"role", "content"}, …]} or {"text"}.'),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the result, checkpoints and plot go.")],
    relay: RelayOption = None,
    model: Annotated[
        str, typer.Option(metavar="PATH_OR_HUB_ID", help="The model that the swarm serves.")
    ] = DEMO_MODEL,
    method: Annotated[str, typer.Option(help="lora, or prompt for virtual tokens before the text.")] = "lora",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps in all.")] = 100,
    batch: Annotated[int, typer.Option(min=1, help="Records per step.")] = 8,
    rate: Annotated[
        float | None, typer.Option(help="How far a step goes.", show_default="1e-3 for lora, 3e-2 for prompt")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Of LoRA's matrices.")] = 8,
    virtual_tokens: Annotated[int, typer.Option(min=1, help="Of a prompt.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a record; the rest is cut off.")] = 512,
    every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 25,
    seed: Annotated[int, typer.Option(help="Of the order of records, and of where learning begins.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in DIR.")] = False,
    relay_only: Annotated[bool, typer.Option("--relay-only", help="Open no direct paths.")] = False,
    log_level: LogLevelOption = "warning",
) -> None:
    """Fine-tune a model through a swarm: its layers stay with the peers, what is learnt is yours.

    The result in DIR has the form of PEFT. Ctrl-C stops; --resume goes on from the last checkpoint.
    """
    configure_logs(log_level)
    if method not in RATES:
        raise SettingsError(f"--method {method} is unknown: write lora or prompt")
    records = read_records(data)
    tokenizer = _tokenizer(model, out)
    found = examples(records, tokenizer, length)
    console = Console()
    torch.manual_seed(seed)
    remote = RemoteModel.from_swarm(model, relays=relay_urls(relay), direct=not relay_only)
    try:
        learning = _learning(remote, method, rank, virtual_tokens)
        step = rate if rate is not None else RATES[method]
        plan = Plan(method, steps, min(batch, len(found)), step, seed, len(found))
        job = Job(remote, learning, plan)
        if resume:
            job.resume(out)
        numbers = sum(value.numel() for value in learning.values())
        console.print(f"{len(found)} records; {numbers:,} numbers learn; every other one stays as it is")
        _run(remote, job, found, out, every, console, tokenizer.pad_token_id or 0)
        _save(remote, method, out)
    finally:
        remote.close()
    console.print(f"[green]done[/]: loss {job.losses[-1]:.4f} after {len(job.losses)} steps; see {out}")


def _run(
    remote: Any,  # noqa: ANN401
    job: Job,
    found: list[Example],
    out: Path,
    every: int,
    console: Console,
    blank: int,
) -> None:
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[pace]} steps/s"),
        TimeRemainingColumn(),
        TextColumn("by {task.fields[peers]}"),
    )
    watched = console.is_terminal
    with Progress(*columns, console=console, disable=not watched) as bar:
        done = len(job.losses)
        task = bar.add_task("tune", total=job.plan.steps, completed=done, loss="–", pace="–", peers="–")
        since, begun = time.monotonic(), len(job.losses)
        seen: Counter[str] = Counter(remote.layers.swarm.chain.visits)

        def heard(step: int, loss: float) -> None:
            nonlocal seen
            visits = Counter(remote.layers.swarm.chain.visits)
            peers = ", ".join(sorted(remote.peer_name(PeerId(peer)) for peer in visits - seen))
            seen = visits
            pace = (step - begun) / (time.monotonic() - since)
            bar.update(task, completed=step, loss=f"{loss:.4f}", pace=f"{pace:.2f}", peers=peers)
            if step % every == 0 or step == job.plan.steps:
                write_plot(out / LOSSES, job.losses, f"loss of {remote.source}, {job.plan.method}")
                if not watched:
                    left_s = (job.plan.steps - step) / pace
                    console.print(
                        f"step {step}/{job.plan.steps}: loss {loss:.4f}, {pace:.2f} steps/s,"
                        f" {left_s:.0f} s left, by {peers}"
                    )

        out.mkdir(parents=True, exist_ok=True)
        job.heard = heard
        job.run(found, out, every, blank)


def _learning(
    remote: Any,  # noqa: ANN401
    method: str,
    rank: int,
    virtual_tokens: int,
) -> dict[str, nn.Parameter]:
    if method == "lora":
        return dict(remote.new_lora(rank=rank, alpha=2 * rank).named_parameters())
    return {"prompt": remote.new_prompt(virtual_tokens)}


def _save(remote: Any, method: Literal["lora", "prompt"] | str, out: Path) -> None:  # noqa: ANN401
    if method == "lora":
        remote.lora.save(out, remote.source)
    else:
        save_prompt(remote.prompt, remote.config, out, remote.source)


def _tokenizer(model: str, out: Path) -> Any:  # noqa: ANN401
    """Of the model's own files, which are few and small; weights are not fetched for it."""
    checkpoint = open_checkpoint(model)
    directory = out / "tokenizer"
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer_files(checkpoint).items():
        (directory / name).write_bytes(content)
    auto: Any = AutoTokenizer
    return auto.from_pretrained(directory, trust_remote_code=False)
