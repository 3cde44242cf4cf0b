"""Train the demo model: `python -m peer.demo.train`, then again with `--start-from peer/demo/corolla-demo`.

The first run starts from nothing and learns to recite and which answer fits a question. The second one
goes on from there with longer conversations, and learns to find its place in them.

Reads conversations/ and writes a folder that plain transformers loads: tokenizer, chat template, weights.
The same machine, thread count and library versions give the same weights; other processors round
differently, so there the weights differ a little and the answers hardly.
"""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peer.demo.topics import Message, Text, compose, read_text

MODEL = Path(__file__).parent / "corolla-demo"
PAD, BEGIN, END, SYSTEM, USER, ASSISTANT = SPECIAL_TOKENS = [
    "<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>",
]  # fmt: skip
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role in ['system', 'developer'] -%}
        {{- '<|system|>' + message.content | trim + eos_token -}}
    {%- elif message.role in ['user', 'assistant'] -%}
        {{- '<|' + message.role + '|>' + message.content | trim + eos_token -}}
    {%- else -%}
        {{- raise_exception('the demo model knows no role ' + message.role) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""
VOCABULARY = 2048
MAX_POSITIONS = 2048
DRILL_TOKENS, DRILL_ANSWER_TOKENS = 32, 6
LAST_RATE, WARMUP_STEPS = 1e-4, 60
# A user's token is now and then another one: the answer should hang on no single word of the question.
NOISE = 0.03
IGNORED = -100
ANSWER_TEMPERATURE = 0.3
# Tokens and targets.
Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Phase:
    """One run's recipe. A step is conversations, in so many rows of such a length, and drills."""

    steps: int
    peak_rate: float
    rows: tuple[tuple[int, int], ...]
    drills: int
    # How much the first tokens of the answers in conversations count on top of the mean.
    stress: float


FROM_NOTHING = Phase(1500, 2e-3, ((3, 256), (1, 512), (3, 256), (1, 512), (1, 1024)), drills=48, stress=0)
GOING_ON = Phase(500, 8e-4, ((8, 256), (4, 512), (8, 256), (4, 512), (2, 1024)), drills=16, stress=2)


@dataclass(frozen=True)
class Row:
    """A stretch of conversations. Targets are the next tokens where the assistant speaks, else ignored."""

    tokens: list[int]
    targets: list[int]


def train_tokenizer(text: Text, rng: random.Random) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so every input has tokens; learned from conversations as they will be trained on."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    conversations = (compose(text, rng, turns=4) for _ in range(2000))
    tokenizer.train_from_iterator((m["content"] for c in conversations for m in c), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def new_model() -> LlamaForCausalLM:
    """Six layers, because six are easily shared by one, two, three or six peers."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=SPECIAL_TOKENS.index(BEGIN),
        eos_token_id=SPECIAL_TOKENS.index(END),
        pad_token_id=SPECIAL_TOKENS.index(PAD),
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: Tokenizer, conversation: list[Message], rng: random.Random) -> Row:
    """The chat template's tokens, made by hand to know whose they are; a test compares the two."""
    special = {name: number for number, name in enumerate(SPECIAL_TOKENS)}
    tokens, spoken = [special[BEGIN]], [False]
    for message in conversation:
        by_assistant = message["role"] == "assistant"
        content = tokenizer.encode(message["content"]).ids
        if not by_assistant:
            content = [rng.randrange(VOCABULARY) if rng.random() < NOISE else token for token in content]
        tokens += [special[f"<|{message['role']}|>"], *content, special[END]]
        spoken += [False] + [by_assistant] * (len(content) + 1)
    targets = [token if said else IGNORED for token, said in zip(tokens[1:], spoken[1:], strict=True)]
    return Row(tokens, [*targets, IGNORED])


def conversations(tokenizer: Tokenizer, text: Text, rng: random.Random, length: int) -> Iterator[Row]:
    """Endless rows, each one conversation that is as long as the row; its last turn is cut off."""
    while True:
        row = Row([], [])
        turns = length // 64
        while len(row.tokens) < length:
            turns *= 2
            row = encode(tokenizer, compose(text, rng, turns), rng)
        yield Row(row.tokens[:length], row.targets[:length])


def drills(tokenizer: Tokenizer, text: Text, rng: random.Random) -> Iterator[Row]:
    """Endless single questions, each with the first tokens of its answer, filled up to one length.

    Which answer fits is settled in its first tokens; the rest is reciting. Taught by conversations alone,
    one target in sixty told the difference, and most held-out questions got the answer to another one.
    """
    pad = SPECIAL_TOKENS.index(PAD)
    while True:
        row = encode(tokenizer, compose(text, rng, turns=1), rng)
        answer_starts = next(at for at, target in enumerate(row.targets) if target != IGNORED)
        begun = min(answer_starts + DRILL_ANSWER_TOKENS, DRILL_TOKENS)
        room = DRILL_TOKENS - begun
        yield Row(row.tokens[:begun] + [pad] * room, row.targets[: begun - 1] + [IGNORED] * (room + 1))


def batches(tokenizer: Tokenizer, text: Text, rng: random.Random, phase: Phase) -> Iterator[list[Batch]]:
    """For one step after another: a batch of conversations and one of drills."""
    drill_rows = drills(tokenizer, text, rng)
    rows_of = {length: conversations(tokenizer, text, rng, length) for _, length in phase.rows}
    for count, length in itertools.cycle(phase.rows):
        rows = [next(rows_of[length]) for _ in range(count)]
        yield [_batch(rows), _batch([next(drill_rows) for _ in range(phase.drills)])]


def _batch(rows: list[Row]) -> Batch:
    return torch.tensor([row.tokens for row in rows]), torch.tensor([row.targets for row in rows])


def rate_at(step: int, phase: Phase) -> float:
    """Warm up in a straight line, then a cosine down to the last rate."""
    if step < WARMUP_STEPS:
        return phase.peak_rate * (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / max(1, phase.steps - WARMUP_STEPS)
    return LAST_RATE + (phase.peak_rate - LAST_RATE) * (1 + math.cos(math.pi * done)) / 2


def openings_of(spoken: torch.Tensor) -> torch.Tensor:
    """The first tokens of each answer, out of all that the assistant speaks."""
    starts = spoken.clone()
    starts[:, 1:] &= ~spoken[:, :-1]
    openings = starts.clone()
    for later in range(1, DRILL_ANSWER_TOKENS):
        openings[:, later:] |= starts[:, :-later]
    return openings & spoken


def losses_of(model: LlamaForCausalLM, batch: Batch, float32: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean loss over what the assistant says, and over its openings; the head runs for these only."""
    tokens, targets = batch
    spoken = targets != IGNORED
    with torch.autocast("cpu", torch.bfloat16, enabled=not float32):
        hidden_states = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden_states[spoken]).float()
    each = functional.cross_entropy(logits, targets[spoken], reduction="none")
    return each.mean(), each[openings_of(spoken)[spoken]].mean()


def train(
    model: LlamaForCausalLM, tokenizer: Tokenizer, text: Text, seed: int, phase: Phase, float32: bool
) -> float:
    """AdamW over endless conversations, with a bar on screen. Returns the smoothed loss of the last steps."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05)
    source = batches(tokenizer, text, random.Random(seed), phase)
    smooth = math.log(VOCABULARY)
    with Progress("loss {task.fields[loss]:.3f}", *Progress.get_default_columns()) as progress:
        bar = progress.add_task("train", total=phase.steps, loss=smooth)
        for step in range(phase.steps):
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, phase)
            talk, drill = next(source)
            said, opened = losses_of(model, talk, float32)
            drilled, _ = losses_of(model, drill, float32)
            ((said + drilled) / 2 + phase.stress * opened).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            smooth += (((said + drilled) / 2).item() - smooth) * (0.02 if step > 50 else 0.2)
            progress.update(bar, advance=1, loss=smooth)
            if step % 100 == 99:
                parts = f"conversations {said:.3f}, their openings {opened:.3f}, drills {drilled:.3f}"
                progress.console.print(f"step {step + 1}: loss {smooth:.3f} ({parts})")
    return smooth


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Half precision halves the files; greedy answers stay the same."""
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # It recites: what it would say at temperature 1 is no English.
        do_sample=True,
        temperature=ANSWER_TEMPERATURE,
    )
    model.half().save_pretrained(out)  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(out)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the trained files.")] = MODEL,
    start_from: Annotated[Path | None, typer.Option(help="Go on from a trained folder.")] = None,
    steps: Annotated[int | None, typer.Option(help="Instead of the phase's own number.")] = None,
    seed: Annotated[int, typer.Option(help="Another seed gives other weights.")] = 1,
    threads: Annotated[int, typer.Option(help="Another count may round differently.")] = 1,
    float32: Annotated[bool, typer.Option(help="For processors without bfloat16 arithmetic.")] = False,
) -> None:
    """Train the demo model and write it to a folder."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    text = read_text()
    if start_from:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(start_from)
        model = LlamaForCausalLM.from_pretrained(start_from, dtype=torch.float32)
        phase = GOING_ON
        seed += 1  # other conversations than those of the first run
    else:
        tokenizer = train_tokenizer(text, random.Random(seed))
        model = new_model()
        phase = FROM_NOTHING
    phase = replace(phase, steps=steps or phase.steps)
    loss = train(model, tokenizer.backend_tokenizer, text, seed, phase, float32)
    save(model, tokenizer, out)
    print(f"{out}: loss {loss:.4f} after {phase.steps} steps")


if __name__ == "__main__":
    typer.run(main)
