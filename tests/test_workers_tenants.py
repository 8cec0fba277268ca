"""What is told of a call in one worker and decided by the scheduler: whose, after whom, why not."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from builders import a_fleet, a_pool
from concertmaster.core.events import RequestArrived
from concertmaster.core.request import Request
from concertmaster.gateway.workers.hub import SIDE_SOCKET
from crew import Crew, over_upstreams
from gateway_rig import CHAT, Heard, Wire, a_body, a_call, a_message, hangs, play, until
from test_api_errors import MESSAGES, check
from test_api_messages import asking
from test_gateway_keys import Safe

GOAL = "Find the file that has the error, then mend it. You may list, read and write files."


@pytest.fixture(name="safe")
def _safe(tmp_path: Path) -> Safe:
    return Safe(tmp_path / "keys.sqlite")


def bearing(secret: str, **fields: object) -> bytes:
    headers = {"authorization": f"Bearer {secret}"}
    return a_message("POST", CHAT, json.dumps(a_body(**fields)).encode(), headers)


async def cuts_late(_: Heard, out: asyncio.StreamWriter) -> None:
    await asyncio.sleep(0.3)
    out.transport.abort()


def arrived(crew: Crew) -> list[Request]:
    return [one.request for one in crew.rig.history if isinstance(one, RequestArrived)]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


async def envelope(wire: Wire) -> tuple[int, str, str]:
    """Check an error of the Messages API; return status, kind and name."""
    lines = (await wire.head()).decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines[1:] if line)
    body = json.loads(await wire.reader.readexactly(int(headers["content-length"])))
    return int(lines[0].split()[1]), check(body, headers), headers["request-id"]


# Tenants.


def test_the_core_is_told_whose_a_call_is_and_with_what_weight(safe: Safe) -> None:
    light, heavy = safe.key("light"), safe.key("heavy", weight=3)

    async def main() -> None:
        async with over_upstreams(keys=str(safe.path)) as (crew, _):
            for number, secret in enumerate((light, heavy)):
                wire = await crew.wire(number)
                wire.send(bearing(secret))
                assert (await wire.answer())[0] == 200
            told = [(one.tenant, one.tenant_weight) for one in arrived(crew)]
            assert told == [("light", 1.0), ("heavy", 3.0)]

    play(main())


def test_a_tenant_that_floods_all_workers_leaves_half_of_the_room_to_others(safe: Safe) -> None:
    flood, quiet = safe.key("flood"), safe.key("quiet")

    async def main() -> None:
        fleet = a_fleet(a_pool(max_sequences=2))
        keys = str(safe.path)
        async with over_upstreams(hangs, keys=keys, most_open=20, fleet=fleet) as (crew, _):
            gateway = crew.rig.gateway
            for number in range(14):
                wire = await crew.wire(number % 2)
                wire.send(bearing(flood))
            refused = gateway.metrics.refusals
            await until(lambda: gateway.open_exchanges + refused["tenant_full"] == 14)
            assert gateway.open_exchanges == 10
            wire = await crew.wire(1)
            wire.send(bearing(flood))
            status, body = await wire.answer()
            assert (status, json.loads(body)["error"]["code"]) == (429, "tenant_full")
            wire.send(bearing(quiet))
            await until(lambda: gateway.open_exchanges == 11)

    play(main())


def test_the_document_of_all_paths_is_for_any_key_at_any_worker(safe: Safe) -> None:
    key = {"authorization": f"Bearer {safe.key()}"}

    async def main() -> None:
        async with over_upstreams(keys=str(safe.path)) as (crew, _):
            wire = await crew.wire(1)
            wire.send(a_message("GET", "/openapi.json", b"", key))
            status, body = await wire.answer()
            assert (status, "/v1/messages" in json.loads(body)["paths"]) == (200, True)
            wire.send(a_message("GET", "/openapi.json"))
            assert (await wire.answer())[0] == 401

    play(main())


def test_prompts_of_two_tenants_are_never_put_together(safe: Safe) -> None:
    secrets = [safe.key("one"), safe.key("two")]
    first = [user("the very same words")]
    then = [*first, {"role": "assistant", "content": "ok"}, user("go")]
    grown = [user("the very same words, which go on, and on, and on for more than a line")]
    later = [user(grown[0]["content"] + " to the end")]

    async def main() -> None:
        async with over_upstreams(keys=str(safe.path)) as (crew, _):
            for number, (messages, mine) in enumerate(
                [(first, 0), (then, 1), (then, 0), (grown, 0), (later, 1), (later, 0)]
            ):
                wire = await crew.wire(number % 2)
                wire.send(bearing(secrets[mine], messages=messages))
                assert (await wire.answer())[0] == 200
            ids = [one.workflow_id for one in arrived(crew)]
            assert ids[0] == ids[2] != ids[1]
            assert ids[3] == ids[5] != ids[4]

    play(main())


# Workflows.


def test_a_text_that_grows_is_known_at_another_worker_with_its_parent() -> None:
    async def main() -> None:
        async with over_upstreams() as (crew, _):
            text = GOAL
            for number in range(4):
                wire = await crew.wire(number % 2)
                wire.send(a_call(messages=[user(text)]))
                assert (await wire.answer())[0] == 200
                text += f"\n> ls {number}\nno such file"
            calls = arrived(crew)
            assert {one.workflow_id for one in calls} == {"inferred-1"}
            assert [one.stage for one in calls] == [0, 1, 2, 3]
            names = [(one.request_id,) for one in calls]
            assert [one.parents for one in calls] == [(), *names[:-1]]

    play(main())


def test_parents_that_a_client_names_are_kept_beside_what_is_inferred() -> None:
    async def main() -> None:
        async with over_upstreams() as (crew, _):
            body = json.dumps(a_body()).encode()
            for number, headers in enumerate(({}, {"x-concertmaster-parent": "p1,p2"})):
                wire = await crew.wire(number)
                wire.send(a_message("POST", CHAT, body, headers))
                assert (await wire.answer())[0] == 200
            assert arrived(crew)[1].parents == ("p1", "p2")

    play(main())


# Errors.


@pytest.mark.parametrize(
    ("fields", "kind"),
    [({"model": "nobody"}, "not_found_error"), ({"max_tokens": 0}, "invalid_request_error")],
)
def test_an_error_has_the_envelope_of_its_api_whoever_raises_it(
    fields: dict[str, Any], kind: str
) -> None:
    async def main() -> None:
        async with over_upstreams() as (crew, _):
            body = json.dumps(asking(**fields)).encode()
            wire = await crew.wire(0)
            wire.send(a_message("POST", MESSAGES, body, {"x-request-id": "mine"}))
            assert (await envelope(wire))[1:] == (kind, "mine")
            wire.send(a_message("POST", MESSAGES, body))
            assert (await envelope(wire))[2].startswith("cm-")

    play(main())


def test_without_a_scheduler_each_api_has_its_words_and_workers_their_own_names() -> None:
    async def main() -> None:
        async with over_upstreams(cuts_late, may_log=True) as (crew, upstream):
            waits = await crew.wire(0)
            waits.send(a_message("POST", MESSAGES, json.dumps(asking()).encode()))
            await until(lambda: upstream.heard)
            for worker in crew.workers:
                assert worker.carrier is not None
                worker.carrier.orphaned()
            names = []
            for number in (0, 1):
                wire = await crew.wire(number)
                wire.send(a_message("POST", MESSAGES, json.dumps(asking()).encode()))
                status, kind, name = await envelope(wire)
                assert (status, kind) == (529, "overloaded_error")
                names.append(name)
            assert names == ["cm-0-1", "cm-1-1"]
            assert await envelope(waits) == (502, "api_error", "cm-1")
            (crew.hub.folder / SIDE_SOCKET).unlink()
            wire.send(a_message("GET", MESSAGES))
            assert await envelope(wire) == (529, "overloaded_error", "cm-1-2")

    play(main())


def test_a_fault_of_the_scheduler_is_told_under_the_name_of_its_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        async with over_upstreams(may_log=True) as (crew, _):
            monkeypatch.setattr(crew.rig.gateway, "consider", None)
            wire = await crew.wire(1)
            headers = {"x-request-id": "mine"}
            wire.send(a_message("POST", MESSAGES, json.dumps(asking()).encode(), headers))
            assert await envelope(wire) == (500, "api_error", "mine")
            assert await wire.reader.read() == b""
            await crew.idle()

    play(main())
