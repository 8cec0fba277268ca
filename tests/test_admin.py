"""The admin door: its own port, its own key, and what is gone from the port of the calls."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from socket import socket
from typing import Any, NamedTuple

import aiohttp
import pytest

from concertmaster.config import GatewaySection
from concertmaster.core.errors import InputError
from concertmaster.gateway.admin import AdminRoutes, Outcome
from concertmaster.gateway.reach import admin_door
from concertmaster.state.key_file import KeyFile
from concertmaster.state.keys import new_key
from gateway_rig import Heard, Rig, an_answer, over_upstreams, play, until

SECRET = "an admin key of some length"  # noqa: S105  # of these tests alone
ENVIRON = {"CM_TEST_ADMIN": SECRET, "CM_TEST_SHORT": "short"}
FLEET_PATHS = ("/", "/metrics", "/state", "/version")
CHANGES = ("/admin/reload", "/admin/drain", "/admin/resume")


def free_port() -> int:
    with socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


class Doors(NamedTuple):
    """A gateway with an admin door."""

    rig: Rig
    port: int
    admin: AdminRoutes
    upstream: Any

    async def ask(self, method: str, path: str, key: str = SECRET) -> tuple[int, Any]:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        url = f"http://127.0.0.1:{self.port}{path}"
        async with (
            aiohttp.ClientSession() as http,
            http.request(method, url, headers=headers) as answer,
        ):
            is_json = answer.content_type == "application/json"
            return answer.status, await (answer.json() if is_json else answer.text())


@asynccontextmanager
async def doors(*scripts: Any, **settings: Any) -> AsyncIterator[Doors]:  # noqa: ANN401
    port, admin = free_port(), AdminRoutes()
    told = {"admin": f"127.0.0.1:{port}", "admin_key_env": "CM_TEST_ADMIN", **settings}
    async with over_upstreams(*scripts, admin_routes=admin, environ=ENVIRON, **told) as (rig, up):
        yield Doors(rig, port, admin, up)


def keys_file(folder: Path) -> tuple[Path, str, str]:
    """A file with the key of an operator and one of somebody else; both secrets."""
    file = folder / "keys.sqlite"
    with closing(KeyFile(file)) as store:
        operator, theirs = new_key("ops", operator=True, now_s=0.0)
        caller, ours = new_key("team", now_s=0.0)
        store.create(operator)
        store.create(caller)
    return file, theirs, ours


def test_what_shows_or_changes_the_fleet_is_behind_the_admin_door_and_not_before_it() -> None:
    async def main() -> None:
        async with doors() as at:
            for path in FLEET_PATHS:
                assert (await at.ask("GET", path))[0] == 200, path
                assert (await at.rig.ask("GET", path)).status == 404, path
            for path in CHANGES:
                assert (await at.rig.ask("POST", path)).status == 404, path
            assert (await at.rig.call()).status == 200
            assert (await at.rig.ask("GET", "/v1/models")).status == 200

    play(main())


def test_no_call_to_a_model_comes_by_the_admin_door() -> None:
    async def main() -> None:
        async with doors() as at:
            for path in ("/v1/chat/completions", "/v1/messages", "/v1/models"):
                assert (await at.ask("POST", path))[0] == 404
            assert not at.upstream.heard

    play(main())


def test_without_an_admin_door_nothing_can_be_changed_from_outside() -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, _):
            for path in CHANGES:
                assert (await rig.ask("POST", path)).status == 404
            assert (await rig.ask("GET", "/state")).status == 200

    play(main())


@pytest.mark.parametrize("key", ["", "x", SECRET[:-1], SECRET + "x", SECRET.upper()])
def test_a_stranger_is_told_401_at_the_admin_door_and_changes_nothing(key: str) -> None:
    async def main() -> None:
        async with doors() as at:
            for method, path in (("POST", "/admin/drain"), ("GET", "/state")):
                status, body = await at.ask(method, path, key)
                assert (status, body["error"]["code"]) == (401, "invalid_api_key")
            assert not at.rig.gateway.draining
            assert at.rig.gateway.metrics.by_status[401] == 2

    play(main())


def test_load_balancers_need_no_key_at_either_door() -> None:
    async def main() -> None:
        async with doors() as at:
            for path in ("/livez", "/readyz"):
                assert (await at.ask("GET", path, ""))[0] == 200
                assert (await at.rig.ask("GET", path)).status == 200

    play(main())


def test_keys_of_operators_open_it_and_those_of_callers_do_not(tmp_path: Path) -> None:
    file, operator, caller = keys_file(tmp_path)

    async def main() -> None:
        async with doors(keys=str(file)) as at:
            assert (await at.ask("GET", "/state", operator))[0] == 200
            assert (await at.ask("GET", "/state", SECRET))[0] == 200
            status, body = await at.ask("POST", "/admin/drain", caller)
            assert (status, body["error"]["code"]) == (403, "permission_denied")
            refused = await at.rig.ask("GET", "/v1/models", authorization=f"Bearer {SECRET}")
            assert refused.status == 401, "the admin key is good for calls"

    play(main())


def test_an_operators_key_is_enough_where_there_is_no_admin_key(tmp_path: Path) -> None:
    file, operator, _ = keys_file(tmp_path)

    async def main() -> None:
        async with doors(keys=str(file), admin_key_env="") as at:
            assert (await at.ask("GET", "/state", operator))[0] == 200
            assert (await at.ask("GET", "/state", ""))[0] == 401

    play(main())


def test_a_drained_gateway_ends_what_it_has_takes_nothing_and_can_go_on() -> None:
    async def main() -> None:
        going = asyncio.Event()

        async def waits(_: Heard, out: asyncio.StreamWriter) -> None:
            await going.wait()
            out.write(an_answer(b"{}"))

        async with doors(waits) as at:
            call = asyncio.create_task(at.rig.call())
            await until(lambda: at.upstream.heard)

            assert await at.ask("POST", "/admin/drain") == (
                200,
                {"draining": True, "open_calls": 1},
            )
            refused = await at.rig.call()
            assert (refused.status, refused.error["code"]) == (503, "shutting_down")
            assert (await at.rig.ask("GET", "/readyz")).status == 503
            going.set()
            assert (await call).status == 200
            assert await at.ask("POST", "/admin/resume") == (
                200,
                {"draining": False, "open_calls": 0},
            )
            assert (await at.rig.call()).status == 200

    play(main())


def test_a_gateway_that_ends_is_not_called_back() -> None:
    async def main() -> None:
        async with doors() as at:
            at.admin.ending = True
            status, body = await at.ask("POST", "/admin/resume")
            assert (status, body["error"]["code"]) == (409, "shutting_down")

    play(main())


def test_reload_answers_what_came_of_it() -> None:
    async def main() -> None:
        async with doors() as at:
            assert (await at.ask("POST", "/admin/reload"))[0] == 409
            at.admin.reload = lambda: Outcome(("a",), ("b",))
            assert await at.ask("POST", "/admin/reload") == (
                200,
                {"changed": ["a"], "needs_restart": ["b"]},
            )
            at.admin.reload = lambda: Outcome(problem="f: x: wrong")
            status, body = await at.ask("POST", "/admin/reload")
            assert (status, body["error"]["message"]) == (400, "f: x: wrong")
            assert (await at.ask("GET", "/admin/reload"))[0] == 405

    play(main())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"admin": "9000"}, "gateway.admin: expected HOST:PORT, found '9000'"),
        ({"admin": ":9000"}, "gateway.admin: expected HOST:PORT, found ':9000'"),
        ({"admin": "h:99999"}, "gateway.admin: expected HOST:PORT, found 'h:99999'"),
        (
            {"admin": "127.0.0.1:9000"},
            (
                "gateway.admin: nothing guards it (set gateway.admin_key_env, or gateway.keys and "
                "make a key with --operator)"
            ),
        ),
        (
            {"admin": "127.0.0.1:9000", "admin_key_env": "CM_TEST_NO"},
            (
                "gateway.admin_key_env: expected 16 characters or more, the environment lacks "
                "CM_TEST_NO (export CM_TEST_NO=…)"
            ),
        ),
        (
            {"admin": "127.0.0.1:9000", "admin_key_env": "CM_TEST_SHORT"},
            (
                "gateway.admin_key_env: expected 16 characters or more, the environment has 5 "
                "characters in CM_TEST_SHORT (export CM_TEST_SHORT=…)"
            ),
        ),
        (
            {"admin_key_env": "CM_TEST_ADMIN"},
            (
                "gateway.admin_key_env: there is no admin address "
                '(set gateway.admin = "127.0.0.1:9000")'
            ),
        ),
    ],
)
def test_a_door_that_would_stand_open_is_refused_at_the_start(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as refused:
        admin_door("f", GatewaySection(**settings), ENVIRON)

    assert str(refused.value) == f"f: {message}"


def test_a_port_that_is_taken_is_named() -> None:
    async def main() -> None:
        with socket() as one:
            one.bind(("127.0.0.1", 0))
            one.listen()
            port = one.getsockname()[1]
            async with doors(admin=f"127.0.0.1:{port}"):
                pass

    with pytest.raises(InputError, match=r"gateway\.admin: cannot listen on 127\.0\.0\.1:\d+: "):
        play(main())
