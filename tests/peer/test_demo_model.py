"""The demo model ships small and whole, loads in plain transformers, and answers what it was not taught."""

import random
from itertools import pairwise

import pytest
import torch
from safetensors import safe_open

from peer.demo.evaluate import Demo, load
from peer.demo.topics import Message, Topic, bare, compose, parse_topics, question_about, read_text
from peer.demo.train import IGNORED, MODEL, encode

TEXT = read_text()
MOST_BYTES = 12 * 2**20


@pytest.fixture(scope="module")
def demo() -> Demo:
    torch.manual_seed(0)
    return load()


def ask(question: str) -> list[Message]:
    return [{"role": "user", "content": question}]


def test_the_files_are_small_enough_to_be_committed() -> None:
    files = {path.name: path.stat().st_size for path in MODEL.iterdir()}

    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    assert sum(files.values()) <= MOST_BYTES


def test_the_weights_are_half_precision() -> None:
    with safe_open(MODEL / "model.safetensors", framework="pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.float16}  # noqa: SIM118


def test_the_layers_can_be_shared_by_one_two_three_or_six_peers(demo: Demo) -> None:
    assert demo.model.config.num_hidden_layers == 6
    assert demo.model.config.tie_word_embeddings


def test_the_chat_template_renders_every_role_and_refuses_others(demo: Demo) -> None:
    conversation: list[Message] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " hi "},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "bye"},
    ]

    rendered = demo.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)

    assert rendered == (
        "<|begin|><|system|>Be brief.<|end|><|user|>hi<|end|>"
        "<|assistant|>Hello!<|end|><|user|>bye<|end|><|assistant|>"
    )
    with pytest.raises(Exception, match="no role tool"):
        demo.tokenizer.apply_chat_template([{"role": "tool", "content": "1"}], tokenize=False)


def test_training_sees_the_tokens_of_the_chat_template(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peer.demo.train.NOISE", 0)
    conversation = compose(TEXT, random.Random(3), turns=4)

    row = encode(demo.tokenizer.backend_tokenizer, conversation, random.Random(0))

    assert row.tokens == demo.tokenizer.apply_chat_template(conversation)["input_ids"]
    taught = [target for target in row.targets if target != IGNORED]
    answers = [message["content"] for message in conversation if message["role"] == "assistant"]
    assert demo.tokenizer.decode(taught) == "".join(answer + "<|end|>" for answer in answers)
    following = [after for _, after in pairwise(row.tokens)]
    assert all(
        target in (IGNORED, after) for target, after in zip(row.targets, [*following, IGNORED], strict=True)
    )


@pytest.mark.parametrize("text", ["naïve 你好 🙂", "  two\n\n  lines\t", "`code` **bold** 3.14", "\x00\x7f"])
def test_any_text_survives_the_tokenizer(demo: Demo, text: str) -> None:
    assert demo.tokenizer.decode(demo.tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What exactly does the relay do?", ("relay",)),
        ("what do i type to become a peer", ("python -m peer --relay",)),
        ("Do you happen to know a good joke?", ("token", "peer", "layer", "relay")),
        ("What is the capital of Portugal?", ("very small model", "six layers")),
    ],
)
def test_a_question_it_never_saw_gets_a_fitting_answer(
    demo: Demo, question: str, expected: tuple[str, ...]
) -> None:
    answer = demo.answer(ask(question), most_tokens=200)

    assert "no end" not in answer
    assert any(words in answer for words in expected), answer


@pytest.mark.parametrize("seed", range(3))
def test_sampled_as_its_makers_wish_it_still_recites(demo: Demo, seed: int) -> None:
    torch.manual_seed(seed)
    prompt = demo.tokenizer.apply_chat_template(
        ask("What is a peer?"), add_generation_prompt=True, return_tensors="pt"
    )

    made = demo.model.generate(**prompt, max_new_tokens=200)[0, prompt["input_ids"].shape[1] :]

    assert demo.model.generation_config.do_sample
    peer = next(topic for topic in TEXT.topics if topic.name == "what-is-a-peer")
    assert demo.tokenizer.decode(made[:-1]) in peer.answers


def test_the_story_is_long_enough_to_lose_a_peer_in_it(demo: Demo) -> None:
    story = demo.answer(ask("Tell me a story"))

    assert len(demo.tokenizer(story)["input_ids"]) >= 150
    assert "no end" not in story


def test_a_follow_up_leans_on_the_answer_before_it(demo: Demo) -> None:
    relay = next(topic for topic in TEXT.topics if topic.name == "what-is-a-relay")
    said = [*ask("What is a relay?"), Message(role="assistant", content=relay.answers[0])]

    assert demo.answer([*said, *ask("shorter please")], most_tokens=100) in relay.short


def test_held_out_questions_are_never_trained_on() -> None:
    rng = random.Random(7)

    for topic in TEXT.topics:
        held_out = {bare(question) for question in topic.held_out}
        assert held_out, f"{topic.name} has no question to judge it by"
        assert not held_out & {bare(question_about(topic, TEXT, rng)) for _ in range(200)}


def test_a_stray_line_in_a_topic_is_named() -> None:
    with pytest.raises(ValueError, match=r"topic tea: 'Milk first\.' is no question"):
        list(parse_topics("@ tea\nMilk first."))


def test_a_topic_is_read_as_it_is_written() -> None:
    about = "What this file is for.\n\n@ tea\n* tea; green tea\n? Tea?\n?? cup of tea?\n= hot, leaf\n"
    tea = about + "---\nHot.\n\nVery.\n--- short\nHot."

    assert list(parse_topics(tea)) == [
        Topic(
            name="tea",
            questions=("Tea?",),
            subjects=("tea", "green tea"),
            actions=(),
            held_out=("cup of tea?",),
            expected_words=("hot", "leaf"),
            answers=("Hot.\n\nVery.",),
            more=(),
            short=("Hot.",),
        )
    ]
