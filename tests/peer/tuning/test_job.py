"""A fine-tuning through a swarm goes as on the unsplit model, and goes on where it was interrupted."""

from __future__ import annotations

import json
import os
import signal
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from peer.__main__ import app
from peer.remote import RemoteModel
from peer.remote.background_loop import BackgroundLoop
from peer.remote.prompts import save_prompt
from peer.settings import DEMO_MODEL
from peer.tuning.job import Job, Plan
from peer.tuning.plot import loss_plot
from peer.tuning.records import Example, examples, read_records
from shared.errors import SettingsError
from tests.harness.processes import ProcessSwarm
from tests.peer.model.families import LAYERS, random_tokens, tiny
from tests.peer.remote.room import Room, close

Crew = tuple[BackgroundLoop, ProcessSwarm]
STEPS = 10
TOPICS = ["the sea", "a ship", "the wind", "gold", "rum", "a parrot", "the moon", "a map"]


def written(folder: Path) -> Path:
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"Tell me about {topic}."},
                {"role": "assistant", "content": f"Arr, {topic} be what every pirate loves, matey!"},
            ]
        }
        for topic in TOPICS
    ]
    path = folder / "data.jsonl"
    path.write_text("\n".join(json.dumps(chat) for chat in chats))
    return path


def demo_examples(folder: Path) -> list[Example]:
    auto: Any = AutoTokenizer
    return examples(read_records(written(folder)), auto.from_pretrained(DEMO_MODEL), 128)


def whole_model() -> Any:  # noqa: ANN401
    auto: Any = AutoModelForCausalLM
    return auto.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()


def plan(method: str, rate: float, count: int, steps: int = STEPS) -> Plan:
    return Plan(method, steps, 4, rate, 0, count)


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    """Three peers with a third each, in processes of their own, and who can take the place of two of them."""
    loop = BackgroundLoop()
    swarm = loop.run(_entered(tmp_path_factory.mktemp("crew")))
    for name, layers in {"ann": "0:2", "bob": "2:4", "eve": "4:6"}.items():
        loop.run(swarm.start(name, layers))
    yield loop, swarm
    loop.run(swarm.__aexit__(None, None, None))
    loop.stop()


async def _entered(folder: Path) -> ProcessSwarm:
    return await ProcessSwarm(Path(DEMO_MODEL), folder).__aenter__()


def run_with_kills(
    crew: Crew,
    job: Job,
    found: list[Example],
    kills: dict[int, tuple[str, str]],
) -> None:
    """After those steps a peer is killed, in the middle of the next step, where another has its layers."""
    loop, swarm = crew
    for name, layers in kills.values():
        loop.run(swarm.start(f"{name}-too", layers))

    def heard(step: int, loss: float) -> None:
        if step in kills:
            process = swarm.children.pop(kills[step][0]).process
            threading.Timer(0.05, os.kill, (process.pid, signal.SIGKILL)).start()

    job.heard = heard
    job.run(found, None, 1000)


def within_a_percent(mine: list[float], theirs: list[float]) -> None:
    assert len(mine) == len(theirs) == STEPS
    assert all(abs(one - other) <= 0.01 * other for one, other in zip(mine, theirs, strict=True)), (
        mine,
        theirs,
    )
    assert theirs[-1] < 0.8 * theirs[0]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_lora_and_prompt_learn_as_on_the_unsplit_model(crew: Crew, tmp_path: Path) -> None:
    found = demo_examples(tmp_path)
    remote: Any = RemoteModel.from_swarm(DEMO_MODEL, relays=[crew[1].relay_url])
    try:
        torch.manual_seed(0)
        lora = remote.new_lora(rank=8, alpha=16)
        lora.save(tmp_path / "begun", "demo")
        job = Job(remote, dict(lora.named_parameters()), plan("lora", 5e-3, len(found)))
        run_with_kills(crew, job, found, {3: ("bob", "2:4"), 7: ("ann", "0:2")})
        assert remote.layers.swarm.chain.rerouted > 0

        theirs: Any = PeftModel.from_pretrained(whole_model(), tmp_path / "begun", is_trainable=True)
        learning = {name: one for name, one in theirs.named_parameters() if one.requires_grad}
        unsplit = Job(theirs, learning, plan("lora", 5e-3, len(found)))
        unsplit.run(found, None, 1000)
        within_a_percent(job.losses, unsplit.losses)

        remote.lora = None
        prompt = remote.new_prompt(8)
        tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)
        theirs = get_peft_model(whole_model(), tuning)
        theirs.prompt_encoder["default"].embedding.weight.data.copy_(prompt.detach())
        job = Job(remote, {"prompt": prompt}, plan("prompt", 5e-2, len(found)))
        before = remote.layers.swarm.chain.rerouted
        run_with_kills(crew, job, found, {2: ("bob-too", "2:4"), 6: ("ann-too", "0:2")})
        assert remote.layers.swarm.chain.rerouted > before
        learning = {name: one for name, one in theirs.named_parameters() if one.requires_grad}
        unsplit = Job(theirs, learning, plan("prompt", 5e-2, len(found)))
        unsplit.run(found, None, 1000)
        within_a_percent(job.losses, unsplit.losses)
    finally:
        remote.close()


