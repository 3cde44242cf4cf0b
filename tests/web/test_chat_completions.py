"""The wire rules of POST /v1/chat/completions that clients rely on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import openai
import orjson
import pytest

from shared.errors import Busy, NoRoute, ProtocolError, SessionFailed
from shared.protocol import Sampling
from tests.harness.fake_swarm import FakeSwarm, Lose, Pause, Raw, Say, Stop
from tests.web.api import CHAT, chat, chunks, content, error_of, lines, post
from web.app import MAX_REQUEST_BYTES
from web.openai.asking import DEFAULT_MAX_TOKENS

LONG = "The petals of a flower 😀 make its corolla."

# ---------------------------------------------------------------- a whole answer


async def test_an_answer_has_text_a_reason_and_usage(http: aiohttp.ClientSession, swarm: FakeSwarm) -> None:
    swarm.say(LONG)
    status, answer, headers = await post(http, chat())
    assert status == 200
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "petal"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": LONG, "refusal": None}
    assert choice["finish_reason"] == "stop"
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(swarm.requests[0].prompt)
    assert usage["completion_tokens"] == len(swarm.tokenizer.encode(LONG).ids) + 1
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert headers["x-request-id"].startswith("req_")
    assert "x-swarm-warning" not in headers


async def test_an_answer_that_reaches_its_limit_says_so(
    http: aiohttp.ClientSession, swarm: FakeSwarm
) -> None:
    for field in ("max_tokens", "max_completion_tokens"):
        swarm.say(LONG)
        _, answer, _ = await post(http, chat(**{field: 3}))
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 3
        assert LONG.startswith(answer["choices"][0]["message"]["content"])


async def test_an_answer_that_ends_within_a_character_shows_that(
    http: aiohttp.ClientSession, swarm: FakeSwarm
) -> None:
    swarm.script(Raw(swarm.tokenizer.encode("😀").ids[:1]))
    _, answer, _ = await post(http, chat(max_tokens=1))
    assert answer["choices"][0]["message"]["content"] == "\N{REPLACEMENT CHARACTER}"


async def test_every_answer_tells_the_weights_it_came_from(
    http: aiohttp.ClientSession, swarm: FakeSwarm
) -> None:
    artefact = swarm.directory.find("petal").artefact
    _, answer, _ = await post(http, chat())
    assert answer["system_fingerprint"] == f"fp_{artefact[:12]}"


# ---------------------------------------------------------------- a stream


async def test_a_stream_opens_with_a_role_and_ends_with_a_reason(
    http: aiohttp.ClientSession, swarm: FakeSwarm
) -> None:
    swarm.say(LONG)
    first, *middle, last = await chunks(http, chat(stream=True))
    assert first["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert all(chunk["choices"][0]["delta"].keys() == {"content"} for chunk in middle)
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in middle)
    assert content(middle) == LONG
    assert last["choices"][0]["delta"] == {} and last["choices"][0]["finish_reason"] == "stop"


async def test_all_chunks_of_a_stream_carry_the_same_head(http: aiohttp.ClientSession) -> None:
    stream = await chunks(http, chat(stream=True))
    keys = ("id", "object", "created", "model", "system_fingerprint")
    assert len({tuple(chunk[key] for key in keys) for chunk in stream}) == 1
    assert stream[0]["object"] == "chat.completion.chunk"
    assert stream[0]["id"].startswith("chatcmpl-")


async def test_usage_comes_last_and_only_when_asked_for(
    http: aiohttp.ClientSession, swarm: FakeSwarm
) -> None:
    *others, last = await chunks(http, chat(stream=True, stream_options={"include_usage": True}))
    assert all(chunk["usage"] is None for chunk in others)
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens"] == len(swarm.requests[0].prompt)

    for options in ({}, {"stream_options": None}, {"stream_options": {"include_usage": False}}):
        assert not any("usage" in chunk for chunk in await chunks(http, chat(stream=True, **options)))


async def test_the_headers_of_a_stream_keep_proxies_from_holding_it_back(
    http: aiohttp.ClientSession,
) -> None:
    async with http.post(CHAT, json=chat(stream=True)) as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        assert response.headers["Cache-Control"] == "no-cache"
        assert response.headers["X-Accel-Buffering"] == "no"
        assert response.headers["x-request-id"].startswith("req_")


async def test_comments_keep_a_quiet_stream_open(http: aiohttp.ClientSession, swarm: FakeSwarm) -> None:
    gate = asyncio.Event()
    swarm.script(Pause(gate), Say("Hi"), Stop())
    async with http.post(CHAT, json=chat(stream=True)) as response:
        first = await response.content.readuntil(b"\n\n")
        assert orjson.loads(first.removeprefix(b"data: "))["choices"][0]["delta"]["role"] == "assistant"
        assert await response.content.readuntil(b"\n\n") == b": keepalive\n\n"
        gate.set()
        assert (await response.content.read()).endswith(b"data: [DONE]\n\n")


# ---------------------------------------------------------------- stop strings


async def test_text_ends_before_a_stop_string(http: aiohttp.ClientSession, swarm: FakeSwarm) -> None:
    for stop in (" make", [" make"], ["never", " make", "corolla", ""]):
        for stream in (False, True):
            swarm.say(LONG)
            body = chat(stop=stop, stream=stream)
            if stream:
                told = await chunks(http, body)
                text, reason = content(told), told[-1]["choices"][0]["finish_reason"]
            else:
                _, answer, _ = await post(http, body)
                choice = answer["choices"][0]
                text, reason = choice["message"]["content"], choice["finish_reason"]
            assert (text, reason) == ("The petals of a flower 😀", "stop")


async def test_a_stop_string_ends_the_session(http: aiohttp.ClientSession, swarm: FakeSwarm) -> None:
    swarm.script(Say("one two"), Pause(asyncio.Event()))
    _, answer, _ = await post(http, chat(stop=" two"))
    assert answer["choices"][0]["message"]["content"] == "one"
    assert swarm.running == 0


# ---------------------------------------------------------------- what reaches the swarm


async def test_sampling_reaches_the_swarm(http: aiohttp.ClientSession, swarm: FakeSwarm) -> None:
    wishes: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "seed": 7,
        "presence_penalty": 0.1,
        "frequency_penalty": -0.2,
        "repetition_penalty": 1.1,
    }
    await post(http, chat(**wishes))
    assert swarm.requests[0].sampling == Sampling(**wishes)


@pytest.mark.parametrize(
    ("wish", "name", "expected"),
    [
        ({}, "temperature", 1.0),
        ({"temperature": None}, "temperature", 1.0),
        ({"temperature": 0}, "temperature", 0.0),
        ({"top_p": 0}, "top_p", 1e-6),
        ({"top_k": -1}, "top_k", 0),
        ({"seed": 2**64 - 1}, "seed", -1),
    ],
)
async def test_sampling_takes_what_clients_send(
    http: aiohttp.ClientSession, swarm: FakeSwarm, wish: dict[str, object], name: str, expected: float
) -> None:
    status, _, _ = await post(http, chat(**wish))
    assert status == 200
    assert getattr(swarm.requests[0].sampling, name) == expected


async def test_without_a_seed_every_answer_is_another_one(
    http: aiohttp.ClientSession, swarm: FakeSwarm
) -> None:
    await post(http, chat())
    await post(http, chat())
    assert swarm.requests[0].sampling.seed != swarm.requests[1].sampling.seed


async def test_the_model_s_stop_tokens_reach_the_swarm(http: aiohttp.ClientSession, swarm: FakeSwarm) -> None:
    await post(http, chat())
    assert list(swarm.requests[0].stop_tokens) == [swarm.end_token]


async def test_an_answer_may_fill_the_context_but_not_more(
    http: aiohttp.ClientSession, swarm: FakeSwarm
) -> None:
    await post(http, chat(max_tokens=10_000))
    request = swarm.requests[0]
    assert len(request.prompt) + request.max_new_tokens == 512

    swarm.serve("large", context=100_000, ann=(0, 2), bob=(2, 4))
    await post(http, chat(model="large"))
    assert swarm.requests[1].max_new_tokens == DEFAULT_MAX_TOKENS


async def test_content_may_come_in_parts_and_roles_in_every_kind(
    http: aiohttp.ClientSession, swarm: FakeSwarm
) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {
            "role": "developer",
            "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}],
        },
        {"role": "user", "content": "Weather?", "name": "kim"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"at": "Ulm"}'}}
            ],
        },
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
    ]
    status, answer, _ = await post(http, chat(messages=messages))
    assert status == 200, answer
    text = swarm.tokenizer.decode(swarm.requests[0].prompt, skip_special_tokens=True)
    assert "Be kind." in text and "Be\nbrief." in text and "sunny" in text


async def test_fields_that_we_do_not_know_are_left_aside(http: aiohttp.ClientSession) -> None:
    habits = {"user": "kim", "store": False, "metadata": {"a": 1}, "service_tier": "auto", "n": 1}
    status, _, _ = await post(http, chat(**habits, parallel_tool_calls=False, reasoning_effort="low"))
    assert status == 200


async def test_what_is_asked_for_and_not_given_is_told_in_a_header(
    http: aiohttp.ClientSession, swarm: FakeSwarm
) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    _, _, headers = await post(http, chat(tools=[tool], tool_choice="auto", stream=False))
    assert "tools" in headers["x-swarm-warning"]
    assert "weather" in swarm.tokenizer.decode(swarm.requests[0].prompt)
    _, _, headers = await post(http, chat(response_format={"type": "json_object"}, tools=[tool]))
    assert "form that is not read" in headers["x-swarm-warning"]
    _, _, headers = await post(http, chat(response_format={"type": "text"}, tools=[]))
    assert "x-swarm-warning" not in headers


# ---------------------------------------------------------------- the route, our extension


async def test_every_token_tells_its_hops_when_asked(http: aiohttp.ClientSession, swarm: FakeSwarm) -> None:
    swarm.say(LONG)
    stream = await chunks(http, chat(stream=True, swarm={"route": True}))
    tokens = [token for chunk in stream for token in chunk.get("swarm", {}).get("tokens", [])]
    start = len(swarm.requests[0].prompt)
    count = len(swarm.tokenizer.encode(LONG).ids) + 1
    assert [token["position"] for token in tokens] == list(range(start, start + count))
    assert all(token["ms"] >= 0 for token in tokens)
    ann, bob = tokens[0]["hops"]
    assert ann == {
        "peer": swarm.id("ann"),
        "name": "ann",
        "start": 0,
        "end": 2,
        "waited_ms": 0.1,
        "computed_ms": 1.234,
        "path": "direct",
    }
    assert (bob["name"], bob["start"], bob["end"]) == ("bob", 2, 4)


async def test_a_reroute_is_an_event_of_its_own(http: aiohttp.ClientSession, swarm: FakeSwarm) -> None:
    swarm.serve("petal", eve=(2, 4))
    swarm.script(Say("one"), Lose("bob", "eve"), Say(" two"), Stop())
    stream = await chunks(http, chat(stream=True, swarm={"route": True}))
    assert content(stream) == "one two"
    (event,) = [chunk for chunk in stream if "event" in chunk.get("swarm", {})]
    assert event["choices"][0]["delta"] == {}
    assert event["swarm"]["event"] == {
        "kind": "rerouted",
        "message": "bob (layers 2–4) went away; eve took over",
        "lost": swarm.id("bob"),
        "lost_name": "bob",
        "route": [{"peer": swarm.id("eve"), "name": "eve", "start": 2, "end": 4}],
    }


@pytest.mark.parametrize(
    ("lose", "message"),
    [
        (Lose("bob", "eve", reason="declined"), "bob (layers 2–4) had no room; eve took over"),
        (
            Lose("bob", "eve", stood_by=True),
            "bob (layers 2–4) went away; eve had followed along and took over",
        ),
        (
            Lose("bob", "eve", reason="late", stood_by=True),
            "bob (layers 2–4) did not answer in time; eve had followed along and took over",
        ),
        (
            Lose("bob", "eve", reason="leaving", stood_by=True),
            "bob (layers 2–4) is leaving; eve had followed along and took over",
        ),
        (Lose("bob", "bob"), "the connection to bob (layers 2–4) broke; it was made anew"),
    ],
)
async def test_a_whole_answer_tells_its_route_when_asked(
    http: aiohttp.ClientSession, swarm: FakeSwarm, lose: Lose, message: str
) -> None:
    swarm.serve("petal", eve=(2, 4))
    swarm.script(Say("one"), lose, Stop())
    _, answer, _ = await post(http, chat(swarm={"route": True}))
    assert [event["message"] for event in answer["swarm"]["events"]] == [message]
    assert len(answer["swarm"]["tokens"]) == answer["usage"]["completion_tokens"]


async def test_nobody_else_sees_the_extension(http: aiohttp.ClientSession, swarm: FakeSwarm) -> None:
    fields: list[dict[str, object]] = [{}, {"swarm": None}, {"swarm": {}}, {"swarm": {"route": False}}]
    for swarm_field in fields:
        swarm.serve("petal", eve=(2, 4))
        swarm.script(Say("one"), Lose("bob", "eve"), Say(" two"), Stop())
        assert not any("swarm" in chunk for chunk in await chunks(http, chat(stream=True, **swarm_field)))
        assert "swarm" not in (await post(http, chat(**swarm_field)))[1]


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("error", "status", "code", "retry"),
    [
        (NoRoute("no live peer serves layers 2–4 of petal"), 503, "no_route", "5"),
        (Busy("every peer of petal is full", 1.5), 429, "rate_limit_exceeded", "2"),
        (SessionFailed("peer ann could not go on: out of memory"), 502, "session_failed", None),
        (ProtocolError("a token for position 3 came, expected 2"), 502, "protocol_error", None),
    ],
)
async def test_an_error_before_the_first_token_is_a_status(
    http: aiohttp.ClientSession,
    swarm: FakeSwarm,
    error: Exception,
    status: int,
    code: str,
    retry: str | None,
) -> None:
    for stream in (False, True):
        swarm.script(error)
        got, answer, headers = await post(http, chat(stream=stream))
        assert (got, answer["error"]["code"]) == (status, code)
        assert answer["error"]["message"] == str(error)
        assert headers.get("Retry-After") == retry
        assert ("x-should-retry" in headers) == (retry is None)


async def test_an_error_amid_a_stream_is_an_event_without_done(
    http: aiohttp.ClientSession, swarm: FakeSwarm
) -> None:
    swarm.script(Say("one"), SessionFailed("peer ann could not go on: out of memory"))
    *_, last = await lines(http, chat(stream=True))
    assert orjson.loads(last.removeprefix("data: ")) == {
        "error": {
            "message": "peer ann could not go on: out of memory",
            "type": "server_error",
            "param": None,
            "code": "session_failed",
        }
    }


async def test_a_mistake_of_ours_is_told_without_its_details(
    http: aiohttp.ClientSession, swarm: FakeSwarm, caplog: pytest.LogCaptureFixture
) -> None:
    swarm.script(ZeroDivisionError("secret"))
    status, error = await error_of(http, chat())
    assert (status, error["code"]) == (500, "internal_error")
    assert "secret" not in error["message"]
    assert "ZeroDivisionError" in caplog.text


async def test_a_model_that_nobody_heard_of_is_not_found(http: aiohttp.ClientSession) -> None:
    status, error = await error_of(http, chat(model="oak"))
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")


async def test_a_model_whose_peers_left_may_come_back(http: aiohttp.ClientSession, swarm: FakeSwarm) -> None:
    await post(http, chat())
    swarm.leave("ann", "bob")
    status, error = await error_of(http, chat())
    assert (status, error["code"]) == (503, "no_route")


async def test_a_conversation_that_is_too_long_says_what_fits(
    http: aiohttp.ClientSession, swarm: FakeSwarm
) -> None:
    status, error = await error_of(http, chat(messages=[{"role": "user", "content": LONG * 100}]))
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
    assert "maximum context length is 512 tokens" in error["message"]
    assert not swarm.requests


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 3}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": ["Hello"]}, "messages[0]"),
        ({"messages": [{"content": "Hello"}]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "king", "content": "Hello"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": []}, "stream_options"),
        ({"n": 5}, "n"),
        ({"seed": 1e40}, "seed"),
        ({"tools": "all"}, "tools"),
        ({"swarm": {"route": 1}}, "swarm.route"),
    ],
)
async def test_a_wrong_field_is_named(
    http: aiohttp.ClientSession, swarm: FakeSwarm, fields: dict[str, object], param: str
) -> None:
    status, error = await error_of(http, chat(**fields))
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert error["param"] is not None and error["param"].startswith(param)
    assert error["message"].startswith(param)
    assert not swarm.requests


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"text"', b"\xff", b"[" * 5000, b'{"model": "\\ud800"}'])
async def test_a_body_that_is_no_json_object_is_refused(http: aiohttp.ClientSession, body: bytes) -> None:
    async with http.post(CHAT, data=body) as response:
        error = (await response.json())["error"]
        assert (response.status, error["type"]) == (400, "invalid_request_error")
        assert "JSON" in error["message"]


async def test_a_body_that_is_too_large_is_refused(http: aiohttp.ClientSession) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(MAX_REQUEST_BYTES // 2**20 + 1):
            yield b" " * 2**20

    async with http.post(CHAT, data=endless()) as response:
        assert response.status == 413
        assert (await response.json())["error"]["code"] == "request_too_large"


async def test_the_template_s_refusal_is_the_asker_s_to_mend(http: aiohttp.ClientSession) -> None:
    status, error = await error_of(http, chat(messages=[{"role": "tool", "content": "sunny"}]))
    assert (status, error["param"]) == (400, "messages")
    assert "a tool must say which call it answers" in error["message"]


# ---------------------------------------------------------------- leaving


async def test_a_client_that_leaves_a_stream_ends_the_session(
    http: aiohttp.ClientSession, swarm: FakeSwarm
) -> None:
    swarm.script(Say("one"), Pause(asyncio.Event()))
    async with http.post(CHAT, json=chat(stream=True)) as response:
        await response.content.readuntil(b'"content":"o"')
        assert swarm.running == 1
        response.close()
    await asyncio.wait_for(swarm.ended.wait(), 5)
    assert swarm.running == 0


async def test_a_client_that_leaves_a_whole_answer_ends_the_session(
    http: aiohttp.ClientSession, swarm: FakeSwarm
) -> None:
    swarm.script(Say("one"), Pause(asyncio.Event()))
    asking = asyncio.create_task(post(http, chat()))
    await asyncio.wait_for(swarm.began.wait(), 5)
    asking.cancel()
    await asyncio.wait_for(swarm.ended.wait(), 5)
    assert swarm.running == 0


async def test_a_client_that_leaves_before_the_first_token_ends_the_session(
    http: aiohttp.ClientSession, swarm: FakeSwarm
) -> None:
    swarm.script(Pause(asyncio.Event()))
    async with http.post(CHAT, json=chat(stream=True)) as response:
        response.close()
    await asyncio.wait_for(swarm.ended.wait(), 5)
    assert swarm.running == 0


async def test_a_client_that_reads_slowly_holds_the_swarm_back(
    http: aiohttp.ClientSession, swarm: FakeSwarm
) -> None:
    """What the client has not read is not drawn: nothing piles up in the gateway."""
    swarm.serve("large", context=1_000_000, ann=(0, 2), bob=(2, 4))
    many = 50_000
    drawn = 0

    class Counted(list[int]):
        def __iter__(self) -> Iterator[int]:
            nonlocal drawn
            for token in [self[0]] * many:
                drawn += 1
                yield token

    swarm.script(Raw(Counted(swarm.tokenizer.encode("a").ids)))
    async with http.post(CHAT, json=chat(model="large", stream=True, max_tokens=many)) as response:
        await response.content.readuntil(b"\n\n")
        before = -1
        while drawn != before:
            before = drawn
            await asyncio.sleep(0.1)
        assert drawn < many
        response.close()


# ---------------------------------------------------------------- the official client


async def test_the_official_client_reads_an_answer(client: openai.AsyncOpenAI, swarm: FakeSwarm) -> None:
    swarm.say(LONG)
    answer = await client.chat.completions.create(
        model="petal", messages=[{"role": "user", "content": "Hello"}], stop=["corolla"]
    )
    assert answer.choices[0].message.content == "The petals of a flower 😀 make its "
    assert answer.usage is not None and answer.usage.total_tokens > 0


async def test_the_official_client_reads_a_stream(client: openai.AsyncOpenAI, swarm: FakeSwarm) -> None:
    swarm.say(LONG)
    stream = await client.chat.completions.create(
        model="petal",
        messages=[{"role": "user", "content": "Hello"}],
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"swarm": {"route": True}},
    )
    seen = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in seen if chunk.choices) == LONG
    assert seen[-1].usage is not None
    assert seen[1].model_extra is not None and "tokens" in seen[1].model_extra["swarm"]


async def test_the_official_client_s_stream_helper_works(
    client: openai.AsyncOpenAI, swarm: FakeSwarm
) -> None:
    swarm.say(LONG)
    async with client.chat.completions.stream(
        model="petal", messages=[{"role": "user", "content": "Hello"}]
    ) as stream:
        answer = await stream.get_final_completion()
    assert answer.choices[0].message.content == LONG


async def test_the_official_client_raises_the_right_errors(
    client: openai.AsyncOpenAI, swarm: FakeSwarm
) -> None:
    async def ask(**fields: object) -> object:
        return await client.chat.completions.create(**chat(**fields))

    with pytest.raises(openai.NotFoundError):
        await ask(model="oak")
    with pytest.raises(openai.BadRequestError) as refused:
        await ask(temperature="hot")
    assert refused.value.param == "temperature"
    swarm.script(Busy("every peer of petal is full", 2.0))
    with pytest.raises(openai.RateLimitError):
        await ask()
    swarm.script(NoRoute("no live peer serves layers 2–4 of petal"))
    with pytest.raises(openai.InternalServerError, match="layers 2–4"):
        await ask()


async def test_the_official_client_notices_a_failure_amid_a_stream(
    client: openai.AsyncOpenAI, swarm: FakeSwarm
) -> None:
    swarm.script(Say("one"), SessionFailed("peer ann could not go on: out of memory"))
    stream = await client.chat.completions.create(
        model="petal", messages=[{"role": "user", "content": "Hello"}], stream=True
    )
    with pytest.raises(openai.APIError, match="out of memory") as failed:
        async for _ in stream:
            pass
    assert failed.value.code == "session_failed"


async def test_the_official_client_asks_again_when_that_helps(
    client: openai.AsyncOpenAI, swarm: FakeSwarm
) -> None:
    swarm.script(Busy("every peer of petal is full", 0.01))
    swarm.say("now")
    answer = await client.with_options(max_retries=1).chat.completions.create(
        model="petal", messages=[{"role": "user", "content": "Hello"}]
    )
    assert answer.choices[0].message.content == "now"


async def test_the_official_client_closes_a_stream(client: openai.AsyncOpenAI, swarm: FakeSwarm) -> None:
    swarm.script(Say("one"), Pause(asyncio.Event()))
    stream = await client.chat.completions.create(
        model="petal", messages=[{"role": "user", "content": "Hello"}], stream=True
    )
    await anext(aiter(stream))
    await stream.close()
    await asyncio.wait_for(swarm.ended.wait(), 5)


@pytest.mark.parametrize(
    ("last", "fields", "param"),
    [
        ({"role": "user", "content": "Hi"}, {}, "continue_final_message"),
        ({"role": "assistant", "content": " "}, {}, "continue_final_message"),
        ({"role": "assistant", "content": "So"}, {"tool_choice": "required"}, "continue_final_message"),
        (
            {"role": "assistant", "content": "So"},
            {"response_format": {"type": "json_object"}},
            "continue_final_message",
        ),
        ({"role": "assistant", "content": "So"}, {"add_generation_prompt": True}, "add_generation_prompt"),
    ],
)
async def test_what_cannot_go_on_is_refused(
    http: aiohttp.ClientSession, last: dict[str, Any], fields: dict[str, Any], param: str
) -> None:
    asked = chat(messages=[{"role": "user", "content": "Hi"}, last], continue_final_message=True, **fields)
    status, error = await error_of(http, asked)
    assert (status, error["param"]) == (400, param)


async def test_a_prompt_without_an_answer_is_refused(http: aiohttp.ClientSession) -> None:
    status, error = await error_of(http, chat(add_generation_prompt=False))
    assert (status, error["param"]) == (400, "add_generation_prompt")
