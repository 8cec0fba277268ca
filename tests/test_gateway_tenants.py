"""Tenants behind one gateway: whose turn it is, how much room each has, and who is whose."""

import hmac
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from builders import a_fleet, a_pool
from concertmaster.cli_keys import app
from concertmaster.core.events import RequestArrived
from concertmaster.gateway.admin import AdminCheck
from concertmaster.gateway.keyring import Keyring
from concertmaster.gateway.reach import AdminDoor
from concertmaster.state.database import Database
from concertmaster.state.key_file import SCHEMA, KeyFile
from concertmaster.state.keys import Limits, digest_of, new_key
from gateway_rig import CHAT, Rig, a_body, a_message, hangs, over_upstreams, play, until


@pytest.fixture(name="path")
def _path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.sqlite"
    KeyFile(path).close()
    return path


def a_key(path: Path, tenant: str, **limits: int) -> str:
    key, secret = new_key(tenant, now_s=1.0)
    with closing(KeyFile(path)) as store:
        store.create(key)
        store.limit(tenant, Limits(**limits))
    return secret


def arrivals(rig: Rig) -> Iterator[tuple[str, float]]:
    for event in rig.history:
        if isinstance(event, RequestArrived):
            yield event.request.tenant, event.request.tenant_weight


def test_the_core_is_told_whose_a_call_is_and_with_what_weight(path: Path) -> None:
    light, heavy = a_key(path, "light"), a_key(path, "heavy", weight=3)

    async def main() -> None:
        async with over_upstreams(keys=str(path)) as (rig, _):
            for secret in (light, heavy):
                await rig.call(authorization=f"Bearer {secret}")
            assert list(arrivals(rig)) == [("light", 1.0), ("heavy", 3.0)]
        async with over_upstreams() as (rig, _):
            await rig.call(x_concertmaster_tenant="heavy")
            assert list(arrivals(rig)) == [("", 1.0)]

    play(main())


@pytest.mark.parametrize("others", [True, False])
def test_a_tenant_that_floods_leaves_half_of_the_room_to_others(
    path: Path, *, others: bool
) -> None:
    flood = a_key(path, "flood")
    quiet = a_key(path, "quiet" if others else "flood")

    async def main() -> None:
        fleet = a_fleet(a_pool(max_sequences=2))
        async with over_upstreams(hangs, keys=str(path), most_open=20, fleet=fleet) as (rig, _):
            headers = {"authorization": f"Bearer {flood}"}
            for _ in range(14):
                wire = await rig.wire()
                wire.send(a_message("POST", CHAT, json.dumps(a_body()).encode(), headers))
            refused = rig.gateway.metrics.refusals
            taken = 10 if others else 14
            await until(lambda: rig.gateway.open_exchanges + refused["tenant_full"] == 14)
            assert rig.gateway.open_exchanges == taken
            if others:
                reply = await rig.call(authorization=f"Bearer {flood}")
                assert (reply.status, reply.error["code"]) == (429, "tenant_full")
                assert int(reply.headers["retry-after"]) > 0
            wire = await rig.wire()
            own = {"authorization": f"Bearer {quiet}"}
            wire.send(a_message("POST", CHAT, json.dumps(a_body()).encode(), own))
            await until(lambda: rig.gateway.open_exchanges == taken + 1)

    play(main())


def test_prompts_of_two_tenants_are_never_put_together(path: Path) -> None:
    secrets = [a_key(path, "one"), a_key(path, "two")]
    first = [{"role": "user", "content": "the very same words"}]
    then = [*first, {"role": "assistant", "content": "ok"}, {"role": "user", "content": "go"}]

    async def main() -> None:
        async with over_upstreams(keys=str(path)) as (rig, _):
            ids = []
            for messages, secret in ((first, secrets[0]), (then, secrets[1]), (then, secrets[0])):
                reply = await rig.call({"messages": messages}, authorization=f"Bearer {secret}")
                ids.append(reply.headers["x-concertmaster-workflow-id"])
            assert ids[0] == ids[2] != ids[1]

    play(main())


def test_weights_are_set_and_listed(tmp_path: Path) -> None:
    file = ["--file", str(tmp_path / "k.sqlite")]
    runner = CliRunner()
    assert runner.invoke(app, ["create", "--tenant", "a", "--weight", "4", *file]).exit_code == 0
    assert "weight 4" in runner.invoke(app, ["list", *file]).output
    assert "none" in runner.invoke(app, ["limit", "--tenant", "a", *file]).output


def test_a_file_of_keys_without_weights_is_brought_to_those_with_them(tmp_path: Path) -> None:
    path = tmp_path / "keys.sqlite"
    before = SCHEMA._replace(migrations=SCHEMA.migrations[:1])
    with closing(Database(path, before)) as old, old.transaction():
        old.write("INSERT INTO tenants VALUES ('team', 5, NULL, NULL)")
    with closing(KeyFile(path)) as store:
        assert store.tenants() == {"team": Limits(requests_per_min=5)}


def test_hashes_of_secrets_are_compared_in_constant_time(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, compared = hmac.compare_digest, 0

    def compare(ours: bytes, theirs: bytes) -> bool:
        nonlocal compared
        compared += 1
        return real(ours, theirs)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    secret = a_key(path, "team").encode()
    with closing(KeyFile(path)) as store:
        assert Keyring(store, lambda: 0.0).known(digest_of(secret))
    assert compared == 1
    check = AdminCheck(AdminDoor("127.0.0.1", 0, digest_of(secret)), None, lambda *_: None)
    check(b"/state", {b"authorization": b"Bearer " + secret})
    assert compared == 2
