"""Answers of real engines, recorded byte for byte: one folder a release, one file an answer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parent / "recorded"

_CHAT: Mapping[str, Any] = {
    "model": "small",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 4,
    "temperature": 0.0,
    "ignore_eos": True,
}
_STREAM = {**_CHAT, "stream": True, "stream_options": {"include_usage": True}}

ASKED: Mapping[str, tuple[str, Mapping[str, Any] | None]] = {
    "models": ("/v1/models", None),
    "chat": ("/v1/chat/completions", _CHAT),
    "stream": ("/v1/chat/completions", _STREAM),
    "too-long": ("/v1/chat/completions", {**_CHAT, "max_tokens": 100_000}),
    "metrics": ("/metrics", None),
}
"""By name of its file, what was asked; figures last, after calls."""
