"""AutoGen."""

from typing import TYPE_CHECKING, Any

from concertmaster.adapters.identity import Workflow

if TYPE_CHECKING:
    from autogen_ext.models.openai import OpenAIChatCompletionClient


def client(
    workflow: Workflow,
    *,
    agent: str = "",
    role: str = "",
    **settings: Any,  # noqa: ANN401  # what OpenAIChatCompletionClient takes
) -> "OpenAIChatCompletionClient":
    """Return a model client whose calls name their workflow; one for each agent."""
    from autogen_ext.models.openai import OpenAIChatCompletionClient  # noqa: PLC0415

    headers = workflow.headers(agent=agent, role=role)
    return OpenAIChatCompletionClient(default_headers=headers, **settings)
