"""What makes forecasts cheap changes none: each part beside a slow way of saying the same."""

import copy
import math
import random
import re
from itertools import pairwise
from zlib import crc32

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import a_request
from concertmaster.core.forecast import Quantiles
from concertmaster.predictors import laws as laws_module
from concertmaster.predictors.calibration import (
    FIRST_LABELS,
    LAST_LABELS,
    MOST_OFFSET,
    MOST_STEP,
    MOST_TRUST,
    Calibration,
    log_pinball,
)
from concertmaster.predictors.evidence import TARGETS, Evidence
from concertmaster.predictors.features import log, prompt_figures
from concertmaster.predictors.heads import HEAD_TARGETS, LEVELS
from concertmaster.predictors.interface import Prompt
from concertmaster.predictors.laws import (
    APP_LEAN_WORKFLOWS,
    BINS,
    EDGES,
    LEAST_REST,
    Law,
    LawTree,
    Path,
    expit,
    logit,
    path_of,
)
from concertmaster.predictors.learned import LearnedPredictor
from concertmaster.predictors.words import BUCKETS, HEAD_CHARS, TAIL_CHARS, WordScores, buckets
from learned_builders import some_heads

Floats = npt.NDArray[np.float64]

# Laws


def blended(tree: LawTree, path: Path) -> tuple[Floats, float, int, bool]:
    """Blend the groups along a path from scratch: cumulated law, workflows, depth, by model."""
    of_model = ("\x1e", *path[-1:])
    chain = ((0, ()), (0, of_model), *((i, path[:i]) for i in range(1, len(path) + 1)))
    groups = [
        (end, APP_LEAN_WORKFLOWS if end == 1 else tree._lean, tree._groups[key])
        for end, key in chain
        if key in tree._groups and tree._groups[key].seen
    ]
    below, rest = np.zeros(BINS + 1), 1.0
    for _, lean, group in reversed(groups):
        own = group.workflows / (group.workflows + lean)
        below += rest * own / group.seen * group.below
        rest *= 1 - own
        if rest < LEAST_REST:
            break
    below += rest * laws_module._PRIOR
    depth, workflows = (groups[-1][0], groups[-1][2].workflows) if groups else (-1, 0.0)
    return below / below[-1], workflows, depth, of_model in tree._groups


NAMES = st.sampled_from(["", "a", "b"])
PATHS = st.builds(path_of, NAMES, NAMES, NAMES) | st.just(())
ADDED = st.tuples(PATHS, st.integers(0, 5000), st.sampled_from([0.0, 0.05, 1.0, 900.0]))


@given(steps=st.lists(st.tuples(ADDED, PATHS), max_size=40), most=st.sampled_from([3, 20_000]))
def test_a_law_that_was_kept_is_that_of_its_groups_at_every_instant(
    steps: list[tuple[tuple[Path, int, float], Path]], most: int
) -> None:
    tree = LawTree(most_groups=most)
    for (path, count, worth), asked in steps:
        tree.add(path, count, worth=worth)
        for one in (asked, path):
            below, workflows, depth, by_model = blended(tree, one)
            law = tree.law(one)
            np.testing.assert_array_equal(law._below, below)
            assert (law.workflows, law.depth, law.by_model) == (workflows, depth, by_model)


def test_a_copy_of_a_tree_goes_its_own_way() -> None:
    tree, path = LawTree(), path_of("app", "m")
    tree.add(path, 10)
    before = tree.law(path)
    copied = copy.deepcopy(tree)
    copied.add(path, 3000)

    assert tree.law(path) is before
    np.testing.assert_array_equal(copied.law(path)._below, blended(copied, path)[0])


def test_models_that_nobody_has_seen_share_a_law() -> None:
    tree = LawTree()
    tree.add(path_of("app", "m"), 10)

    assert tree.law(path_of("app", "x")) is tree.law(path_of("app", "y"))
    assert tree.law(path_of("app", "x")) is not tree.law(path_of("app", "m"))


def test_paths_beyond_the_bound_are_blended_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laws_module, "MOST_CHAINS", 2)
    tree = LawTree()
    for i in range(9):
        tree.law(path_of(f"app {i}"))

    assert len(tree._chains) <= 2


@given(counts=st.lists(st.integers(0, 3000), max_size=30))
def test_the_shape_of_a_law_is_that_of_its_quantiles(counts: list[int]) -> None:
    tree = LawTree()
    for count in counts:
        tree.add(("app",), count)
    law = tree.law(("app",))
    low, middle, high = np.maximum(np.interp((0.1, 0.5, 0.9), law._below, EDGES), 0.0).tolist()

    expected = (log(middle), log(high) - log(low), log(law.workflows), float(law.depth))

    assert law.shape() == law.shape() == expected


@given(
    counts=st.lists(st.integers(0, 3000), max_size=30),
    levels=st.lists(st.floats(0.0001, 0.9999), min_size=1, max_size=8),
)
def test_quantiles_of_a_law_are_never_below_zero(counts: list[int], levels: list[float]) -> None:
    tree = LawTree()
    for count in counts:
        tree.add((), count)
    law: Law = tree.law(())

    assert law.quantiles(np.array(sorted(levels))) == tuple(law.at(sorted(levels)).tolist())


# Calibration


