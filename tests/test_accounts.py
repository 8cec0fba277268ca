"""What tenants have used outlives the gateway: read at the start, written beside the calls."""

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from concertmaster.core.errors import QuotaError
from concertmaster.gateway import accounts as module
from concertmaster.gateway.accounts import Accounts
from concertmaster.gateway.keyring import Keyring
from concertmaster.gateway.quotas import Quota
from concertmaster.state.account_file import AccountFile
from concertmaster.state.accounts import Spent
from concertmaster.state.key_file import SCHEMA, KeyFile
from concertmaster.state.keys import Limits, new_key
from gateway_rig import over_upstreams, play, says_hello

TENANTS = ("a", "b", "c")
LIMITS = {
    "a": Limits(requests_per_min=30, tokens_per_min=600),
    "b": Limits(tokens_per_min=90, in_flight=3),
    "c": Limits(in_flight=1),
}


class World:
    """A wall clock, and another that counts from each start of the process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.wall_s = 1_000_000.0
        self._begun_s = self.wall_s
        self.start()

    def start(self) -> None:
        self._begun_s = self.wall_s
        self.store = KeyFile(self.path)
        self.ring = Keyring(self.store, lambda: self.wall_s - self._begun_s)
        self.accounts = Accounts(self.ring, AccountFile(self.path), lambda: self.wall_s)

    def stop(self) -> None:
        asyncio.run(self.accounts.close())
        self.ring.close()

    def restart(self) -> None:
        self.stop()
        self.start()

    def quota(self, tenant: str) -> Quota:
        quota = self.ring.quota(tenant)
        assert quota is not None
        return quota

    def spent(self) -> dict[str, tuple[float, float]]:
        return {tenant: self.quota(tenant).spent() for tenant in TENANTS}


def with_tenants(path: Path) -> Path:
    path.unlink(missing_ok=True)
    with closing(KeyFile(path)) as store:
        for tenant, limits in LIMITS.items():
            store.create(new_key(tenant, now_s=1.0)[0])
            store.limit(tenant, limits)
    return path


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(with_tenants(tmp_path / "k.sqlite"))


steps = st.lists(
    st.tuples(
        st.sampled_from(TENANTS),
        st.floats(0.0, 40.0),
        st.integers(0, 400),
        st.integers(0, 400),
        st.booleans(),
    ),
    max_size=12,
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps)
def test_used_after_a_restart_is_used_before(
    tmp_path: Path, calls: list[tuple[str, float, int, int, bool]]
) -> None:
    world = World(with_tenants(tmp_path / "k.sqlite"))
    for tenant, gap_s, prompt, output, flushes in calls:
        world.wall_s += gap_s
        try:
            world.quota(tenant).begin(prompt)
        except QuotaError:
            continue
        if output:
            world.quota(tenant).end(output, 1.0)
        if flushes:
            asyncio.run(world.accounts.flush())
    before = world.spent()
    world.restart()
    after = world.spent()
    world.stop()
    for tenant in TENANTS:
        assert after[tenant] == pytest.approx(before[tenant], abs=1e-6)
    assert {world.quota(tenant).in_flight for tenant in TENANTS} == {0}


def test_what_was_used_flows_back_while_nobody_runs(world: World) -> None:
    world.quota("a").begin(600)
    world.stop()
    world.wall_s += 30.0
    world.start()
    assert world.quota("a").spent() == pytest.approx((0.0, 300.0))
    with pytest.raises(QuotaError, match=r"600 tokens a minute: try again in 1\.000 s"):
        world.quota("a").begin(310)
    world.stop()
    with closing(AccountFile(world.path)) as store:
        assert list(store.spent()) == ["a"]
    world.wall_s += 31.0
    world.start()
    world.stop()
    with closing(AccountFile(world.path)) as store:
        assert store.spent() == {}


def test_a_clock_that_was_set_back_gives_nothing_and_takes_nothing(world: World) -> None:
    world.quota("a").begin(500)
    world.stop()
    world.wall_s -= 86_400.0
    world.start()
    assert world.quota("a").spent() == (1.0, 500.0)
    world.wall_s += 60.0
    assert world.quota("a").spent() == (0.0, 0.0)
    world.stop()


def test_who_is_killed_forgets_what_was_not_written_and_nothing_else(world: World) -> None:
    world.quota("a").begin(200)
    asyncio.run(world.accounts.flush())
    world.quota("a").begin(300)
    world.start()
    assert world.quota("a").spent() == (1.0, 200.0)
    world.stop()


def test_other_limits_since_then_keep_what_was_used(world: World) -> None:
    world.quota("a").begin(500)
    world.stop()
    with closing(KeyFile(world.path)) as store:
        store.limit("a", Limits(tokens_per_min=1000))
    world.start()
    assert world.quota("a").spent() == (0.0, 500.0)
    world.stop()


def test_an_account_goes_with_its_tenant(world: World) -> None:
    world.quota("a").begin(500)
    asyncio.run(world.accounts.flush())
    world.quota("a").begin(50)
    with closing(KeyFile(world.path)) as store:
        key = next(key for key in store.issued() if key.tenant == "a")
        store.revoke(key.key_id, 2.0)
        with store._db.transaction():
            store._db.write("DELETE FROM keys WHERE tenant = 'a'")
            store._db.write("DELETE FROM tenants WHERE name = 'a'")
    asyncio.run(world.accounts.flush())
    world.stop()
    with closing(AccountFile(world.path)) as store:
        assert store.spent() == {}


def test_accounts_are_no_reason_to_read_keys_again(world: World) -> None:
    seen = world.store.changes()
    world.quota("a").begin(5)
    asyncio.run(world.accounts.flush())
    assert world.store.changes() == seen
    with closing(AccountFile(world.path)) as store:
        assert store.spent() == {"a": Spent(1.0, 5.0, world.wall_s)}
    world.stop()


def test_who_has_no_rate_is_not_written(world: World) -> None:
    asyncio.run(world.accounts.flush())
    world.quota("c").begin(5)
    assert not world.quota("c").touched
    world.stop()


def test_a_disk_that_fails_is_told_once_and_nothing_is_forgotten(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_: object, __: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(AccountFile, "put", full)
        for _ in range(3):
            world.quota("a").begin(5)
            asyncio.run(world.accounts.flush())
    assert [record.message for record in caplog.records] == [
        "what tenants have used cannot be written: database or disk is full"
    ]
    asyncio.run(world.accounts.flush())
    with closing(AccountFile(world.path)) as store:
        assert store.spent()["a"][:2] == (3.0, 15.0)
    world.stop()


def test_a_file_of_before_there_were_accounts_is_migrated(tmp_path: Path) -> None:
    path = tmp_path / "k.sqlite"
    with closing(sqlite3.connect(path)) as db:
        for number, migration in enumerate(SCHEMA.migrations[:2], start=1):
            for statement in migration:
                db.execute(statement)
            db.execute(f"PRAGMA user_version={number}")
        db.execute(f"PRAGMA application_id={SCHEMA.mark}")
        db.execute("INSERT INTO tenants VALUES ('old', 5, 60, NULL, NULL)")
        db.commit()
    with closing(KeyFile(path)) as keys, closing(AccountFile(path)) as store:
        before = keys.changes()
        store.put({"old": Spent(1.0, 2.0, 3.0), "unknown": Spent(1.0, 2.0, 3.0)})
        assert store.spent() == {"old": Spent(1.0, 2.0, 3.0)}
        assert keys.changes() == before
        keys.limit("old", Limits(in_flight=7))
        assert keys.changes() > before


def test_a_gateway_that_starts_anew_goes_on_where_the_last_one_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FLUSH_S", 0.05)
    path = tmp_path / "k.sqlite"
    key, secret = new_key("team", now_s=1.0)
    with closing(KeyFile(path)) as store:
        store.create(key)
        store.limit("team", Limits(requests_per_min=2))
    statuses: list[int] = []

    async def main() -> None:
        async with over_upstreams(says_hello, keys=str(path)) as (rig, _):
            answers = [await rig.call(x_api_key=secret) for _ in range(2)]
            statuses.extend(answer.status for answer in answers)

    play(main())
    play(main())
    assert statuses == [200, 200, 429, 429]
