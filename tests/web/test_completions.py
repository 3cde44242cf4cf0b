"""POST /v1/completions, and what lm-eval needs beside it."""

from __future__ import annotations

from typing import Any

import aiohttp
import openai
import orjson
import pytest

from tests.harness.fake_swarm import FakeSwarm, Raw, Say, Stop, likelihood
from tests.web.api import Json

PATH = "/v1/completions"
TEXT = "The petals of a flower 😀 make its corolla."


def body(**fields: object) -> Json:
    return {"model": "petal", "prompt": "Hello", **fields}


async def post(http: aiohttp.ClientSession, **fields: object) -> tuple[int, Json]:
    async with http.post(PATH, json=body(**fields)) as response:
        return response.status, await response.json()


async def test_a_text_is_continued(http: aiohttp.ClientSession, swarm: FakeSwarm) -> None:
    swarm.say(TEXT)
    status, answer = await post(http, max_tokens=100)
    assert status == 200 and answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}]
    (request,) = swarm.requests
    assert list(request.prompt) == swarm.tokenizer.encode("Hello").ids
    assert answer["usage"]["prompt_tokens"] == len(request.prompt)


async def test_without_a_limit_it_is_sixteen_tokens(http: aiohttp.ClientSession, swarm: FakeSwarm) -> None:
    await post(http)
    assert swarm.requests[0].max_new_tokens == 16


async def test_prompts_may_be_texts_or_tokens_and_several(
    http: aiohttp.ClientSession, swarm: FakeSwarm
) -> None:
    for prompt, expected in (
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        (["a", [7, 8]], [swarm.tokenizer.encode("a").ids, [7, 8]]),
    ):
        swarm.requests.clear()
        _, answer = await post(http, prompt=prompt, n=2, seed=5)
        assert [list(request.prompt) for request in swarm.requests] == [
            each for each in expected for _ in range(2)
        ]
        assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(expected)))
        assert [request.sampling.seed for request in swarm.requests] == [5, 6] * len(expected)


@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_lm_eval_s_question_is_answered_with_how_likely_every_token_was(
    http: aiohttp.ClientSession, swarm: FakeSwarm, max_tokens: int
) -> None:
    """Its request as recorded, and what it reads of the answer."""
    contexts = [[20, 21, 22, 23], [30, 31, 32]]
    swarm.script(Raw([40]))
    swarm.script(Stop())
    _, answer = await post(
        http, prompt=contexts, temperature=0, max_tokens=max_tokens, logprobs=1, seed=1234, echo=True
    )
    for choice, tokens in zip(answer["choices"], contexts, strict=True):
        told = choice["logprobs"]
        assert told["token_logprobs"][0] is None
        assert told["token_logprobs"][1 : len(tokens)] == [
            likelihood(token, 1).logprob for token in tokens[1:]
        ]
        assert len(told["token_logprobs"]) == len(tokens) + max_tokens
        assert {len(told[key]) for key in ("tokens", "top_logprobs", "text_offset")} == {
            len(tokens) + max_tokens
        }
        greedy = zip(told["token_logprobs"][1:], told["top_logprobs"][1:], strict=True)
        assert all(logprob == max(top.values()) for logprob, top in greedy)
    request = swarm.requests[0]
    assert request.sampling.prompt_likelihoods and request.sampling.likelihoods == 1
    assert request.max_new_tokens == 1
    assert answer["usage"]["completion_tokens"] == 2 * max_tokens


async def test_echo_gives_the_prompt_back(http: aiohttp.ClientSession, swarm: FakeSwarm) -> None:
    swarm.say(" there")
    _, answer = await post(http, echo=True)
    assert answer["choices"][0]["text"] == "Hello there"
    swarm.say(" there")
    _, answer = await post(http, echo=True, logprobs=0)
    told = answer["choices"][0]["logprobs"]
    assert "".join(told["tokens"][:-1]) == "Hello there"
    offsets = [len("".join(told["tokens"][:place])) for place in range(len(told["tokens"]))]
    assert told["text_offset"] == offsets


