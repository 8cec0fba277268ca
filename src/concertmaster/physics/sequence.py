"""What the fast engine model knows of one call."""

from concertmaster.physics.batching import EngineCall

NOT_RUNNING = -1
"""Admission of a call that waits."""


class Sequence:
    """A call and its state.

    ``known`` counts prompt and answer at the last admission or preemption; ``computed`` is
    right while it prefills, ``base`` while it decodes.
    """

    __slots__ = (
        "admission",
        "base",
        "chunks",
        "computed",
        "decoding",
        "gone",
        "hashes",
        "known",
        "order",
        "output_tokens",
        "priority",
        "prompt_tokens",
        "request_id",
        "seen",
    )

    def __init__(
        self, call: EngineCall, order: int, priority: int, hashes: tuple[int, ...]
    ) -> None:
        self.request_id = call.request_id
        self.prompt_tokens = self.known = call.prompt_tokens
        self.output_tokens = call.output_tokens
        self.order = order
        self.priority = priority
        self.hashes = hashes
        self.computed = self.base = 0
        self.admission = NOT_RUNNING
        self.decoding = self.gone = self.seen = False
        self.chunks: list[int] = []
