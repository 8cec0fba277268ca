import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from concertmaster.core.errors import InvalidRequestError
from concertmaster.core.request import ServiceClass
from concertmaster.gateway.identity import (
    _HINT_HEADERS,
    _SESSION_KEYS,
    DIALECTS,
    Identity,
    Normalizer,
    with_hints,
)
from concertmaster.gateway.openai_api import CallBody

CAPTURES = Path(__file__).parents[1].parent / "shared" / "data" / "agent-wire-captures.jsonl"

needs_captures = pytest.mark.skipif(
    not CAPTURES.exists(), reason=f"the captured requests are not at {CAPTURES}"
)


def identify(
    headers: Mapping[str, str] | None = None,
    body: object = None,
    normalizer: Normalizer | None = None,
) -> Identity | None:
    raw = {
        name.lower().encode(): value.encode("latin-1") for name, value in (headers or {}).items()
    }
    call = msgspec.json.decode(json.dumps(body or {}).encode(), type=CallBody)
    return (normalizer or Normalizer()).identify(raw, call)


def hinted(headers: Mapping[str, str], body: object = None) -> Identity:
    raw = {name.lower().encode(): value.encode("latin-1") for name, value in headers.items()}
    call = msgspec.json.decode(json.dumps(body or {}).encode(), type=CallBody)
    return with_hints(raw, call, Identity(workflow_id="w"))  # type: ignore[arg-type]


# What real clients sent.


class Expected(NamedTuple):
    """What is to be understood of one captured request."""

    dialect: str
    workflow: str
    agent: str = ""
    parent: str = ""
    role: str = ""


CODEX_1 = "01a1fb7b-5e46-7332-876f-63c44932ac00"
CODEX_2 = "01a1fb7d-2e24-72a2-b257-521a63d58c34"
CLAUDE = "8534f24b-4e0a-4571-bdd2-6752886f14e2"
OPENCODE = "ses_e04848d24ffe9CD4mI59HDTV7w"

EXPECTED: list[Expected | None] = [
    Expected("codex", CODEX_1),
    Expected("codex", CODEX_1),
    Expected("claude-code", CLAUDE),
    Expected("claude-code", CLAUDE, "a1cfe45e1c9241cf2", CLAUDE),
    Expected("claude-code", CLAUDE),
    Expected("session", OPENCODE),  # the title call
    Expected("session", OPENCODE),
    Expected("session", OPENCODE, "ses_e04848324ffe2RWlaoHXbxTl0z", OPENCODE),
    Expected("session", OPENCODE),
    None,  # OpenAI Agents SDK, chat
    None,  # OpenAI Agents SDK, responses
    None,  # LangChain
    Expected("codex", CODEX_2),
    Expected("codex", CODEX_2),
    Expected("codex", CODEX_2, "01a1fb7d-2f72-7163-8eb2-7fef8acb9877", CODEX_2, "collab_spawn"),
]


@needs_captures
@pytest.mark.parametrize("number", range(len(EXPECTED)))
def test_each_captured_request_is_understood(number: int) -> None:
    normalizer = Normalizer()
    found = None
    for line in CAPTURES.read_text().splitlines()[: number + 1]:
        captured = json.loads(line)
        found = identify(captured["h"], captured["b"], normalizer)

    expected = EXPECTED[number]
    if expected is None:
        assert found is None
    else:
        assert found == Identity(
            workflow_id=expected.workflow,  # type: ignore[arg-type]
            agent=expected.agent,
            parent_agent=expected.parent,
            role=expected.role,
            dialect=expected.dialect,
        )


@needs_captures
def test_every_captured_request_is_expected() -> None:
    assert len(CAPTURES.read_text().splitlines()) == len(EXPECTED)


@needs_captures
def test_a_client_whose_headers_were_stripped_is_known_by_its_body() -> None:
    captured = [json.loads(line) for line in CAPTURES.read_text().splitlines()]
    codex, claude = (identify({}, captured[number]["b"]) for number in (14, 3))

    assert codex == Identity(
        workflow_id=CODEX_2,  # type: ignore[arg-type]
        confidence=0.6,
        dialect="prompt-cache-key",
    )
    assert claude == Identity(workflow_id=CLAUDE, dialect="claude-code")  # type: ignore[arg-type]


