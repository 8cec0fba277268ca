"""A gateway with keys: who comes in, what they may use, and what engines see of it."""

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import openai
import pytest

from concertmaster.core.errors import InputError
from concertmaster.gateway import keyring
from concertmaster.gateway.keyring import OPEN_PATHS, Keyring
from concertmaster.gateway.peers import Peer
from concertmaster.state.key_file import KeyFile
from concertmaster.state.keys import Limits, new_key
from gateway_rig import (
    CHAT,
    Heard,
    Rig,
    Script,
    a_message,
    a_rig,
    an_answer,
    hangs,
    over_engines,
    over_upstreams,
    play,
    says_hello,
    until,
)


class Safe:
    """A file of keys, and the secrets that were handed out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ids: dict[str, str] = {}

    def key(self, tenant: str = "team", *, operator: bool = False, **limits: int) -> str:
        key, secret = new_key(tenant, operator=operator, now_s=1.0)
        with closing(KeyFile(self.path)) as store:
            store.create(key)
            if limits:
                store.limit(tenant, Limits(**limits))
        self.ids[secret] = key.key_id
        return secret

    def revoke(self, secret: str) -> None:
        with closing(KeyFile(self.path)) as store:
            store.revoke(self.ids[secret], 2.0)


@pytest.fixture(name="safe")
def _safe(tmp_path: Path) -> Safe:
    safe = Safe(tmp_path / "keys.sqlite")
    KeyFile(safe.path).close()
    return safe


@asynccontextmanager
async def guarded(
    safe: Safe,
    script: Script = says_hello,
    **settings: Any,  # noqa: ANN401
) -> AsyncIterator[tuple[Rig, Any]]:
    async with over_upstreams(script, keys=str(safe.path), **settings) as rig:
        yield rig


# Who comes in.


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer cm-wrong"},
        {"authorization": "Bearer "},
        {"authorization": "Basic KEY"},
        {"authorization": "KEY"},
        {"x-api-key": "KEYx"},
        {"api-key": "KE"},
        {"cookie": "api-key=KEY"},
        {"authorization": "Bearer wrong", "x-api-key": "KEY"},
    ],
)
def test_who_has_no_good_key_is_told_so_in_openais_words(
    safe: Safe, headers: dict[str, str]
) -> None:
    secret = safe.key()

    async def main() -> None:
        async with guarded(safe) as (rig, upstream):
            sent = {name: value.replace("KEY", secret) for name, value in headers.items()}
            reply = await rig.call(None, **sent)
            assert reply.status == 401
            assert reply.headers["www-authenticate"] == "Bearer"
            assert reply.error == {
                "message": "expected a good API key",
                "type": "invalid_request_error",
                "param": None,
                "code": "invalid_api_key",
            }
            assert not upstream.heard
            assert rig.gateway.metrics.by_status[401] == 1

    play(main())


@pytest.mark.parametrize("name", ["authorization", "Authorization", "x-api-key", "api-key"])
def test_a_good_key_comes_in_by_any_of_three_headers_and_goes_no_further(
    safe: Safe, name: str
) -> None:
    secret = safe.key()
    value = secret if name.endswith("key") else f"Bearer {secret}"

    async def main() -> None:
        async with guarded(safe) as (rig, upstream):
            assert (await rig.call(None, **{name: value})).status == 200
            assert secret not in repr(upstream.heard[0])
            assert not {"authorization", "x-api-key", "api-key"} & upstream.heard[0].headers.keys()

    play(main())


def test_no_credential_of_a_caller_reaches_an_engine_that_has_its_own(safe: Safe) -> None:
    secret = safe.key()

    async def main() -> None:
        async with over_upstreams(keys=str(safe.path)) as (_, upstream):
            peers: Any = {"p-0": Peer(api_key="engine-key")}
            async with a_rig({"p-0": upstream.url}, keys=str(safe.path), peers=peers) as rig:
                sent = {"authorization": f"Bearer {secret}", "x-api-key": "a", "api-key": "b"}
                assert (await rig.call(None, **sent)).status == 200
            heard = upstream.heard[0].headers
            assert heard["authorization"] == "Bearer engine-key"
            assert not {"x-api-key", "api-key"} & heard.keys()

    play(main())


def test_a_stranger_is_refused_by_its_head_before_its_body_is_read(safe: Safe) -> None:
    secret = safe.key()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 19000000\r\nx-api-key: "
    )

    async def main() -> None:
        async with guarded(safe) as (rig, _):
            known, stranger = await rig.wire(), await rig.wire()
            known.send(f"{head}{secret}\r\n\r\n".encode())
            assert (await known.head()).split()[1] == b"100"
            stranger.send(f"{head}x\r\n\r\n".encode())
            assert (await stranger.answer())[0] == 401

    play(main())


def test_a_key_stays_good_where_another_protocol_is_offered(safe: Safe) -> None:
    secret = safe.key()
    offer = {"x-api-key": secret, "connection": "upgrade", "upgrade": "h2c"}
    body = b'{"model": "m", "messages": [{}]}'

    async def main() -> None:
        async with guarded(safe) as (rig, upstream):
            wire = await rig.wire()
            wire.send(a_message("POST", CHAT, body, offer))
            assert (await wire.answer())[0] == 200
            assert secret not in repr(upstream.heard)
            wire.send(a_message("POST", CHAT, body, {**offer, "x-api-key": "x"}))
            assert (await wire.answer())[0] == 401

    play(main())


def test_keys_of_messages_in_one_packet_are_not_mixed(safe: Safe) -> None:
    one, other = safe.key("one", requests_per_min=1), safe.key("other", requests_per_min=9)
    body = b'{"model": "m", "messages": [{}]}'

    async def main() -> None:
        async with guarded(safe) as (rig, _):
            wire = await rig.wire()
            keys = (one, other, one, other, "x")
            wire.send(b"".join(a_message("POST", CHAT, body, {"x-api-key": k}) for k in keys))
            found = [(await wire.answer())[0] for _ in keys]
            assert found == [200, 200, 429, 200, 401]

    play(main())


def test_without_keys_a_callers_own_key_goes_to_its_engine() -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, upstream):
            assert (await rig.call(authorization="Bearer mine")).status == 200
            assert upstream.heard[0].headers["authorization"] == "Bearer mine"

    play(main())


def test_every_other_address_asks_for_a_key_and_what_shows_the_fleet_for_an_operators(
    safe: Safe,
) -> None:
    caller, operator = safe.key(), safe.key("ops", operator=True)
    closed = ("/", "/metrics", "/state", "/version", "/elsewhere", "/%76ersion", "//v1/models")

    async def main() -> None:
        async with guarded(safe) as (rig, _):
            for path in (path.decode() for path in OPEN_PATHS):
                assert (await rig.ask("GET", path)).status == 200
            assert (await rig.ask("GET", "/v1/models")).status == 401
            assert (await rig.ask("GET", "/v1/models", x_api_key=caller)).status == 200
            for path in closed:
                found = []
                for key in ("", caller, operator):
                    wire = await rig.wire()
                    wire.send(a_message("GET", path, headers={"x-api-key": key}))
                    found.append(int((await wire.head()).split()[1]))
                assert found[:2] == [401, 403], path
                assert found[2] in {200, 404}
            grade = b'{"success": 1}'
            path = "/v1/workflows/w/grade"
            assert (await rig.ask("POST", path, grade)).status == 401
            assert (await rig.ask("POST", path, grade, x_api_key=caller)).status == 200
            reply = await rig.ask("GET", "/metrics", x_api_key=caller)
            assert (reply.error["type"], reply.error["code"]) == (
                "permission_error",
                "permission_denied",
            )

    play(main())


def test_the_official_client_raises_its_own_errors(safe: Safe) -> None:
    secret = safe.key(requests_per_min=1)

    async def main() -> None:
        async with guarded(safe) as (rig, _), rig.sdk() as stranger:
            messages: Any = [{"role": "user", "content": "Say it."}]
            with pytest.raises(openai.AuthenticationError, match="good API key"):
                await stranger.chat.completions.create(model="m", messages=messages)
            known = stranger.with_options(api_key=secret)
            await known.chat.completions.create(model="m", messages=messages)
            with pytest.raises(openai.RateLimitError, match="1 requests a minute") as found:
                await known.chat.completions.create(model="m", messages=messages)
            assert 50 < int(found.value.response.headers["retry-after"]) <= 60

    play(main())


# Changes while it serves.


def test_a_key_opens_and_ends_within_a_second_while_serving(safe: Safe) -> None:
    async def main() -> None:
        async with guarded(safe) as (rig, _):
            secret = safe.key()
            await asyncio.sleep(2 * keyring.REREAD_S)
            assert (await rig.call(x_api_key=secret)).status == 200
            safe.revoke(secret)
            await asyncio.sleep(2 * keyring.REREAD_S)
            assert (await rig.call(x_api_key=secret)).status == 401

    assert 2 * keyring.REREAD_S < 1
    play(main())


def test_limits_change_while_serving_and_keep_what_is_in_flight(safe: Safe) -> None:
    secret = safe.key(in_flight=1)

    async def main() -> None:
        async with guarded(safe, hangs) as (rig, _):
            calls = [asyncio.ensure_future(rig.call(x_api_key=secret))]
            await until(lambda: rig.gateway.open_exchanges == 1)
            assert (await rig.call(x_api_key=secret)).status == 429
            with closing(KeyFile(safe.path)) as store:
                store.limit("team", Limits(in_flight=2))
            await asyncio.sleep(2 * keyring.REREAD_S)
            calls.append(asyncio.ensure_future(rig.call(x_api_key=secret)))
            await until(lambda: rig.gateway.open_exchanges == 2)
            assert (await rig.call(x_api_key=secret)).status == 429
            for call in calls:
                call.cancel()
            await rig.idle()

    play(main())


def test_if_the_store_fails_keys_stay_good_and_the_log_says_so_once(
    safe: Safe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    safe.key(in_flight=1)
    store = KeyFile(safe.path)
    ring = Keyring(store, lambda: 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(store, "changes", _broken)
        ring.refresh()
        ring.refresh()
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "those last read stay good: disk I/O error" in caplog.text
    ring.refresh()
    with closing(sqlite3.connect(safe.path)) as db, db:
        db.execute("UPDATE tenants SET in_flight = 0")
    ring.refresh()
    assert "--in-flight: expected at least 1, found 0" in caplog.text
    ring.close()


def _broken() -> int:
    raise sqlite3.OperationalError("disk I/O error")


# What tenants may use.


def test_keys_of_one_tenant_share_its_limits_and_other_tenants_have_their_own(safe: Safe) -> None:
    first, second, other = safe.key(requests_per_min=2), safe.key(), safe.key("other")

    async def main() -> None:
        async with guarded(safe) as (rig, upstream):
            reply = await rig.call(x_api_key=first)
            assert reply.headers["x-ratelimit-limit-requests"] == "2"
            assert reply.headers["x-ratelimit-remaining-requests"] == "1"
            assert (await rig.call(x_api_key=second)).status == 200
            for secret in (first, second):
                reply = await rig.call(x_api_key=secret)
                assert reply.status == 429
                assert reply.error["type"] == "rate_limit_error"
                assert reply.error["code"] == "rate_limit_exceeded"
                wait_ms = int(reply.headers["retry-after-ms"])
                assert int(reply.headers["retry-after"]) == -(-wait_ms // 1000)
                assert 20_000 < wait_ms <= 30_000
            reply = await rig.call(x_api_key=other)
            assert reply.status == 200
            assert not any(name.lower().startswith("x-ratelimit") for name in reply.headers)
            assert len(upstream.heard) == 3

    play(main())


def test_output_counts_as_the_engine_counted_it(safe: Safe) -> None:
    secret = safe.key(tokens_per_min=1000)

    async def wordy(_: Heard, out: asyncio.StreamWriter) -> None:
        out.write(an_answer(b'{"usage":{"completion_tokens":5000}}'))

    async def main() -> None:
        async with guarded(safe, wordy) as (rig, _):
            assert (await rig.call(x_api_key=secret)).status == 200
            reply = await rig.call(x_api_key=secret)
            assert reply.status == 429
            assert 240 <= int(reply.headers["retry-after"]) <= 243

    play(main())


def test_a_call_in_flight_ends_for_its_tenant_however_it_ends(safe: Safe) -> None:
    secret = safe.key(in_flight=1)

    async def by_turns(heard: Heard, out: asyncio.StreamWriter) -> None:
        how = heard.json["how"]
        if how == "hang":
            await hangs(heard, out)
        out.write(an_answer(b"{}", {"ok": "200 OK", "bad": "400 Bad Request"}[how]))

    async def main() -> None:
        async with guarded(safe, by_turns) as (rig, _):
            for how, status in (("ok", 200), ("bad", 400), ("ok", 200)):
                assert (await rig.call({"how": how}, x_api_key=secret)).status == status
            call = asyncio.ensure_future(rig.call({"how": "hang"}, x_api_key=secret))
            await until(lambda: rig.gateway.open_exchanges == 1)
            assert (await rig.call({"how": "ok"}, x_api_key=secret)).status == 429
            call.cancel()
            await rig.idle()
            unknown = await rig.call({"how": "ok", "model": "none"}, x_api_key=secret)
            assert unknown.status == 404
            assert (await rig.ask("POST", CHAT, b"{}", x_api_key=secret)).status == 400
            assert (await rig.call({"how": "ok"}, x_api_key=secret)).status == 200

    play(main())


def test_limits_that_an_engine_tells_are_not_mixed_with_ours(safe: Safe) -> None:
    secret = safe.key(requests_per_min=7)

    async def limited(_: Heard, out: asyncio.StreamWriter) -> None:
        out.write(an_answer(b"{}", headers=("X-RateLimit-Limit-Requests: 9999",)))

    async def main() -> None:
        async with guarded(safe, limited) as (rig, _):
            reply: Any = await rig.call(x_api_key=secret)
            assert reply.headers.getall("x-ratelimit-limit-requests") == ["7"]

    play(main())


# Where it may listen.


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.7", "example.org"])  # noqa: S104
def test_without_keys_it_listens_on_loopback_only(host: str) -> None:
    async def main() -> None:
        async with a_rig({}, host=host):
            pass

    with pytest.raises(InputError) as found:
        play(main())
    assert str(found.value) == (
        "gateway.host: without keys the gateway listens on loopback only, "
        f"found {host!r} "
        '(set gateway.keys = "keys.sqlite" and run: concertmaster keys create --help)'
    )


def test_with_keys_it_listens_where_it_is_told(safe: Safe) -> None:
    secret = safe.key()

    async def main() -> None:
        async with over_upstreams(keys=str(safe.path), host="0.0.0.0") as (rig, _):  # noqa: S104
            assert (await rig.call(x_api_key=secret)).status == 200

    play(main())


def test_a_file_of_keys_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    path = tmp_path / "kes.sqlite"

    async def main() -> None:
        async with over_upstreams(keys=str(path)):
            pass

    with pytest.raises(InputError, match=r"gateway\.keys: no such file: .*keys create --file"):
        play(main())
    assert not path.exists()


def test_what_one_tenant_has_stored_is_not_there_for_another(safe: Safe) -> None:
    ours, theirs = safe.key("ours"), safe.key("theirs")

    async def main() -> None:
        async with over_engines(keys=str(safe.path)) as (rig, _), rig.sdk() as sdk:
            mine, other = sdk.with_options(api_key=ours), sdk.with_options(api_key=theirs)
            made = await mine.responses.create(model="m", input="Say it.")
            assert (await mine.responses.retrieve(made.id)).id == made.id
            spoofed = {"x-concertmaster-tenant": "ours"}
            with pytest.raises(openai.NotFoundError):
                await other.responses.retrieve(made.id, extra_headers=spoofed)
            with pytest.raises(openai.APIStatusError):
                await other.responses.create(
                    model="m", input="On.", previous_response_id=made.id, extra_headers=spoofed
                )

    play(main())
