"""Traces: what was written is read back, and what is broken is said."""

from pathlib import Path
from typing import get_args

import pytest

from builders import a_forecast, a_request
from concertmaster.core.actions import Action, Cancel, Demote, Dispatch, Fail, Reject, Resize, Wake
from concertmaster.core.errors import InputError
from concertmaster.core.events import (
    Event,
    PaceObserved,
    ReplicaDemoted,
    ReplicaDied,
    ReplicaDraining,
    ReplicaJoined,
    ReplicaOnTrial,
    ReplicaReady,
    ReplicaRemoved,
    RequestArrived,
    RequestCancelled,
    RequestFailed,
    RequestFinished,
    TimerFired,
    TokensStreamed,
    WorkflowClosed,
)
from concertmaster.core.fleet import (
    Cluster,
    ClusterId,
    Node,
    NodeId,
    PoolId,
    Readiness,
    ReplicaId,
)
from concertmaster.core.forecast import Quantiles
from concertmaster.core.request import ModelName, RequestId, ServiceClass, WorkflowId
from concertmaster.observe.trace import Entry, Header, TraceReader, TraceWriter

HEADER = Header(trace=1, fleet="two models", policy="las", seed=7)
R1, P0, P1 = RequestId("r1"), ReplicaId("p-0"), ReplicaId("p-1")

EVENTS: list[Event] = [
    RequestArrived(a_request()),
    RequestArrived(
        a_request(
            "ü/2",
            models=(ModelName("m"),),
            role="planner",
            app="chat",
            template="react",
            step="vote",
            stage=2,
            parents=(R1,),
            service_class=ServiceClass.BATCH,
            prefix_hashes=(2**63, 1),
            deadline_s=12.5,
        ),
        a_forecast(
            30.25,
            output_tokens_on={ModelName("m"): Quantiles((0.1, 0.9), (1.0, 99.5))},
            success={ModelName("m"): 0.25},
            remaining_tokens=Quantiles.exactly(300.0),
            source="role",
        ),
    ),
    RequestCancelled(R1),
    TokensStreamed(((R1, 1, 20), (RequestId("r2"), 3, 1))),
    RequestFinished(R1, 2, 512),
    RequestFailed(R1, 1, retriable=True),
    ReplicaDied(P0),
    ReplicaReady(P0),
    ReplicaDemoted(P0, Readiness.SLEEPING),
    ReplicaDraining(P0),
    ReplicaJoined(
        P1,
        PoolId("p"),
        Node(node_id=NodeId("n"), cluster=Cluster(cluster_id=ClusterId("c")), gpu="g", gpus=2),
    ),
    ReplicaRemoved(P1),
    ReplicaOnTrial(P0),
    PaceObserved(((P0, 1.3), (P1, 0.25))),
    WorkflowClosed(WorkflowId("w1")),
    TimerFired(),
]
ACTIONS: list[Action] = [
    Dispatch(R1, P0, 2, -5, 0.1 + 0.2, 2, 0.75, {P0: {"prefill": 0.5}, P1: {"prefill": 1 / 3}}),
    Dispatch(R1, P0, 1, 0, 0.0, 1),
    Reject(R1, "queue_full", 1.5),
    Reject(R1, "too_long"),
    Fail(R1, "replica_died"),
    Cancel(R1, P0),
    Wake(P0),
    Demote(P0, Readiness.DISK),
    Resize(P0, 512),
]


def write(path: Path, *entries: Entry) -> Path:
    with TraceWriter(path, HEADER) as trace:
        for entry in entries:
            trace(entry.now_s, entry.event, list(entry.actions))
    return path


def message_of(path: Path) -> str:
    with pytest.raises(InputError) as refusal:
        TraceReader(path)
    return str(refusal.value)


def test_every_kind_of_event_and_action_comes_back_as_it_was(tmp_path: Path) -> None:
    assert {type(event) for event in EVENTS} == set(get_args(Event))
    assert {type(action) for action in ACTIONS} == set(get_args(Action))
    entries = [Entry(i / 3, event, tuple(ACTIONS)) for i, event in enumerate(EVENTS)]

    reader = TraceReader(write(tmp_path / "deep" / "er" / "a.trace.jsonl", *entries))

    assert reader.header == HEADER
    assert list(reader.entries()) == entries
    assert reader.broken_at is None


def test_a_trace_is_plain_json_a_line_an_event(tmp_path: Path) -> None:
    path = write(tmp_path / "t", Entry(1.5, RequestFinished(R1, 1, 9), (Wake(P0),)))

    assert path.read_text().splitlines() == [
        '{"trace":1,"fleet":"two models","policy":"las","seed":7}',
        (
            '{"now_s":1.5,"event":{"RequestFinished":{"request_id":"r1","attempt":1,'
            '"output_tokens":9}},"actions":[{"Wake":{"replica_id":"p-0"}}]}'
        ),
    ]


def test_a_half_written_last_line_ends_the_trace_and_is_noted(tmp_path: Path) -> None:
    path = write(tmp_path / "t", *[Entry(float(i), TimerFired(), ()) for i in range(3)])
    path.write_bytes(path.read_bytes()[:-9])

    reader = TraceReader(path)

    assert [entry.now_s for entry in reader.entries()] == [0.0, 1.0]
    assert reader.broken_at == 4


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "7",
        "",
        "{}",
        '{"now_s":"soon","event":{"TimerFired":{}},"actions":[]}',
        '{"now_s":1,"event":3,"actions":[]}',
        '{"now_s":1,"event":{},"actions":[]}',
        '{"now_s":1,"event":{"Unheard":{}},"actions":[]}',
        '{"now_s":1,"event":{"ReplicaDied":{}},"actions":[]}',
        '{"now_s":1,"event":{"TimerFired":{}},"actions":[{"Wake":{"replica_id":1}}]}',
        (
            '{"now_s":1,"event":{"RequestArrived":{"request":{"request_id":"r","workflow_id":"w",'
            '"arrival_s":0,"prompt_tokens":0,"max_output_tokens":1}}},"actions":[]}'
        ),
    ],
)
def test_a_line_that_is_no_event_ends_the_trace_and_is_noted(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "t", Entry(0.0, TimerFired(), ()))
    path.write_text(f"{path.read_text()}{line}\n")

    reader = TraceReader(path)

    assert len(list(reader.entries())) == 1
    assert reader.broken_at == 3


def test_a_trace_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text('{"trace":2,"fleet":"f","policy":"las","seed":0}\n')

    assert message_of(path) == f"{path}: line 1: expected trace version 1, found 2"


@pytest.mark.parametrize("text", ["", "hello\n", '{"fleet":"f"}\n', "[1]\n"])
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t"
    path.write_text(text)

    assert message_of(path) == (
        f"{path}: line 1: expected the header of a trace "
        "(traces are written by concertmaster simulate --trace and serve --trace)"
    )


def test_a_missing_trace_and_a_folder_are_refused(tmp_path: Path) -> None:
    missing = tmp_path / "missing"

    assert message_of(missing) == f"{missing}: cannot read a trace: No such file or directory"
    assert message_of(tmp_path) == f"{tmp_path}: cannot read a trace: Is a directory"


def test_a_trace_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as refusal:
        TraceWriter(tmp_path, HEADER)

    assert str(refusal.value) == f"{tmp_path}: cannot write a trace: Is a directory"