# Every dialect.


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"X-Concertmaster-Workflow-Id": "w"}, Expected("concertmaster", "w")),
        (
            {"X-Concertmaster-Workflow-Id": "w", "X-Concertmaster-Agent": "a"},
            Expected("concertmaster", "w", "a", "w"),
        ),
        ({"session-id": "s", "thread-id": "s"}, Expected("codex", "s")),
        ({"session_id": "s"}, Expected("codex", "s")),
        (
            {"x-claude-code-session-id": "s", "x-claude-code-agent-id": "a"},
            Expected("claude-code", "s", "a", "s"),
        ),
        (
            {
                "x-claude-code-session-id": "s",
                "x-claude-code-agent-id": "b",
                "x-claude-code-parent-agent-id": "a",
            },
            Expected("claude-code", "s", "b", "a"),
        ),
        ({"X-Dynamo-Session-ID": "s"}, Expected("dynamo", "s")),
        (
            {"X-Dynamo-Session-ID": "s", "X-Dynamo-Parent-Session-ID": "p"},
            Expected("dynamo", "p", "s", "p"),
        ),
        ({"x-litellm-session-id": "s"}, Expected("litellm", "s")),
        ({"x-litellm-trace-id": "t"}, Expected("litellm", "t")),
        ({"x-conversation-id": "c"}, Expected("semantic-router", "c")),
        ({"X-Session-ID": "s"}, Expected("session", "s")),
        ({"x-session-id": "s", "x-parent-session-id": "p"}, Expected("session", "p", "s", "p")),
        # The more telling header wins.
        (
            {"x-session-id": "s", "x-concertmaster-workflow-id": "w"},
            Expected("concertmaster", "w"),
        ),
        ({"x-session-id": "s", "session-id": ""}, Expected("session", "s")),
    ],
    ids=lambda value: "" if isinstance(value, Expected) else "+".join(value),
)
def test_headers_name_a_workflow(headers: dict[str, str], expected: Expected) -> None:
    found = identify(headers)

    assert found is not None
    told = (found.dialect, found.workflow_id, found.agent, found.parent_agent, found.role)
    assert told == expected
    assert found.confidence == 1.0


CONTEXT: dict[str, Any] = {
    "program_id": "p",
    "root_program_id": "r",
    "agent_id": "a",
    "parent_program_id": "q",
    "agent_role": "critic",
    "deadline_seconds": 7.5,
}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"session_id": "s"}, Expected("session", "s")),
        ({"session_id": 17}, Expected("session", "17")),
        ({"session_params": {"id": "s"}}, Expected("session", "s")),
        ({"program_id": "p"}, Expected("thunderagent", "p")),
        (
            {"vllm_xargs": {"agentic_context": CONTEXT}},
            Expected("vllm-router", "r", "a", "q", "critic"),
        ),
        (
            {"vllm_xargs": {"agentic_context": {"program_id": "p"}}},
            Expected("vllm-router", "p"),
        ),
        (
            {
                "nvext": {
                    "agent_context": {
                        "session_id": "s",
                        "trajectory_id": "t",
                        "parent_trajectory_id": "u",
                    }
                }
            },
            Expected("dynamo", "s", "t", "u"),
        ),
        ({"nvext": {"session_control": {"session_id": "s"}}}, Expected("dynamo", "s")),
        ({"metadata": {"user_id": '{"session_id": "s"}'}}, Expected("claude-code", "s")),
        ({"metadata": {"workflow_id": "w", "role": "r"}}, Expected("metadata", "w", role="r")),
        ({"metadata": {"session_id": "s"}}, Expected("metadata", "s")),
        ({"metadata": {"conversation_id": "c"}}, Expected("metadata", "c")),
        ({"metadata": {"thread_id": "t"}}, Expected("metadata", "t")),
        ({"metadata": {"trace_id": "t"}}, Expected("metadata", "t")),
        ({"metadata": {"group_id": "g"}}, Expected("metadata", "g")),
        ({"conversation": "c"}, Expected("conversation", "c")),
        ({"conversation": {"id": "c"}}, Expected("conversation", "c")),
    ],
)
def test_body_fields_name_a_workflow(body: dict[str, object], expected: Expected) -> None:
    found = identify({}, body)

    assert found is not None
    told = (found.dialect, found.workflow_id, found.agent, found.parent_agent, found.role)
    assert told == expected
    assert found.confidence == 1.0


def test_a_cache_key_is_a_workflow_with_little_confidence() -> None:
    found = identify({}, {"prompt_cache_key": "k"})

    assert found is not None
    assert (found.workflow_id, found.confidence) == ("k", 0.6)
    assert found.dialect == "prompt-cache-key"


