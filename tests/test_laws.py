"""Laws of groups: what was seen often answers for itself, what was not leans on its parent."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertmaster.predictors.laws import (
    EDGES,
    MOST_WORKFLOWS,
    LawTree,
    expit,
    logit,
    path_of,
    stage_bucket,
)

A, B = path_of("a", "coder", "m"), path_of("b", "coder", "another")
counts = st.integers(0, 2_000_000)


def seen(*values: float, path: tuple[str, ...] = A, tree: LawTree | None = None) -> LawTree:
    tree = tree or LawTree()
    for value in values:
        tree.add(path, value)
    return tree


def test_before_anything_was_seen_the_law_is_wide() -> None:
    low, high = LawTree().law(A).at((0.05, 0.95))

    assert low < 10
    assert high > 2000


def test_a_group_that_was_seen_often_answers_with_what_it_saw() -> None:
    tree = seen(*range(100, 300))

    low, middle, high = tree.law(A).at((0.05, 0.5, 0.95))

    assert low == pytest.approx(110, rel=0.1)
    assert middle == pytest.approx(200, rel=0.05)
    assert high == pytest.approx(290, rel=0.1)


def test_a_law_that_was_read_before_knows_what_came_since() -> None:
    tree = seen(*[50.0] * 20)
    before = tree.law(A).at(0.5)
    seen(*[900.0] * 100, tree=tree)

    assert before == pytest.approx(50, rel=0.1)
    assert tree.law(A).at(0.5) == pytest.approx(900, rel=0.1)


def test_a_group_that_was_never_seen_answers_with_its_parent() -> None:
    tree = seen(*[50.0] * 100)

    law = tree.law(path_of("a", "critic"))

    assert law.depth == 1
    assert law.at(0.5) == pytest.approx(50, abs=3)


def test_an_app_that_was_never_seen_answers_with_all_apps() -> None:
    law = seen(*[50.0] * 100).law(B)

    assert law.depth == 0
    assert law.at(0.5) == pytest.approx(50, abs=10)


def test_an_app_that_was_never_seen_answers_with_its_model() -> None:
    tree = seen(*[50.0] * 100, path=path_of("a", "", "coder", "m"))
    seen(*[1000.0] * 100, path=path_of("b", "", "coder", "another"), tree=tree)

    law = tree.law(path_of("new", "", "coder", "m"))

    assert (law.depth, law.by_model) == (0, True)
    assert law.at(0.5) == pytest.approx(50, abs=5)


def test_a_model_that_was_never_seen_leaves_the_answer_to_all_apps() -> None:
    tree = seen(*[50.0] * 100)

    assert not tree.law(path_of("new", "coder", "another")).by_model
    assert not seen(*[50.0] * 100, path=path_of("a", "")).law(path_of("new", "")).by_model


def test_a_new_app_soon_answers_for_itself() -> None:
    tree = LawTree(lean_workflows=8.0)
    for i in range(20):
        seen(*[10_000.0] * 20, path=path_of(f"old {i}", "", "0", "coder", "m"), tree=tree)
    seen(*[100.0] * 10, path=path_of("new", "", "0", "coder", "m"), tree=tree)

    assert tree.law(path_of("new", "", "1", "coder", "m")).at(0.9) < 200


def test_many_calls_of_one_workflow_are_one_piece_of_evidence() -> None:
    alone, spread = LawTree(), LawTree()
    for i in range(50):
        alone.add(A, 50.0, worth=float(i == 0))
        spread.add(A, 50.0)

    assert alone.law(A).workflows == 1
    assert alone.law(A).at(0.95) > spread.law(A).at(0.95)


def test_one_large_app_does_not_speak_for_all_apps() -> None:
    tree = seen(*[20.0] * 20_000)
    for i in range(20):
        seen(*[1000.0] * 20, path=path_of(f"small {i}"), tree=tree)

    assert tree.law(B).at(0.5) > 500


def test_a_group_forgets_by_halves() -> None:
    tree = seen(*[10.0] * int(MOST_WORKFLOWS), *[1000.0] * int(MOST_WORKFLOWS))

    assert tree.law(A).workflows <= MOST_WORKFLOWS
    assert tree.law(A).at(0.5) > 500


def test_groups_beyond_the_bound_lean_on_their_parent() -> None:
    tree = LawTree(most_groups=3)
    seen(*[10.0] * 30, tree=tree)
    seen(*[1000.0] * 30, path=B, tree=tree)

    assert tree.law(B).depth == 0


@given(values=st.lists(counts, max_size=30), value=counts)
def test_ranks_are_levels_and_grow_with_the_count(values: list[int], value: int) -> None:
    law = seen(*values).law(A)

    assert 0 <= law.rank(value) <= law.rank(value + 1) <= 1


@given(values=st.lists(counts, min_size=1, max_size=30), value=counts)
def test_a_rank_leads_back_to_its_count(values: list[int], value: int) -> None:
    law = seen(*values, value).law(A)

    assert law.at(law.rank(value)) == pytest.approx(value, rel=1e-6, abs=1e-6)


@given(values=st.lists(counts, max_size=30))
def test_a_kept_tree_answers_as_before(values: list[int]) -> None:
    tree = seen(*values, path=path_of("app", "", "planner/"))
    levels = (0.01, 0.3, 0.5, 0.99)

    restored = LawTree.from_arrays(tree.arrays())

    for path in (path_of("app", "", "planner/"), path_of("app"), path_of("else"), ()):
        np.testing.assert_allclose(
            restored.law(path).at(levels), tree.law(path).at(levels), rtol=1e-4, atol=1e-3
        )


@given(value=st.integers(0, 16))
def test_small_counts_have_bins_of_their_own(value: int) -> None:
    assert any((low, high) == (value - 0.5, value + 0.5) for low, high in pairwise(EDGES))


@given(levels=st.lists(st.floats(0.001, 0.999), min_size=1))
def test_log_odds_lead_back_to_levels(levels: list[float]) -> None:
    np.testing.assert_allclose(expit(logit(levels)), levels)


def test_stages_share_a_bucket_the_wider_the_later() -> None:
    buckets = [stage_bucket(stage) for stage in range(600)]

    assert len(set(buckets)) < 25
    assert buckets == sorted(buckets, key=int)


def test_a_name_cannot_reach_into_another_group() -> None:
    assert path_of("a\x1fb", "c") != path_of("a", "b\x1fc")
    assert LawTree.from_arrays(seen(5.0, path=path_of("a\x1fb")).arrays()).law(("a b",)).depth == 1
