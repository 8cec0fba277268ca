"""Errors of the Messages API: one envelope whoever raises them, and the client's own classes."""

import asyncio
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import anthropic
import pytest

from builders import a_policy
from concertmaster.gateway import agent
from concertmaster.policies.admission import BoundedLine
from concertmaster.state.key_file import KeyFile
from concertmaster.state.keys import Limits, new_key
from gateway_rig import Heard, Rig, a_message, an_answer, cuts, hangs, over_upstreams, play, until
from test_api_messages import a_client, a_completion, asking

MESSAGES = "/v1/messages"


@pytest.fixture(autouse=True)
def _short_farewell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "_LINGER_S", 0.05)


async def answers(_: Heard, out: asyncio.StreamWriter) -> None:
    out.write(an_answer(a_completion({"content": "ok"})))


async def caught(
    rig: Rig, wanted: type[anthropic.APIStatusError], **fields: object
) -> anthropic.APIStatusError:
    """Make a call that fails, and check all that holds for any error."""
    async with a_client(rig) as client:
        with pytest.raises(anthropic.APIStatusError) as found:
            await client.messages.create(**asking(**fields))
    error = found.value
    assert type(error) is wanted
    check(error.body, error.response.headers)
    assert error.request_id == error.response.headers["x-request-id"]
    return error


def check(body: Any, headers: Any) -> str:  # noqa: ANN401  # whatever came
    """Check an envelope against its headers; return the kind of the error."""
    assert list(body) == ["type", "error", "request_id"]
    assert body["type"] == "error"
    assert list(body["error"]) == ["type", "message"]
    assert body["error"]["message"]
    assert body["request_id"] == headers["request-id"] == headers["x-request-id"] != ""
    return str(body["error"]["type"])


def kind(error: anthropic.APIStatusError) -> str:
    body: Any = error.body
    return f"{error.status_code} {body['error']['type']}"


def a_key(path: Path, **limits: int) -> str:
    key, secret = new_key("team", now_s=1.0)
    with closing(KeyFile(path)) as store:
        store.create(key)
        store.limit("team", Limits(**limits))
    return secret


# Before a call is one.


def test_a_stranger_an_unknown_model_and_a_bad_field() -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, _):
            missing = await caught(rig, anthropic.NotFoundError, model="nobody")
            assert kind(missing) == "404 not_found_error"
            bad = await caught(rig, anthropic.BadRequestError, max_tokens=0)
            assert kind(bad) == "400 invalid_request_error"
            stage = {"x-concertmaster-stage": "later", "x-request-id": "mine"}
            header = await caught(rig, anthropic.BadRequestError, extra_headers=stage)
            assert header.request_id == "mine"

    play(main())


def test_keys_and_quotas(tmp_path: Path) -> None:
    path = tmp_path / "keys.sqlite"
    secret = a_key(path, requests_per_min=1)

    async def main() -> None:
        async with over_upstreams(answers, keys=str(path)) as (rig, _):
            stranger = await caught(rig, anthropic.AuthenticationError)
            assert kind(stranger) == "401 authentication_error"
            assert stranger.response.headers["www-authenticate"] == "Bearer"
            key = {"authorization": f"Bearer {secret}"}
            async with a_client(rig) as client:
                await client.messages.create(**asking(extra_headers=key))
            much = await caught(rig, anthropic.RateLimitError, extra_headers=key)
            assert kind(much) == "429 rate_limit_error"
            assert int(much.response.headers["retry-after"]) > 0
            assert much.response.headers["x-ratelimit-remaining-requests"] == "0"

    play(main())


def test_what_is_too_large_is_refused_by_the_connection() -> None:
    async def main() -> None:
        async with over_upstreams(max_body_mb=0.01) as (rig, _):
            large = [{"role": "user", "content": "x" * 20_000}]
            body = await caught(rig, anthropic.RequestTooLargeError, messages=large)
            assert kind(body) == "413 request_too_large"
            flood = {f"x-{i}": "y" for i in range(200)}
            await caught(rig, anthropic.RequestHeaderFieldsTooLargeError, extra_headers=flood)
            named = {**flood, "x-request-id": "mine"}
            again = await caught(
                rig, anthropic.RequestHeaderFieldsTooLargeError, extra_headers=named
            )
            assert again.request_id == "mine"

    play(main())


