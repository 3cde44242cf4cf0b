"""Calls of tools, answers by a schema, and the dialects that lead to them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import jsonschema
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from tests.harness.fake_swarm import FakeSwarm, Say
from tests.harness.tokenizers import TEMPLATE, byte_level, chat_files
from tests.web.api import Json, chat, chunks, content, error_of, post
from web.app import Gateway, GatewaySettings
from web.openai.tools import Argued, Called, CallReader

HERMES = TEMPLATE.replace("(tools | tojson)", "(tools | tojson) + 'Answer with <tool_call>.'").replace(
    "message.content | trim",
    "message.content | trim + (message.tool_calls | tojson if message.tool_calls else '')",
)
PARAMETERS: Json = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Json = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells it", "parameters": PARAMETERS},
}
TIME: Json = {"type": "function", "function": {"name": "time"}}
ARGUMENTS = '{"city": "Köln } \\" x", "days": 3}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'


@pytest.fixture(params=["plain", "special"])
async def swarm(request: pytest.FixtureRequest) -> FakeSwarm:
    """Marks around calls may be special tokens, which texts leave out."""
    tokenizer = byte_level()
    if request.param == "special":
        tokenizer.add_special_tokens(["<tool_call>", "</tool_call>"])
    swarm = FakeSwarm(tokenizer, chat_files(tokenizer, template=HERMES))
    swarm.serve("petal", ann=(0, 2), bob=(2, 4))
    return swarm


@pytest.fixture
async def gateway(swarm: FakeSwarm, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with Gateway(GatewaySettings(data_dir=tmp_path, keepalive_s=0.05), swarm) as gateway:
        yield gateway


# ---------------------------------------------------------------- reading calls


def read(text: str, size: int) -> tuple[str, list[tuple[str, str]]]:
    reader, said, calls = CallReader(), "", []
    pieces = [piece for at in range(0, len(text), size) for piece in reader.push(text[at : at + size])]
    for piece in [*pieces, *reader.finish()]:
        match piece:
            case Called():
                calls.append((piece.name, ""))
            case Argued():
                calls[piece.index] = (calls[piece.index][0], calls[piece.index][1] + piece.text)
            case _:
                said += piece
    return said, calls


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("Hello.", "Hello.", []),
        (CALL, "", [("weather", ARGUMENTS)]),
        (f"I look.\n{CALL}\n{CALL}\n", "I look.", [("weather", ARGUMENTS)] * 2),
        ('<tool_call>{"arguments": {"a": 1}, "name": "x"}</tool_call>', "", [("x", '{"a": 1}')]),
        ('<tool_call>{"name": "x"}</tool_call>', "", [("x", "{}")]),
        ('<tool_call>{"name": "x", "arguments": {"a": [', "", [("x", '{"a": [')]),
        ('<tool_call>{"name": "x", "arguments": {}}', "", [("x", "{}")]),
        ("<tool_call>nothing</tool_call> more", "<tool_call>nothing</tool_call> more", []),
        ("a < b <tool", "a < b <tool", []),
        ("text \n ", "text \n ", []),
    ],
)
def test_calls_are_read_however_the_text_is_cut(
    text: str, said: str, calls: list[tuple[str, str]], size: int
) -> None:
    assert read(text, size) == (said, calls)


@settings(deadline=None)
@given(st.text('<tool_cal>/{}"name:arguments, \\', max_size=60), st.integers(1, 9))
def test_nothing_breaks_the_reader_and_pieces_do_not_matter(text: str, size: int) -> None:
    assert read(text, size) == read(text, 1000)


# ---------------------------------------------------------------- chats


async def test_a_model_may_call_a_tool(http: aiohttp.ClientSession, swarm: FakeSwarm) -> None:
    swarm.say(f"I look. {CALL}")
    _, answer, headers = await post(http, chat(tools=[WEATHER, TIME]))
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I look."
    (call,) = choice["message"]["tool_calls"]
    assert call["id"].startswith("call_") and call["type"] == "function"
    assert call["function"] == {"name": "weather", "arguments": ARGUMENTS}
    assert "x-swarm-warning" not in headers
    assert "Tells it" in swarm.tokenizer.decode(swarm.requests[0].prompt)


async def test_a_call_is_streamed_as_it_grows(http: aiohttp.ClientSession, swarm: FakeSwarm) -> None:
    swarm.say(CALL)
    stream = await chunks(http, chat(tools=[WEATHER], stream=True))
    deltas = [call for chunk in stream for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert deltas[0]["function"] == {"name": "weather", "arguments": ""} and deltas[0]["id"]
    assert all(delta["index"] == 0 for delta in deltas) and not any("id" in delta for delta in deltas[1:])
    assert len(deltas) > 3
    assert "".join(delta["function"]["arguments"] for delta in deltas) == ARGUMENTS
    assert content(stream) == ""
    assert stream[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_a_round_trip_shows_the_model_what_it_called(
    http: aiohttp.ClientSession, swarm: FakeSwarm
) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    status, _, _ = await post(http, chat(messages=messages, tools=[WEATHER]))
    prompt = swarm.tokenizer.decode(swarm.requests[0].prompt)
    assert status == 200 and "sunny" in prompt and "days" in prompt


def follows(grammar: str, text: str) -> bool:
    """llguidance itself is asked, with a tokenizer of single bytes and more."""
    tokenizer = byte_level()
    matcher = LLMatcher(LLTokenizer(tokenizer.to_str(), eos_token=1), grammar, log_level=0)
    return matcher.consume_tokens(tokenizer.encode(text).ids) and matcher.is_accepting()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_forced_tool_begins_in_the_prompt_and_follows_its_schema(
    http: aiohttp.ClientSession, swarm: FakeSwarm, stream: bool
) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    swarm.say(ARGUMENTS)
    body = chat(tools=[WEATHER, TIME], tool_choice=choice, stream=stream)
    if stream:
        told = await chunks(http, body)
        calls = [call for chunk in told for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
        name, text = calls[0]["function"]["name"], "".join(each["function"]["arguments"] for each in calls)
        reason = told[-1]["choices"][0]["finish_reason"]
    else:
        _, answer, _ = await post(http, body)
        (call,) = answer["choices"][0]["message"]["tool_calls"]
        name, text = call["function"]["name"], call["function"]["arguments"]
        reason = answer["choices"][0]["finish_reason"]
    assert (name, text, reason) == ("weather", ARGUMENTS, "tool_calls")
    (request,) = swarm.requests
    prompt = swarm.tokenizer.decode(request.prompt, skip_special_tokens=False)
    assert prompt.endswith('<tool_call>\n{"name": "weather", "arguments": ')
    assert follows(request.sampling.grammar, '{"city": "Ulm"}')
    assert not follows(request.sampling.grammar, '{"days": 3}')


async def test_some_tool_can_be_required(http: aiohttp.ClientSession, swarm: FakeSwarm) -> None:
    swarm.say('{"name": "time", "arguments": {}}')
    _, answer, _ = await post(http, chat(tools=[WEATHER, TIME], tool_choice="required"))
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "time", "arguments": "{}"}
    grammar = swarm.requests[0].sampling.grammar
    assert follows(grammar, '{"name": "weather", "arguments": {"city": "Ulm"}}')
    assert not follows(grammar, '{"name": "rose", "arguments": {}}')


async def test_a_call_that_reaches_the_limit_says_length(
    http: aiohttp.ClientSession, swarm: FakeSwarm
) -> None:
    swarm.script(Say(ARGUMENTS))
    choice = {"type": "function", "function": {"name": "weather"}}
    _, answer, _ = await post(http, chat(tools=[WEATHER], tool_choice=choice, max_tokens=4))
    assert answer["choices"][0]["finish_reason"] == "length"
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["arguments"] and ARGUMENTS.startswith(call["function"]["arguments"])


async def test_tools_that_are_not_to_be_called_are_not_shown(
    http: aiohttp.ClientSession, swarm: FakeSwarm
) -> None:
    swarm.say(CALL)
    _, answer, _ = await post(http, chat(tools=[WEATHER], tool_choice="none"))
    assert "tool_calls" not in answer["choices"][0]["message"]
    assert "weather" not in swarm.tokenizer.decode(swarm.requests[0].prompt)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tools": [WEATHER], "tool_choice": "some"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "rose"}}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://x/y"}}}},
            "response_format.json_schema.schema",
        ),
    ],
)
async def test_what_cannot_be_followed_is_refused_before_a_peer_is_asked(
    http: aiohttp.ClientSession, swarm: FakeSwarm, fields: Json, param: str
) -> None:
    status, error = await error_of(http, chat(**fields))
    assert (status, error["param"]) == (400, param)
    assert not swarm.requests


async def test_an_answer_can_be_held_to_json(http: aiohttp.ClientSession, swarm: FakeSwarm) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "w", "strict": True, "schema": PARAMETERS}}
    for number, response_format in enumerate(({"type": "json_object"}, wanted)):
        await post(http, chat(response_format=response_format))
        grammar = swarm.requests[number].sampling.grammar
        assert follows(grammar, '{"city": "Ulm"}') and not follows(grammar, "Ulm")
        assert follows(grammar, '{"days": 3}') is (number == 0)


# ---------------------------------------------------------------- the official clients


async def test_openai_s_helpers_read_calls_and_parsed_answers(
    client: openai.AsyncOpenAI, swarm: FakeSwarm
) -> None:
    swarm.say(CALL)
    # Its helpers read calls of strict tools alone.
    tools: Any = [{**WEATHER, "function": {**WEATHER["function"], "strict": True}}]
    async with client.chat.completions.stream(
        model="petal", messages=[{"role": "user", "content": "Hello"}], tools=tools
    ) as stream:
        answer = await stream.get_final_completion()
    assert answer.choices[0].message.tool_calls is not None
    assert answer.choices[0].message.tool_calls[0].function.arguments == ARGUMENTS


async def test_openai_s_responses_are_answered(client: openai.AsyncOpenAI, swarm: FakeSwarm) -> None:
    swarm.say("Good day.")
    response = await client.responses.create(
        model="petal", input="Hello", instructions="Be kind.", max_output_tokens=50, temperature=0
    )
    assert response.output_text == "Good day." and response.status == "completed"
    assert response.usage is not None and response.usage.output_tokens > 0
    assert "Be kind." in swarm.tokenizer.decode(swarm.requests[0].prompt)
    assert swarm.requests[0].max_new_tokens == 50

    swarm.script(Say("Good day and more"))
    cut = await client.responses.create(model="petal", input="Hello", max_output_tokens=2)
    assert cut.status == "incomplete" and cut.incomplete_details is not None


async def test_openai_s_responses_stream_text_and_calls(client: openai.AsyncOpenAI, swarm: FakeSwarm) -> None:
    swarm.say(f"I look. {CALL}")
    tool: Any = {"type": "function", "strict": False, **WEATHER["function"]}
    async with client.responses.stream(model="petal", input="Hello", tools=[tool]) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_response()
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert {"response.output_text.delta", "response.function_call_arguments.delta"} <= set(kinds)
    message, call = final.output
    assert message.type == "message" and final.output_text == "I look."
    assert call.type == "function_call" and call.arguments == ARGUMENTS and call.status == "completed"
    assert [event.sequence_number for event in events] == sorted({event.sequence_number for event in events})


async def test_a_conversation_of_responses_shows_calls_and_what_they_gave(
    client: openai.AsyncOpenAI, swarm: FakeSwarm
) -> None:
    items: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "function_call", "call_id": "1", "name": "weather", "arguments": ARGUMENTS},
        {"type": "function_call_output", "call_id": "1", "output": "sunny"},
    ]
    text: Any = {"format": {"type": "json_schema", "name": "w", "schema": PARAMETERS, "strict": True}}
    swarm.say('{"city": "Ulm"}')
    response = await client.responses.create(model="petal", input=items, text=text)
    jsonschema.validate(json.loads(response.output_text), PARAMETERS)
    assert "sunny" in swarm.tokenizer.decode(swarm.requests[0].prompt)
    assert follows(swarm.requests[0].sampling.grammar, '{"city": "Ulm"}')
    with pytest.raises(openai.BadRequestError) as refused:
        await client.responses.create(model="petal", input="Hello", previous_response_id="resp_1")
    assert refused.value.param == "previous_response_id"


@pytest.fixture
async def claude(gateway: Gateway) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=gateway.url, api_key="none", max_retries=0) as client:
        yield client


async def test_anthropic_s_client_reads_an_answer(claude: anthropic.AsyncAnthropic, swarm: FakeSwarm) -> None:
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    swarm.say("Good day.")
    answer = await claude.messages.create(
        model="petal", max_tokens=50, system="Be kind.", messages=messages, stop_sequences=["nay", " d"]
    )
    assert [block.type for block in answer.content] == ["text"]
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", " d")
    assert "Be kind." in swarm.tokenizer.decode(swarm.requests[0].prompt)
    counted = await claude.messages.count_tokens(model="petal", messages=messages, system="Be kind.")
    assert counted.input_tokens == answer.usage.input_tokens == len(swarm.requests[0].prompt)


async def test_anthropic_s_client_streams_text_and_calls(
    claude: anthropic.AsyncAnthropic, swarm: FakeSwarm
) -> None:
    swarm.say(f"I look. {CALL}")
    tools: Any = [{"name": "weather", "input_schema": PARAMETERS}]
    async with claude.messages.stream(
        model="petal", max_tokens=200, messages=[{"role": "user", "content": "Hello"}], tools=tools
    ) as stream:
        text = "".join([text async for text in stream.text_stream])
        answer = await stream.get_final_message()
    assert text == "I look." and answer.stop_reason == "tool_use"
    call = answer.content[1]
    assert call.type == "tool_use" and call.input == json.loads(ARGUMENTS)

    results: Any = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}]},
    ]
    swarm.say(ARGUMENTS)
    choice: Any = {"type": "tool", "name": "weather"}
    again = await claude.messages.create(
        model="petal", max_tokens=99, messages=results, tools=tools, tool_choice=choice
    )
    assert again.content[0].type == "tool_use"
    assert "sunny" in swarm.tokenizer.decode(swarm.requests[-1].prompt)


async def test_anthropic_s_client_raises_the_right_errors(
    claude: anthropic.AsyncAnthropic, swarm: FakeSwarm
) -> None:
    async def ask(**fields: Any) -> object:  # noqa: ANN401
        body: Any = {"model": "petal", "max_tokens": 5, "messages": [{"role": "user", "content": "a"}]}
        return await claude.messages.create(**{**body, **fields})

    with pytest.raises(anthropic.NotFoundError):
        await ask(model="oak")
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        await ask(extra_body={"temperature": "hot"})
