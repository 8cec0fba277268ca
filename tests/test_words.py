"""Word scores: the ends of a prompt, hashed alike in every process."""

import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from concertmaster.predictors.words import BUCKETS, HEAD_CHARS, TAIL_CHARS, WordScores, buckets


def some_scores() -> WordScores:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(3, BUCKETS)).astype(np.float16).astype(np.float32)
    rarity = rng.uniform(1, 4, BUCKETS).astype(np.float16).astype(np.float32)
    return WordScores(weights, rarity, np.array([0.1, 0.2, 0.3], dtype=np.float32))


@given(text=st.text(max_size=700))
def test_any_text_has_finite_scores(text: str) -> None:
    found = buckets(text)

    assert ((found >= 0) & (found < BUCKETS)).all()
    assert np.isfinite(some_scores().scores(text)).all()


@given(text=st.text(st.characters(codec="ascii"), max_size=HEAD_CHARS))
def test_plain_text_is_split_as_any_other(text: str) -> None:
    plain, other = buckets(text), buckets(f"{text}\u3000")  # a space, outside ASCII

    in_head = BUCKETS // 2
    np.testing.assert_array_equal(plain[plain < in_head], other[other < in_head])


def test_lone_surrogates_and_nulls_are_no_trouble() -> None:
    assert np.isfinite(some_scores().scores("\ud800 \x00 \uffff")).all()


def test_a_text_without_words_scores_the_offsets() -> None:
    np.testing.assert_array_equal(
        some_scores().scores(" \n"), np.array([0.1, 0.2, 0.3], dtype=np.float32)
    )


def test_the_middle_of_a_long_prompt_is_not_read() -> None:
    head, tail = "head " * HEAD_CHARS, "tail " * TAIL_CHARS

    assert buckets(head + "x" * 100 + tail).tolist() == buckets(head + "y" * 9 + tail).tolist()


def test_what_stands_at_the_start_differs_from_what_stands_at_the_end() -> None:
    assert set(buckets("alpha" + " " * 600)).isdisjoint(buckets(" " * 600 + "alpha"))


def test_the_order_of_words_matters() -> None:
    assert buckets("dog bites man").tolist() != buckets("man bites dog").tolist()


def test_buckets_are_the_same_in_every_process() -> None:
    code = "from concertmaster.predictors.words import buckets; print(buckets('a b').tolist())"
    found = {
        subprocess.run(  # noqa: S603
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "src"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }

    assert len(found) == 1


def test_kept_scores_answer_as_before() -> None:
    scores = some_scores()

    restored = WordScores.from_arrays(scores.arrays())

    text = "Sort the list and return its median"
    np.testing.assert_allclose(restored.scores(text), scores.scores(text), rtol=1e-5)
