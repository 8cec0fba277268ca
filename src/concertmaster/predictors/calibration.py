"""Keeps what is stated true: quantiles are moved until they cover what they say.

Adaptive conformal inference (Gibbs and Candès, 2021), once per target, group and level:
each label moves the level's offset up a little if it was missed and down if it was
covered, so that the share covered tends to the level whatever the labels do. Offsets are
log odds of ranks, see ``laws``; a group begins with its parent's.
"""

from collections.abc import Mapping, Sequence
from math import log1p

import numpy as np
import numpy.typing as npt

from concertmaster.core.forecast import Quantiles
from concertmaster.predictors.laws import SEPARATOR, Path, logit

Floats = npt.NDArray[np.float64]

FIRST_LABELS, LAST_LABELS = 40.0, 240.0
"""A label moves an offset as the next one of this many would: of few at first, of more later."""

MOST_STEP = 0.5

LEAN_WORKFLOWS = 100.0
"""Workflows at which a group's own labels say as much of the trust in the heads as its parent's."""

LEAN_OF_OFFSETS = 300.0
"""The same of the offsets: a tail of few workflows is mostly their luck."""

MOST_OWN = 1.5
"""How far from its parent a fit may move a group: few workflows say little of a tail."""

MOST_ERROR = 2.0
"""Misses beyond this count the same when heads are weighed, in log odds."""

MOST_OFFSET = 6.0
MOST_TRUST = 6.0
MOST_WORTHS = 64
"""Worths of labels whose steps are kept, for groups that have seen many."""

BLENDS: Floats = np.linspace(0.02, 0.98, 13)
"""Weights of the heads that are tried on labels that they have not seen."""

_TRUST_STEP = 1.0


class _Group:
    """Offsets of one group by level, what stands behind them, and the trust in the heads.

    Levels are few: a label moves plain floats in less time than an array of them.
    """

    __slots__ = ("_share", "_trust", "curve", "labels", "offsets")

    def __init__(self, offsets: list[float], trust: float) -> None:
        self.offsets = offsets
        self.trust = trust
        self.labels = 0.0
        self.curve: Floats = np.zeros(len(BLENDS))

    @property
    def trust(self) -> float:
        """Log odds of the weight of the heads."""
        return self._trust

    @trust.setter
    def trust(self, odds: float) -> None:
        self._trust = odds
        self._share: float | None = None

    @property
    def share(self) -> float:
        """Weight of the heads, in 0…1."""
        if self._share is None:
            self._share = float(1 / (1 + np.exp(-self._trust)))
        return self._share


