"""``GET /v1/decisions``: receipts, to those whose calls they are of."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from concertmaster.gateway.openai_api import error_body
from concertmaster.gateway.receipts import MOST_LISTED, Receipts, owner_of

LISTED = 20
_JSON = "application/json"


class DecisionRoutes:
    """Handlers over the receipts of one gateway.

    With keys a tenant finds its own receipts only; what is another's looks as if it were not there.
    """

    def __init__(self, receipts: Receipts) -> None:
        self._receipts = receipts

    def routes(self) -> list[Route]:
        """Return what to serve."""
        return [
            Route("/v1/decisions", self.of_workflow),
            Route("/v1/decisions/{request_id:path}", self.one),
        ]

    async def one(self, request: Request) -> Response:
        """Answer one receipt."""
        request_id = request.path_params["request_id"]
        found = await self._receipts.find(request_id, owner_of(request.scope["message"]))
        if found is None:
            return _problem(404, f"no decision on {request_id[:100]} is kept", "not_found_error")
        return Response(msgspec.json.encode(found), media_type=_JSON)

    async def of_workflow(self, request: Request) -> Response:
        """Answer the latest receipts of a workflow, newest first."""
        workflow_id = request.query_params.get("workflow", "")
        if not workflow_id:
            return _problem(400, "workflow: expected its id, found nothing")
        limit = request.query_params.get("limit", str(LISTED))
        if not (limit.isascii() and limit.isdecimal() and 1 <= int(limit[:9]) <= MOST_LISTED):
            expected = f"a number from 1 to {MOST_LISTED}"
            return _problem(400, f"limit: expected {expected}, found {limit[:100]!r}")
        owner = owner_of(request.scope["message"])
        found = await self._receipts.of_workflow(workflow_id, owner, int(limit))
        content = {"object": "list", "data": found}
        return Response(msgspec.json.encode(content), media_type=_JSON)


def _problem(status: int, message: str, kind: str = "invalid_request_error") -> Response:
    code = "not_found" if status == 404 else None
    return Response(error_body(message, kind, code=code), status_code=status, media_type=_JSON)
