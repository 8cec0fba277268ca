"""CrewAI."""

from typing import Any

from concertmaster.adapters.identity import Workflow


def llm(
    workflow: Workflow,
    *,
    agent: str = "",
    role: str = "",
    **settings: Any,  # noqa: ANN401  # what CrewAI's LLM takes
) -> Any:  # noqa: ANN401  # CrewAI is not there to be checked against
    """Return an ``LLM`` whose calls name their workflow; one for each agent."""
    from crewai import LLM  # noqa: PLC0415

    return LLM(default_headers=workflow.headers(agent=agent, role=role), **settings)
