"""Feedback in any order: what is in the file after a flush is what was said."""

import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from builders import a_request
from concertmaster.core.request import ModelName, Request, RequestId, WorkflowId
from concertmaster.learning.feedback import FeedbackStore
from concertmaster.predictors.interface import Completion


def asked_by(name: str, workflow: str, arrival_s: float) -> Request:
    return a_request(name, workflow_id=WorkflowId(workflow), arrival_s=arrival_s)


def came_to(tokens: int) -> Completion:
    return Completion(model=ModelName("m"), output_tokens=tokens, finished_s=99.0)


CALLS = [(f"r{i}", f"w{i % 2}", float(i // 3)) for i in range(6)]
calls = st.sampled_from(CALLS)


class AnyOrder(RuleBasedStateMachine):
    """What is in the file after a flush is what was said, whatever came first."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "labels.sqlite"
        self.asked: dict[str, tuple[str, float]] = {}
        self.tokens: dict[str, int | None] = {}
        self.grades: dict[str, float | None] = {}
        self.store = self.open()

    def open(self) -> FeedbackStore:
        return FeedbackStore(self.path)

    @rule(call=calls)
    def ask(self, call: tuple[str, str, float]) -> None:
        name, workflow, arrival_s = call
        self.store.asked(asked_by(name, workflow, arrival_s))
        self.asked.setdefault(name, (workflow, arrival_s))

    @rule(call=calls, tokens=st.integers(0, 99))
    def answer(self, call: tuple[str, str, float], tokens: int) -> None:
        self.store.answered(RequestId(call[0]), came_to(tokens))
        self.tokens.setdefault(call[0], tokens)

    @rule(call=calls)
    def fail(self, call: tuple[str, str, float]) -> None:
        self.store.failed(RequestId(call[0]))
        self.tokens.setdefault(call[0], None)

    @rule(call=calls, grade=st.sampled_from((None, 0.0, 1.0)))
    def close(self, call: tuple[str, str, float], grade: float | None) -> None:
        self.store.closed(WorkflowId(call[1]), grade)
        if self.grades.get(call[1]) is None:
            self.grades[call[1]] = grade

    @rule()
    def flush(self) -> None:
        assert self.store.flush()

    @rule()
    def reopen(self) -> None:
        """Outcomes that wait for their call are in memory alone."""
        self.store.close()
        self.tokens = {name: left for name, left in self.tokens.items() if name in self.asked}
        self.store = self.open()

    @invariant()
    def flushed_rows_are_what_was_said(self) -> None:
        if self.store.buffered:
            return
        found = {label.request_id: label for label in self.store.rows()}
        assert set(found) == {name for name in self.asked if self.tokens.get(name) is not None}
        for name, label in found.items():
            workflow, _ = self.asked[name]
            assert (label.workflow_id, label.output_tokens) == (workflow, self.tokens[name])
            assert label.workflow_success == self.grades.get(workflow)
            assert (label.remaining_tokens, label.remaining_calls) == self.rest_of(name)

    def rest_of(self, name: str) -> tuple[int | None, int | None]:
        workflow, _ = self.asked[name]
        ranked = sorted(
            (arrival_s, other) for other, (its, arrival_s) in self.asked.items() if its == workflow
        )
        if workflow not in self.grades or any(other not in self.tokens for _, other in ranked):
            return None, None
        at = ranked.index((self.asked[name][1], name))
        left = [self.tokens[other] for _, other in ranked[at:]]
        served = [tokens for tokens in left if tokens is not None]
        return sum(served), len(served)

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()


class Trimmed(AnyOrder):
    """Where rows are dropped, those left are right, and what is not known is not made up.

    Calls are asked in the order in which they arrive, and each thing is flushed at once.
    """

    def open(self) -> FeedbackStore:
        return FeedbackStore(self.path, max_rows=5)

    @rule(call=calls)
    def ask(self, call: tuple[str, str, float]) -> None:
        i = len(self.asked)
        super().ask((f"r{i:03d}", f"w{i % 2}", float(i)))

    @rule(call=st.integers(1, 6), tokens=st.integers(0, 99))
    def answer_late(self, call: int, tokens: int) -> None:
        if name := next(iter(list(self.asked)[-call:]), ""):
            super().answer((name, "", 0.0), tokens)

    @invariant()
    def flushed_rows_are_what_was_said(self) -> None:
        assert self.store.flush()
        found = list(self.store.rows())
        assert len(found) <= 5
        for label in found:
            assert label.output_tokens == self.tokens[label.request_id]
            rest = (label.remaining_tokens, label.remaining_calls)
            assert rest in ((None, None), self.rest_of(label.request_id))


TestAnyOrder = AnyOrder.TestCase
TestTrimmed = Trimmed.TestCase
TestAnyOrder.settings = settings(max_examples=20, stateful_step_count=40, deadline=None)
TestTrimmed.settings = TestAnyOrder.settings
