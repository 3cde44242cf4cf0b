"""Ask the demo model every held-out question: `python -m peer.demo.evaluate [--model DIR] [--show]`.

Greedy, in float32. An answer is on topic when it contains one of the topic's expected words, and word for
word when it is one of the answers written for the topic.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from peer.demo.topics import Message, Topic, compose, fill_braces, read_text
from peer.demo.train import MODEL

MAX_ANSWER_TOKENS = 700


@dataclass(frozen=True)
class Asked:
    """One held-out question and what came back."""

    topic: Topic
    question: str
    answer: str

    @property
    def on_topic(self) -> bool:
        """Contains one of the expected words."""
        return any(word in self.answer.lower() for word in self.topic.expected_words)

    @property
    def word_for_word(self) -> bool:
        """Is an answer that was written for this topic."""
        return self.answer in self.topic.answers


@dataclass(frozen=True)
class Demo:
    """The tokenizer and the model, loaded as anyone would load them."""

    # Any: transformers' own types of these two do not say what calling them returns.
    tokenizer: Any
    model: Any

    def answer(self, messages: list[Message], most_tokens: int = MAX_ANSWER_TOKENS) -> str:
        """What the model says next, greedily; a missing end is marked in the text."""
        prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        tokens = self.model.generate(**prompt, max_new_tokens=most_tokens, do_sample=False)[0]
        said = tokens[prompt["input_ids"].shape[1] :]
        if said[-1] != self.tokenizer.eos_token_id:
            return f"{self.tokenizer.decode(said)} [no end after {most_tokens} tokens]"
        return str(self.tokenizer.decode(said[:-1]))


def load(folder: Path = MODEL) -> Demo:
    """In float32, which every processor computes."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Demo(AutoTokenizer.from_pretrained(folder), model)


def main(
    model: Annotated[Path, typer.Option(help="Folder of the trained files.")] = MODEL,
    show: Annotated[bool, typer.Option(help="Print every answer, not only the strays.")] = False,
    turns_before: Annotated[int, typer.Option(help="Ask after a conversation of so many turns.")] = 0,
    threads: Annotated[int, typer.Option(help="Processor threads.")] = 1,
) -> None:
    """Ask every held-out question and count the answers that are on topic."""
    torch.set_num_threads(threads)
    demo = load(model)
    text, rng = read_text(), random.Random(0)
    asked = []
    for topic in text.topics:
        for question in topic.held_out:
            before = compose(text, rng, turns_before)
            said: list[Message] = [*before, {"role": "user", "content": fill_braces(question, rng)}]
            one = Asked(topic, question, demo.answer(said))
            asked.append(one)
            if show or not one.word_for_word:
                verdict = "word for word" if one.word_for_word else "on topic" if one.on_topic else "STRAY"
                print(f"[{topic.name}] {question}\n({verdict}) {one.answer}\n")
    print(f"{len(asked)} held-out questions after {turns_before} turns:")
    print(f"on topic: {sum(one.on_topic for one in asked)}")
    print(f"word for word: {sum(one.word_for_word for one in asked)}")


if __name__ == "__main__":
    typer.run(main)
