"""Driver one: virtual time. The only clock is the time of the event at hand.

An agenda of what will happen, in order of time and then of being scheduled. Agents make a
call once the calls it waits for are answered; the core decides; engine models take the
place of engines.
"""

import heapq
import time
from collections.abc import Callable, Iterable
from typing import Any, assert_never

from concertmaster.core.actions import (
    Action,
    Cancel,
    Demote,
    Dispatch,
    Fail,
    Reject,
    Resize,
    Wake,
)
from concertmaster.core.events import (
    Event,
    ReplicaDemoted,
    ReplicaDied,
    ReplicaReady,
    RequestArrived,
    RequestFinished,
    TimerFired,
    TokensStreamed,
    WorkflowClosed,
)
from concertmaster.core.fleet import Pool, Readiness, ReplicaId
from concertmaster.core.forecast import Forecast
from concertmaster.core.request import RequestId, WorkflowId
from concertmaster.core.scheduler import Scheduler
from concertmaster.learning.prompts import prompt_of
from concertmaster.physics.batching import BatchingEngine, EngineCall, Milestone
from concertmaster.predictors.interface import NO_PROMPT, Completion, Predictor, Prompt
from concertmaster.predictors.rates import PaceWatch
from concertmaster.sim.gauges import FleetGauges
from concertmaster.sim.incidents import Incident
from concertmaster.sim.open_calls import OpenCall
from concertmaster.workload.agents import Agents
from concertmaster.workload.plan import Workload
from concertmaster.workload.records import CallOutcome, RunRecords, WorkflowRecord

PROGRESS_S = 1.0
"""How often engines tell how far their calls have come; the gateway does the same."""

EngineFactory = Callable[[Pool], BatchingEngine]
Observer = Callable[[float, Event, list[Action]], None]