def test_a_deadline_in_the_body_of_a_vllm_router_call_is_read_within_bounds() -> None:
    for seconds, read in ((7.5, 7.5), (0, None), (1e9, None), ("soon", None)):
        context = {**CONTEXT, "deadline_seconds": seconds}
        found = identify({}, {"vllm_xargs": {"agentic_context": context}})
        assert found is not None
        assert found.deadline_s == read


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"x-session-token": base64.b64encode(b"10.0.0.7:8000").decode()}, {}),
        ({"x-session-id": base64.b64encode(b"10.0.0.7:8000").decode()}, {}),
        ({"x-client-request-id": "one"}, {}),
        ({"x-request-id": "one"}, {}),
        ({"x-concertmaster-workflow-id": "  "}, {}),
        ({}, {"user": "u", "safety_identifier": "u"}),
        ({}, {"metadata": {"user_id": "plain"}}),
        ({}, {"metadata": {"user_id": "{not json"}}),
        ({}, {"metadata": {"user_id": '{"device": 1}'}}),
        ({}, {"metadata": "text", "nvext": [1], "vllm_xargs": {"agentic_context": 3}}),
        ({}, {"session_id": {"a": 1}, "program_id": True, "conversation": {"id": None}}),
        ({}, {"session_id": "", "prompt_cache_key": "", "conversation": ""}),
    ],
)
def test_what_is_no_workflow_names_none(headers: dict[str, str], body: object) -> None:
    assert identify(headers, body) is None


def test_a_session_that_is_an_address_gives_way_to_the_next_dialect() -> None:
    address = base64.b64encode(b"10.0.0.7:8000").decode()

    found = identify({"x-session-id": address}, {"session_id": "s"})

    assert found is not None
    assert found.workflow_id == "s"


def test_the_sub_agent_of_a_sub_agent_belongs_to_the_root() -> None:
    normalizer = Normalizer()
    for session, parent in (("root", ""), ("child", "root"), ("grandchild", "child")):
        headers = {"x-session-id": session} | ({"x-parent-session-id": parent} if parent else {})
        found = identify(headers, normalizer=normalizer)
        assert found is not None
        assert found.workflow_id == "root"
        assert found.parent_agent == parent
    again = identify({"x-session-id": "grandchild"}, normalizer=normalizer)
    assert again is not None
    assert again.workflow_id == "root"


def test_only_so_many_sessions_are_remembered() -> None:
    normalizer = Normalizer(max_roots=2)
    for session, parent in (("b", "a"), ("c", "b"), ("d", "c"), ("e", "d")):
        identify({"x-session-id": session, "x-parent-session-id": parent}, normalizer=normalizer)

    assert len(normalizer._roots) == 2


def test_long_ids_are_cut_and_odd_bytes_are_kept() -> None:
    for headers, body in (({"session-id": "x" * 999}, {}), ({}, {"session_id": "x" * 999})):
        found = identify(headers, body)
        assert found is not None
        assert found.workflow_id == "x" * 256
    odd = identify({"session-id": "caf\xe9"})
    assert odd is not None
    assert odd.workflow_id == "caf\xe9"


def test_an_id_from_a_body_cannot_end_a_line_of_a_header() -> None:
    for body in ({"session_id": " a\r\nset-cookie: b\x00 "}, {"metadata": {"trace_id": "a\n\n"}}):
        found = identify({}, body)
        assert found is not None
        assert found.workflow_id in {"aset-cookie: b", "a"}


@pytest.mark.parametrize(
    ("headers", "body", "is_final"),
    [
        ({"x-dynamo-session-id": "s", "x-dynamo-session-final": "True"}, {}, True),
        ({"x-dynamo-session-id": "s", "x-dynamo-session-final": "false"}, {}, False),
        ({"x-dynamo-session-id": "s"}, {}, False),
        ({"x-session-id": "s", "x-dynamo-session-final": "true"}, {}, False),
        (
            {
                "x-dynamo-session-id": "s",
                "x-dynamo-parent-session-id": "p",
                "x-dynamo-session-final": "true",
            },
            {},
            False,
        ),
        ({}, {"nvext": {"session_control": {"session_id": "s", "action": "close"}}}, True),
        ({}, {"nvext": {"session_control": {"session_id": "s", "action": "bind"}}}, False),
        (
            {},
            {
                "nvext": {
                    "agent_context": {"session_id": "s", "parent_trajectory_id": "p"},
                    "session_control": {"action": "close"},
                }
            },
            False,
        ),
    ],
)
def test_the_last_call_of_a_session_is_the_workflows_last_unless_a_sub_agent_says_so(
    headers: dict[str, str], body: dict[str, object], *, is_final: bool
) -> None:
    found = identify(headers, body)

    assert found is not None
    assert found.is_final == is_final


