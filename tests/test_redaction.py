"""What no file of labels shall hold, planted wherever a caller can write."""

import sqlite3
import string
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import a_fleet, a_request
from concertmaster import forecaster
from concertmaster.config import GatewaySection
from concertmaster.core.forecast import Forecast
from concertmaster.core.request import ModelName, RequestId, WorkflowId
from concertmaster.learning.feedback import FeedbackStore
from concertmaster.learning.label_schema import SCHEMA
from concertmaster.learning.labels import MOST_TEXT_CHARS
from concertmaster.learning.redaction import LONGEST_CHARS, Redactor, is_card, redacted
from concertmaster.predictors.interface import Completion

ALNUM = string.ascii_letters + string.digits
BASE64 = ALNUM + "+/"


def words(letters: str, least: int, most: int) -> st.SearchStrategy[str]:
    return st.text(letters, min_size=least, max_size=most)


def mixed(word: str) -> str:
    """Make sure of a capital, a small letter and a digit."""
    return f"aZ9{word}"


def with_check_digit(digits: str) -> str:
    return next(digits + last for last in string.digits if is_card(digits + last))


def grouped(digits: str) -> str:
    return " ".join(digits[i : i + 4] for i in range(0, len(digits), 4))


mails = st.builds(
    "{}@{}.{}".format,
    words(ALNUM + "._+-", 1, 40),
    words(string.ascii_lowercase + "-", 1, 20),
    words(string.ascii_lowercase, 2, 6),
)
keys = st.builds(
    "{}{}".format,
    st.sampled_from(["sk-", "sk-proj-", "sk-ant-api03-", "cm-", "ghp_", "glpat-", "xoxb-", "hf_"]),
    words(ALNUM, 16, 60),
)
bearers = words(ALNUM + "._~+/-", 12, 60)
passwords = words(ALNUM + "!$%&*", 8, 30)
jwts = st.builds(
    "eyJ{}.{}.{}".format, words(ALNUM, 10, 40), words(ALNUM, 10, 80), words(ALNUM, 20, 43)
)
cards = words(string.digits, 12, 18).map(with_check_digit)
phones = st.builds(
    "+{} {} {}".format, st.integers(1, 99), st.integers(100, 999), st.integers(10**6, 10**8)
)
hexes = st.one_of(words("0123456789abcdef", 32, 80), words("0123456789ABCDEF", 32, 80))
tokens = words(BASE64, 32, 90).map(mixed)

planted = st.one_of(
    mails.map(lambda one: (one, "[mail]", one)),
    keys.map(lambda one: (one, "[key]", one)),
    bearers.map(lambda one: (one, "[key]", f"Authorization: Bearer {one}")),
    passwords.map(lambda one: (one, "[key]", f'"password": "{one}"')),
    passwords.map(lambda one: (one, "[key]", f"API_KEY={one}")),
    jwts.map(lambda one: (one, "[key]", one)),
    cards.map(lambda one: (one, "[card]", one)),
    cards.map(grouped).map(lambda one: (one, "[card]", one)),
    phones.map(lambda one: (one, "[", one)),
    hexes.map(lambda one: (one, "[", one)),
    tokens.map(lambda one: (one, "[", one)),
)
"""A secret, what shall stand in its place, and how it is written."""

around = st.sampled_from(["", " ", "\n", "see ", "x: ", "(", '"', "\t", "wörter, "])


@given(planted, around, around)
def test_a_secret_is_found_by_its_form(one: tuple[str, str, str], left: str, right: str) -> None:
    secret, mark, written = one
    if right not in ("", '"'):
        right = right if right[0] in ' \n\t("' else " " + right
    safe = redacted(f"{left}{written}{right}")
    assert secret not in safe
    assert mark in safe


