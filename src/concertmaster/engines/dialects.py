"""What each kind of engine calls the figures that it exposes, release by release.

Names are those of the engines' own ``/metrics``; where a release renamed one, the newest
stands first. An engine that has no figure for a signal leaves it out, and our own ledger of
calls in flight stands in for it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Literal, NamedTuple

Signal = Literal["running", "waiting", "kv_ratio"]
EngineKind = Literal["vllm", "sglang", "llama.cpp", "ollama", "openai"]

_NUMBER = r"[-+0-9.eE]+|NaN|[-+]?Inf"
_NAMES = re.compile(rb"^# TYPE (\S+)", re.MULTILINE)


class Reading(NamedTuple):
    """What one look at an engine's figures showed.

    Attributes:
        values: By signal; labels of one name (data-parallel ranks, models) are summed, but for
            ratios, whose largest counts.
        missing: Signals of this kind of engine that no known name of it gave.
    """

    values: Mapping[Signal, float]
    missing: tuple[Signal, ...]


@dataclass(frozen=True)
class Dialect:
    """One kind of engine.

    Attributes:
        names: Metric of each signal, newest release first.
        tried: Releases whose names these are.
        priority_sign: Factor from our priority, where less goes first, to the engine's in the
            field ``priority`` of a body; 0 if it takes none there.
        header: Whether the priority goes into ``x-vllm-priority`` instead.
        health_path: What answers 200 while it serves; empty if that hangs on its control.
    """

    kind: EngineKind
    tried: str
    names: Mapping[Signal, tuple[str, ...]]
    priority_sign: int = 0
    header: bool = False
    health_path: str = ""

    @cached_property
    def _lines(self) -> re.Pattern[bytes]:
        names = "|".join(re.escape(one) for known in self.names.values() for one in known)
        return re.compile(rf"^({names})(?:{{[^\n]*}})? ({_NUMBER})".encode(), re.MULTILINE)

    def read(self, exposed: bytes) -> Reading:
        """Find the signals in a ``/metrics`` text.

        >>> DIALECTS["vllm"].read(b'vllm:num_requests_running{engine="0"} 3.0').values
        {'running': 3.0}
        """
        found: dict[str, list[float]] = {}
        for name, value in self._lines.findall(exposed):
            found.setdefault(name.decode(), []).append(float(value))
        values: dict[Signal, float] = {}
        for signal, known in self.names.items():
            name = next((one for one in known if one in found), None)
            if name is not None:
                values[signal] = (max if signal == "kv_ratio" else sum)(found[name])
        return Reading(values, tuple(signal for signal in self.names if signal not in values))

    def prioritised(self, body: bytes, priority: int) -> tuple[bytes, bytes]:
        """Return a line of the head, and the body, that tell the engine who goes first.

        Of ours the smaller goes first, as in vLLM; SGLang takes the larger first.

        >>> DIALECTS["sglang"].prioritised(b'{"model": "m"}', 3)
        (b'', b'{"model": "m","priority":-3}')
        >>> DIALECTS["ollama"].prioritised(b"{}", 3)
        (b'', b'{}')
        """
        if self.header:
            return b"x-vllm-priority: %d\r\n" % priority, body
        return b"", with_priority(
            body, self.priority_sign * priority
        ) if self.priority_sign else body

    def complaint(self, exposed: bytes, missing: tuple[Signal, ...]) -> str:
        """Say which names are not there, and which that are come nearest.

        >>> gone = b"# TYPE vllm:num_requests_going gauge"
        >>> DIALECTS["vllm"].complaint(gone, ("running",))
        'no vllm:num_requests_running (nearest: vllm:num_requests_going); names are of vllm 0.33'
        """
        there = [name.decode() for name in _NAMES.findall(exposed)]
        parts = []
        for signal in missing:
            newest = self.names[signal][0]
            near = get_close_matches(newest, there, n=1)
            parts.append(f"no {newest}" + (f" (nearest: {near[0]})" if near else ""))
        return f"{', '.join(parts)}; names are of {self.kind} {self.tried}"


DIALECTS: Mapping[EngineKind, Dialect] = {
    one.kind: one
    for one in (
        Dialect(
            "vllm",
            "0.33",
            {
                "running": ("vllm:num_requests_running",),
                "waiting": ("vllm:num_requests_waiting",),
                "kv_ratio": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
            },
            header=True,
        ),
        Dialect(
            "sglang",
            "0.5.23",
            {
                "running": ("sglang:num_running_reqs",),
                "waiting": ("sglang:num_queue_reqs",),
                "kv_ratio": ("sglang:token_usage",),
            },
            priority_sign=-1,
        ),
        Dialect(
            "llama.cpp",
            "11434",
            {
                "running": ("llamacpp:requests_processing",),
                "waiting": ("llamacpp:requests_deferred",),
            },
        ),
        Dialect("ollama", "any", {}),
        Dialect("openai", "any", {}, health_path="/v1/models"),
    )
}
"""Every kind by its name in a fleet file; ``openai`` is any that speaks OpenAI's API."""


def with_priority(body: bytes, priority: int) -> bytes:
    """Add a priority to a JSON object; it stands last, so that it wins over a caller's own.

    >>> with_priority(b'{"model": "m"}', -3)
    b'{"model": "m","priority":-3}'
    """
    head, _, _ = body.rpartition(b"}")
    comma = b"" if head.rstrip().endswith(b"{") else b","
    return b'%b%b"priority":%d}' % (head, comma, priority)
