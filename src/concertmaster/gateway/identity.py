"""Who is calling: one normaliser for the identity dialects of agents and gateways.

Each dialect has its own word for the workflow, the agent in it and the agent's parent. A
sub-agent belongs to the workflow of whoever started it. docs/identity.md lists what is read.
"""

import base64
import binascii
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from concertmaster.core.errors import InvalidRequestError
from concertmaster.core.request import RequestId, ServiceClass, WorkflowId
from concertmaster.gateway.openai_api import CallBody

MAX_DEADLINE_S = 86_400.0
MAX_STAGE = 1_000_000
MAX_ID_CHARS = 256
_MAX_ROOTS = 100_000

CACHE_KEY = 0.6
"""Confidence of a ``prompt_cache_key``: a session for some clients, a template for others."""


class Identity(NamedTuple):
    """What is known of a call's place in its workflow.

    Attributes:
        agent: The agent within the workflow; "" for the root or if unknown.
        parent_agent: Who started that agent: another, or the root, which goes by the
            workflow's id; "" for the root itself.
        template: The shape of the workflow, in the client's words; "" if unknown.
        step: What kind of step the role takes; "" if unknown.
        deadline_s: Time granted from arrival on; ``None`` if none was given.
        is_final: Whether the client says that this is the workflow's last call.
        confidence: 1.0 if the client said so, less if it was inferred.
        dialect: Which client's or gateway's words were understood.
        rooted: False while the workflow's id is that of a session whose root was not looked up.
    """

    workflow_id: WorkflowId
    agent: str = ""
    parent_agent: str = ""
    role: str = ""
    app: str = ""
    template: str = ""
    step: str = ""
    stage: int | None = None
    parents: tuple[RequestId, ...] = ()
    service_class: ServiceClass = ServiceClass.INTERACTIVE
    deadline_s: float | None = None
    is_final: bool = False
    confidence: float = 1.0
    dialect: str = ""
    rooted: bool = True


UNNAMED = Identity(WorkflowId(""))
"""Of a call that names no workflow."""


class Dialect(NamedTuple):
    """Header names of one client or gateway, lower case.

    ``parent_is_workflow`` tells dialects where a sub-agent names only its parent's session.
    """

    name: str
    workflow: bytes
    agent: bytes = b""
    parent: bytes = b""
    role: bytes = b""
    final: bytes = b""
    parent_is_workflow: bool = False


DIALECTS = (
    Dialect("concertmaster", b"x-concertmaster-workflow-id", agent=b"x-concertmaster-agent"),
    Dialect(
        "codex",
        b"session-id",
        agent=b"thread-id",
        parent=b"x-codex-parent-thread-id",
        role=b"x-openai-subagent",
    ),
    Dialect("codex", b"session_id"),  # older versions; some proxies drop underscores
    Dialect(
        "claude-code",
        b"x-claude-code-session-id",
        agent=b"x-claude-code-agent-id",
        parent=b"x-claude-code-parent-agent-id",
    ),
    Dialect(
        "dynamo",
        b"x-dynamo-session-id",
        agent=b"x-dynamo-session-id",
        parent=b"x-dynamo-parent-session-id",
        final=b"x-dynamo-session-final",
        parent_is_workflow=True,
    ),
    Dialect("litellm", b"x-litellm-session-id"),
    Dialect("litellm", b"x-litellm-trace-id"),
    Dialect("semantic-router", b"x-conversation-id"),
    Dialect(
        "session",
        b"x-session-id",
        agent=b"x-session-id",
        parent=b"x-parent-session-id",
        parent_is_workflow=True,
    ),
)
"""Asked in this order; the first whose workflow header is there wins."""

_WORKFLOW_HEADERS = frozenset(dialect.workflow for dialect in DIALECTS)
_HINT_HEADERS = frozenset(
    {
        b"x-concertmaster-app",
        b"x-concertmaster-class",
        b"x-concertmaster-deadline-ms",
        b"x-concertmaster-parent",
        b"x-concertmaster-role",
        b"x-concertmaster-stage",
        b"x-concertmaster-step",
        b"x-concertmaster-template",
        b"x-smg-priority",
    }
)
CALLERS_HEADERS = _HINT_HEADERS | {b"x-concertmaster-workflow-id", b"x-concertmaster-agent"}
"""Headers of ours that callers may set."""

_SESSION_KEYS = (
    "workflow_id",
    "session_id",
    "conversation_id",
    "thread_id",
    "trace_id",
    "group_id",
)


