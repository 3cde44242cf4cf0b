"""Read the conversations the demo model learns and compose new ones from them. No torch here.

A topic is a list of questions that share answers, so one page of text makes millions of conversations:
any question with any answer, in any order, with the slips people make when they type.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

CONVERSATIONS = Path(__file__).parent / "conversations"
# Topics whose name is a kind of answer: their questions lean on the answer before them.
FOLLOW_UPS = ("more", "short", "again")
NO_QUESTIONS = ("nothing-more", "nothing-before")
FRAMES = ("about-a-subject", "about-an-action")
# How often a topic that has subjects or actions is asked about through a frame.
FRAMED = 0.4


class Message(TypedDict):
    """One turn, in the form every chat template takes."""

    role: str
    content: str


@dataclass(frozen=True)
class Topic:
    """Questions that share answers. Held-out questions are never trained on."""

    name: str
    questions: tuple[str, ...]
    subjects: tuple[str, ...]
    actions: tuple[str, ...]
    held_out: tuple[str, ...]
    expected_words: tuple[str, ...]
    answers: tuple[str, ...]
    more: tuple[str, ...]
    short: tuple[str, ...]

    @property
    def weight(self) -> float:
        """How often the topic comes up: a topic with many questions needs more turns to learn them."""
        asked = len(self.questions) + (len(self.subjects) + len(self.actions)) // 2
        return min(6.0, max(0.7, asked / 16))


@dataclass(frozen=True)
class Text:
    """Everything the demo model learns from."""

    topics: tuple[Topic, ...]
    follow_ups: dict[str, Topic]
    frames: dict[str, Topic]
    nothing_more: tuple[str, ...]
    nothing_before: tuple[str, ...]
    systems: tuple[str, ...]


@dataclass
class _Draft:
    name: str
    questions: list[str] = field(default_factory=list)
    subjects: list[str] = field(default_factory=list)
    actions: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    expected_words: list[str] = field(default_factory=list)
    answers: dict[str, list[list[str]]] = field(default_factory=lambda: {"": [], "more": [], "short": []})

    def finish(self) -> Topic:
        def texts(kind: str) -> tuple[str, ...]:
            return tuple("\n".join(lines).strip() for lines in self.answers[kind])

        return Topic(
            self.name,
            tuple(self.questions),
            tuple(self.subjects),
            tuple(self.actions),
            tuple(self.held_out),
            tuple(self.expected_words),
            texts(""),
            texts("more"),
            texts("short"),
        )


def parse_topics(text: str) -> Iterator[Topic]:
    """Read the format that README.md explains."""
    draft: _Draft | None = None
    answer: list[str] | None = None
    for line in text.splitlines():
        mark, _, rest = line.partition(" ")
        if mark == "@":
            if draft:
                yield draft.finish()
            draft, answer = _Draft(rest), None
        elif draft is None:
            continue  # the lines before the first topic say what the file is for
        elif mark == "---":
            if rest not in draft.answers:
                raise ValueError(f"topic {draft.name}: {line!r} should be '---', '--- more' or '--- short'")
            answer = []
            draft.answers[rest].append(answer)
        elif answer is not None:
            answer.append(line)
        elif mark == "?":
            draft.questions.append(rest)
        elif mark == "??":
            draft.held_out.append(rest)
        elif mark == "*":
            draft.subjects.extend(rest.split("; "))
        elif mark == "+":
            draft.actions.extend(rest.split("; "))
        elif mark == "=":
            draft.expected_words.extend(rest.split(", "))
        elif line.strip():
            raise ValueError(f"topic {draft.name}: {line!r} is no question, and no answer has begun")
    if draft:
        yield draft.finish()


def read_text(folder: Path = CONVERSATIONS) -> Text:
    """Read every file of the folder, in the order of their names."""
    found: dict[str, Topic] = {}
    for path in sorted(folder.glob("*.txt")):
        for topic in parse_topics(path.read_text(encoding="utf-8")):
            if topic.name in found:
                raise ValueError(f"{path}: a topic {topic.name} is there already")
            found[topic.name] = topic
    system_lines = (folder / "system.txt").read_text(encoding="utf-8").splitlines()
    return Text(
        topics=tuple(t for name, t in found.items() if name not in FOLLOW_UPS + NO_QUESTIONS + FRAMES),
        follow_ups={name: found[name] for name in FOLLOW_UPS},
        frames={name: found[name] for name in FRAMES},
        nothing_more=found["nothing-more"].answers,
        nothing_before=found["nothing-before"].answers,
        systems=tuple(line.removeprefix("- ") for line in system_lines if line.startswith("- ")),
    )


def fill_braces(question: str, rng: random.Random) -> str:
    """Draw one word from each `{a|b|c}`."""
    return re.sub(r"\{([^}]*)\}", lambda braces: rng.choice(braces[1].split("|")), question)


def question_about(topic: Topic, text: Text, rng: random.Random) -> str:
    """One of the topic's own questions, or a frame around its subject or action; never a held-out one."""
    named = [(FRAMES[0], thing) for thing in topic.subjects] + [(FRAMES[1], thing) for thing in topic.actions]
    if named and rng.random() < FRAMED:
        name, thing = rng.choice(named)
        framed = rng.choice(text.frames[name].questions).replace("_", thing)
        if bare(framed) not in {bare(question) for question in topic.held_out}:
            return framed
    return fill_braces(rng.choice(topic.questions), rng)


