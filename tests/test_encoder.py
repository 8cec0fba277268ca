"""Encoders: text to unit vectors, the same in every process, whatever the text."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertmaster.core.errors import InputError
from concertmaster.learning.distill import Teacher, distill
from concertmaster.predictors.encoder import (
    STATIC_CHARS,
    Encoder,
    StaticEncoder,
    encode_fresh,
    excerpt,
    fresh_part,
)
from concertmaster.predictors.hashing import HashedEncoder
from concertmaster.predictors.hub import (
    MAX_WINDOWS,
    STRIDE_TOKENS,
    WINDOW_TOKENS,
    HubEncoder,
    OnnxEncoder,
    windows,
)
from concertmaster.predictors.wordpiece import WordPiece

REAL_IDS = {
    "[UNK]": 100, "!": 999, "$": 1002, "'": 1005, "(": 1006, ")": 1007, "+": 1009, ",": 1010,
    ".": 1012, "2": 1016, "3": 1017, ":": 1024, "?": 1029, "^": 1034, "t": 1056, "x": 1060,
    "y": 1061, "—": 1517, "日": 1864, "本": 1876, "語": 1950, "the": 1996, "of": 1997, "is": 2003,
    "##s": 2015, "what": 2054, "france": 2605, "return": 2709, "50": 2753, "doesn": 2987,
    "capital": 3007, "##ble": 3468, "##ization": 3989, "##ding": 4667, "add": 5587, "cafe": 7668,
    "em": 7861, "##bed": 8270, "def": 13366, "una": 14477, "naive": 15743, "token": 19204,
    "##ffa": 20961,
}  # fmt: skip
PIECES = list(REAL_IDS)

GOLDEN = {
    "What is the capital of France?": [2054, 2003, 1996, 3007, 1997, 2605, 1029],
    "Café naïve — unaffable!": [7668, 15743, 1517, 14477, 20961, 3468, 999],
    "def add(x, y): return x+y": [
        13366, 5587, 1006, 1060, 1010, 1061, 1007, 1024, 2709, 1060, 1009, 1061,
    ],
    "日本語 x^2": [1864, 1876, 1950, 1060, 1034, 1016],
    "doesn't $3.50 ＷＩＤＥ": [2987, 1005, 1056, 1002, 1017, 1012, 2753, 100],
    "tokenization\tof\nembeddings": [19204, 3989, 1997, 7861, 8270, 4667, 2015],
    "of" * 51: [100],
}  # fmt: skip
"""Ids that the tokenizer of all-MiniLM-L6-v2 gives."""

ANY_TEXT = st.text(st.characters(codec=None), max_size=60)
"""Lone surrogates and control characters included."""


def static() -> StaticEncoder:
    rng = np.random.default_rng(0)
    table = rng.integers(-127, 128, (len(PIECES), 8)).astype(np.int8)
    scale = np.linspace(0.5, 1.5, 8, dtype=np.float32)
    return StaticEncoder(PIECES, table, scale, np.full(8, 0.1, np.float32))


ENCODERS: dict[str, Encoder] = {
    "static": static(),
    "hashed": HashedEncoder(64),
    "projected": HashedEncoder(
        projection=np.random.default_rng(1).normal(size=(64, 8)).astype(np.float32)
    ),
}
every_encoder = pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS)


@pytest.mark.parametrize("text", GOLDEN)
def test_words_fall_into_the_pieces_that_the_real_tokenizer_gives(text: str) -> None:
    split = WordPiece(PIECES)
    assert [REAL_IDS[PIECES[number]] for number in split.ids(text)] == GOLDEN[text]
    assert split.ids(text) == split.ids(text), "from memory as from scratch"


def test_a_word_of_more_than_a_hundred_letters_is_unknown() -> None:
    split = WordPiece(["[UNK]", "a", "##a"])
    assert split.ids("a" * 100) == [1] + [2] * 99
    assert split.ids("a" * 101) == [0]


def test_the_memory_of_words_is_bounded() -> None:
    split = WordPiece(PIECES, remembered=10)
    for number in range(100):
        split.ids(f"word{number}")
    assert len(split._fresh) + len(split._older) <= 10


def test_a_word_in_use_outlives_any_number_of_others() -> None:
    split, taken_apart = WordPiece(PIECES, remembered=10), []
    split._split = lambda word: taken_apart.append(word) or [0]  # type: ignore[method-assign,func-returns-value]
    for number in range(100):
        split.ids(f"word {number}")
    assert taken_apart.count("word") == 1


@given(texts=st.lists(st.text("ab \u00e9", max_size=12), max_size=30))
def test_what_is_remembered_changes_no_ids(texts: list[str]) -> None:
    split = WordPiece(PIECES, remembered=3)
    assert [split.ids(text) for text in texts] == [WordPiece(PIECES).ids(text) for text in texts]


def test_a_long_chunk_is_not_remembered() -> None:
    split = WordPiece(PIECES)
    split.ids("x" * 10_000)
    assert not split._fresh


@every_encoder
@given(texts=st.lists(ANY_TEXT, max_size=5))
def test_any_text_gives_a_row_of_length_one_or_zero(encoder: Encoder, texts: list[str]) -> None:
    rows = encoder.encode(texts)
    assert rows.shape == (len(texts), encoder.dims)
    assert rows.dtype == np.float32
    lengths = np.linalg.norm(rows, axis=1)
    assert np.all(np.isclose(lengths, 1, atol=1e-5) | (lengths == 0))


@every_encoder
def test_a_text_without_words_has_a_row_of_zeros(encoder: Encoder) -> None:
    assert not encoder.encode(["", " \n"]).any()
    assert encoder.encode(["what is the capital"]).any()


@every_encoder
@given(texts=st.lists(ANY_TEXT, min_size=2, max_size=5))
def test_a_row_depends_on_its_own_text_alone(encoder: Encoder, texts: list[str]) -> None:
    together = encoder.encode(texts)
    alone = np.concatenate([encoder.encode([text]) for text in reversed(texts)])[::-1]
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_the_middle_of_a_long_text_is_not_read() -> None:
    head, tail = "what is " * 400, " capital of france" * 400
    one, other = (head + middle * 300_000 + tail for middle in ("x ", "y "))
    for encoder in (static(), HashedEncoder(32)):
        first, second = encoder.encode([one, other])
        assert first.tolist() == second.tolist()


@given(text=ANY_TEXT, chars=st.integers(2, 30))
def test_an_excerpt_keeps_head_and_tail(text: str, chars: int) -> None:
    cut = excerpt(text, chars)
    assert len(cut) <= max(chars + 1, 0)
    assert text.startswith(cut[: chars // 2])
    assert text.endswith(cut[len(cut) - chars // 2 :]) or len(text) <= chars


def test_hashes_are_the_same_in_every_process() -> None:
    code = (
        "from concertmaster.predictors.hashing import HashedEncoder;"
        "print(HashedEncoder(16).encode(['what is the capital']).tolist())"
    )
    said = {
        subprocess.run(  # noqa: S603 - our own interpreter and code
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "src"},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert said == {f"{HashedEncoder(16).encode(['what is the capital']).tolist()}\n"}


def test_a_static_encoder_survives_its_arrays(tmp_path: Path) -> None:
    encoder = static()
    np.savez_compressed(tmp_path / "encoder.npz", allow_pickle=False, **encoder.arrays())
    with np.load(tmp_path / "encoder.npz", allow_pickle=False) as arrays:
        restored = StaticEncoder.from_arrays(arrays)
    texts = list(GOLDEN)
    assert restored.encode(texts).tolist() == encoder.encode(texts).tolist()


@given(head=st.text(max_size=40), one=st.text(max_size=20), other=st.text(max_size=20))
def test_the_fresh_part_and_the_shared_head_make_up_the_prompt(
    head: str, one: str, other: str
) -> None:
    text = head + one
    fresh = fresh_part(text, head + other)
    shared = text[: len(text) - len(fresh)]
    assert text.endswith(fresh)
    assert (head + other).startswith(shared)


def test_the_fresh_part_starts_at_a_word() -> None:
    assert fresh_part("rules. capital of", "rules. capacity") == "capital of"
    assert fresh_part("same", "same") == ""


def test_the_part_not_seen_before_weighs_more() -> None:
    encoder = static()
    head = "def add(x, y): return x " * 20
    text, fresh = head + "capital of france", encoder.encode(["capital of france"])[0]
    mixed = encode_fresh(encoder, text, head + "what is it")
    whole = encoder.encode([text])[0]
    assert mixed @ fresh > whole @ fresh + 0.1
    assert np.linalg.norm(mixed) == pytest.approx(1, abs=1e-5)


def test_without_a_previous_prompt_the_whole_is_what_counts() -> None:
    encoder = static()
    whole = encoder.encode(["what is the capital"])[0].tolist()
    assert encode_fresh(encoder, "what is the capital").tolist() == whole
    assert encode_fresh(encoder, "what is the capital", "what is the capital").tolist() == whole
    assert not encode_fresh(encoder, "", "x").any()


def test_a_distilled_table_comes_near_its_teacher() -> None:
    rng = np.random.default_rng(0)
    pieces = rng.normal(size=(len(PIECES), 12)).astype(np.float32)
    truth = pieces + rng.normal(size=pieces.shape)
    words = [piece for piece in PIECES if piece.isalpha() and piece.isascii()]
    texts = [" ".join(rng.choice(words, 6)) for _ in range(600)]
    split = WordPiece(PIECES)
    vectors = np.stack([truth[split.ids(text)].mean(axis=0) for text in texts])
    teacher = Teacher(PIECES, pieces, texts, vectors.astype(np.float32))
    likeness = vectors - vectors.mean(axis=0)
    goal = likeness @ likeness.T

    def agreement(epochs: int) -> float:
        rows = distill(teacher, dims=8, epochs=epochs).encode(texts)
        rows -= rows.mean(axis=0)
        return float(np.corrcoef((rows @ rows.T).ravel(), goal.ravel())[0, 1])

    assert agreement(150) > agreement(0) + 0.05
    assert distill(teacher, dims=8, epochs=2).encode(texts).tolist() == (
        distill(teacher, dims=8, epochs=2).encode(texts).tolist()
    )


@given(count=st.integers(0, 6_000))
def test_windows_cover_a_text_or_its_head_and_tail(count: int) -> None:
    found = windows(range(count))
    assert len(found) <= MAX_WINDOWS
    assert all(len(part) <= WINDOW_TOKENS for part in found)
    covered = {token for part in found for token in part}
    if count <= WINDOW_TOKENS + (MAX_WINDOWS - 1) * STRIDE_TOKENS:
        assert covered == set(range(count))
    else:
        assert {0, count - 1} <= covered


@pytest.mark.skipif(find_spec("onnxruntime") is not None, reason="onnxruntime is installed")
def test_an_encoder_without_its_extra_says_which_to_install(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"onnxruntime is not installed .*\[encoders\]"):
        OnnxEncoder(tmp_path)


@pytest.mark.skipif(find_spec("torch") is not None, reason="torch is installed")
def test_a_hub_encoder_without_its_extra_says_which_to_install() -> None:
    with pytest.raises(InputError, match=r"torch is not installed .*\[hub\]"):
        HubEncoder("any/model")


def test_a_hub_encoder_reads_a_tiny_model_from_a_folder(tmp_path: Path) -> None:
    reason = "needs the extra hub: torch and transformers"
    pytest.importorskip("torch", reason=reason)
    hub = pytest.importorskip("transformers", reason=reason)
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PIECES[1:]]
    (tmp_path / "vocab.txt").write_text("\n".join(vocab), "utf-8")
    hub.BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    hub.BertModel(
        hub.BertConfig(
            vocab_size=len(vocab),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    ).save_pretrained(tmp_path)
    encoder = HubEncoder(str(tmp_path))
    rows = encoder.encode(["what is the capital", "", "x " * 3_000, "\ud800"])
    assert rows.shape == (4, 16)
    assert np.linalg.norm(rows[0]) == pytest.approx(1, abs=1e-5)
    assert not rows[1].any()


def test_the_static_encoder_reads_so_many_characters() -> None:
    assert STATIC_CHARS == 4_000, "the docs say so"
