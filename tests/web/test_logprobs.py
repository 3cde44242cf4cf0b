"""The bytes of all tokens told are the bytes of the text told, however it was cut."""

from __future__ import annotations

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from shared.protocol import Likelihood
from tests.harness.fake_swarm import FakeSwarm
from tests.harness.tokenizers import byte_fallback, byte_level, chat_files
from tests.web.api import chat, chunks, content, post
from web.logprobs import TokenText, TokenTexts
from web.text import Detokenizer, StopStrings
from web.tokenizer import ModelTokenizer, load_tokenizer

TEXT = "Grüße 😀, the petals make a corolla."


@pytest.fixture(scope="module", params=[byte_level, byte_fallback])
def both(request: pytest.FixtureRequest) -> tuple[Tokenizer, ModelTokenizer]:
    tokenizer = request.param()
    return tokenizer, load_tokenizer(chat_files(tokenizer))


def told(tokens: list[int], model: ModelTokenizer, stops: list[str]) -> tuple[str, list[TokenText]]:
    detokenizer, ending, texts = Detokenizer(model.decode), StopStrings(stops), TokenTexts(model.token_bytes)
    text, out = "", []
    for token in tokens:
        certain = detokenizer.push(token)
        texts.add(Likelihood(token, -1.0), certain)
        piece = ending.push(certain)
        text += piece
        out += texts.tell(piece)
        if ending.hit:
            break
    else:
        certain = detokenizer.finish()
        texts.settle(certain)
        piece = ending.push(certain) + ending.finish()
        text += piece
        out += texts.tell(piece)
    return text, out + texts.finish()


@settings(deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" theé😀"), max_size=20),
    st.lists(st.text(" theé", min_size=1, max_size=3), max_size=2),
)
def test_bytes_of_tokens_are_the_bytes_of_the_text(
    both: tuple[Tokenizer, ModelTokenizer], text: str, stops: list[str]
) -> None:
    tokenizer, model = both
    said, texts = told(tokenizer.encode(text).ids, model, stops)
    assert b"".join(each.raw for each in texts) == said.encode()
    if "\N{REPLACEMENT CHARACTER}" not in said:
        assert "".join(each.text for each in texts) == said


@settings(deadline=None)
@given(st.lists(st.integers(5, 299), max_size=20))
def test_also_when_a_model_draws_nonsense(both: tuple[Tokenizer, ModelTokenizer], tokens: list[int]) -> None:
    _, model = both
    said, texts = told(tokens, model, [])
    assert b"".join(each.raw for each in texts) == said.encode()


async def test_a_chat_tells_how_likely_its_tokens_were(http: aiohttp.ClientSession, swarm: FakeSwarm) -> None:
    swarm.say(TEXT)
    _, answer, _ = await post(http, chat(logprobs=True, top_logprobs=3))
    entries = answer["choices"][0]["logprobs"]["content"]
    assert len(entries) == len(swarm.tokenizer.encode(TEXT).ids)
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == TEXT
    assert "".join(entry["token"] for entry in entries) == TEXT
    assert all(len(entry["top_logprobs"]) == 3 for entry in entries)
    assert all(entry["top_logprobs"][0]["logprob"] == entry["logprob"] for entry in entries)
    assert swarm.requests[0].sampling.likelihoods == 3

    swarm.say(TEXT)
    stream = await chunks(http, chat(logprobs=True, stream=True))
    streamed = [
        entry for chunk in stream for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in entries]
    assert content(stream) == TEXT


async def test_biases_and_seeds_reach_the_swarm(http: aiohttp.ClientSession, swarm: FakeSwarm) -> None:
    _, answer, _ = await post(http, chat(logit_bias={"7": -100, "9": 2.5}, n=3, seed=40))
    biases = [(bias.token, bias.add) for bias in swarm.requests[0].sampling.logit_bias]
    assert biases == [(7, -100), (9, 2.5)]
    assert [request.sampling.seed for request in swarm.requests] == [40, 41, 42]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 3 * (len(swarm.tokenizer.encode("Hello.").ids) + 1)


async def test_a_stream_of_several_answers_names_each(http: aiohttp.ClientSession, swarm: FakeSwarm) -> None:
    swarm.say("one")
    swarm.say("two")
    stream = await chunks(http, chat(stream=True, n=2, stream_options={"include_usage": True}))
    for index, text in enumerate(("one", "two")):
        choices = [each for chunk in stream for each in chunk["choices"] if each["index"] == index]
        assert choices[0]["delta"]["role"] == "assistant"
        assert "".join(each["delta"].get("content", "") for each in choices) == text
        assert choices[-1]["finish_reason"] == "stop"
    assert len(stream[-1]["choices"]) == 0


async def test_a_swarm_that_does_not_tell_is_an_error_and_no_invention(
    http: aiohttp.ClientSession, swarm: FakeSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.harness.fake_swarm.likelihood", lambda token, top: None)
    status, answer, _ = await post(http, chat(logprobs=True))
    assert (status, answer["error"]["code"]) == (502, "protocol_error")


async def test_top_logprobs_come_with_logprobs(http: aiohttp.ClientSession) -> None:
    for fields in ({"top_logprobs": 2}, {"logprobs": True, "top_logprobs": 21}):
        status, answer, _ = await post(http, chat(**fields))
        assert (status, answer["error"]["param"]) == (400, "top_logprobs")