@pytest.mark.parametrize(
    "text",
    [
        "Fix the bug in src/concertmaster/gateway/server.py, line 148.",
        "The release of 2026-11-21 took 1,234,567 tokens; p99 was 0.0123456789 s.",
        "550e8400-e29b-41d4-a716-446655440000",
        "coding-0001/0",
        "3f2a9c01:cm-17",
        "the token limit is 4096 and a token costs 3",
        "a basic understanding of passwords",
        "def handle_all_the_requests_of_one_workflow_in_order(self):",
        "order 4111 1111 1111 1112",
        "at 1700000000123456789 ns",
    ],
)
def test_plain_words_stay(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize(
    "text", ["1 4111111111111111", "4111-1111-1111-1111 12 345", "7 4111 1111 1111 1111"]
)
def test_a_card_is_found_between_other_numbers(text: str) -> None:
    assert "[card]" in redacted(text)
    assert "1111" not in redacted(text)


@pytest.mark.parametrize(
    "text",
    [
        "export OPENAI_API_KEY=hunter2222",
        "DB_PASSWORD: 'hunter2222'",
        '{"access_token": "hunter2222"}',
        "authorization: Basic hunter2222",
        "https://example.com/?token=hunter2222&x=1",
    ],
)
def test_a_secret_of_any_form_is_found_by_what_stands_before_it(text: str) -> None:
    assert "hunter" not in redacted(text)
    assert "[key]" in redacted(text)


def test_a_private_key_and_a_login_are_taken_out_even_without_their_end() -> None:
    body = "MIIEvQIBADANBg\n" * 20
    for end in ("-----END RSA PRIVATE KEY-----", ""):
        assert redacted(f"a\n-----BEGIN RSA PRIVATE KEY-----\n{body}{end}").startswith("a\n[key]")
        assert "MIIE" not in redacted(f"-----BEGIN PRIVATE KEY-----\n{body}{end}")
    assert "hunter2" not in redacted("postgres://bob:hunter2@db.example.com/x")


@given(planted, st.integers(0, 200))
def test_what_is_cut_in_two_at_the_end_leaves_nothing(
    one: tuple[str, str, str], ahead: int
) -> None:
    secret, _, written = one
    text = "a.long.address@example.com " * 50 + "word " * 2000
    at = MOST_TEXT_CHARS + LONGEST_CHARS - ahead
    kept = Redactor(b"salt").excerpt(f"{text[:at]} {written}", MOST_TEXT_CHARS)
    assert len(kept) <= MOST_TEXT_CHARS
    assert set(kept.split()) <= {"[mail]", "word", "wor", "wo", "w"}, secret


def test_ids_stay_apart_and_nobody_without_the_salt_can_try_addresses() -> None:
    one, other = Redactor(b"one"), Redactor(b"other")
    ids = [f"user-{name}@example.com" for name in "abc"]
    assert len({one.identity(name) for name in ids}) == 3
    assert [one.identity(name) for name in ids] == [one.identity(name) for name in ids]
    assert one.identity(ids[0]) != other.identity(ids[0])
    assert one.identity(ids[0]).startswith("[mail]#")
    assert one.identity("cm-17") == "cm-17"


def all_bytes(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())


def all_texts(path: Path) -> str:
    with closing(sqlite3.connect(path)) as db:
        rows = [*db.execute("SELECT * FROM calls"), *db.execute("SELECT * FROM workflows")]
    return "\n".join(str(value) for row in rows for value in row if isinstance(value, str))


@settings(max_examples=40, deadline=None)
@given(st.lists(planted, min_size=1, max_size=4))
def test_no_planted_secret_reaches_the_bytes_of_the_file(
    secrets: list[tuple[str, str, str]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "labels.sqlite"
        store = FeedbackStore(path, keep_text=True)
        for number, (_, _, written) in enumerate(secrets):
            workflow = WorkflowId(f"w{number} {written}")
            name = RequestId(f"r{number} {written}")
            words = dict.fromkeys(("app", "template", "role", "step"), written)
            request = a_request(name, workflow_id=workflow, **words)
            store.asked(request, Forecast(), text=f"Please use {written} for it.")
            store.answered(name, Completion(model=ModelName("m"), output_tokens=3))
            store.closed(workflow, 1.0)
        assert store.flush()
        kept, texts = all_bytes(Path(folder)), all_texts(path)
        labels = store.latest(9)
        store.close()
        assert [label.remaining_calls for label in labels] == [1] * len(secrets)
        for secret, _, _ in secrets:
            for written_down in (kept, all_bytes(Path(folder))):
                assert secret.encode() not in written_down
            assert secret not in texts


def test_every_text_of_a_file_is_one_that_is_redacted_or_ours() -> None:
    """All else is a figure, or a vector of them."""
    with closing(sqlite3.connect(":memory:")) as db:
        for statement in SCHEMA.migrations[0]:
            db.execute(statement)
        tables = [
            name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type='table'")
        ]
        texts = {
            f"{table}.{row[1]}"
            for table in tables
            for row in db.execute(f"PRAGMA table_info({table})")
            if row[2] == "TEXT"
        }
    redacted_ones = ("request_id", "workflow_id", "app", "template", "role", "step", "prompt_text")
    ours = ("source", "said_models", "gpu", "model")
    assert texts == {
        *(f"calls.{name}" for name in (*redacted_ones, *ours)),
        *("workflows.workflow_id", "counters.name"),
    }


@pytest.mark.parametrize("redacts", [True, False])
def test_a_setting_keeps_names_as_they_are(tmp_path: Path, *, redacts: bool) -> None:
    path = tmp_path / "labels.sqlite"
    section = GatewaySection(feedback=str(path), redact_labels=redacts)
    predictor = forecaster.serving_predictor(section, a_fleet(), trains=False)
    predictor.predict(a_request("r", role="bob@example.com"))
    predictor.end()  # type: ignore[attr-defined]
    assert (b"bob@example.com" in all_bytes(tmp_path)) is not redacts
