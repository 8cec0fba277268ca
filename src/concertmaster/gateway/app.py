"""Everything of the gateway that is no call to a model: health, models, metrics, the page."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from concertmaster import __version__
from concertmaster.core.errors import InvalidRequestError
from concertmaster.core.fleet import Replica
from concertmaster.core.request import WorkflowId
from concertmaster.gateway.answers import JSON, json_answer, problem_answer
from concertmaster.gateway.apis.anthropic_answer import speaks, worded
from concertmaster.gateway.apis.desk import PATHS
from concertmaster.gateway.apis.responses_store import owner_of
from concertmaster.gateway.decisions_api import DecisionRoutes
from concertmaster.gateway.identity import MAX_ID_CHARS
from concertmaster.gateway.metrics import exposition
from concertmaster.gateway.openai_api import AUTO, caller_error
from concertmaster.gateway.openapi import document
from concertmaster.gateway.operations import OPENAPI
from concertmaster.gateway.receipts import Receipts

if TYPE_CHECKING:
    from concertmaster.gateway.driver import Gateway

PAGE_PERIOD_S = 0.5
CALL_PATHS = ("/v1/chat/completions", "/v1/completions", *PATHS)


class SideRoutes:
    """Handlers over one gateway, attached once it exists, and over its receipts."""

    def __init__(self, receipts: Receipts) -> None:
        self._decisions = DecisionRoutes(receipts)
        self.gateway: Gateway | None = None

    @property
    def _gateway(self) -> "Gateway":
        assert self.gateway is not None, "the side door opened before the gateway"
        return self.gateway

    def app(self, *, shows_fleet: bool = True) -> Starlette:
        """Build the app for callers.

        Args:
            shows_fleet: Whether it has what shows the whole fleet; not beside an admin door.
        """
        fleet = self._fleet() if shows_fleet else []
        return _app([*self._open(), *fleet, *self._calls()])

    def admin_app(self, routes: Sequence[Route]) -> Starlette:
        """Build the app of the admin door: health, what shows the fleet, what changes it."""
        return _app([*self._open(), *self._fleet(), *routes])

    def _open(self) -> list[Route]:
        live = ("/livez", "/health/live", "/liveness", "/healthz", "/health")
        ready = ("/readyz", "/health/ready", "/readiness")
        return [
            *(Route(path, self.live) for path in live),
            *(Route(path, self.ready) for path in ready),
        ]

    def _fleet(self) -> list[Route]:
        return [
            Route("/version", self.version),
            Route("/metrics", self.metrics),
            Route("/state", self.state),
            Route("/events", self.events),
            Route("/", self.page),
        ]

    def _calls(self) -> list[Route]:
        return [
            Route("/v1/models", self.models),
            *self._decisions.routes(),
            Route("/v1/workflows/{workflow_id:path}/grade", self.grade, methods=["POST"]),
            *(Route(path, self.call, methods=["POST"]) for path in CALL_PATHS),
            Route("/v1/responses/{response_id}", self.response),
            Route("/v1/responses/{response_id}", self.forget_response, methods=["DELETE"]),
        ]

    async def live(self, _: Request) -> Response:
        """Answer that the process runs."""
        return Response()

    async def ready(self, _: Request) -> Response:
        """Answer whether calls are taken: not while draining, not without a replica."""
        replicas = self._gateway.scheduler.replicas.values()
        if self._gateway.draining:
            return problem_answer(503, "the gateway is shutting down", "draining")
        if not any(replica.alive for replica in replicas):
            return problem_answer(503, "no replica is alive", "no_replica")
        return Response()

    async def version(self, _: Request) -> Response:
        """Answer the version."""
        return json_answer({"version": __version__})

    async def models(self, _: Request) -> Response:
        """List the models, and ``auto`` for any of them."""
        pools = self._gateway.scheduler.pools.values()
        contexts: dict[str, int] = {p.model.name: p.model.context_tokens for p in pools}
        listed = {AUTO: max(contexts.values()), **contexts}
        return json_answer(
            {
                "object": "list",
                "data": [
                    {
                        "id": name,
                        "object": "model",
                        "created": 0,
                        "owned_by": "concertmaster",
                        "max_model_len": context_tokens,
                    }
                    for name, context_tokens in listed.items()
                ],
            }
        )

    async def grade(self, request: Request) -> Response:
        """Take in that a workflow is over and how well it went; it may be over for long."""
        workflow_id: str = request.path_params["workflow_id"][:MAX_ID_CHARS].strip()
        try:
            success = _success_in(await request.body())
        except InvalidRequestError as error:
            status, body = caller_error(error)
            return Response(body, status_code=status, media_type=JSON)
        self._gateway.grade(WorkflowId(workflow_id), success)
        return json_answer({"workflow_id": workflow_id, "success": success})

    async def metrics(self, _: Request) -> Response:
        """Answer a scrape."""
        gateway = self._gateway
        body = exposition(gateway.metrics, gateway.scheduler, gateway.engines)
        return Response(body, media_type="text/plain; version=0.0.4")

    async def state(self, _: Request) -> Response:
        """Answer what every replica has in flight."""
        return json_answer(self._snapshot())

    async def events(self, _: Request) -> Response:
        """Stream the state to the page."""
        return StreamingResponse(self._snapshots(), media_type="text/event-stream")

    async def call(self, _: Request) -> Response:
        """Stand in for the calls, which never come by the side door, to name their method."""
        raise AssertionError("a call came by the side door")

    async def response(self, request: Request) -> Response:
        """Answer what the Responses API answered before."""
        owner, response_id = _owner(request), request.path_params["response_id"]
        found = self._gateway.apis.responses.find(response_id, owner)
        if found is None:
            return _no_response(response_id)
        return Response(found.body, media_type=JSON)

    async def forget_response(self, request: Request) -> Response:
        """Forget an answer of the Responses API."""
        owner, response_id = _owner(request), request.path_params["response_id"]
        if not self._gateway.apis.responses.delete(response_id, owner):
            return _no_response(response_id)
        return json_answer({"id": response_id, "object": "response.deleted", "deleted": True})

    async def page(self, _: Request) -> Response:
        """Show the fleet at work."""
        page = files("concertmaster.gateway").joinpath("page.html").read_bytes()
        return Response(page, media_type="text/html")

    async def _snapshots(self) -> AsyncIterator[bytes]:
        while True:
            yield b"data: " + msgspec.json.encode(self._snapshot()) + b"\n\n"
            await asyncio.sleep(PAGE_PERIOD_S)

    def _snapshot(self) -> dict[str, Any]:
        gateway = self._gateway
        return {
            "policy": gateway.scheduler.policy.name,
            "waiting": len(gateway.scheduler.line),
            "workflows": len(gateway.scheduler.workflows),
            "answered": sum(gateway.metrics.by_status.values()),
            "output_tokens": gateway.metrics.output_tokens,
            "replicas": [_view(replica) for replica in gateway.scheduler.replicas.values()],
        }


def _state(replica: Replica) -> str:
    if not replica.alive:
        return "dead"
    return "draining" if replica.removed else replica.readiness.value


def _app(routes: Sequence[Route]) -> Starlette:
    handlers = {HTTPException: _http_error, Exception: _internal_error}
    return Starlette(routes=[*routes, _described(routes)], exception_handlers=handlers)


def _described(routes: Sequence[Route]) -> Route:
    """Return the route of the document about these, and about itself."""
    paths = {OPENAPI, *(route.path_format for route in routes)}

    async def describe(_: Request) -> Response:
        return json_answer(document(paths))

    return Route(OPENAPI, describe)


def _view(replica: Replica) -> dict[str, Any]:
    ledger = replica.kv
    return {
        "replica": replica.replica_id,
        "model": replica.pool.model.name,
        "gpu": replica.pool.gpu,
        "state": _state(replica),
        "running": len(replica.in_flight),
        "decode_tokens": replica.decode_tokens,
        "kv_reserved_ratio": ledger.reserved_blocks / ledger.capacity_blocks,
    }


def _owner(request: Request) -> bytes:
    return owner_of(request.scope["message"])


def _no_response(response_id: str) -> Response:
    return problem_answer(404, f"no response {response_id[:100]} is kept", "not_found")


def _success_in(body: bytes) -> float | None:
    """Read the grade of a workflow; ``None`` if nobody graded it.

    Raises:
        InvalidRequestError: There is none, or it is no grade.
    """
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict) or "success" not in fields:
        problem = "expected a number from 0 to 1, or null, found nothing"
        raise InvalidRequestError(f"success: {problem}", param="success")
    success = fields["success"]
    if success is None:
        return None
    if isinstance(success, bool) or not isinstance(success, int | float) or not 0 <= success <= 1:
        found = msgspec.json.encode(success).decode()[:100]
        problem = f"expected a number from 0 to 1, or null, found {found}"
        raise InvalidRequestError(f"success: {problem}", param="success")
    return float(success)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = f"{request.method} {request.url.path}"
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "GET")
        message = f"{path}: expected {allowed}"
        answer = problem_answer(405, message, "method_not_allowed", {"allow": allowed})
    else:
        answer = problem_answer(error.status_code, f"{path}: no such address", "not_found")
    return _reworded(request, answer)


async def _internal_error(request: Request, _: Exception) -> Response:
    answer = problem_answer(500, "internal error; the log says more", "internal")
    return _reworded(request, answer)


def _reworded(request: Request, answer: Response) -> Response:
    """Return an error in the words of the API that was asked."""
    target = request.scope["raw_path"]
    if not speaks(target):
        return answer
    name = request.scope["name"]()
    status, body = worded(target, answer.status_code, bytes(answer.body), name)
    kept = {key: value for key, value in answer.headers.items() if key == "allow"}
    headers = {**kept, "request-id": name}
    return Response(body, status_code=status, headers=headers, media_type=JSON)