def bare(question: str) -> str:
    """What counts as the same question: case and the last sign do not."""
    return question.lower().strip(" ?.!")


OPENINGS = (
    "hey, ", "Hey! ", "so ", "So, ", "ok, ", "Okay, ", "please ", "Please tell me: ", "one question: ",
    "Hi! ", "hello, ", "Hello! ", "well, ", "and ", "but ", "I wonder, ", "Sorry, ", "can you tell me: ",
    "quick question: ", "Thanks. ", "could you tell me, ", "I would like to know: ", "just curious, ",
    "I am new here. ", "hmm, ", "ah, ", "Good. ", "would you please say: ", "dear Corolla, ",
)  # fmt: skip
ENDINGS = (" please", " pls", "?", "??", "!", ".", " thanks", ", please", ", thank you", " :)", "...")
SHORTHAND = (
    ("you", "u"), ("are", "r"), ("please", "pls"), ("what's", "whats"), ("don't", "dont"), ("your", "ur"),
    ("What is", "What's"), ("what is", "whats"), ("I am", "im"), ("because", "cause"), ("and", "&"),
    ("what does", "what do"), ("explain", "describe"), ("tell me", "let me know"), ("How do I", "how to"),
    ("how do i", "how can i"), ("machine", "computer"), ("computer", "pc"), ("machines", "computers"),
    ("Corolla", "this"), ("can you", "could you"), ("Can you", "Would you"), ("show me", "give me"),
)  # fmt: skip


def typed_by_hand(question: str, rng: random.Random) -> str:
    """The question as somebody might type it: openings, small letters, shorthand, lost words, slips."""
    if rng.random() < 0.3:
        word, short = rng.choice(SHORTHAND)
        question = re.sub(rf"\b{re.escape(word)}\b", short, question)
    words = question.split(" ")
    if len(words) > 4 and rng.random() < 0.12:
        del words[rng.randrange(len(words))]
        question = " ".join(words)
    if rng.random() < 0.3:
        question = question.rstrip("?.!")
    if rng.random() < 0.15:
        question = question.rstrip("?.!") + rng.choice(ENDINGS)
    if rng.random() < 0.2:
        question = rng.choice(OPENINGS) + question[:1].lower() + question[1:]
    if rng.random() < 0.35:
        question = question.lower()
    elif rng.random() < 0.3:
        question = question[:1].upper() + question[1:]
    elif rng.random() < 0.03:
        question = question.upper()
    if len(question) > 8 and rng.random() < 0.2:
        question = _with_slip(question, rng)
    return question


def _with_slip(text: str, rng: random.Random) -> str:
    at = rng.randrange(1, len(text) - 1)
    match rng.randrange(3):
        case 0:
            return text[:at] + text[at + 1 :]
        case 1:
            return text[:at] + text[at] + text[at:]
        case _:
            return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


def compose(text: Text, rng: random.Random, turns: int) -> list[Message]:
    """One conversation of so many questions and answers."""
    messages: list[Message] = []

    def say(question: str, answer: str) -> None:
        messages.append({"role": "user", "content": typed_by_hand(question, rng)})
        messages.append({"role": "assistant", "content": answer})

    if rng.random() < 0.2:
        messages.append({"role": "system", "content": rng.choice(text.systems)})
    weights = [topic.weight for topic in text.topics]
    topic: Topic | None = None
    unsaid: list[str] = []
    for _ in range(turns):
        kind = rng.choice(FOLLOW_UPS) if rng.random() < (0.35 if topic else 0.04) else ""
        if kind == "short" and topic and not topic.short:
            kind = ""
        if not kind:
            topic = rng.choices(text.topics, weights)[0]
            answer = rng.choice(topic.answers)
            say(question_about(topic, text, rng), answer)
            # "more" gives what was written for it, else another answer, and says so when there is none.
            unsaid = list(topic.more) or [other for other in topic.answers if other != answer][:1]
            continue
        question = rng.choice(text.follow_ups[kind].questions)
        if topic is None:
            say(question, rng.choice(text.nothing_before))
        elif kind == "more":
            say(question, unsaid.pop(0) if unsaid else rng.choice(text.nothing_more))
        elif kind == "short":
            say(question, rng.choice(topic.short))
        else:
            say(question, messages[-1]["content"])
    return messages