def small_job(model: Any, steps: int) -> tuple[Job, list[Example]]:  # noqa: ANN401
    torch.manual_seed(0)
    lora = model.new_lora(rank=2)
    found = [Example(random_tokens(8).tolist(), [True] * 8) for _ in range(6)]
    return Job(model, dict(lora.named_parameters()), plan("lora", 1e-2, 6, steps)), found


def test_a_job_goes_on_from_its_checkpoint_as_if_nothing_had_been(tmp_path: Path) -> None:
    with Room(tiny("llama").directory, ann=(0, 3), bob=(3, LAYERS)) as room:
        remote = room.remote()
        job, found = small_job(remote, 6)
        job.run(found, None, 1000)
        first, _ = small_job(remote, 4)
        first.run(found, tmp_path, 2)
        again, _ = small_job(remote, 6)
        again.resume(tmp_path)
        again.run(found, tmp_path, 2)

        assert again.losses == pytest.approx(job.losses, rel=1e-6)
        for name, value in again.learning.items():
            close(value.detach(), job.learning[name].detach())
        other = Job(remote, again.learning, plan("lora", 0.5, 6))
        with pytest.raises(SettingsError, match=r"made with rate 0\.01, not 0\.5"):
            other.resume(tmp_path)
        with pytest.raises(SettingsError, match="holds no checkpoint"):
            again.resume(tmp_path / "nothing")


def test_a_prompt_of_ours_is_one_of_peft(tmp_path: Path) -> None:
    model = tiny("llama")
    ids = random_tokens(2, 7)
    with Room(model.directory, ann=(0, LAYERS)) as room:
        remote = room.remote()
        save_prompt(remote.new_prompt(5), remote.config, tmp_path, "tiny")
        remote.load_prompt(tmp_path)
        with torch.no_grad():
            found = remote(ids).logits
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        drawn = remote.generate(ids, **options)

    auto: Any = AutoModelForCausalLM
    theirs: Any = PeftModel.from_pretrained(
        auto.from_pretrained(model.directory, dtype=torch.float32), tmp_path
    )
    with torch.no_grad():
        close(found, theirs(ids).logits[:, 5:])
    assert torch.equal(drawn, theirs.generate(input_ids=ids, **options))


def test_the_command_teaches_the_model_and_draws_its_losses(tmp_path: Path) -> None:
    with Room(Path(DEMO_MODEL), ann=(0, 6)) as room:
        command = ["tune", "--relay", room.swarm.relay_urls[0], "--data", str(written(tmp_path))]
        command += ["--out", str(tmp_path / "out"), "--batch", "4", "--every", "2", "--rank", "2"]

        first = CliRunner().invoke(app, [*command, "--steps", "2"])
        then = CliRunner().invoke(app, [*command, "--steps", "4", "--resume"])

    assert first.exit_code == 0, first.output
    assert then.exit_code == 0, then.output
    assert "step 2/2: loss" in first.output
    assert "by ann" in first.output
    assert "step 4/4: loss" in then.output
    assert "step 2/" not in then.output
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2
    picture = ElementTree.parse(tmp_path / "out" / "loss.svg").getroot()
    [curve] = picture.iter("{http://www.w3.org/2000/svg}polyline")
    assert len(curve.get("points", "").split()) == 4


def test_the_plot_of_one_step_is_a_picture_too() -> None:
    ElementTree.fromstring(loss_plot([1.0], "a < b & c"))
