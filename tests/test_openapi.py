"""The document says what the gateway does: whatever is sent by it is answered by it."""

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.routing import Route

from builders import a_fleet, a_pool
from concertmaster.core.fleet import ReplicaId
from concertmaster.gateway.admin import AdminRoutes
from concertmaster.gateway.app import SideRoutes
from concertmaster.gateway.openapi import document
from concertmaster.gateway.operations import OPENAPI, OPERATIONS
from concertmaster.gateway.peers import Peer
from concertmaster.gateway.receipts import Receipts
from concertmaster.state.key_file import KeyFile
from concertmaster.state.keys import new_key
from gateway_rig import Rig, Upstream, a_rig, exactly, over_engines, over_upstreams, play
from live_gateway import Live, answers_anything, live

EXAMPLES = 10
CHECKS = [
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
]
SCHEMA = schemathesis.openapi.from_dict(document())
ASKED = [
    (path, method)
    for path, operations in OPERATIONS.items()
    for method in operations
    if path != "/events" and not path.startswith("/admin")  # one never ends, one has its own door
]


@asynccontextmanager
async def over_chats_and_embeddings() -> AsyncIterator[tuple[Rig, Any]]:
    pools = (a_pool("p", model="m"), a_pool("q", model="e"))
    peers = {ReplicaId("q-0"): Peer(serves="embeddings")}
    async with Upstream(answers_anything) as one, Upstream(answers_anything) as other:
        urls = {"p-0": one.url, "q-0": other.url}
        async with a_rig(urls, fleet=a_fleet(*pools), peers=peers) as rig:
            yield rig, (one, other)


@pytest.fixture(scope="module", name="gateway")
def _gateway() -> Iterator[Live]:
    with live(over_chats_and_embeddings()) as running:
        yield running


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize(("path", "method"), ASKED)
def test_whatever_is_sent_by_the_document_is_answered_by_it(
    path: str, method: str, mode: GenerationMode, gateway: Live
) -> None:
    operation = SCHEMA[path][method]
    if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query):
        pytest.skip("nothing can be wrong with it")

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def is_answered(case: Any) -> None:  # noqa: ANN401  # generic in what nobody names
        body: Any = case.body
        if mode is GenerationMode.POSITIVE and isinstance(body, dict) and "model" in body:
            body["model"] = "auto"  # else hardly any call would get past its model
        with requests.Session() as http:
            case.validate_response(case.call(gateway.rig.url, http, timeout=10), checks=CHECKS)

    is_answered()
    gateway.do(gateway.rig.idle())
    assert gateway.do(gateway.rig.call()).status == 200


def test_every_route_is_in_the_document_and_nothing_else() -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, _):
            routes = SideRoutes(Receipts(rig.gateway.scheduler))
            callers, admins = routes.app().routes, routes.admin_app(AdminRoutes().routes()).routes
            found = {
                (route.path_format, method.lower())
                for route in (*callers, *admins)
                if isinstance(route, Route)
                for method in route.methods or ()
            }
            listed = {(path, method) for path, one in OPERATIONS.items() for method in one}
            assert {one for one in found if one[1] != "head"} == listed

    play(main())


def test_it_is_served_and_written_down_and_says_what_each_door_has(tmp_path: Path) -> None:
    written = json.loads((Path(__file__).parents[1] / "docs" / "openapi.json").read_text())
    key, secret = new_key("team", now_s=1.0)
    store = KeyFile(tmp_path / "keys.sqlite")
    store.create(key)
    store.close()

    async def main() -> None:
        async with over_upstreams(keys=str(tmp_path / "keys.sqlite")) as (rig, _):
            assert (await rig.ask("GET", OPENAPI)).status == 401
            served = (await rig.ask("GET", OPENAPI, x_api_key=secret)).json
            admins = {path for path in OPERATIONS if path.startswith("/admin")}
            assert set(served["paths"]) == {*OPERATIONS} - admins
            served["paths"] = written["paths"]
            assert {**served, "components": 0} == {**written, "components": 0}
        env = {"ADMIN_KEY": "x" * 20}
        door = {"admin": "127.0.0.1:0", "admin_key_env": "ADMIN_KEY"}
        async with over_upstreams(environ=env, **door) as (rig, _):
            served = (await rig.ask("GET", OPENAPI)).json
            assert not {"/state", "/admin/drain"} & set(served["paths"])
            assert "State" not in served["components"]["schemas"]

    play(main())


def test_receipts_are_as_the_document_says() -> None:
    schema = {"$ref": "#/components/schemas/Receipt", "components": document()["components"]}

    async def main() -> None:
        async with over_engines(replicas=2) as (rig, _):
            for number in range(3):
                asked = {**exactly(4), "stream": number == 1}
                assert (await rig.call(asked, x_request_id=f"r{number}")).status == 200
                receipt = (await rig.ask("GET", f"/v1/decisions/r{number}")).json
                jsonschema.validate(receipt, schema)
                kinds = document()["components"]["schemas"]
                assert set(receipt) == set(kinds["Receipt"]["properties"])
                assert set(receipt["attempts"][0]) == set(kinds["AttemptShown"]["properties"])

    play(main())
