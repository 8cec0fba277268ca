"""``concertmaster keys``, and ``serve`` with and without them."""

import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from concertmaster import commands_serve
from concertmaster.cli import app
from concertmaster.core.errors import InputError
from concertmaster.state.key_file import KeyFile
from concertmaster.state.keys import Limits, digest_of

FLEET = str(Path(__file__).parents[1] / "examples/fleets/local.toml")


def said(*arguments: str, file: Path | None = None) -> str:
    options = [] if file is None else ["--file", str(file)]
    result = CliRunner().invoke(app, [*arguments, *options])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def serve(*, host: str = "127.0.0.1", config: str = FLEET) -> None:
    changes = {"host": host, "port": 0, "policy": None, "models": "recent"}
    commands_serve.serve(Path(config), changes, None)


def test_a_key_is_made_shown_once_listed_and_ended(tmp_path: Path) -> None:
    file = tmp_path / "k.sqlite"
    made = ("keys", "create", "--tenant", "team", "--name", "ci", "--tokens-per-min", "9")
    secret = said(*made, file=file).strip()
    assert re.fullmatch(r"cm-[\w-]{43}", secret)
    with closing(KeyFile(file)) as store:
        (key,) = store.issued()
        assert (key.digest, key.tenant, key.name) == (digest_of(secret.encode()), "team", "ci")
        assert store.tenants() == {"team": Limits(tokens_per_min=9)}
    listed = said("keys", "list", file=file)
    assert secret not in listed
    assert key.key_id in listed
    assert secret[:10] in listed
    assert f"{key.key_id} of team ended 20" in said("keys", "revoke", key.key_id, file=file)
    with closing(KeyFile(file)) as store:
        assert store.issued()[0].revoked_s is not None


def test_another_key_without_limits_leaves_those_of_the_tenant(tmp_path: Path) -> None:
    file = tmp_path / "k.sqlite"
    said("keys", "create", "--tenant", "team", "--in-flight", "3", file=file)
    said("keys", "create", "--tenant", "team", "--operator", file=file)
    with closing(KeyFile(file)) as store:
        assert store.tenants() == {"team": Limits(in_flight=3)}
        assert [key.operator for key in store.issued()] == [False, True]
    assert said("keys", "limit", "--tenant", "team", file=file) == "team: none\n"
    with closing(KeyFile(file)) as store:
        assert store.tenants() == {"team": Limits()}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("create", "--tenant", "a b"), "--tenant: expected 1 to 64 letters"),
        (("create", "--tenant", "a", "--in-flight", "0"), "--in-flight: expected at least 1"),
        (("revoke", "key-1"), "keys: no key of this id: 'key-1' (see concertmaster keys list)"),
        (("limit", "--tenant", "b"), "tenants: no tenant of this name: 'b'"),
    ],
)
def test_what_cannot_be_done_is_one_clear_line(
    tmp_path: Path, arguments: tuple[str, ...], problem: str
) -> None:
    file = tmp_path / "k.sqlite"
    KeyFile(file).close()
    with pytest.raises(InputError, match=re.escape(problem)):
        said("keys", *arguments, file=file)


@pytest.mark.parametrize("arguments", [("list",), ("revoke", "x"), ("limit", "--tenant", "t")])
def test_only_create_makes_a_file(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    file = tmp_path / "k.sqlite"
    with pytest.raises(InputError, match="no such file"):
        said("keys", *arguments, file=file)
    assert not file.exists()


def test_a_file_that_is_being_written_for_long_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "k.sqlite"
    KeyFile(file).close()
    monkeypatch.setattr("concertmaster.state.database.BUSY_S", 0.0)
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(InputError, match="database is locked"):
            said("keys", "create", "--tenant", "t", file=file)


def test_serve_without_keys_refuses_a_host_that_strangers_reach() -> None:
    with pytest.raises(InputError) as found:
        serve(host="0.0.0.0")  # noqa: S104
    assert str(found.value).startswith(f"{FLEET}: gateway.host: without keys the gateway listens")


def test_serve_refuses_a_file_of_keys_that_is_not_there(tmp_path: Path) -> None:
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(f'{Path(FLEET).read_text()}\n[gateway]\nkeys = "/no/keys.sqlite"\n')
    with pytest.raises(InputError, match=r"fleet\.toml: gateway\.keys: no such file"):
        serve(config=str(fleet))


@pytest.mark.parametrize("command", ["create", "limit", "list", "revoke"])
def test_every_command_has_help_with_an_example(command: str) -> None:
    assert f"Example: concertmaster keys {command}" in said("keys", command, "--help")
