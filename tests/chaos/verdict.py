"""What an agent may be answered while engines fail, judged from its side alone."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

DONE = "[DONE]"


@dataclass(frozen=True)
class Transcript:
    """One call as its agent saw it.

    Attributes:
        tokens: How many it asked for.
        status: Of the answer; 0 if none came.
        body: All that came.
        whole: Whether the body ended as HTTP says it must.
        left: Whether the agent hung up.
        gateway_died: Whether the gateway was killed, or not back, while it waited.
        error: What the client's library made of an answer that broke.
    """

    name: str
    stream: bool
    tokens: int
    began_s: float
    took_s: float
    status: int = 0
    body: bytes = b""
    whole: bool = False
    left: bool = False
    gateway_died: bool = False
    error: str = ""


class Verdict:
    """Judges transcripts.

    Args:
        words: What engines write, token by token.
        longest_s: How long any call may take.

    Attributes:
        outcomes: How many calls came to what.
    """

    def __init__(self, words: list[str], *, longest_s: float) -> None:
        self._words = words
        self._longest_s = longest_s
        self.outcomes: Counter[str] = Counter()

    def problem(self, call: Transcript) -> str:
        """Say what is wrong with an answer; empty if nothing is."""
        outcome, problem = self._judge(call)
        self.outcomes[outcome] += 1
        if call.took_s > self._longest_s and not call.gateway_died:  # it waits until that is back
            problem = problem or f"took {call.took_s:.1f} s, expected {self._longest_s:.1f} at most"
        return problem and f"{call.name}: {problem}"

    def _judge(self, call: Transcript) -> tuple[str, str]:
        if call.left:
            return "left", ""
        if not call.status:
            problem = f"no answer, and the gateway lived: {call.error} after {call.took_s:.1f} s"
            return "no answer", "" if call.gateway_died else problem
        if call.status != 200:
            return f"refused {call.status}", _refusal_problem(call)
        if call.stream:
            return self._judge_stream(call)
        if not call.whole:
            return "cut", ""  # it cannot be taken for a whole one: its length says so
        return "served", self._whole_problem(call)

    def _whole_problem(self, call: Transcript) -> str:
        try:
            answer = json.loads(call.body)
            text = answer["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            return f"200, and no completion: {call.body[:200]!r}"
        return "" if text == self._text(call.tokens) else f"expected other words than {text!r}"

    def _judge_stream(self, call: Transcript) -> tuple[str, str]:
        events, rest = _events(call.body)
        text = "".join(_delta(event) for event in events)
        failed = any("error" in event for event in events if isinstance(event, dict))
        done = bool(events) and events[-1] == DONE
        finished = any(_finish_reason(event) for event in events)
        if not self._text(call.tokens).startswith(text):
            return "wrong", f"tokens were lost, doubled or moved: {text!r}"
        if failed:
            held = not text  # refused while it was held: its status had been sent before
            finished = done or finished or (call.whole and not held)
            return "broke", "it broke, and looks finished" if finished else ""
        if not call.whole:
            return "cut", "it was cut, and looks finished" if done else ""
        if not (done and finished and not rest and text == self._text(call.tokens)):
            return "wrong", f"a finished stream lacks its end: {call.body[-200:]!r}"
        return "served", ""

    def _text(self, tokens: int) -> str:
        return "".join(self._words[:tokens])


def _refusal_problem(call: Transcript) -> str:
    try:
        error = json.loads(call.body)["error"]
        named = all(isinstance(error[key], str) for key in ("message", "type", "code"))
    except (ValueError, LookupError, TypeError):
        named = False
    if named and call.whole and call.status >= 400:
        return ""
    return f"{call.status} without a reason: {call.body[:200]!r}"


def _events(body: bytes) -> tuple[list[Any], bytes]:
    """Return the payloads of whole events, and what is left over."""
    *frames, rest = body.split(b"\n\n")
    lines = [line for frame in frames for line in frame.split(b"\n")]
    payloads = [line.removeprefix(b"data: ") for line in lines if line.startswith(b"data: ")]
    return [DONE if one == DONE.encode() else json.loads(one) for one in payloads], rest


def _choice(event: Any) -> dict[str, Any]:  # noqa: ANN401  # whatever was sent
    choices = event.get("choices") if isinstance(event, dict) else None
    return choices[0] if choices else {}


def _delta(event: Any) -> str:  # noqa: ANN401
    return str(_choice(event).get("delta", {}).get("content") or "")


def _finish_reason(event: Any) -> str | None:  # noqa: ANN401
    reason: str | None = _choice(event).get("finish_reason")
    return reason
