"""Values of texts are worked out once while they are kept."""

from hypothesis import given
from hypothesis import strategies as st

from concertmaster.predictors.kept import Kept, content_key


def counting(entries: int) -> tuple[Kept[int], list[str]]:
    made: list[str] = []

    def make(text: str) -> int:
        made.append(text)
        return len(text)

    return Kept(make, entries=entries), made


def test_a_text_that_comes_again_is_not_worked_out_again() -> None:
    kept, made = counting(2)

    assert [kept.of("a"), kept.of("bb"), kept.of("a")] == [1, 2, 1]
    assert made == ["a", "bb"]


def test_the_text_unused_for_longest_goes_first() -> None:
    kept, made = counting(2)
    for text in ("a", "bb", "a", "ccc", "a", "bb"):
        kept.of(text)

    assert made == ["a", "bb", "ccc", "bb"]
    assert len(kept) == 2


@given(texts=st.lists(st.sampled_from(["", "a", "bb", "ccc", "dddd"]), max_size=20))
def test_what_is_kept_is_what_would_be_made_and_stays_small(texts: list[str]) -> None:
    kept, _ = counting(3)

    assert [kept.of(text) for text in texts] == [len(text) for text in texts]
    assert len(kept) <= 3


def test_texts_with_lone_surrogates_have_keys_of_their_own() -> None:
    assert len({content_key("\ud800"), content_key("\udfff"), content_key("")}) == 3
