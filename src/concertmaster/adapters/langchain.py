"""LangChain and LangGraph."""

from typing import TYPE_CHECKING, Any

from concertmaster.adapters.identity import Workflow

if TYPE_CHECKING:
    from langchain_core.runnables import Runnable
    from langchain_openai import ChatOpenAI


def identified(
    model: "Runnable[Any, Any]", workflow: Workflow, *, agent: str = "", role: str = ""
) -> "Runnable[Any, Any]":
    """Return a chat model, with its tools bound or without, that names its workflow."""
    return model.bind(extra_headers=workflow.headers(agent=agent, role=role))


def chat_openai(
    workflow: Workflow,
    *,
    agent: str = "",
    role: str = "",
    **settings: Any,  # noqa: ANN401  # what ChatOpenAI takes
) -> "ChatOpenAI":
    """Return a ``ChatOpenAI`` that names its workflow, for agents that bind their tools."""
    from langchain_openai import ChatOpenAI  # noqa: PLC0415

    return ChatOpenAI(default_headers=workflow.headers(agent=agent, role=role), **settings)