class Reference:
    """Offsets and trust of one target, a group at a time, in the order of the formulas."""

    def __init__(self) -> None:
        self.groups: dict[Path, tuple[Floats, float, float]] = {}

    def learn(
        self, path: Path, stated: Quantiles, law: Quantiles, truth: float, worth: float
    ) -> None:
        levels = np.array(LEVELS)
        covered = np.array([truth <= value for value in stated.values])
        better = log_pinball(law, truth) - log_pinball(stated, truth)
        for end in range(len(path) + 1):
            offsets, trust, labels = self.groups.get(path[:end]) or self.begun(path[:end])
            known = min(FIRST_LABELS + labels, LAST_LABELS)
            step = np.minimum(MOST_STEP, 1 / (known * (levels * (1 - levels)))) * worth
            offsets = np.clip(offsets + step * (levels - covered), -MOST_OFFSET, MOST_OFFSET)
            trust = min(max(trust + worth * better, -MOST_TRUST), MOST_TRUST)
            self.groups[path[:end]] = offsets, trust, labels + worth

    def begun(self, path: Path) -> tuple[Floats, float, float]:
        if not path:
            return np.zeros(len(LEVELS)), 0.0, 0.0
        offsets, trust, _ = self.groups[path[:-1]]
        return offsets, trust if len(path) > 1 else 0.0, 0.0


def test_calibration_moves_as_its_formulas_say() -> None:
    rng, calibration, reference = random.Random(0), Calibration(LEVELS), Reference()
    for _ in range(600):
        path = path_of(rng.choice("ab"), rng.choice("cd"))
        stated, law = (
            Quantiles(LEVELS, tuple(sorted(rng.lognormvariate(5, 1) for _ in LEVELS)))
            for _ in range(2)
        )
        truth, worth = rng.lognormvariate(5, 1), rng.choice([0.05, 1.0])
        calibration.learn("tokens", path, stated, law, truth, worth=worth)
        reference.learn(path, stated, law, truth, worth)

        offsets, trust, _ = reference.groups[path]
        np.testing.assert_array_equal(calibration.offsets("tokens", path), offsets)
        assert calibration.trust("tokens", path) == float(1 / (1 + np.exp(-trust)))


# Heads and laws together


@given(odds=st.none() | st.lists(st.floats(-9, 9, width=32), min_size=24, max_size=24))
def test_ranks_of_all_targets_are_those_of_each_alone(odds: list[float] | None) -> None:
    rng, path = random.Random(1), path_of("app", "coder/")
    predictor = LearnedPredictor(Evidence(), some_heads())
    calibration = predictor.calibration
    for target in TARGETS * 5:
        law = Quantiles.exactly(rng.lognormvariate(5, 1))
        wide = Quantiles(LEVELS, tuple(sorted(rng.lognormvariate(5, 1) for _ in LEVELS)))
        calibration.learn(target, path, wide, law, rng.lognormvariate(5, 1))
    said = None if odds is None else np.array(odds, np.float32).reshape(3, 8)

    rows = predictor._levels(path, said)

    for i, target in enumerate(TARGETS):
        expected: Floats = logit(LEVELS)
        if said is not None and target in HEAD_TARGETS:
            trust = calibration.trust(target, path)
            expected = trust * said[i] + (1 - trust) * expected
        moved = np.maximum.accumulate(expected + calibration.offsets(target, path))
        np.testing.assert_array_equal(rows[i], expit(moved))


# Prompts

WILD = st.text(st.characters(codec=None), max_size=500) | st.text(
    "aB1 |(\n?.{`é漢\ud800", max_size=500
)


@given(text=WILD)
def test_the_end_of_a_prompt_is_counted_character_by_character(text: str) -> None:
    figures = prompt_figures(a_request("r"), Prompt(text=text), LawTree().law(()))
    tail = text[-400:]

    assert figures[7] == math.log1p(len(text.rstrip("\n").rpartition("\n")[2]))
    assert figures[10] == sum(char in "0123456789" for char in tail)
    assert figures[11] == sum(char in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" for char in tail)
    assert figures[12] == sum(char in "|,;:[]()" for char in tail)


def hashed(text: str, offset: int) -> set[int]:
    found = re.findall(r"\w+|[^\w\s]", text.lower())
    words = [word.encode("utf-8", "replace") for word in found]
    pairs = [b" ".join(pair) for pair in pairwise(words)]
    return {offset + crc32(word) % (BUCKETS // 2) for word in words + pairs}


@given(text=WILD)
def test_buckets_are_those_of_each_word_and_pair_in_rising_order(text: str) -> None:
    head, tail = hashed(text[:HEAD_CHARS], 0), hashed(text[-TAIL_CHARS:], BUCKETS // 2)

    assert buckets(text).tolist() == sorted(head | tail)
    assert buckets(text).dtype == np.int32


def test_scores_do_not_depend_on_what_was_scored_before() -> None:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(3, BUCKETS)).astype(np.float32)
    ones, none = np.ones(BUCKETS, np.float32), np.zeros(3, np.float32)
    texts = ["the same start, " * 40 + end for end in ("one", "two", "one two")]

    together = WordScores(weights, ones, none)

    for text in texts:
        alone = WordScores(weights, ones, none)
        np.testing.assert_array_equal(together.scores(text), alone.scores(text))
