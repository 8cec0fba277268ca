"""Official clients and agent frameworks, unchanged and with their adapters, against the gateway."""

import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import agents
import anthropic
import openai
import pytest
from langchain_core.tools import tool as langchain_tool
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from pydantic_ai import Agent as PydanticAgent
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from concertmaster.adapters import Workflow, langchain, openai_agents
from concertmaster.core.events import RequestArrived
from gateway_rig import STREAM_HEAD, Heard, Rig, Upstream, an_answer, events, over_upstreams, play

pytestmark = pytest.mark.filterwarnings("ignore")
"""What frameworks warn of is theirs."""

PAGE = Path(__file__).parents[1] / "docs" / "agents.md"
TRIP = Workflow(workflow_id="trip-7", app="travel", deadline_ms=60_000)
KEY: Any = {"api_key": "x"}


def weather(city: str) -> str:
    """Say how the weather is."""
    return f"sunny in {city}"


async def a_model(heard: Heard, out: Any) -> None:  # noqa: ANN401  # a stream writer
    """Ask for the tool, once; then answer with what it said."""
    body = heard.json
    said = [one["content"] for one in body["messages"] if one["role"] == "tool"]
    if body.get("tools") and not said:
        name = body["tools"][0]["function"]["name"]
        call = {"index": 0, "id": f"call-{len(body['messages'])}", "type": "function"}
        function = {"name": name, "arguments": json.dumps({"city": "Oslo"})}
        message: dict[str, Any] = {"content": None, "tool_calls": [{**call, "function": function}]}
        reason = "tool_calls"
    else:
        message, reason = {"content": f"It is {said[0] if said else 'fine'}."}, "stop"
    out.write(streamed(message, reason) if body.get("stream") else whole(message, reason))


USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
COMPLETION = {"id": "c", "created": 1, "model": "m"}


def whole(message: dict[str, Any], reason: str) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": reason}
    body = {**COMPLETION, "object": "chat.completion", "choices": [choice], "usage": USAGE}
    return an_answer(json.dumps(body).encode(), headers=("content-type: application/json",))


def streamed(message: dict[str, Any], reason: str) -> bytes:
    chunk = {**COMPLETION, "object": "chat.completion.chunk"}
    first = {"index": 0, "delta": {"role": "assistant", **message}, "finish_reason": None}
    last = {"index": 0, "delta": {}, "finish_reason": reason}
    return STREAM_HEAD + events(
        {**chunk, "choices": [first]},
        {**chunk, "choices": [last]},
        {**chunk, "choices": [], "usage": USAGE},
    )


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Rig, Upstream]]:
    agents.set_tracing_disabled(disabled=True)
    async with over_upstreams(a_model) as (rig, upstream):
        yield rig, upstream


def calls(rig: Rig) -> list[Any]:
    return [event.request for event in rig.history if isinstance(event, RequestArrived)]


def is_one_inferred_workflow(rig: Rig) -> bool:
    names = [call.workflow_id for call in calls(rig)]
    return len(names) == 2 and len({*names}) == 1 and names[0].startswith("inferred-")


def is_the_trip(rig: Rig, *, agent: str = "") -> bool:
    found = calls(rig)
    named = all((one.workflow_id, one.app) == ("trip-7", "travel") for one in found)
    due = all(one.deadline_s is not None for one in found)
    return len(found) == 2 and named and due and all(one.role == agent for one in found)


# Official clients.


def test_the_openai_client_uses_a_tool_streams_and_gets_its_request_id() -> None:
    async def main() -> None:
        async with serving() as (rig, _):
            sdk = rig.sdk()
            tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
            messages: Any = [{"role": "user", "content": "Weather?"}]
            asked = await sdk.chat.completions.create(model="m", messages=messages, tools=tools)
            (call,) = asked.choices[0].message.tool_calls or []
            assert call.id == "call-1"
            stream = await sdk.chat.completions.create(
                model="m", messages=messages, stream=True, extra_headers={"x-request-id": "mine-1"}
            )
            text = "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])
            assert text == "It is fine."
            assert stream.response.headers["x-request-id"] == "mine-1"

    play(main())


