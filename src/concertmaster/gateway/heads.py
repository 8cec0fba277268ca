"""Heads that the gateway writes: of requests to engines, and what it adds to answers."""

import re
from collections.abc import Mapping

from concertmaster.core.actions import Dispatch
from concertmaster.gateway.agent import Message
from concertmaster.gateway.identity import CALLERS_HEADERS, Identity
from concertmaster.gateway.openai_api import error_body

_DROPPED_HEADERS = frozenset(
    {
        b"accept-encoding",
        b"connection",
        b"content-length",
        b"expect",
        b"host",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"x-request-id",
        b"x-vllm-priority",
    }
)


_OURS = b"x-concertmaster-"
_TRACE = re.compile(rb"^(?:traceparent|tracestate): [^\r]*\r\n", re.MULTILINE)
_CREDENTIALS = re.compile(rb"^(?:authorization|x-api-key|api-key): [^\r]*\r\n", re.MULTILINE)


def engine_head(message: Message, request_id: str) -> bytes:
    """Request line and the headers that go on to the engine.

    Left out: what concerns one connection only (RFC 9110, section 7.6.1), what we set ourselves,
    and names of ours that callers have no say in.
    """
    headers = message.headers
    named = headers.get(b"connection", b"").lower()
    hops = frozenset(one.strip() for one in named.split(b",")) if named else frozenset()
    lines = [
        name + b": " + value
        for name, value in headers.items()
        if name not in _DROPPED_HEADERS
        and name not in hops
        and (not name.startswith(_OURS) or name in CALLERS_HEADERS)
    ]
    lines.append(b"x-request-id: " + request_id.encode("latin-1"))
    return b"POST " + message.target + b" HTTP/1.1\r\n" + b"\r\n".join(lines) + b"\r\n"


def traced(head: bytes, lines: bytes) -> bytes:
    r"""Put lines of a trace into a request head, in the place of those that were there.

    >>> traced(b"POST / HTTP/1.1\r\ntraceparent: a\r\n", b"traceparent: b\r\n")
    b'POST / HTTP/1.1\r\ntraceparent: b\r\n'
    """
    return _TRACE.sub(b"", head) + lines


def lines_of(headers: Mapping[str, str]) -> bytes:
    """Write headers as lines."""
    return b"".join(f"{name}: {value}\r\n".encode("latin-1") for name, value in headers.items())


def addressed(head: bytes, prefix: bytes, api_key: bytes) -> bytes:
    r"""Put an engine's path before ours, and its key in the place of the caller's.

    >>> addressed(b"POST /v1/models HTTP/1.1\r\nauthorization: mine\r\n", b"/api", b"k")
    b'POST /api/v1/models HTTP/1.1\r\nauthorization: Bearer k\r\n'
    """
    if prefix:
        head = head.replace(b" ", b" " + prefix, 1)
    if api_key:
        head = _CREDENTIALS.sub(b"", head) + b"authorization: Bearer %b\r\n" % api_key
    return head


def identity_headers(request_id: str, identity: Identity) -> bytes:
    """Say whose call it is, and how sure that is."""
    return b"x-request-id: %b\r\nx-concertmaster-workflow-id: %b\r\n%b" % (
        request_id.encode("latin-1"),
        identity.workflow_id.encode("latin-1", "replace"),
        b""
        if identity.confidence >= 1.0
        else b"x-concertmaster-workflow-confidence: %.2f\r\n" % identity.confidence,
    )


def decision_headers(policy: str, model: str, action: Dispatch) -> bytes:
    """Which model, which replica, and why."""
    cost = "" if action.cost_s is None else f"; {action.cost_s:.3f} s"
    return (
        f"x-concertmaster-model: {model}\r\n"
        f"x-concertmaster-replica: {action.replica_id}\r\n"
        f"x-concertmaster-queue-wait-ms: {1000 * action.waited_s:.1f}\r\n"
        f"x-concertmaster-why: {policy}{cost}; of {action.candidates} with room\r\n"
    ).encode("latin-1", "replace")


def error_frame(problem: str) -> bytes:
    """Frame an error for a stream that broke after it began."""
    return b"data: " + error_body(problem, "server_error", code="engine_error") + b"\n\n"
