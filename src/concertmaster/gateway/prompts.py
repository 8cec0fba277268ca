"""What a predictor may read of a call that came in, at little cost however long it is."""

import re
from typing import Any

import msgspec

from concertmaster.gateway.openai_api import CallBody
from concertmaster.predictors.interface import Prompt

MAX_EXACT_BYTES = 65_536
"""Raw prompts up to here are decoded; of longer ones only the ends are looked at."""

END_CHARS = 4_000
"""How much of a long prompt is kept at either end, in characters or, undecoded, in bytes."""

_LONGEST_LAST_BYTES = 65_536
"""How far back the role of the last message is looked for."""

CUT_MARK = "\n…[cut]…\n"
_ANSWERS_OF_TOOLS = frozenset({"tool", "function"})
_NO_EFFORT = frozenset({"none", "minimal"})
_ROLE = b'"role"'
_ROLE_TAIL = re.compile(rb'"role"\s*:\s*"(\w{1,32})"')
_OPENING = re.compile(rb'\{"(?:role|type)": ?"\w+", ?"(?:content|text)": ?\[?"?')
"""What stands before the text of a message, as clients write it."""


class _Message(msgspec.Struct):
    role: object = None
    content: object = None


_UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError)
"""Not as expected, not in UTF-8, too deep: the gateway passed these parts over when it parsed."""

_decode_messages = msgspec.json.Decoder(list[_Message]).decode
_decode = msgspec.json.Decoder().decode
_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode


def read_prompt(call: CallBody) -> Prompt:
    """Return what is asked, and how; what cannot be read is left out, never refused."""
    raw = call.text()
    if len(raw) > MAX_EXACT_BYTES:
        text, chars = _ends_of(raw), len(raw)
    else:
        text = _texts_of(raw, chat=len(call.messages) > 0)
        chars = len(text)
        if chars > 2 * END_CHARS:
            text = text[:END_CHARS] + CUT_MARK + text[-END_CHARS:]
    return Prompt(
        text=text,
        chars=chars,
        tools=_count(call.tools) if len(call.tools) else 0,
        thinking=_thinks(call),
        after_tool=_after_tool(raw) if len(call.messages) else None,
    )


def _texts_of(raw: memoryview, *, chat: bool) -> str:
    """Join the texts of all messages, or of a prompt that is text or a list of texts."""
    try:
        if not chat:
            return _text_of(_decode(raw))
        return "\n".join([_text_of(message.content) for message in _decode_messages(raw)])
    except _UNREADABLE:
        return ""


def _text_of(content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    texts = [part.get("text", "") if isinstance(part, dict) else part for part in content]
    return "\n".join([text for text in texts if isinstance(text, str)])


def _ends_of(raw: memoryview) -> str:
    """Read both ends of a long prompt, as far as that goes without parsing it."""
    return CUT_MARK.join(_plain(bytes(end)) for end in (raw[:END_CHARS], raw[-END_CHARS:]))


def _plain(part: bytes) -> str:
    """Take the JSON between texts out of a part of a prompt, and undo the commonest escapes."""
    text = b"".join(_OPENING.split(part)).replace(b'"},', b"\n")
    return text.replace(b"\\n", b"\n").replace(b'\\"', b'"').decode(errors="ignore")


def _after_tool(raw: memoryview) -> bool | None:
    """Say whether the last message is a tool's result; ``None`` if it is too long to tell.

    Inside a text every quote is escaped, so the last ``"role"`` is that of the last message.
    """
    tail = bytes(raw[-END_CHARS:])
    start = tail.rfind(_ROLE)
    if start < 0:
        tail = bytes(raw[-_LONGEST_LAST_BYTES:])
        start = tail.rfind(_ROLE)
    role = _ROLE_TAIL.match(tail, start) if start >= 0 else None
    return None if role is None else role[1].decode() in _ANSWERS_OF_TOOLS


def _count(raw: msgspec.Raw) -> int:
    try:
        return len(_decode_list(raw))
    except _UNREADABLE:
        return 0


def _thinks(call: CallBody) -> bool:
    """Say whether the caller asked for reasoning, in any of the words that are in use."""
    effort = call.reasoning_effort
    if isinstance(effort, str):
        return effort not in _NO_EFFORT
    for raw, asks in (
        (call.reasoning, _asks_by_effort),
        (call.thinking, _asks_by_type),
        (call.chat_template_kwargs, _asks_by_template),
    ):
        if len(raw):
            try:
                return asks(_decode(raw))
            except _UNREADABLE:
                return False
    return False


def _asks_by_effort(reasoning: Any) -> bool:  # noqa: ANN401  # whatever was sent
    """OpenAI and OpenRouter: ``reasoning: {"effort": "high"}``."""
    if not isinstance(reasoning, dict):
        return False
    effort = reasoning.get("effort")
    return effort not in _NO_EFFORT if isinstance(effort, str) else bool(reasoning.get("enabled"))


def _asks_by_type(thinking: Any) -> bool:  # noqa: ANN401  # whatever was sent
    """Anthropic, GLM and others: ``thinking: {"type": "enabled"}``."""
    if isinstance(thinking, dict):
        return thinking.get("type") in ("enabled", "adaptive")
    return thinking is True


def _asks_by_template(settings: Any) -> bool:  # noqa: ANN401  # whatever was sent
    """Qwen, DeepSeek and others on vLLM and SGLang: ``enable_thinking`` or ``thinking``."""
    if not isinstance(settings, dict):
        return False
    return True in (settings.get("enable_thinking"), settings.get("thinking"))