class Normalizer:
    """Turns headers and body fields into an ``Identity``.

    It remembers which workflow a session belongs to, so that the sub-agent of a sub-agent
    is counted to the root.
    """

    def __init__(self, max_roots: int = _MAX_ROOTS) -> None:
        self._max_roots = max_roots
        self._roots: OrderedDict[str, str] = OrderedDict()

    def identify(self, headers: Mapping[bytes, bytes], call: CallBody) -> Identity | None:
        """Return what the caller says of itself; ``None`` if it names no workflow."""
        identity = named(headers, call)
        return self.rooted(identity) if identity.workflow_id else None

    def rooted(self, identity: Identity) -> Identity:
        """Count a sub-agent to the workflow of its root."""
        if identity.rooted:
            return identity
        root = self._root(identity.workflow_id, identity.parent_agent)
        return identity._replace(workflow_id=WorkflowId(root), rooted=True)

    def _root(self, session: str, parent: str) -> str:
        root = self._roots.get(session)
        if root is None:
            root = self._roots.get(parent, parent) if parent else session
            self._roots[session] = root
            if len(self._roots) > self._max_roots:
                self._roots.popitem(last=False)
        else:
            self._roots.move_to_end(session)
        return root


def named(headers: Mapping[bytes, bytes], call: CallBody) -> Identity:
    """Read what the caller says of itself, before any root is looked up."""
    for dialect in () if _WORKFLOW_HEADERS.isdisjoint(headers) else DIALECTS:
        session = _text(headers, dialect.workflow)
        if session and not _is_address(session):
            return _read(headers, dialect, session)
    return _by_body(call) or UNNAMED


def _read(headers: Mapping[bytes, bytes], dialect: Dialect, session: str) -> Identity:
    parent = _text(headers, dialect.parent)
    agent = _text(headers, dialect.agent)
    if dialect.parent_is_workflow:
        agent = session if parent else ""
    elif agent == session:
        agent = ""
    return Identity(
        workflow_id=WorkflowId(session),
        agent=agent,
        parent_agent=(parent or session) if agent else "",
        role=_text(headers, dialect.role),
        is_final=not agent and _text(headers, dialect.final).lower() == "true",
        dialect=dialect.name,
        rooted=not dialect.parent_is_workflow,
    )


def with_hints(headers: Mapping[bytes, bytes], call: CallBody, identity: Identity) -> Identity:
    """Add what any client may say of a call, whatever names its workflow.

    Raises:
        InvalidRequestError: A header of ours holds a value that is not allowed.
    """
    if call.service_tier is None and _HINT_HEADERS.isdisjoint(headers):
        return identity
    stage = _stage(headers)
    return identity._replace(
        app=_text(headers, b"x-concertmaster-app") or identity.app,
        role=_text(headers, b"x-concertmaster-role") or identity.role,
        template=_text(headers, b"x-concertmaster-template") or identity.template,
        step=_text(headers, b"x-concertmaster-step") or identity.step,
        stage=identity.stage if stage is None else stage,
        parents=_parents(headers) or identity.parents,
        deadline_s=_deadline_s(headers) or identity.deadline_s,
        service_class=_service_class(headers, call.service_tier),
    )


def _stage(headers: Mapping[bytes, bytes]) -> int | None:
    text = _text(headers, b"x-concertmaster-stage")
    if not text:
        return None
    if not text.isdecimal() or int(text) > MAX_STAGE:
        raise InvalidRequestError(
            f"x-concertmaster-stage: expected a number from 0 to {MAX_STAGE}, found {text!r}"
        )
    return int(text)


def _parents(headers: Mapping[bytes, bytes]) -> tuple[RequestId, ...]:
    named = headers.get(b"x-concertmaster-parent", b"").decode("latin-1").split(",")
    return tuple(RequestId(one.strip()[:MAX_ID_CHARS]) for one in named if one.strip())


def _deadline_s(headers: Mapping[bytes, bytes]) -> float | None:
    text = _text(headers, b"x-concertmaster-deadline-ms")
    if not text:
        return None
    if not text.isdecimal() or not 0 < int(text) <= 1000 * MAX_DEADLINE_S:
        raise InvalidRequestError(
            "x-concertmaster-deadline-ms: expected milliseconds from 1 to "
            f"{1000 * MAX_DEADLINE_S:.0f}, found {text!r}"
        )
    return int(text) / 1000


def _service_class(headers: Mapping[bytes, bytes], tier: object) -> ServiceClass:
    named = _text(headers, b"x-concertmaster-class")
    if named:
        try:
            return ServiceClass(named)
        except ValueError:
            raise InvalidRequestError(
                f'x-concertmaster-class: expected "interactive" or "batch", found {named!r}'
            ) from None
    if tier == "flex" or _text(headers, b"x-smg-priority") == "bulk":
        return ServiceClass.BATCH
    return ServiceClass.INTERACTIVE


