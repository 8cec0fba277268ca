"""Empirical laws of counts, by group, each leaning on the coarser group it belongs to.

A group that was never seen answers with its parent's law, one that was seen a little with a
blend, and one that was seen often with its own. What a group is worth is counted in
workflows, not in calls, because the calls of one workflow resemble each other.

Learnt predictors work in *ranks*: the level that a count has in the law of its group. A
rank means the same for every app, so what is learnt of ranks carries over to apps that
nobody has seen.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from math import log1p

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Path = tuple[str, ...]
"""A group and those it belongs to: ("app", "app/template", …), coarse to fine; the last name
of a whole path is that of the model, "" if nobody knows it."""

_ANY_APP = "\x1e"

_UNIT_BINS = 17
_BINS_PER_OCTAVE = 8
_MOST = 4_000_000.0


def _edges() -> tuple[float, ...]:
    """Bins of one count up to 16, then an eighth of an octave wide."""
    edges = [i - 0.5 for i in range(_UNIT_BINS + 1)]
    while edges[-1] < _MOST:
        edges.append(edges[-1] * 2 ** (1 / _BINS_PER_OCTAVE))
    return tuple(edges)


EDGES = _edges()
BINS = len(EDGES) - 1
_EDGE_ARRAY = np.array(EDGES)

LEAN_WORKFLOWS = 3.0
"""Workflows at which a group's own law and its parent's weigh the same."""

APP_LEAN_WORKFLOWS = 1.0
"""The same for an app as a whole: what other apps needed says little of a new one."""

LEAST_REST = 1e-6
"""Weight of coarser groups below which they are not looked at."""

MOST_WORKFLOWS = 3000.0
"""What a group may be worth; beyond, what it has seen is halved, so that it follows drift."""


MOST_CHAINS = 2_000
"""Paths whose law is kept until a group of it changes."""

FULL_WORKFLOWS = 50.0
"""What one app adds to the laws of all apps tends to as many workflows as this."""


def _prior() -> Floats:
    """Return a law so wide that it says nothing: log-normal about 150, a factor 12 either way."""
    middles = np.log(np.maximum(_EDGE_ARRAY[1:] + _EDGE_ARRAY[:-1], 1.0) / 2)
    widths = np.diff(np.log(np.maximum(_EDGE_ARRAY, 0.3)))
    mass = np.exp(-0.5 * ((middles - 5.0) / 2.5) ** 2) * widths
    return np.concatenate(([0.0], np.cumsum(mass) / mass.sum()))


_PRIOR = _prior()


class _Group:
    """What was seen of one group: counts below each edge, and what they are worth."""

    __slots__ = ("additions", "below", "seen", "workflows")

    def __init__(self) -> None:
        self.below: Floats = np.zeros(BINS + 1)
        self.seen = 0.0
        self.workflows = 0.0
        self.additions = 0

    def add(self, first: int, count: float, worth: float) -> None:
        tail = self.below[first:]
        tail += count
        self.seen += count
        self.workflows += worth
        self.additions += 1
        if self.workflows > MOST_WORKFLOWS:
            self.below *= 0.5
            self.seen *= 0.5
            self.workflows *= 0.5


class Law:
    """A distribution of counts: the blend of a group's own and its parents'.

    Attributes:
        workflows: What the finest group that was seen is worth.
        depth: How many groups of the path were seen.
        by_model: Whether its model was seen, in whatever app.
    """

    __slots__ = ("_below", "_shape", "by_model", "depth", "workflows")

    def __init__(self, below: Floats, *, workflows: float, depth: int, by_model: bool) -> None:
        self._below = below
        self._shape: tuple[float, ...] = ()
        self.workflows = workflows
        self.depth = depth
        self.by_model = by_model

    def rank(self, count: float) -> float:
        """Return the level of a count, inside 0…1, spread evenly over its bin."""
        i = min(max(bisect_right(EDGES, count) - 1, 0), BINS - 1)
        low, high = float(self._below[i]), float(self._below[i + 1])
        share = (count - EDGES[i]) / (EDGES[i + 1] - EDGES[i])
        return low + min(max(share, 0.0), 1.0) * (high - low)

    def at(self, levels: npt.ArrayLike) -> Floats:
        """Return the counts at some levels, not below 0."""
        found: Floats = np.interp(np.asarray(levels, dtype=np.float64), self._below, _EDGE_ARRAY)
        return np.maximum(found, 0.0)

    def quantiles(self, levels: Floats) -> tuple[float, ...]:
        """Return the counts at rising levels, not below 0."""
        values: list[float] = np.interp(levels, self._below, _EDGE_ARRAY).tolist()
        if values[0] < 0.0:
            values = [max(value, 0.0) for value in values]
        return tuple(values)

    def shape(self) -> tuple[float, ...]:
        """Return logarithms of the median, of the width of the middle 80 %, and of the worth.

        The width is a quotient; last comes the depth. All of it is worked out once.
        """
        if not self._shape:
            low, middle, high = map(log1p, self.quantiles(_SHAPE_LEVELS))
            self._shape = middle, high - low, log1p(self.workflows), float(self.depth)
        return self._shape


_SHAPE_LEVELS = np.array((0.1, 0.5, 0.9))


class _Chain:
    """The groups along a path, fine to coarse, and the law that they made last.

    Args:
        groups: Depth, lean and group; some may not have been seen.
        by_model: Whether the model of the path was seen.
    """

    __slots__ = ("_additions", "_by_model", "_groups", "_law", "_seen", "_used")

    def __init__(self, groups: Sequence[tuple[int, float, _Group]], *, by_model: bool) -> None:
        self._groups = groups
        self._by_model = by_model
        self._law: Law | None = None
        self._used = 0
        self._additions = -1
        self._seen = -1

    def law(self, seen: int) -> Law:
        """Blend the groups, unless those that count are as they were.

        Args:
            seen: What the whole tree has taken in.
        """
        law = self._law
        if law is None or (seen != self._seen and self._counted() != self._additions):
            law = self._law = self._blend()
            self._additions = self._counted()
        self._seen = seen
        return law

    def _counted(self) -> int:
        """Count what was added to the groups that the law rests on: none is ever taken away."""
        counted = 0
        for _, _, group in self._groups[: self._used]:
            counted += group.additions
        return counted

    def _blend(self) -> Law:
        below: Floats | None = None
        rest, depth, workflows, used = 1.0, -1, 0.0, 0
        for end, lean, group in self._groups:
            used += 1
            if not group.seen:
                continue
            own = group.workflows / (group.workflows + lean)
            part = group.below * (rest * own / group.seen)
            if below is None:
                below, depth, workflows = part, end, group.workflows
            else:
                below += part
            rest *= 1 - own
            if rest < LEAST_REST:
                break
        self._used = used
        prior = _PRIOR * rest
        below = prior if below is None else np.add(below, prior, out=below)
        below /= below[-1]
        return Law(below, workflows=workflows, depth=depth, by_model=self._by_model)


class LawTree:
    """The laws of one quantity.

    Args:
        lean_workflows: Workflows at which a group's own law weighs as much as its parent's.
        most_groups: Groups to remember; those beyond answer with their parent.
    """

    def __init__(
        self, *, lean_workflows: float = LEAN_WORKFLOWS, most_groups: int = 20_000
    ) -> None:
        self._lean = lean_workflows
        self._most_groups = most_groups
        self._groups: dict[Path, _Group] = {(): _Group()}
        self._chains: dict[Path, _Chain] = {}
        self._by_groups: dict[tuple[_Group, ...], _Chain] = {}
        self._lines: dict[Path, list[_Group]] = {}
        self._seen = 0

    def __deepcopy__(self, memo: dict[int, object]) -> "LawTree":
        """Copy what was seen; what is kept of it is worked out anew."""
        copied = LawTree(lean_workflows=self._lean, most_groups=self._most_groups)
        copied._groups = deepcopy(self._groups, memo)
        return copied

    def law(self, path: Path) -> Law:
        """Blend the groups along a path, as far as they were seen."""
        chain = self._chains.get(path)
        if chain is None:
            if len(self._chains) >= MOST_CHAINS:
                self._forget_chains()
            self._chains[path] = chain = self._chain(path)
        return chain.law(self._seen)

    def _chain(self, path: Path) -> _Chain:
        """Gather the groups of the path, then of its model in any app, then of all apps.

        Paths of the same groups share a chain, such as those of models that nobody has seen.
        """
        of_model = _of_model(path)
        ends = [(end, path[:end]) for end in range(len(path), 0, -1)]
        groups = [
            (end, APP_LEAN_WORKFLOWS if end == 1 else self._lean, group)
            for end, key in (*ends, (0, of_model), (0, ()))
            if (group := self._groups.get(key)) is not None
        ]
        key = tuple([group for _, _, group in groups])
        chain = self._by_groups.get(key)
        if chain is None:
            chain = self._by_groups[key] = _Chain(groups, by_model=of_model in self._groups)
        return chain

    def add(self, path: Path, count: float, *, worth: float = 1.0) -> None:
        """Take in a count; ``worth`` is what it adds to the evidence, in workflows."""
        self._seen += 1
        first = min(max(bisect_right(EDGES, count), 1), BINS)
        known = self._groups.get(path[:1])
        share = (1 + known.workflows / FULL_WORKFLOWS) ** -2 if known is not None else 1.0
        self._groups[()].add(first, share, worth * share)
        for group in self._lines.get(path) or self._line(path):
            group.add(first, 1.0, worth)
        if path and path[-1] and (of_model := self._open(_of_model(path))) is not None:
            of_model.add(first, share, worth * share)

    def _line(self, path: Path) -> list[_Group]:
        """Open the groups of a path but that of everything, and remember them while none opens."""
        opened = [self._open(path[:end]) for end in range(1, len(path) + 1)]
        line = [group for group in opened if group is not None]
        if len(self._lines) < MOST_CHAINS:
            self._lines[path] = line
        return line

    def _open(self, key: Path) -> _Group | None:
        """Return a group to add to; ``None`` if it would be one too many."""
        group = self._groups.get(key)
        if group is None and len(self._groups) < self._most_groups:
            group = self._groups[key] = _Group()
            self._forget_chains()
        return group

    def _forget_chains(self) -> None:
        self._chains.clear()
        self._by_groups.clear()
        self._lines.clear()

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return all that was seen, to keep."""
        paths = list(self._groups)
        counts = np.stack([np.diff(self._groups[path].below) for path in paths])
        return {
            "paths": np.array([SEPARATOR.join(path) for path in paths]),
            "depths": np.array([len(path) for path in paths], dtype=np.int8),
            "counts": counts.astype(np.float32),
            "workflows": np.array([self._groups[path].workflows for path in paths]),
        }

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, npt.NDArray[np.generic]],
        *,
        lean_workflows: float = LEAN_WORKFLOWS,
    ) -> "LawTree":
        """Restore what ``arrays`` kept."""
        tree = cls(lean_workflows=lean_workflows)
        counts = np.asarray(arrays["counts"], dtype=np.float64)
        below = np.concatenate((np.zeros((len(counts), 1)), np.cumsum(counts, axis=1)), axis=1)
        for i, (joined, depth) in enumerate(zip(arrays["paths"], arrays["depths"], strict=True)):
            path = tuple(str(joined).split(SEPARATOR)) if depth else ()
            group = tree._groups[path] = _Group()
            group.below = below[i]
            group.seen = float(below[i, -1])
            group.workflows = float(arrays["workflows"][i])
        return tree


