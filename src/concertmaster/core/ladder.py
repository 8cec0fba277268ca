"""The work of waiting calls, in their order: how much of it comes before a given place.

Sums are kept as calls enter and leave, in whole tokens, so that they never drift from what
the calls themselves say.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from operator import itemgetter
from typing import NamedTuple, TypeAlias

Rank: TypeAlias = tuple[float, int]
"""Place of a call in an order: its key, and its serial among equals."""

BLOCK = 64
"""Rungs of a block when it is split off; a block has at most twice as many."""


class Work(NamedTuple):
    """What some calls need, on one model.

    Attributes:
        variance: Of the output tokens of them all, in tokens squared.
    """

    calls: int
    prompt_tokens: int
    output_tokens: int
    variance: int

    def plus(self, other: "Work") -> "Work":
        """Return the work of both."""
        return Work(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def less(self, other: "Work") -> "Work":
        """Return the work without that of some of its calls."""
        return Work(*(mine - theirs for mine, theirs in zip(self, other, strict=True)))


NO_WORK = Work(0, 0, 0, 0)


def total(works: Iterable[Work]) -> Work:
    """Add up."""
    columns = tuple(zip(*works, strict=True))
    return Work(*map(sum, columns)) if columns else NO_WORK


class _Block:
    """Neighbours in the order, and their work in all."""

    __slots__ = ("rungs", "work")

    def __init__(self, rungs: list[tuple[Rank, Work]]) -> None:
        self.rungs = rungs
        self.work = total(work for _, work in rungs)

    def before(self, rank: Rank) -> Work:
        """Return the work of the rungs before a place."""
        return total(work for _, work in self.rungs[: self.index(rank)])

    def index(self, rank: Rank) -> int:
        """Return how many rungs come before a place."""
        return bisect_left(self.rungs, rank, key=itemgetter(0))


class Ladder:
    """Calls by rank, in blocks with sums: entering, leaving and asking look at one block each.

    >>> ladder = Ladder()
    >>> for serial in range(300):
    ...     ladder.add((float(serial % 7), serial), Work(1, 10, 100, 4))
    >>> ladder.before((0.0, 7))
    Work(calls=1, prompt_tokens=10, output_tokens=100, variance=4)
    >>> ladder.before((7.0, 0)).calls
    300
    """

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._lasts: list[Rank] = []

    def add(self, rank: Rank, work: Work) -> None:
        """Let a call in; ranks differ."""
        if not self._blocks:
            self._blocks, self._lasts = [_Block([(rank, work)])], [rank]
            return
        i = min(bisect_left(self._lasts, rank), len(self._lasts) - 1)
        block = self._blocks[i]
        insort(block.rungs, (rank, work))
        block.work = block.work.plus(work)
        self._lasts[i] = block.rungs[-1][0]
        if len(block.rungs) > 2 * BLOCK:
            self._put(i, _Block(block.rungs[:BLOCK]), _Block(block.rungs[BLOCK:]))

    def remove(self, rank: Rank) -> None:
        """Let a call out that is in."""
        i = bisect_left(self._lasts, rank)
        block = self._blocks[i]
        found, work = block.rungs.pop(block.index(rank))
        assert found == rank, f"{rank} is not on the ladder"
        block.work = block.work.less(work)
        self._put(i, *([block] if block.rungs else []))

    def before(self, rank: Rank) -> Work:
        """Return the work of all calls that go before a place."""
        i = bisect_left(self._lasts, rank)
        whole = total(block.work for block in self._blocks[:i])
        return whole if i == len(self._blocks) else whole.plus(self._blocks[i].before(rank))

    def _put(self, i: int, *blocks: _Block) -> None:
        self._blocks[i : i + 1] = blocks
        self._lasts[i : i + 1] = [block.rungs[-1][0] for block in blocks]

    def validate(self, rungs: Iterable[tuple[Rank, Work]]) -> None:
        """Check that it holds just these, in order, and that its sums are theirs."""
        held = [rung for block in self._blocks for rung in block.rungs]
        assert held == sorted(rungs), "a ladder and its lane differ"
        assert self._lasts == [block.rungs[-1][0] for block in self._blocks]
        for block in self._blocks:
            assert block.work == total(work for _, work in block.rungs), "a sum of work is off"