def _by_body(call: CallBody) -> Identity | None:
    """Read the body's own dialects: vLLM and SGLang, ThunderAgent, vLLM router, Dynamo, OpenAI."""
    for name, value in (("session", call.session_id), ("thunderagent", call.program_id)):
        session = _id(value)
        if session:
            return _identity(session, name)
    for raw, read in (
        (call.session_params, _by_session_params),
        (call.vllm_xargs, _by_xargs),
        (call.nvext, _by_nvext),
        (call.metadata, _by_metadata),
    ):
        found = read(_fields(raw)) if len(raw) else None
        if found is not None:
            return found
    conversation = call.conversation
    session = _id(conversation.get("id") if isinstance(conversation, dict) else conversation)
    if session:
        return _identity(session, "conversation")
    cache_key = _id(call.prompt_cache_key)
    if cache_key:
        return _identity(cache_key, "prompt-cache-key", confidence=CACHE_KEY)
    return None


def _by_session_params(params: Mapping[str, Any]) -> Identity | None:
    session = _string(params, "id")
    return _identity(session, "session") if session else None


def _by_xargs(xargs: Mapping[str, Any]) -> Identity | None:
    context = _nested(xargs, "agentic_context")
    program = _string(context, "root_program_id") or _string(context, "program_id")
    if not program:
        return None
    deadline_s = context.get("deadline_seconds")
    if not isinstance(deadline_s, int | float) or not 0 < deadline_s <= MAX_DEADLINE_S:
        deadline_s = None
    return _identity(
        program,
        "vllm-router",
        agent=_string(context, "agent_id"),
        parent_agent=_string(context, "parent_program_id"),
        role=_string(context, "agent_role"),
        deadline_s=deadline_s,
    )


def _by_nvext(nvext: Mapping[str, Any]) -> Identity | None:
    context = _nested(nvext, "agent_context")
    session = _string(context, "session_id")
    control = _nested(nvext, "session_control")
    session = session or _string(control, "session_id")
    if not session:
        return None
    parent = _string(context, "parent_trajectory_id")
    return _identity(
        session,
        "dynamo",
        agent=_string(context, "trajectory_id"),
        parent_agent=parent,
        is_final=not parent and control.get("action") == "close",
    )


def _by_metadata(metadata: Mapping[str, Any]) -> Identity | None:
    """OpenAI metadata with a session key, or Anthropic's ``user_id`` that wraps a JSON object."""
    user = _string(metadata, "user_id")
    if user.startswith("{"):
        session = _string(_fields(msgspec.Raw(user.encode())), "session_id")
        if session:
            return _identity(session, "claude-code")
    for key in _SESSION_KEYS:
        session = _string(metadata, key)
        if session:
            hints = {key: _string(metadata, key) for key in ("role", "template", "step")}
            return _identity(session, "metadata", **hints)
    return None


def _identity(session: str, dialect: str, **facts: Any) -> Identity:  # noqa: ANN401
    return Identity(workflow_id=WorkflowId(session), dialect=dialect, **facts)


def _fields(raw: msgspec.Raw) -> Mapping[str, Any]:
    try:
        return msgspec.json.decode(raw, type=dict[str, Any])
    except msgspec.MsgspecError:
        return {}


def _nested(fields: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = fields.get(key)
    return value if isinstance(value, dict) else {}


def _string(fields: Mapping[str, Any], key: str) -> str:
    return _id(fields.get(key))


def _id(value: object) -> str:
    """Return a text or number as an id; "" for anything else.

    An id goes into a header of the answer, so it must not hold the end of a line.
    """
    if not isinstance(value, str | int) or isinstance(value, bool):
        return ""
    text = str(value)[:MAX_ID_CHARS].strip()
    return text if text.isprintable() else "".join(filter(str.isprintable, text))


def _text(headers: Mapping[bytes, bytes], name: bytes) -> str:
    return headers.get(name, b"")[:MAX_ID_CHARS].decode("latin-1").strip()


_ADDRESS = re.compile(rb"\d{1,3}(\.\d{1,3}){3}:\d{1,5}")


def _is_address(session: str) -> bool:
    """Tell AIBrix's ``x-session-id``, an encoded ``ip:port``, from a session.

    >>> _is_address(base64.b64encode(b"10.0.0.7:8000").decode()), _is_address("ses_1")
    (True, False)
    """
    try:
        return bool(_ADDRESS.fullmatch(base64.b64decode(session, validate=True)))
    except (binascii.Error, ValueError):
        return False
