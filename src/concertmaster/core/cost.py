"""Tokens to seconds: what one iteration of an engine costs, and sums of iterations."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class RateCurve:
    """How long an iteration takes on one kind of replica (model, GPU, tensor parallelism).

    A step computes the linear operators once over all its tokens (one for each decoding
    sequence plus the prefill chunk), reads the KV cache of the decoding sequences, and
    attends each prefill token to its context.

    Attributes:
        fixed_s: Per iteration, whatever the batch: launches, scheduling, embedding.
        linear_tokens: Increasing token counts at which ``linear_s`` is known; first is 1.
        linear_s: Seconds of all linear operators (and all-reduces) over that many tokens.
        sequence_s: Per sequence in the batch: sampling, bookkeeping.
        kv_token_s: Per KV token read by a decoding sequence.
        prefill_pair_s: Per (prefill token, context token) pair of attention.
    """

    fixed_s: float
    linear_tokens: tuple[int, ...]
    linear_s: tuple[float, ...]
    sequence_s: float = 0.0
    kv_token_s: float = 0.0
    prefill_pair_s: float = 0.0
    _table_s: list[float] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.linear_tokens) < 2 or len(self.linear_tokens) != len(self.linear_s):
            raise ValueError("a rate curve needs at least two points, as many times as counts")
        if list(self.linear_tokens) != sorted(set(self.linear_tokens)):
            raise ValueError(f"linear_tokens must increase, got {self.linear_tokens}")
        last = self.linear_tokens[-1]
        self._table_s.extend(
            _interpolate(self.linear_tokens, self.linear_s, n) for n in range(last + 1)
        )

    def linear_at_s(self, tokens: int) -> float:
        """Seconds of the linear operators over ``tokens`` tokens; 0 tokens cost nothing."""
        if tokens <= 0:
            return 0.0
        if tokens < len(self._table_s):
            return self._table_s[tokens]
        return _interpolate(self.linear_tokens, self.linear_s, tokens)

    def step_s(
        self, batch: int, kv_tokens: int, prefill_tokens: int = 0, prefill_pairs: float = 0.0
    ) -> float:
        """Seconds of one iteration.

        Args:
            batch: Sequences that decode one token each.
            kv_tokens: KV tokens that these sequences read.
            prefill_tokens: Prompt tokens computed in this iteration.
            prefill_pairs: Sum over those tokens of the context each attends to.
        """
        return (
            self.fixed_s
            + self.linear_at_s(batch + prefill_tokens)
            + self.sequence_s * batch
            + self.kv_token_s * kv_tokens
            + self.prefill_pair_s * prefill_pairs
        )

    def prefill_s(self, tokens: int, *, cached_tokens: int = 0, chunk_tokens: int = 2048) -> float:
        """Seconds to prefill ``tokens`` prompt tokens alone on the replica, in chunks.

        Args:
            tokens: Length of the prompt.
            cached_tokens: Leading tokens that are in the prefix cache.
            chunk_tokens: Most tokens an iteration takes.
        """
        new = max(1, tokens - cached_tokens)
        full, rest = divmod(new, chunk_tokens)
        pairs = new * (tokens - new) + new * (new + 1) / 2
        seconds = full * (self.fixed_s + self.linear_at_s(chunk_tokens))
        if rest:
            seconds += self.fixed_s + self.linear_at_s(rest)
        return seconds + self.prefill_pair_s * pairs

    def decode_s(self, tokens: float, *, batch: int, kv_tokens: float) -> float:
        """Seconds for ``tokens`` iterations in a batch that reads ``kv_tokens`` on average."""
        return tokens * (
            self.fixed_s
            + self.linear_at_s(batch)
            + self.sequence_s * batch
            + self.kv_token_s * kv_tokens
        )


def _interpolate(xs: Sequence[int], ys: Sequence[float], x: int) -> float:
    """Piecewise linear; past either end the nearest segment goes on."""
    i = min(max(bisect_left(xs, x), 1), len(xs) - 1)
    slope = (ys[i] - ys[i - 1]) / (xs[i] - xs[i - 1])
    return ys[i - 1] + slope * (x - xs[i - 1])
