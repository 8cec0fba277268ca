"""The OpenAI Agents SDK."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from concertmaster.adapters.identity import Workflow

if TYPE_CHECKING:
    from agents import Agent, RunConfig


def run_config(workflow: Workflow, **settings: Any) -> "RunConfig":  # noqa: ANN401
    """Return the config of a run whose calls all name their workflow.

    Args:
        workflow: The workflow.
        settings: What else ``RunConfig`` takes, but ``model_settings``.
    """
    from agents import ModelSettings, RunConfig  # noqa: PLC0415

    return RunConfig(model_settings=ModelSettings(extra_headers=workflow.headers()), **settings)


def identified(agent: "Agent[Any]", workflow: Workflow, *, role: str = "") -> "Agent[Any]":
    """Return the agent with its name, and its role, on each of its calls.

    Use it without ``run_config``, whose headers would take the place of these.
    """
    headers = workflow.headers(agent=agent.name, role=role or agent.name)
    return agent.clone(model_settings=replace(agent.model_settings, extra_headers=headers))