class Calibration:
    """Offsets and trust by target and group.

    Args:
        levels: Of the forecasts.
        most_groups: Groups to keep; those beyond use their parent's.
    """

    def __init__(self, levels: Sequence[float], *, most_groups: int = 5000) -> None:
        self._levels = np.array(levels)
        self._nominal: list[float] = self._levels.tolist()
        # in log odds a quantile lies where the density is level * (1 - level), and the step
        # that learns it fastest is one over that (Robbins and Monro)
        self._densities: list[float] = (self._levels * (1 - self._levels)).tolist()
        self._last_steps: dict[float, list[float]] = {}
        self._nothing = [0.0] * len(levels)
        self._most_groups = most_groups
        self._groups: dict[tuple[str, Path], _Group] = {}

    def offsets(self, target: str, path: Path) -> Floats:
        """Return what to add to log odds, by level; 0 where nothing was learnt."""
        offsets: Floats = self.all_offsets((target,), path)[0]
        return offsets

    def all_offsets(self, targets: Sequence[str], path: Path) -> Floats:
        """Return the same of several targets, a row each."""
        groups = [self._find(target, path) for target in targets]
        return np.array([self._nothing if one is None else one.offsets for one in groups])

    def trust(self, target: str, path: Path) -> float:
        """Return the weight of the heads beside the law of the group, in 0…1."""
        group = self._find(target, path)
        return 0.5 if group is None else group.share

    def learn(
        self,
        target: str,
        path: Path,
        stated: Quantiles,
        law: Quantiles,
        truth: float,
        *,
        worth: float = 1.0,
    ) -> None:
        """Take in a label.

        Args:
            target: What was forecast.
            path: The group, and those it belongs to.
            stated: The forecast that was made.
            law: What the law of the group alone would have said.
            truth: What came of it.
            worth: In workflows; labels of one workflow resemble each other.
        """
        pairs = zip(self._nominal, stated.values, strict=True)
        off = [level - 1.0 if truth <= value else level for level, value in pairs]
        better = log_pinball(law, truth) - log_pinball(stated, truth)
        for end in range(len(path) + 1):
            group = self._groups.get((target, path[:end])) or self._open(target, path[:end])
            if group is None:
                return
            steps = self._steps(group.labels, worth)
            group.offsets = [
                min(max(offset + step * missed, -MOST_OFFSET), MOST_OFFSET)
                for offset, step, missed in zip(group.offsets, steps, off, strict=True)
            ]
            trust = group.trust + _TRUST_STEP * worth * better
            group.trust = min(max(trust, -MOST_TRUST), MOST_TRUST)
            group.labels += worth

    def _steps(self, labels: float, worth: float) -> list[float]:
        """Return how far a label moves each level of a group that has seen so many."""
        known = min(FIRST_LABELS + labels, LAST_LABELS)
        steps = self._last_steps.get(worth) if known == LAST_LABELS else None
        if steps is None:
            steps = [min(MOST_STEP, 1 / (known * one)) * worth for one in self._densities]
            if known == LAST_LABELS and len(self._last_steps) < MOST_WORTHS:
                self._last_steps[worth] = steps
        return steps

    def fit(
        self, target: str, paths: Sequence[Path], odds: Floats, truths: Floats, worths: Floats
    ) -> None:
        """Set the offsets from labels that the heads have not seen.

        Args:
            target: What was forecast.
            paths: The group of each label, and those it belongs to.
            odds: What the heads said, shape ``(labels, levels)``, in log odds of a rank.
            truths: Log odds of the rank that came, by label.
            worths: In workflows, by label; they say how far a group leans on its parent.
        """
        for depth in range(max(map(len, paths), default=0) + 1):
            members: dict[Path, list[int]] = {}
            for i, path in enumerate(paths):
                members.setdefault(path[:depth], []).append(i)
            for path, rows in members.items():
                self._set(target, path, odds[rows], truths[rows], worths[rows])

    def _set(self, target: str, path: Path, odds: Floats, truths: Floats, worths: Floats) -> None:
        parent = self._find(target, path[:-1])
        group = self._groups.get((target, path)) or self._open(target, path)
        if group is None:
            return
        labels = float(worths.sum())
        lean = LEAN_OF_OFFSETS / (labels + LEAN_OF_OFFSETS)
        group.labels = labels
        group.curve = _blend_losses(odds, truths, labels, self._levels)
        if parent is not None and path:
            group.curve += parent.curve * LEAN_WORKFLOWS / max(parent.labels, LEAN_WORKFLOWS)
        share = float(BLENDS[int(np.argmin(group.curve))])
        group.trust = float(np.clip(np.log(share / (1 - share)), -MOST_TRUST, MOST_TRUST))
        if path:  # what all apps have in common the heads have learnt
            blended = share * odds + (1 - share) * logit(self._levels)
            own = own_quantiles(truths[:, None] - blended, self._levels)
            before = np.array(group.offsets)
            own = np.clip(own, before - MOST_OWN, before + MOST_OWN)
            group.offsets = (lean * before + (1 - lean) * own).tolist()

    def _find(self, target: str, path: Path) -> _Group | None:
        for end in range(len(path), -1, -1):
            group = self._groups.get((target, path[:end]))
            if group is not None:
                return group
        return None

    def _open(self, target: str, path: Path) -> _Group | None:
        if len(self._groups) >= self._most_groups:
            return None
        parent = self._find(target, path)
        offsets = self._nothing if parent is None else parent.offsets
        # what was learnt of other apps says little of how far to trust the heads on this one
        trust = parent.trust if parent is not None and len(path) > 1 else 0.0
        group = self._groups[target, path] = _Group(offsets, trust)
        return group

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return what ``restore`` needs."""
        groups = self._groups.values()
        return {
            "targets": np.array([target for target, _ in self._groups], dtype=np.str_),
            "paths": np.array([SEPARATOR.join(path) for _, path in self._groups], dtype=np.str_),
            "depths": np.array([len(path) for _, path in self._groups], dtype=np.int8),
            "offsets": np.array([group.offsets for group in groups], dtype=np.float32),
            "trusts": np.array([group.trust for group in groups], dtype=np.float32),
            "labels": np.array([group.labels for group in groups], dtype=np.float32),
        }

    def restore(self, arrays: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Take in what ``arrays`` kept."""
        for i, (target, joined) in enumerate(zip(arrays["targets"], arrays["paths"], strict=True)):
            path = tuple(str(joined).split(SEPARATOR)) if arrays["depths"][i] else ()
            offsets = np.asarray(arrays["offsets"][i], dtype=np.float64)
            group = _Group(offsets.tolist(), float(arrays["trusts"][i]))
            group.labels = float(arrays["labels"][i])
            self._groups[str(target), path] = group


def _blend_losses(odds: Floats, truths: Floats, labels: float, levels: Floats) -> Floats:
    """Return the pinball loss of each blend of heads and law, in log odds of ranks."""
    losses = []
    for share in BLENDS:
        errors = truths[:, None] - (share * odds + (1 - share) * logit(levels))
        errors = np.clip(errors, -MOST_ERROR, MOST_ERROR)
        pinball = np.maximum(levels * errors, (levels - 1) * errors).mean(axis=1)
        losses.append(float(pinball.mean()) * labels)
    return np.array(losses)


def own_quantiles(columns: Floats, levels: Floats) -> Floats:
    """Return the quantile of each column at the level of the same place.

    >>> own_quantiles(np.array([[1.0], [2.0], [9.0]]), np.array([0.5])).tolist()
    [2.0]
    """
    pairs = zip(columns.T, levels, strict=True)
    return np.array([np.quantile(column, level) for column, level in pairs])


def log_pinball(stated: Quantiles, truth: float) -> float:
    """Return the pinball loss in logarithms, as a mean over the levels.

    >>> round(log_pinball(Quantiles((0.5,), (0.0,)), 0.0), 3)
    0.0
    """
    true = log1p(truth)
    total = 0.0
    for level, value in zip(stated.levels, stated.values, strict=True):
        error = true - log1p(value)
        total += level * error if error > 0 else (level - 1) * error
    return total / len(stated.levels)