SEPARATOR = "\x1f"
_SPACES = str.maketrans({SEPARATOR: " ", _ANY_APP: " "})


def _of_model(path: Path) -> Path:
    """Return the group of a path's model over all apps."""
    return (_ANY_APP, *path[-1:])


def logit(levels: npt.ArrayLike) -> Floats:
    """Log odds of levels, kept off 0 and 1 by 0.0005.

    >>> float(logit(0.5))
    0.0
    """
    clipped = np.clip(np.asarray(levels, dtype=np.float64), 0.0005, 0.9995)
    odds: Floats = np.log(clipped / (1 - clipped))
    return odds


def expit(odds: npt.ArrayLike) -> Floats:
    """Levels of log odds."""
    levels: Floats = 1 / (1 + np.exp(-np.asarray(odds, dtype=np.float64)))
    return levels


def path_of(*names: str) -> Path:
    """Return a path whose groups are each named within the one before.

    >>> path_of("chat", "", "planner")
    ('chat', '', 'planner')
    """
    return tuple(map(_clean, names))


@lru_cache(4_096)
def _clean(name: str) -> str:
    return name.translate(_SPACES)


@lru_cache(1_024)
def stage_bucket(stage: int) -> str:
    """Name a stage, exactly up to 5 and then two names an octave.

    >>> [stage_bucket(stage) for stage in (0, 5, 6, 9, 40)]
    ['0', '5', '6', '7', '11']
    """
    if stage < 6:
        return str(stage)
    return str(6 + int(2 * np.log2(stage / 6)))