def test_metadata_may_say_role_template_and_step() -> None:
    said = {"session_id": "s", "role": "critic", "template": "loop", "step": "vote"}

    found = identify(body={"metadata": said})

    assert found is not None
    assert (found.role, found.template, found.step) == ("critic", "loop", "vote")


# Our own headers, beside any dialect.


def test_our_headers_say_role_stage_parents_app_deadline_and_class() -> None:
    found = hinted(
        {
            "X-Concertmaster-App": "review",
            "X-Concertmaster-Role": "critic",
            "X-Concertmaster-Template": "loop",
            "X-Concertmaster-Step": "vote",
            "X-Concertmaster-Stage": "2",
            "X-Concertmaster-Parent": "r0, r1,,",
            "X-Concertmaster-Deadline-Ms": "1500",
            "X-Concertmaster-Class": "batch",
        }
    )

    assert found == Identity(
        workflow_id="w",  # type: ignore[arg-type]
        app="review",
        role="critic",
        template="loop",
        step="vote",
        stage=2,
        parents=("r0", "r1"),  # type: ignore[arg-type]
        deadline_s=1.5,
        service_class=ServiceClass.BATCH,
    )


def test_without_a_hint_an_identity_stays_as_it_is() -> None:
    assert hinted({"x-app": "cli"}) == Identity(workflow_id="w")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("headers", "body", "expected"),
    [
        ({}, {"service_tier": "flex"}, ServiceClass.BATCH),
        ({}, {"service_tier": "priority"}, ServiceClass.INTERACTIVE),
        ({}, {"service_tier": 7}, ServiceClass.INTERACTIVE),
        ({"x-smg-priority": "bulk"}, {}, ServiceClass.BATCH),
        ({"x-smg-priority": "system"}, {}, ServiceClass.INTERACTIVE),
        ({"x-concertmaster-class": "interactive"}, {"service_tier": "flex"}, "interactive"),
    ],
)
def test_other_words_for_a_class_are_understood(
    headers: dict[str, str], body: object, expected: str
) -> None:
    assert hinted(headers, body).service_class == expected


DEADLINE = "x-concertmaster-deadline-ms: expected milliseconds from 1 to 86400000, found {!r}"
STAGE = "x-concertmaster-stage: expected a number from 0 to 1000000, found {!r}"
CLASS = 'x-concertmaster-class: expected "interactive" or "batch", found {!r}'


@pytest.mark.parametrize(
    ("header", "value", "message"),
    [
        *(
            ("x-concertmaster-deadline-ms", value, DEADLINE)
            for value in ("0", "-5", "soon", "1.5", "86400001", "9" * 40, "\xb2")
        ),
        *(("x-concertmaster-stage", value, STAGE) for value in ("-1", "two", "1000001", "9" * 99)),
        *(("x-concertmaster-class", value, CLASS) for value in ("urgent", "Batch")),
    ],
)
def test_a_bad_value_in_our_header_is_named(header: str, value: str, message: str) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        hinted({header: value})

    assert str(refusal.value) == message.format(value)


def test_the_longest_deadline_and_the_last_stage_are_allowed() -> None:
    found = hinted({"x-concertmaster-deadline-ms": "86400000", "x-concertmaster-stage": "1000000"})

    assert (found.deadline_s, found.stage) == (86_400.0, 1_000_000)


def test_every_header_and_field_that_is_read_is_documented() -> None:
    text = (Path(__file__).parents[1] / "docs/identity.md").read_text().lower()
    names = {part.decode() for dialect in DIALECTS for part in dialect[1:6] if part}
    names |= {name.decode() for name in _HINT_HEADERS}
    fields = set(CallBody.__struct_fields__) - {
        *("model", "messages", "prompt", "stream", "max_tokens", "max_completion_tokens")
    }

    assert (
        sorted(name for name in names | fields | {*_SESSION_KEYS} if f"`{name}" not in text) == []
    )
