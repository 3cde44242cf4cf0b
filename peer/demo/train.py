"""Train the demo model from nothing: `python -m peer.demo.train [--out DIR] [--steps N]`.

Reads conversations/ and writes a folder that plain transformers loads: tokenizer, chat template, weights.
The same machine, thread count and library versions give the same weights; other processors round
differently, so there the weights differ a little and the answers hardly.
"""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peer.demo.topics import Message, Text, compose, read_text

MODEL = Path(__file__).parent / "model"
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
# A step is a batch of conversations, in so many rows of such a length, and a batch of drills.
ROWS = ((3, 256), (1, 512), (3, 256), (1, 512), (1, 1024))
DRILLS, DRILL_TOKENS, DRILL_ANSWER_TOKENS = 48, 32, 6
PEAK_RATE, LAST_RATE, WARMUP_STEPS = 2e-3, 1e-4, 60
# A user's token is now and then another one: the answer should hang on no single word of the question.
NOISE = 0.03
IGNORED = -100
# Tokens and targets.
Batch = tuple[torch.Tensor, torch.Tensor]


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


def batches(tokenizer: Tokenizer, text: Text, rng: random.Random) -> Iterator[list[Batch]]:
    """For one step after another: a batch of conversations and one of drills."""
    drill_rows = drills(tokenizer, text, rng)
    rows_of = {length: conversations(tokenizer, text, rng, length) for _, length in ROWS}
    for count, length in itertools.cycle(ROWS):
        rows = [next(rows_of[length]) for _ in range(count)]
        yield [_batch(rows), _batch([next(drill_rows) for _ in range(DRILLS)])]


def _batch(rows: list[Row]) -> Batch:
    return torch.tensor([row.tokens for row in rows]), torch.tensor([row.targets for row in rows])


def rate_at(step: int, steps: int) -> float:
    """Warm up in a straight line, then a cosine down to the last rate."""
    if step < WARMUP_STEPS:
        return PEAK_RATE * (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return LAST_RATE + (PEAK_RATE - LAST_RATE) * (1 + math.cos(math.pi * done)) / 2


def loss_of(model: LlamaForCausalLM, tokens: torch.Tensor, targets: torch.Tensor, low: bool) -> torch.Tensor:
    """Mean loss over what the assistant says; the head runs for those positions only."""
    spoken = targets != IGNORED
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        hidden_states = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden_states[spoken])
    return functional.cross_entropy(logits.float(), targets[spoken])


def train(
    model: LlamaForCausalLM, tokenizer: Tokenizer, text: Text, seed: int, steps: int, low: bool
) -> float:
    """AdamW over endless conversations, with a bar on screen. Returns the loss of the last steps."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05)
    source = batches(tokenizer, text, random.Random(seed))
    smooth = math.log(VOCABULARY)
    with Progress("loss {task.fields[loss]:.3f}", *Progress.get_default_columns()) as progress:
        bar = progress.add_task("train", total=steps, loss=smooth)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, steps)
            losses = [loss_of(model, *batch, low) for batch in next(source)]
            loss = torch.stack(losses).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            smooth += (loss.item() - smooth) * (0.02 if step > 50 else 0.2)
            progress.update(bar, advance=1, loss=smooth)
            if step % 100 == 99:
                said, drilled = (part.item() for part in losses)
                progress.console.print(
                    f"step {step + 1}: loss {smooth:.3f} (conversations {said:.3f}, drills {drilled:.3f})"
                )
    return smooth


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Half precision halves the files; greedy answers stay the same."""
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.half().save_pretrained(out)  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(out)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the trained files.")] = MODEL,
    steps: Annotated[int, typer.Option(help="Steps of about 2250 tokens.")] = 1500,
    seed: Annotated[int, typer.Option(help="Another seed gives other weights.")] = 1,
    threads: Annotated[int, typer.Option(help="Processor threads; another count may round differently.")] = 2,
    float32: Annotated[bool, typer.Option(help="For processors without bfloat16 arithmetic.")] = False,
) -> None:
    """Train the demo model and write it to a folder."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    text = read_text()
    tokenizer = train_tokenizer(text, random.Random(seed))
    model = new_model()
    loss = train(model, tokenizer.backend_tokenizer, text, seed, steps, low=not float32)
    save(model, tokenizer, out)
    print(f"{out}: loss {loss:.4f} after {steps} steps")


if __name__ == "__main__":
    typer.run(main)