def test_errors_are_those_of_the_official_clients() -> None:
    async def main() -> None:
        async with serving() as (rig, _):
            messages: Any = [{"role": "user", "content": "x"}]
            with pytest.raises(openai.NotFoundError) as missing:
                await rig.sdk().chat.completions.create(model="no", messages=messages)
            assert missing.value.code == "model_not_found"
            assert missing.value.request_id
            with pytest.raises(openai.BadRequestError):
                await rig.sdk().chat.completions.create(
                    model="m", messages=messages, extra_headers={"x-concertmaster-stage": "x"}
                )
            claude = anthropic.AsyncAnthropic(base_url=rig.url, max_retries=0, **KEY)
            with pytest.raises(anthropic.NotFoundError) as unknown:
                await claude.messages.create(model="no", messages=messages, max_tokens=5)
            assert unknown.value.request_id

    play(main())


def test_the_anthropic_client_talks_and_streams() -> None:
    async def main() -> None:
        async with serving() as (rig, _):
            claude = anthropic.AsyncAnthropic(base_url=rig.url, max_retries=0, **KEY)
            asked: Any = {
                "model": "m",
                "max_tokens": 5,
                "messages": [{"role": "user", "content": "x"}],
            }
            message = await claude.messages.create(**asked)
            assert message.content[0].text == "It is fine."
            async with claude.messages.stream(**asked) as stream:
                assert await stream.get_final_text() == "It is fine."

    play(main())


# The OpenAI Agents SDK.


def an_agent(rig: Rig, *, responses: bool) -> agents.Agent[Any]:
    kind = agents.OpenAIResponsesModel if responses else agents.OpenAIChatCompletionsModel
    model: Any = kind(model="m", openai_client=rig.sdk())
    return agents.Agent(name="guide", model=model, tools=[agents.function_tool(weather)])


@pytest.mark.parametrize("responses", [True, False])
def test_the_openai_agents_sdk_runs_a_tool_loop(*, responses: bool) -> None:
    async def main() -> None:
        async with serving() as (rig, _):
            done = await agents.Runner.run(an_agent(rig, responses=responses), "Weather?")
            assert done.final_output == "It is sunny in Oslo."
            assert is_one_inferred_workflow(rig)

    play(main())


def test_the_openai_agents_sdk_streams() -> None:
    async def main() -> None:
        async with serving() as (rig, _):
            run = agents.Runner.run_streamed(an_agent(rig, responses=True), "Weather?")
            kinds = [event.type async for event in run.stream_events()]
            assert run.final_output == "It is sunny in Oslo."
            assert "raw_response_event" in kinds

    play(main())


def test_the_openai_agents_sdk_names_its_workflow_with_its_adapter() -> None:
    async def main() -> None:
        async with serving() as (rig, _):
            config = openai_agents.run_config(TRIP)
            await agents.Runner.run(an_agent(rig, responses=False), "Hi", run_config=config)
            assert is_the_trip(rig)
        async with serving() as (rig, _):
            guide = openai_agents.identified(an_agent(rig, responses=True), TRIP)
            await agents.Runner.run(guide, "Hi")
            assert is_the_trip(rig, agent="guide")

    play(main())


# LangChain and LangGraph.


