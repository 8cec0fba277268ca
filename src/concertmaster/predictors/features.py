"""What the heads see of a call: figures that mean the same for every app.

Names of apps, roles and models are no features; they choose the law whose ranks are
predicted, see ``laws``. So a head that was fitted on some apps says something of others.
"""

from collections.abc import Sequence
from math import copysign, log1p

from concertmaster.core.request import PREFIX_CHUNK_TOKENS, Request
from concertmaster.predictors.history import History, Track
from concertmaster.predictors.interface import Prompt
from concertmaster.predictors.laws import Law

_TAIL_CHARS = 400
_DIGITS = b"0123456789"
_CAPITALS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MARKS = b"|,;:[]()"
_TROUBLE = ("error", "not found", "no such", "invalid")
_CODE = ("`", "def ", "{")

PROMPT_FEATURES = (
    "prompt_tokens", "prompt_rank", "prompt_chars", "tools", "thinking", "after_tool",
    "lines", "last_line", "trouble", "questions", "digits", "capitals", "marks", "code",
)  # fmt: skip
TRACK_FEATURES = (
    "calls", "rank_1", "rank_2", "rank_3", "rank_mean", "rank_high", "rank_low",
    "rank_spread", "rank_smooth", "tokens_last", "tokens_mean", "streak", "grown_tokens",
)  # fmt: skip
HISTORY_FEATURES = (
    "stage", "parents", "first_call", "all_calls", "all_rank_1", "all_rank_2", "all_mean",
    "all_smooth", "all_tokens_last", "all_tokens", "all_repeats", "all_streak",
    "first_prompt", "all_grown_tokens", "fresh_tokens", "fresh_before", "cached_share",
    "uncached_tokens", "turns", "since_turn", "tool_calls", "pause_s", "pause_smooth",
    "tool_s",
)  # fmt: skip
LAW_FEATURES = ("median", "width", "workflows", "depth")


def log(value: float) -> float:
    """Logarithm that keeps the sign and is 0 at 0.

    >>> log(0), round(log(-9), 2)
    (0.0, -2.3)
    """
    return copysign(log1p(abs(value)), value)


def prompt_figures(request: Request, prompt: Prompt, prompt_law: Law) -> list[float]:
    """Return ``PROMPT_FEATURES``: sizes, and what the end of the prompt looks like."""
    text = prompt.text
    tail = text[-_TAIL_CHARS:]
    lower = tail.lower()
    raw = tail.encode("utf-8", "surrogatepass")
    told = text.rstrip("\n")
    return [
        log1p(request.prompt_tokens),
        prompt_law.rank(request.prompt_tokens),
        log1p(prompt.chars or len(text)),
        log1p(prompt.tools),
        float(prompt.thinking),
        -1.0 if prompt.after_tool is None else float(prompt.after_tool),
        log1p(text.count("\n")),
        log1p(len(told) - told.rfind("\n") - 1),
        float(sum([lower.count(word) for word in _TROUBLE])),
        float(lower.count("?")),
        _count(raw, _DIGITS),
        _count(raw, _CAPITALS),
        _count(raw, _MARKS),
        float(sum([text.count(mark) for mark in _CODE])),
    ]


def _count(raw: bytes, which: bytes) -> float:
    """Count bytes of a UTF-8 text that are one of some ASCII characters."""
    return float(len(raw) - len(raw.translate(None, which)))


def track_figures(request: Request, track: Track) -> list[float]:
    """Return ``TRACK_FEATURES``: how the same role answered before in this workflow."""
    calls = track.calls
    if not calls:
        return [0.0, *[-1.0] * 10, 0.0, 0.0]
    return [
        log1p(calls),
        *_padded(track.last_ranks, 3),
        track.mean,
        track.high,
        track.low,
        track.spread,
        track.smooth,
        log1p(track.last_tokens),
        log1p(track.tokens / calls),
        float(track.streak),
        log(request.prompt_tokens - track.prompt_tokens),
    ]


def history_figures(request: Request, history: History, track: Track) -> list[float]:
    """Return ``HISTORY_FEATURES``: the workflow so far, whoever answered."""
    everything = history.all
    calls = everything.calls
    grown = request.prompt_tokens - everything.prompt_tokens if calls else 0
    cached = cached_tokens(request, track)
    return [
        log(calls if request.stage is None else request.stage),
        float(len(request.parents)),
        float(calls == 0),
        log1p(calls),
        *_padded(everything.last_ranks, 2),
        everything.mean,
        everything.smooth if calls else -1.0,
        log1p(everything.last_tokens) if calls else -1.0,
        log1p(everything.tokens),
        float(everything.repeats),
        float(everything.streak),
        log1p(history.first_prompt_tokens or request.prompt_tokens),
        log(grown),
        log(grown - everything.last_tokens) if calls else 0.0,
        log(history.fresh_tokens),
        cached / request.prompt_tokens,
        log1p(request.prompt_tokens - cached),
        log1p(history.turns),
        log1p(history.since_turn),
        history.tool_calls,
        log1p(history.pause_s(request)),
        history.smooth_pause if history.smooth_pause < 0 else log1p(history.smooth_pause),
        log1p(history.tool_s),
    ]


def cached_tokens(request: Request, track: Track) -> int:
    """Count the leading tokens that the prompt shares with the role's last one.

    Hashes are chained, so that all before an equal pair are equal too.
    """
    mine, theirs = request.prefix_hashes, track.last_hashes
    low, high = 0, min(len(mine), len(theirs))
    while low < high:
        middle = (low + high + 1) // 2
        if mine[middle - 1] == theirs[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return min(low * PREFIX_CHUNK_TOKENS, request.prompt_tokens)


def _padded(values: Sequence[float], count: int) -> list[float]:
    return [*values[:count], *[-1.0] * (count - len(values))]
