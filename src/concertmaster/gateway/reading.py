"""A message is read: which API it speaks, and what it says that matters to where it goes.

Reading needs no memory of other calls, so that any process can do it.
"""

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from concertmaster.core.request import ModelName
from concertmaster.gateway import openai_api
from concertmaster.gateway.agent import AgentConnection, Message
from concertmaster.gateway.apis.desk import ApiDesk
from concertmaster.gateway.exchange import Caller
from concertmaster.gateway.identity import Identity, named, with_hints
from concertmaster.gateway.openai_api import CallBody
from concertmaster.gateway.prompts import read_prompt
from concertmaster.gateway.trails import PromptTrail, Trail
from concertmaster.predictors.interface import NO_PROMPT, Prompt

_CALL_PATHS = {b"/v1/chat/completions": True, b"/v1/completions": False}


class Reading(msgspec.Struct, frozen=True, array_like=True):
    """What a call says.

    Attributes:
        identity: Whose it says it is; of no workflow if it names none.
        teaches: Whether there is anything to forecast of its answer, or to learn from it.
        prompt: What the predictor may read, if it wants to.
    """

    identity: Identity
    models: tuple[ModelName, ...]
    max_output_tokens: int
    prompt_tokens: int
    prefix_hashes: tuple[int, ...]
    streams: bool
    model_named: str
    teaches: bool
    prompt: Prompt = NO_PROMPT


class Opened(NamedTuple):
    """A message that is a call, and what was read of it.

    Attributes:
        caller: Who waits for the answer.
        message: What the engine is to be sent.
        trail: Makes what is told of its prompt, where it names no workflow.
    """

    caller: Caller
    message: Message
    reading: Reading
    trail: Callable[[], Trail]


class Reader:
    """Tells calls from other messages, and reads them.

    Args:
        apis: Opens the calls of all APIs but chat and completions.
    """

    def __init__(self, apis: ApiDesk) -> None:
        self._apis = apis

    def is_call(self, message: Message) -> bool:
        """Whether a message asks for an answer of a model."""
        if message.method != b"POST":
            return False
        return message.target.partition(b"?")[0] in _CALL_PATHS or self._apis.serves(message)

    def caller(self, agent: AgentConnection, message: Message) -> Caller:
        """Return who words errors as the API of a call does."""
        if message.target.partition(b"?")[0] in _CALL_PATHS:
            return agent
        return self._apis.caller(agent, message)

    def read(self, agent: AgentConnection, message: Message, *, reads_prompts: bool) -> Opened:
        """Read a call.

        Raises:
            CallerError: Its body or a header of ours is wrong.
        """
        chat = _CALL_PATHS.get(message.target.partition(b"?")[0])
        if chat is not None:
            call = openai_api.parse_call(message.body, chat=chat)
            reading, trail = _read(message, call, teaches=True, reads_prompts=reads_prompts)
            return Opened(agent, message, reading, trail)
        caller, message, call, teaches = self._apis.open(agent, message)
        reading, trail = _read(message, call, teaches=teaches, reads_prompts=reads_prompts)
        return Opened(caller, message, reading, trail)


def _read(
    message: Message, call: CallBody, *, teaches: bool, reads_prompts: bool
) -> tuple[Reading, Callable[[], Trail]]:
    headers, text = message.headers, call.text()
    reading = Reading(
        with_hints(headers, call, named(headers, call)),
        call.models(),
        call.max_output_tokens(),
        openai_api.prompt_tokens(text),
        openai_api.prefix_hashes(text),
        bool(call.stream),
        call.model if isinstance(call.model, str) else "",
        teaches,
        read_prompt(call) if reads_prompts else NO_PROMPT,
    )
    tenant = "" if message.quota is None else message.quota.tenant
    return reading, lambda: PromptTrail(text, tenant)