def test_a_body_that_does_not_come_is_told_so_in_the_same_words() -> None:
    async def main() -> None:
        async with over_upstreams(body_timeout_s=0.1) as (rig, _):
            wire = await rig.wire()
            wire.send(f"POST {MESSAGES} HTTP/1.1\r\nhost: g\r\ncontent-length: 9\r\n\r\n".encode())
            head, _, body = (await wire.rest()).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 408 ")
            lines = [line.split(": ", 1) for line in head.decode().split("\r\n")[1:]]
            assert check(json.loads(body), dict(lines)) == "invalid_request_error"

    play(main())


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", MESSAGES, 405),
        ("POST", f"{MESSAGES}/batches", 404),
        ("GET", f"{MESSAGES}/batches/b-1?x=1", 404),
        ("DELETE", f"{MESSAGES}/count_tokens", 405),
    ],
)
def test_addresses_and_methods_that_are_not_there(method: str, path: str, status: int) -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, _):
            reply = await rig.ask(method, path)
            assert reply.status == status
            check(reply.json, reply.headers)
            assert ("allow" in reply.headers) is (status == 405)
            beside = await rig.ask("GET", "/v1/messages2", x_request_id="mine")
            assert (beside.error["code"], beside.headers["x-request-id"]) == ("not_found", "mine")

    play(main())


# Calls that are refused, and calls that break.


def test_a_full_line_is_a_rate_limit() -> None:
    async def main() -> None:
        policy = a_policy(admission=BoundedLine(max_waiting=0))
        async with over_upstreams(policy=policy) as (rig, _):
            assert kind(await caught(rig, anthropic.RateLimitError)) == "429 rate_limit_error"

    play(main())


def test_a_gateway_that_ends_or_has_too_many_calls_is_overloaded() -> None:
    async def main() -> None:
        async with over_upstreams(hangs, most_open=1) as (rig, upstream):
            wire = await rig.wire()
            wire.send(a_message("POST", MESSAGES, json.dumps(asking()).encode()))
            await until(lambda: upstream.heard)
            full = await caught(rig, anthropic.OverloadedError)
            assert kind(full) == "529 overloaded_error"
            assert int(full.response.headers["retry-after"]) > 0
            rig.gateway.draining = True
            ending = await caught(rig, anthropic.OverloadedError)
            assert kind(ending) == "529 overloaded_error"

    play(main())


def test_a_fleet_without_a_replica_is_overloaded_and_a_broken_engine_is_not() -> None:
    async def main() -> None:
        async with over_upstreams(cuts, hold_s=0.0) as (rig, _):
            broken = await caught(rig, anthropic.InternalServerError)
            assert kind(broken) == "502 api_error"
            none = await caught(rig, anthropic.OverloadedError)
            assert kind(none) == "529 overloaded_error"

    play(main())


def test_an_answer_that_takes_too_long_is_a_timeout() -> None:
    async def main() -> None:
        async with over_upstreams(hangs, total_timeout_s=0.2) as (rig, _):
            late = await caught(rig, anthropic.DeadlineExceededError)
            assert kind(late) == "504 timeout_error"
            assert late.response.headers["x-should-retry"] == "false"

    play(main())


def test_a_fault_of_ours_is_told_in_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with over_upstreams(may_log=True) as (rig, _):
            monkeypatch.setattr(rig.gateway, "_intake", Broken())
            fault = await caught(rig, anthropic.InternalServerError)
            assert kind(fault) == "500 api_error"
            assert fault.request_id == "still-named"

    play(main())


class Broken:
    """An intake with a fault."""

    def name(self, _: object) -> str:
        return "still-named"

    def open(self, *_: object, **__: object) -> None:
        raise ZeroDivisionError