async def test_a_stream_tells_the_same_in_pieces(http: aiohttp.ClientSession, swarm: FakeSwarm) -> None:
    for echo in (False, True):
        swarm.say(TEXT)
        fields: Json = {"echo": echo, "logprobs": 2, "max_tokens": 99}
        _, whole = await post(http, **fields)
        swarm.say(TEXT)
        options = {"include_usage": True}
        async with http.post(PATH, json=body(stream=True, stream_options=options, **fields)) as response:
            *events, done = (await response.text()).strip().split("\n\n")
        assert done == "data: [DONE]"
        *chunks, usage = [orjson.loads(event.removeprefix("data: ")) for event in events]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
        told = [each for chunk in chunks for each in chunk["choices"][0]["logprobs"]["token_logprobs"]]
        assert told == whole["choices"][0]["logprobs"]["token_logprobs"]
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        assert usage["usage"] == whole["usage"] and usage["choices"] == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [400]}, "prompt"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"suffix": "end"}, "suffix"),
        ({"n": 5}, "n"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"rose": 1}}, "logit_bias"),
    ],
)
async def test_a_wrong_field_is_named(
    http: aiohttp.ClientSession, swarm: FakeSwarm, fields: dict[str, object], param: str
) -> None:
    status, answer = await post(http, **fields)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert answer["error"]["param"].startswith(param)
    assert not swarm.requests


async def test_a_prompt_that_is_too_long_says_what_fits(
    http: aiohttp.ClientSession, swarm: FakeSwarm
) -> None:
    for prompt in ("word " * 600, [5] * 512, "a" * 2_000_000):
        status, answer = await post(http, prompt=prompt)
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        assert "maximum context length is 512 tokens" in answer["error"]["message"]
    assert not swarm.requests


async def test_the_official_client_reads_completions(client: openai.AsyncOpenAI, swarm: FakeSwarm) -> None:
    swarm.say(TEXT)
    answer = await client.completions.create(model="petal", prompt="Hello", logprobs=1, max_tokens=99)
    assert answer.choices[0].text == TEXT and answer.choices[0].logprobs is not None
    swarm.say(TEXT)
    stream = await client.completions.create(model="petal", prompt="Hello", stream=True, max_tokens=99)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == TEXT


async def test_a_tokenizer_can_be_used_from_afar(http: aiohttp.ClientSession, swarm: FakeSwarm) -> None:
    async with http.get("/tokenizer_info") as response:
        info = await response.json()
    assert info["eos_token"] == "<|end|>" and "messages" in info["chat_template"]
    for fields in ({"prompt": TEXT}, {"prompt": TEXT, "add_special_tokens": False}):
        async with http.post("/tokenize", json=fields) as response:
            tokens = (await response.json())["tokens"]
        assert tokens == swarm.tokenizer.encode(TEXT).ids
    async with http.post("/detokenize", json={"tokens": tokens}) as response:
        assert (await response.json())["prompt"] == TEXT
    messages = [{"role": "user", "content": "Hello"}]
    async with http.post("/tokenize", json={"model": "petal", "messages": messages}) as response:
        count = (await response.json())["count"]
    await http.post("/v1/chat/completions", json={"model": "petal", "messages": messages})
    assert count == len(swarm.requests[-1].prompt)


async def test_which_tokenizer_must_be_said_where_there_are_several(
    http: aiohttp.ClientSession, swarm: FakeSwarm
) -> None:
    swarm.serve("rose", ann=(0, 4))
    swarm.serve("petal", bob=(0, 4))
    async with http.post("/tokenize", json={"prompt": "a"}) as response:
        answer: Any = await response.json()
        assert (response.status, answer["error"]["param"]) == (400, "model")
    async with http.get("/tokenizer_info", params={"model": "rose"}) as response:
        assert response.status == 200


async def test_stop_strings_and_cut_tokens_agree(http: aiohttp.ClientSession, swarm: FakeSwarm) -> None:
    swarm.script(Say(TEXT))
    _, answer = await post(http, stop="etals", logprobs=0, max_tokens=99)
    told = answer["choices"][0]["logprobs"]["tokens"]
    assert "".join(told) == answer["choices"][0]["text"] == "The p"
