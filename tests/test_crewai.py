"""CrewAI, in an environment of its own: ``make test-crewai``."""

import asyncio
import os
from pathlib import Path

import pytest

from gateway_rig import play
from test_agent_frameworks import calls, serving

PYTHON = os.environ.get("CREWAI_PYTHON", "")
REPO = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not PYTHON, reason="run by make test-crewai")

CREW = """
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
QUIET = {"OTEL_SDK_DISABLED": "true", "CREWAI_DISABLE_TELEMETRY": "true"}


async def run_crew(url: str, kind: str) -> str:
    environ = {**os.environ, **QUIET, "PYTHONPATH": str(REPO / "src")}
    process = await asyncio.create_subprocess_exec(
        *(PYTHON, "-c", CREW, url, kind),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environ,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()[-2000:]
    return out.decode()


@pytest.mark.parametrize("kind", ["adapter", "unchanged"])
def test_crewai_runs_a_tool_loop(kind: str) -> None:
    async def main() -> None:
        async with serving() as (rig, _):
            said = await run_crew(rig.url, kind)
            assert "sunny in Oslo" in said.partition("ANSWER")[2]
            names = {call.workflow_id for call in calls(rig)}
            assert len(calls(rig)) > 1
            assert names == {"trip-7"} or (kind == "unchanged" and len(names) == 1)

    play(main(), seconds=120.0)
