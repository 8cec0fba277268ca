"""Answers of the side door: JSON, and errors."""

from collections.abc import Mapping

import msgspec
from starlette.responses import Response

from concertmaster.gateway.openai_api import error_body

JSON = "application/json"
_KINDS = {404: "not_found_error", 500: "server_error", 503: "overloaded_error"}


def json_answer(content: object) -> Response:
    """Answer with anything that can be JSON."""
    return Response(msgspec.json.encode(content), media_type=JSON)


def problem_answer(
    status: int, message: str, code: str, headers: Mapping[str, str] | None = None
) -> Response:
    """Answer with an error."""
    body = error_body(message, _KINDS.get(status, "invalid_request_error"), code=code)
    return Response(body, status_code=status, headers=headers, media_type=JSON)
