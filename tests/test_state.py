"""Keys and tenants on disk: what was acknowledged stays, and nothing else is read as ours."""

import os
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from concertmaster.core.errors import InputError
from concertmaster.state import key_file
from concertmaster.state.database import Database, Schema
from concertmaster.state.key_file import KeyFile
from concertmaster.state.keys import Key, Limits, digest_of, new_key

SRC = str(Path(__file__).parents[1] / "src")


def drawn(seed: int = 0) -> Callable[[int], bytes]:
    return lambda count: bytes((seed + i) % 256 for i in range(count))


def a_key(tenant: str = "t", seed: int = 0, now_s: float = 1.0) -> Key:
    return new_key(tenant, now_s=now_s, token_bytes=drawn(seed))[0]


def test_a_secret_is_256_random_bits_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    asked: list[int] = []

    def token_bytes(count: int) -> bytes:
        asked.append(count)
        return bytes(range(count))

    key, secret = new_key("t", now_s=1.0, token_bytes=token_bytes)
    assert asked[0] == 32
    assert (key.digest, key.shown) == (digest_of(secret.encode()), secret[:10])
    with closing(KeyFile(tmp_path / "k.sqlite")) as store:
        store.create(key)
        kept = b"".join(file.read_bytes() for file in tmp_path.iterdir())
        assert key.digest in kept
        assert secret.encode()[11:] not in kept


def test_two_keys_are_never_alike() -> None:
    made = {new_key("t", now_s=1.0)[1] for _ in range(100)}
    assert len(made) == 100
    assert {len(secret) for secret in made} == {46}


def test_what_is_kept_is_read_back_by_another_process(tmp_path: Path) -> None:
    limits = Limits(requests_per_min=5, tokens_per_min=70, in_flight=2)
    with closing(KeyFile(tmp_path / "k.sqlite")) as store:
        store.create(a_key("a", 1))
        store.create(new_key("b", name="ci", operator=True, now_s=2.0, token_bytes=drawn(9))[0])
        store.limit("a", limits)
        ended = store.revoke(store.issued()[1].key_id, 3.0)
        assert store.revoke(ended.key_id, 9.0).revoked_s == 3.0
        before = store.issued(), store.tenants()
    with closing(KeyFile(tmp_path / "k.sqlite")) as store:
        assert (store.issued(), store.tenants()) == before
        assert store.tenants() == {"a": limits, "b": Limits()}
        assert [(k.tenant, k.name, k.operator, k.revoked_s) for k in store.issued()] == [
            ("a", "", False, None),
            ("b", "ci", True, 3.0),
        ]


def test_only_its_owner_may_read_the_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "k.sqlite"
    with closing(KeyFile(path)) as store:
        store.create(a_key())
        modes = {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert modes == {0o600}


CHILD = """
import itertools, sys
from pathlib import Path
from concertmaster.state.key_file import KeyFile
from concertmaster.state.keys import new_key
store = KeyFile(Path(sys.argv[1]))
for number in itertools.count():
    key, _ = new_key("t", now_s=float(number))
    store.create(key)
    if number % 3 == 0:
        store.revoke(key.key_id, float(number))
    print(key.key_id, number % 3 == 0, flush=True)
"""


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "k.sqlite"
    acknowledged: dict[str, bool] = {}
    for most in (1, 7, 20):
        child = subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", CHILD, str(path)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": SRC},
        )
        assert child.stdout is not None
        with child, child.stdout as said:
            for _ in range(most):
                key_id, revoked = said.readline().split()
                acknowledged[key_id] = revoked == "True"
            child.send_signal(signal.SIGKILL)
            for line in said:
                if line.endswith("\n"):
                    acknowledged[line.split()[0]] = line.split()[1] == "True"
        with closing(KeyFile(path)) as store:
            kept = {key.key_id: key.revoked_s is not None for key in store.issued()}
            assert acknowledged.items() <= kept.items()
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_revoked_keys_are_forgotten_in_the_end_and_their_tenants_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_file, "REVOKED_KEPT", 3)
    with closing(KeyFile(tmp_path / "k.sqlite")) as store:
        good = a_key("good", 200)
        store.create(good)
        for number in range(8):
            key = a_key(f"t{number}", number, now_s=number)
            store.create(key)
            store.revoke(key.key_id, float(number))
        assert [key.tenant for key in store.issued()] == ["good", "t5", "t6", "t7"]
        assert list(store.tenants()) == ["good", "t5", "t6", "t7"]


def test_the_number_of_good_keys_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_file, "MOST_KEYS", 2)
    with closing(KeyFile(tmp_path / "k.sqlite")) as store:
        store.create(a_key(seed=1))
        store.create(a_key(seed=2))
        with pytest.raises(InputError, match="expected at most 2 keys that are good, found 2"):
            store.create(a_key(seed=3))
        assert len(store.issued()) == 2


def test_changes_of_others_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "k.sqlite"
    with closing(KeyFile(path)) as store, closing(KeyFile(path)) as other:
        before = store.changes()
        assert store.changes() == before
        other.create(a_key())
        assert store.changes() != before


# Versions.

SMALL = Schema("numbers", 0x1234, (["CREATE TABLE numbers (n INTEGER)"],))
LARGER = SMALL._replace(
    migrations=(
        *SMALL.migrations,
        ["ALTER TABLE numbers ADD COLUMN name TEXT", "UPDATE numbers SET name = 'old'"],
        ["CREATE INDEX by_name ON numbers (name)"],
    )
)


def test_an_older_file_is_brought_to_the_newest_version(tmp_path: Path) -> None:
    path = tmp_path / "n.sqlite"
    with closing(Database(path, SMALL)) as old, old.transaction():
        old.write("INSERT INTO numbers VALUES (7)")
    for _ in range(2):
        with closing(Database(path, LARGER)) as new:
            assert new.rows("SELECT n, name FROM numbers") == [(7, "old")]
            assert new.number("PRAGMA user_version") == 3


def test_a_migration_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "n.sqlite"
    Database(path, SMALL).close()
    broken = LARGER._replace(migrations=(*LARGER.migrations, ["no statement"]))
    with pytest.raises(InputError, match="cannot be opened"):
        Database(path, broken)
    with closing(Database(path, SMALL)) as db:
        assert db.number("PRAGMA user_version") == 1
        assert [row[1] for row in db.rows("PRAGMA table_info(numbers)")] == ["n"]


def test_a_later_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "n.sqlite"
    Database(path, LARGER).close()
    with pytest.raises(InputError, match="expected a version up to 1, found 3"):
        Database(path, SMALL)


@pytest.mark.parametrize("content", [b"no database at all" * 100, None])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.sqlite"
    if content is None:
        with closing(sqlite3.connect(path)) as db:
            db.execute("CREATE TABLE theirs (n)")
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.sqlite: expected a file of keys, found"):
        KeyFile(path)


@pytest.mark.parametrize("name", ["", "a b", "ä", "-x", "x" * 65, "a\n"])
def test_names_that_are_hard_to_read_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="--tenant: expected 1 to 64 letters"):
        new_key(name, now_s=1.0)


def test_a_limit_is_at_least_one() -> None:
    with pytest.raises(InputError, match="--tokens-per-min: expected at least 1, found 0"):
        Limits(tokens_per_min=0)