class Simulation:
    """One workload through one scheduler over engine models.

    Args:
        scheduler: The core, fresh.
        workload: What agents will ask.
        predictor: Makes the forecast that travels with each arrival.
        make_engine: Builds the engine model of a replica.
        incidents: What befalls the fleet from outside.
        observe: Told of every event and the actions it led to.
        progress: Told how many workflows are over, after each.
        enough: Shown each workflow that is over; the run ends at the first yes.
        follow_pace: Whether the core is told how far replicas are from their rate curves.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        workload: Workload,
        predictor: Predictor,
        make_engine: EngineFactory,
        *,
        incidents: Iterable[Incident | tuple[float, Event]] = (),
        observe: Observer | None = None,
        progress: Callable[[int], None] | None = None,
        enough: Callable[[WorkflowRecord], bool] | None = None,
        follow_pace: bool = True,
    ) -> None:
        self._scheduler = scheduler
        self._predictor = predictor
        self._observe = observe
        self._agents = Agents(workload)
        self._progress = progress
        self._enough = enough
        self._ended = False
        self._engines: dict[ReplicaId, BatchingEngine] = {
            replica.replica_id: make_engine(replica.pool) for replica in scheduler.replicas.values()
        }
        self._unsettled = len(workload)
        self._gauges = FleetGauges(scheduler.replicas.values(), self._engines)
        self._polls_s: dict[ReplicaId, float] = {}
        self._pace = PaceWatch(scheduler) if follow_pace else None
        self._open: dict[RequestId, OpenCall] = {}
        self._foreseen: dict[RequestId, tuple[Prompt, Forecast]] = {}
        self._agenda: list[tuple[float, int, Callable[[float, Any], None], Any]] = []
        self._scheduled = 0
        self._timer_s: float | None = None
        self._fed_s = 0.0
        self._ticking = False
        self._decision_s: list[float] = []
        for plan in workload:
            self._at(plan.arrival_s, self._begin_workflow, plan)
        for incident in incidents:
            self._await(incident)

    def _await(self, incident: Incident | tuple[float, Event]) -> None:
        if not isinstance(incident, Incident):
            self._at(incident[0], self._strike, incident[1])
        elif incident.event is not None:
            self._at(incident.at_s, self._strike, incident.event)
        else:
            self._at(incident.at_s, self._slow, incident)

    def run(self, *, policy: str, seed: int) -> RunRecords:
        """Play to the end, or until it is enough, and return what came of it."""
        started_s = time.perf_counter()
        agenda = self._agenda
        while agenda and not self._ended:
            now_s, _, handler, argument = heapq.heappop(agenda)
            handler(now_s, argument)
        self._gauges.finish(self._fed_s)
        return RunRecords(
            policy=policy,
            seed=seed,
            calls=self._agents.calls,
            workflows=self._agents.workflows,
            gauges=self._gauges.totals,
            decision_s=self._decision_s,
            duration_s=self._fed_s,
            wall_s=time.perf_counter() - started_s,
        )

    def _at(self, time_s: float, handler: Callable[[float, Any], None], argument: object) -> None:
        self._scheduled += 1
        heapq.heappush(self._agenda, (time_s, self._scheduled, handler, argument))

    # The core

    def _feed(self, now_s: float, event: Event) -> None:
        self._fed_s = now_s
        if self._pace is not None:
            self._pace.note(now_s, event)
        begun_s = time.perf_counter()
        actions = self._scheduler.handle(now_s, event)
        if actions:
            self._decision_s.append(time.perf_counter() - begun_s)
        if self._observe is not None:
            self._observe(now_s, event, actions)
        for action in actions:
            self._perform(now_s, action)
        self._set_timer(now_s)

    def _set_timer(self, now_s: float) -> None:
        wakeup_s = self._scheduler.next_wakeup_s()
        if wakeup_s is not None and (self._timer_s is None or wakeup_s < self._timer_s):
            self._timer_s = wakeup_s
            self._at(max(now_s, wakeup_s), self._fire_timer, wakeup_s)

    def _fire_timer(self, now_s: float, wakeup_s: float) -> None:
        if self._timer_s != wakeup_s:
            return
        self._timer_s = None
        if not self._unsettled:
            return  # only a scaling policy still asks, for ever
        due_s = self._scheduler.next_wakeup_s()
        if due_s is not None and due_s <= now_s:
            self._feed(now_s, TimerFired())
        else:
            self._set_timer(now_s)

    def _perform(self, now_s: float, action: Action) -> None:
        match action:
            case Dispatch():
                self._dispatch(now_s, action)
            case Reject(request_id, reason):
                self._refuse(request_id, "rejected", reason)
            case Fail(request_id, reason):
                self._refuse(request_id, "failed", reason)
            case Cancel(request_id, replica_id):
                self._engines[replica_id].cancel(now_s, request_id)
                self._poll_later(now_s, replica_id)
            case Wake(replica_id):
                self._wake(now_s, replica_id)
            case Demote(replica_id, readiness):
                self._demote(now_s, replica_id, readiness)
            case Resize(replica_id, kv_blocks):
                self._engines[replica_id].resize(now_s, kv_blocks)
                self._poll_later(now_s, replica_id)
            case _:
                assert_never(action)

    # Agents

    def _begin_workflow(self, now_s: float, plan: Any) -> None:  # noqa: ANN401
        for call in self._agents.begin(plan):
            self._at(now_s + call.tool_s, self._make_call, (plan.workflow_id, call))

    def _make_call(self, now_s: float, named: Any) -> None:  # noqa: ANN401
        workflow_id, call = named
        request, record = self._agents.call(now_s, workflow_id, call)
        self._open[request.request_id] = OpenCall(request=request, call=call, record=record)
        prompt = prompt_of(call) if self._predictor.reads_prompts else NO_PROMPT
        forecast = self._predictor.predict(request, prompt)
        self._foreseen[request.request_id] = prompt, forecast
        self._feed(now_s, RequestArrived(request, forecast))

    def _refuse(self, request_id: RequestId, outcome: CallOutcome, reason: str) -> None:
        one = self._open.pop(request_id)
        self._foreseen.pop(request_id, None)
        self._agents.refuse(one.record, outcome, reason)
        self._close_if_settled(one.request.workflow_id)

    def _close_if_settled(self, workflow_id: WorkflowId) -> None:
        """Tell the predictor once that no call of a workflow is open or will follow."""
        if self._agents.is_settled(workflow_id):
            self._unsettled -= 1
            self._predictor.close(workflow_id, self._agents.success(workflow_id))

    # Engines

    def _dispatch(self, now_s: float, action: Dispatch) -> None:
        one = self._open[action.request_id]
        request, record = one.request, one.record
        replica = self._scheduler.replicas[action.replica_id]
        one.sent[action.replica_id] = action.attempt
        record.dispatched_s = now_s if record.dispatched_s is None else record.dispatched_s
        if not action.hedge:
            one.note_server(replica)
        engine_call = EngineCall(
            request_id=request.request_id,
            prompt_tokens=request.prompt_tokens,
            output_tokens=one.output_tokens_on(replica),
            prefix_hashes=request.prefix_hashes,
            priority=action.priority,
        )
        self._at(
            now_s + replica.network_s / 2,
            self._submit,
            (action.replica_id, engine_call, action.attempt),
        )
        if not self._ticking:
            self._ticking = True
            self._gauges.skip_to(now_s)
            self._at(now_s + PROGRESS_S, self._tick, None)

    def _submit(self, now_s: float, handed: Any) -> None:  # noqa: ANN401
        replica_id, call, attempt = handed
        if self._scheduler.in_flight(call.request_id, attempt) == replica_id:
            self._engines[replica_id].submit(now_s, call)
            self._poll_later(now_s, replica_id)

    def _poll_later(self, now_s: float, replica_id: ReplicaId) -> None:
        """Come back when the engine's next milestone is due."""
        due_s = self._engines[replica_id].next_milestone_s()
        if due_s is None:
            self._polls_s.pop(replica_id, None)
        elif self._polls_s.get(replica_id) != due_s:
            self._polls_s[replica_id] = due_s
            self._at(max(now_s, due_s), self._poll, (replica_id, due_s))

    def _poll(self, now_s: float, due: Any) -> None:  # noqa: ANN401
        replica_id, due_s = due
        if self._polls_s.get(replica_id) != due_s:
            return
        del self._polls_s[replica_id]
        network_s = self._scheduler.replicas[replica_id].network_s
        for milestone in self._engines[replica_id].advance(now_s):
            news = (milestone, self._open[milestone.request_id].sent[replica_id])
            if network_s:
                self._at(now_s + network_s / 2, self._reach, news)
            else:
                self._reach(now_s, news)
        self._poll_later(now_s, replica_id)

    def _reach(self, now_s: float, news: tuple[Milestone, int]) -> None:
        """Take in what an engine said, unless it spoke of an attempt that is over by now."""
        milestone, attempt = news
        replica_id = self._scheduler.in_flight(milestone.request_id, attempt)
        if replica_id is None:
            return
        one, replica = self._open[milestone.request_id], self._scheduler.replicas[replica_id]
        request, call, record = one.request, one.call, one.record
        one.note_server(replica)
        if milestone.kind == "first_token":
            record.first_token_s = now_s
            self._feed(now_s, TokensStreamed(((request.request_id, attempt, 1),)))
            return
        del self._open[request.request_id]
        record.finished_s, record.outcome = now_s, "served"
        completion = Completion(
            model=replica.pool.model.name,
            output_tokens=record.output_tokens,
            finished_s=now_s,
            tool_call=call.tool_call,
        )
        prompt, forecast = self._foreseen.pop(request.request_id)
        self._predictor.learn(request, completion, prompt, forecast)
        self._feed(now_s, RequestFinished(request.request_id, attempt, record.output_tokens))
        freed = self._agents.finish(now_s, request, call, replica.pool.model.name)
        for child in freed:
            self._at(now_s + child.tool_s, self._make_call, (request.workflow_id, child))
        self._close_if_settled(request.workflow_id)
        if self._agents.is_over(request.workflow_id):
            self._feed(now_s, WorkflowClosed(request.workflow_id))
            self._tell(self._agents.record(request.workflow_id))

    def _tell(self, over: WorkflowRecord) -> None:
        """Tell who watches that a workflow is over; end the run if they saw enough."""
        if self._progress is not None:
            self._progress(self._agents.over)
        if self._enough is not None:
            self._ended = self._enough(over)

    def _tick(self, now_s: float, _: object) -> None:
        """Tell the core how far every call has come."""
        progress = []
        for replica_id, engine in self._engines.items():
            if self._scheduler.replicas[replica_id].in_flight:
                progress += [
                    (request_id, self._open[request_id].sent[replica_id], tokens)
                    for request_id, tokens in engine.progress(now_s)
                    if request_id in self._open
                ]
        self._gauges.sample(now_s)
        self._ticking = bool(self._open)
        if progress:
            self._feed(now_s, TokensStreamed(tuple(progress)))
        paces = None if self._pace is None else self._pace.due(now_s)
        if paces is not None:
            self._feed(now_s, paces)
        if self._ticking:
            self._at(now_s + PROGRESS_S, self._tick, None)

    # Incidents and weights

    def _strike(self, now_s: float, event: Event) -> None:
        if isinstance(event, ReplicaDied | ReplicaDemoted | ReplicaReady):
            self._gauges.note_change(now_s, event.replica_id)
        if isinstance(event, ReplicaDied | ReplicaDemoted):
            self._engines[event.replica_id].clear()
            self._polls_s.pop(event.replica_id, None)
        self._feed(now_s, event)

    def _slow(self, now_s: float, incident: Any) -> None:  # noqa: ANN401
        """Change the pace of an engine; nobody is told."""
        engine = self._engines[incident.replica_id]
        engine.progress(now_s)  # steps until now are taken at the old pace
        engine.slowdown = incident.factor
        self._poll_later(now_s, incident.replica_id)

    def _wake(self, now_s: float, replica_id: ReplicaId) -> None:
        replica = self._scheduler.replicas[replica_id]
        self._gauges.note_wake(now_s, replica)
        ready_s = replica.pool.ready_s.get(replica.readiness, 0.0)
        self._at(now_s + ready_s, self._strike, ReplicaReady(replica_id))

    def _demote(self, now_s: float, replica_id: ReplicaId, readiness: Readiness) -> None:
        """Move an idle replica's weights away, which takes no time."""
        if self._scheduler.replicas[replica_id].readiness is Readiness.RUNNING:
            self._gauges.note_stop()
        self._at(now_s, self._strike, ReplicaDemoted(replica_id, readiness))