def a_graph(model: Any) -> Any:  # noqa: ANN401
    async def talk(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await model.ainvoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("talk", talk)
    graph.add_node("tools", ToolNode([langchain_tool(weather)]))
    graph.add_edge(START, "talk")
    graph.add_conditional_edges("talk", tools_condition)
    graph.add_edge("tools", "talk")
    return graph.compile()


def chat_model(rig: Rig, **settings: Any) -> ChatOpenAI:  # noqa: ANN401
    return ChatOpenAI(model="m", base_url=f"{rig.url}/v1", max_retries=0, **KEY, **settings)


ASKED = {"messages": [{"role": "user", "content": "Weather?"}]}


@pytest.mark.parametrize("streams", [True, False])
def test_langgraph_runs_a_tool_loop(*, streams: bool) -> None:
    async def main() -> None:
        async with serving() as (rig, upstream):
            model = chat_model(rig, streaming=streams).bind_tools([langchain_tool(weather)])
            done = await a_graph(model).ainvoke(ASKED)
            assert done["messages"][-1].content == "It is sunny in Oslo."
            assert is_one_inferred_workflow(rig)
            assert [bool(one.json.get("stream")) for one in upstream.heard] == [streams] * 2

    play(main())


def test_langgraph_names_its_workflow_with_its_adapter() -> None:
    async def main() -> None:
        tools = [langchain_tool(weather)]
        async with serving() as (rig, _):
            bound = chat_model(rig).bind_tools(tools)
            await a_graph(langchain.identified(bound, TRIP, role="guide")).ainvoke(ASKED)
            assert is_the_trip(rig, agent="guide")
        async with serving() as (rig, _):
            settings = {"model": "m", "base_url": f"{rig.url}/v1", **KEY}
            model = langchain.chat_openai(TRIP, role="guide", **settings)
            await a_graph(model.bind_tools(tools)).ainvoke(ASKED)
            assert is_the_trip(rig, agent="guide")

    play(main())


def test_langchain_raises_the_clients_own_errors() -> None:
    async def main() -> None:
        async with serving() as (rig, _):
            with pytest.raises(openai.NotFoundError):
                await chat_model(rig).bind(model="no").ainvoke("x")

    play(main())


# pydantic-ai.


def a_pydantic_agent(rig: Rig, model: str = "m") -> PydanticAgent[None, str]:
    found = OpenAIChatModel(model, provider=OpenAIProvider(openai_client=rig.sdk()))
    return PydanticAgent(found, tools=[weather])


def test_pydantic_ai_runs_a_tool_loop_and_streams() -> None:
    async def main() -> None:
        async with serving() as (rig, _):
            done = await a_pydantic_agent(rig).run("Weather?")
            assert done.output == "It is sunny in Oslo."
            assert is_one_inferred_workflow(rig)
            async with a_pydantic_agent(rig).run_stream("Weather?") as run:
                assert await run.get_output() == "It is sunny in Oslo."

    play(main())


def test_pydantic_ai_raises_its_own_error() -> None:
    async def main() -> None:
        async with serving() as (rig, _):
            with pytest.raises(ModelHTTPError) as refused:
                await a_pydantic_agent(rig, "no").run("x")
            assert refused.value.status_code == 404

    play(main())


# Adapters.


def test_adapters_import_no_framework_before_they_are_called() -> None:
    code = (
        "import sys; import concertmaster.adapters.autogen, concertmaster.adapters.crewai, "
        "concertmaster.adapters.langchain, concertmaster.adapters.openai_agents; "
        "print({'agents', 'langchain_core', 'autogen_ext', 'crewai', 'openai', 'msgspec'} "
        "& {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603  # ours

    assert done.stdout == "set()\n"


def test_a_workflow_says_only_what_it_is_told() -> None:
    assert Workflow(workflow_id="w").headers() == {"x-concertmaster-workflow-id": "w"}
    told = Workflow(workflow_id="w", template="t", service_class="batch", deadline_ms=0)
    assert told.headers(agent="a", role="r", step="s") == {
        "x-concertmaster-workflow-id": "w",
        "x-concertmaster-template": "t",
        "x-concertmaster-class": "batch",
        "x-concertmaster-deadline-ms": "0",
        "x-concertmaster-agent": "a",
        "x-concertmaster-role": "r",
        "x-concertmaster-step": "s",
    }


SNIPPETS = dict(
    re.findall(r"^## (.+?)\n.*?^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
)


APART = ("AutoGen", "CrewAI")
"""Frameworks in environments of their own."""


@pytest.mark.parametrize("name", [one for one in SNIPPETS if one not in APART])
def test_every_snippet_of_the_page_runs(name: str) -> None:
    async def main() -> None:
        async with serving() as (rig, _):
            code = SNIPPETS[name].replace("http://127.0.0.1:8000", rig.url).replace('"auto"', '"m"')
            body = "\n".join(f"    {line}" for line in code.splitlines())
            names: dict[str, Any] = {}
            exec(f"async def snippet():\n{body}\n    return locals()", names)  # noqa: S102  # our page
            said = str((await names["snippet"]())["answer"])
            assert "fine" in said
            named = [one for one in calls(rig) if one.workflow_id == "trip-7"]
            assert named or name == "Clients that send nothing"

    play(main())
