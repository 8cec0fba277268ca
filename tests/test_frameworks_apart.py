"""Frameworks in environments of their own: ``make test-frameworks``."""

import asyncio
import os
from pathlib import Path

import pytest

from gateway_rig import play
from test_agent_frameworks import calls, serving

REPO = Path(__file__).parents[1]

CREWAI = """
import sys
from crewai import LLM, Agent, Crew, Task
from crewai.tools import tool
from concertmaster.adapters import Workflow
from concertmaster.adapters.crewai import llm

@tool("weather")
def weather(city: str) -> str:
    "Say how the weather is."
    return f"sunny in {city}"

settings = {"model": "openai/m", "base_url": sys.argv[1] + "/v1", "api_key": "x"}
trip = Workflow(workflow_id="trip-7", app="travel")
model = llm(trip, role="guide", **settings) if sys.argv[2] == "adapter" else LLM(**settings)
guide = Agent(role="guide", goal="guide", backstory="guides", llm=model, tools=[weather])
task = Task(description="Weather?", expected_output="a line", agent=guide)
print("ANSWER", Crew(agents=[guide], tasks=[task]).kickoff().raw)
"""

AUTOGEN = """
import asyncio, sys
from autogen_agentchat.agents import AssistantAgent
from autogen_ext.models.openai import OpenAIChatCompletionClient
from concertmaster.adapters import Workflow
from concertmaster.adapters.autogen import client

def weather(city: str) -> str:
    "Say how the weather is."
    return f"sunny in {city}"

known = ("vision", "function_calling", "json_output", "structured_output")
info = {"family": "unknown", **{name: name == "function_calling" for name in known}}
settings = {"model": "m", "model_info": info, "base_url": sys.argv[1] + "/v1", "api_key": "x"}
trip = Workflow(workflow_id="trip-7", app="travel")
make = OpenAIChatCompletionClient
model = client(trip, role="guide", **settings) if sys.argv[2] == "adapter" else make(**settings)
guide = AssistantAgent("guide", model, tools=[weather], reflect_on_tool_use=True)
print("ANSWER", asyncio.run(guide.run(task="Weather?")).messages[-1].content)
"""
QUIET = {"OTEL_SDK_DISABLED": "true", "CREWAI_DISABLE_TELEMETRY": "true"}


async def run(python: str, code: str, url: str, kind: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *(python, "-c", code, url, kind),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **QUIET, "PYTHONPATH": str(REPO / "src")},
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()[-2000:]
    return out.decode()


@pytest.mark.parametrize("kind", ["adapter", "unchanged"])
@pytest.mark.parametrize(("named", "code"), [("CREWAI", CREWAI), ("AUTOGEN", AUTOGEN)])
def test_a_framework_runs_a_tool_loop(named: str, code: str, kind: str) -> None:
    python = os.environ.get(f"{named}_PYTHON", "")
    if not python:
        pytest.skip("run by make test-frameworks")

    async def main() -> None:
        async with serving() as (rig, _):
            said = await run(python, code, rig.url, kind)
            assert "sunny in Oslo" in said.partition("ANSWER")[2]
            names = {call.workflow_id for call in calls(rig)}
            assert len(calls(rig)) > 1
            assert names == {"trip-7"} or (kind == "unchanged" and len(names) == 1)

    play(main(), seconds=120.0)
