"""Which call is on which replica: handed out in order, followed, and struck off again."""

import random
from collections.abc import Mapping, Sequence

from concertmaster.core.actions import Action, Cancel, Dispatch
from concertmaster.core.fair_share import engine_s
from concertmaster.core.fleet import InFlight, Pool, PoolId, Replica, ReplicaId
from concertmaster.core.outlook import key_of
from concertmaster.core.policy import Policy
from concertmaster.core.promise import Promises
from concertmaster.core.queue import Lane, Waiting, WaitingLine
from concertmaster.core.races import HedgeOutcome, Races
from concertmaster.core.request import RequestId
from concertmaster.core.residency import Residents
from concertmaster.core.routing import Routing
from concertmaster.core.scaling import Scaler
from concertmaster.core.service import lacking_tokens, service_on
from concertmaster.core.sketch import Bar, affine
from concertmaster.core.weighing import Row, Weighing
from concertmaster.core.window import Window
from concertmaster.core.workflow import Workflows


class Dispatcher:
    """Takes calls out of the line and writes them into the ledgers of replicas.

    Args:
        policy: Orders, scores and picks.
        pools: All there are.
        line: Calls that wait.
        running: Calls that were handed out, with their replica; kept here.
        workflows: Told what its calls get.
        window: Which replicas have room.
        routing: Told where a call went.
        races: Finds calls that are late, and knows those on two replicas.
        promises: What KV calls are promised, if a rule says so.
        residents: See that it is granted, where nodes are shared.
        scaler: Counts dispatches, if there is one.
        rng: Source of randomness.
        record_candidates: Keep the costs of every candidate with a dispatch.
        weighing: Told what is weighed, if somebody will ask.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        pools: Mapping[PoolId, Pool],
        line: WaitingLine,
        running: dict[RequestId, tuple[Waiting, Replica]],
        workflows: Workflows,
        window: Window,
        routing: Routing,
        races: Races,
        promises: Promises | None,
        residents: Residents | None,
        scaler: Scaler | None,
        rng: random.Random,
        record_candidates: bool,
        weighing: Weighing | None,
    ) -> None:
        self._policy = policy
        self._pools = pools
        self._line = line
        self._running = running
        self._workflows = workflows
        self._window = window
        self._routing = routing
        self._races = races
        self._promises = promises
        self._residents = residents
        self._scaler = scaler
        self._rng = rng
        self._record_candidates = record_candidates
        self._weighing = weighing
        self._dispatches = 0

    def adopt(self, policy: Policy) -> None:
        """Go by another policy from here on."""
        self._policy = policy

    def key(self, call: Waiting) -> float:
        """Place of a call in the line."""
        return key_of(self._policy, call, self._pools[call.pools[0]])

    def dispatch(self, now_s: float, actions: list[Action]) -> None:
        """Hand out calls, best key first, until nobody fits.

        A head that finds no room closes its pools to calls behind it: what frees up is kept
        for it, so that small calls cannot starve a large one.
        """
        refresh = self.key if self._policy.ordering.drifts else None
        blocked: dict[PoolId, None] = {}
        lanes = [lane for lane in self._line.lanes.values() if self._may_move(lane, blocked)]
        while lanes:
            heads = [
                (*lane.turn(head), lane, head) for lane in lanes if (head := lane.head(refresh))
            ]
            _, _, _, lane, call = min(heads)
            replicas = self.room_for(call, blocked)
            if replicas:
                self._line.remove(call.request.request_id)
                actions += self.place(now_s, call, replicas)
                self._charge(call)
            else:
                blocked.update(dict.fromkeys(lane.pools))
            lanes = [lane for lane in lanes if len(lane) and self._may_move(lane, blocked)]

    def _charge(self, call: Waiting) -> None:
        """Put a call that has waited, and was handed out, on its tenant's account."""
        request = call.request
        if not request.tenant:
            return
        replica = self._running[request.request_id][1]
        in_flight = replica.in_flight[request.request_id]
        call.charged_tokens = in_flight.expected_tokens
        seconds = engine_s(replica.pool, in_flight.prefill_tokens, in_flight.expected_tokens)
        self._line.shares.charge(replica.pool, request, seconds)

    def _settle(self, call: Waiting, pool: Pool, streamed_tokens: int) -> None:
        """Put right what a call was charged, by what it has written."""
        charged_tokens, call.charged_tokens = call.charged_tokens, None
        if charged_tokens is not None:
            seconds = engine_s(pool, 0, streamed_tokens - charged_tokens)
            self._line.shares.charge(pool, call.request, seconds)

    def _may_move(self, lane: Lane, blocked: dict[PoolId, None]) -> bool:
        return any(
            pool_id not in blocked and self._window.open_replicas(pool_id) for pool_id in lane.pools
        )

    def room_for(self, call: Waiting, blocked: dict[PoolId, None]) -> list[Replica]:
        """Return the open replicas that every filter keeps."""
        found: list[Replica] = []
        for pool_id in call.pools:
            if pool_id not in blocked:
                found += self._window.room(call, self._pools[pool_id])
        return found

    def place(self, now_s: float, call: Waiting, replicas: Sequence[Replica]) -> list[Action]:
        """Choose among the replicas that have room, and write the call into its ledgers."""
        policy, request, weighing = self._policy, call.request, self._weighing
        chosen, chosen_cost_s = replicas[0], None
        rows: list[Row] = []
        if len(replicas) > 1:
            scorers = policy.scorers

            def cost_s(replica: Replica) -> float:
                if weighing is None:
                    return sum(scorer.cost_s(now_s, call, replica) for scorer in scorers)
                costs_s = [scorer.cost_s(now_s, call, replica) for scorer in scorers]
                total_s = sum(costs_s)
                rows.append((total_s, costs_s, replica))
                return total_s

            chosen = policy.picker.pick(call, replicas, cost_s, self._rng)
            chosen_cost_s = cost_s(chosen) if scorers else None
        costs_s: Mapping[ReplicaId, Mapping[str, float]] = {}
        if self._record_candidates:
            costs_s = {r.replica_id: policy.costs_s(now_s, call, r) for r in replicas}
        if weighing is not None:
            weighing.look(now_s, call, chosen, rows)
        self._commit(now_s, call, chosen)
        self._running[request.request_id] = (call, chosen)
        self._hold(now_s, call, chosen)
        if weighing is not None:
            weighing.keep(call, chosen)
        dispatch = Dispatch(
            request.request_id,
            chosen.replica_id,
            call.attempt,
            self._priority(call, chosen),
            now_s - request.arrival_s,
            len(replicas),
            chosen_cost_s,
            costs_s,
        )
        return self._granted(now_s, chosen, dispatch)

    def _priority(self, call: Waiting, replica: Replica) -> int:
        return int(1000 * self.key(call)) if replica.pool.priority_scheduling else 0

    def _granted(self, now_s: float, replica: Replica, dispatch: Dispatch) -> list[Action]:
        if self._residents is None:
            return [dispatch]
        return [*self._residents.grants(now_s, replica), dispatch]

    def _commit(self, now_s: float, call: Waiting, replica: Replica) -> None:
        """Note for its workflow where a call goes, and watch that it is heard of."""
        request, model = call.request, replica.pool.model.name
        if self._races.are_on:
            self._races.sent(now_s, call, replica)
        if call.workflow.model != model:
            self._routing.commit(call, model)
        if self._policy.siblings:
            law = service_on(now_s, call, replica).law(call.output_sketch(model))
            call.workflow.ends[request.request_id] = Bar(affine(law, 1.0, now_s))
        if self._scaler is not None:
            self._scaler.note_dispatch(model, self._in_flight(call, replica))
        call.workflow.waited_s += now_s - request.arrival_s

    def _in_flight(self, call: Waiting, replica: Replica) -> InFlight:
        expected_tokens = call.expected_tokens(replica.pool.model.name)
        return InFlight(
            request=call.request,
            prefill_tokens=lacking_tokens(call.request, replica),
            decode_tokens=expected_tokens,
            expected_tokens=expected_tokens,
        )

    def _hold(self, now_s: float, call: Waiting, replica: Replica) -> None:
        """Write an attempt into the ledgers of its replica."""
        self._promise(now_s, call, replica, self._in_flight(call, replica))
        self._dispatches += 1
        replica.last_dispatch = self._dispatches
        replica.last_used_s = now_s
        self._window.update(now_s, replica)

    def _promise(self, now_s: float, call: Waiting, replica: Replica, in_flight: InFlight) -> None:
        pool, promises = replica.pool, self._promises
        if promises is None:
            replica.admit(now_s, in_flight, min(call.kv_tokens(pool.model.name), pool.kv_tokens))
            return
        in_flight.promised_tokens = promises.tokens(call, pool)
        replica.admit(now_s, in_flight, in_flight.promised_tokens)
        promises.enter(call, replica)

    def stream(self, request_id: RequestId, attempt: int, tokens: int) -> None:
        """Take in that a call has now produced so many tokens; old news is passed over."""
        found = self.attempt_of(request_id, attempt)
        if found is None or not tokens:
            return
        call, replica = found
        workflow, pool, pace = call.workflow, replica.pool, replica.pace
        prefill_tokens = replica.in_flight[request_id].prefill_tokens
        if prefill_tokens:
            workflow.attained_s += prefill_tokens * pool.prefill_token_s * pace
        fresh_tokens = replica.stream(request_id, tokens)
        self._window.note(replica)
        if self._residents is not None:
            self._residents.note_growth(replica)
        self._workflows.stream(workflow, fresh_tokens, pool.model.name)
        workflow.attained_s += fresh_tokens * pool.decode_token_s * pace

    def release(
        self,
        now_s: float,
        request_id: RequestId,
        attempt: int,
        *,
        settle: bool = True,
        finished: bool = False,
    ) -> Waiting | None:
        """Strike an attempt from the ledgers; ``None`` if that is not the end of its call.

        It is none if the attempt is over already, or if another goes on beside it.
        """
        found = self.attempt_of(request_id, attempt)
        if found is None:
            return None
        call, replica = found
        if request_id in self._races.seconds:
            self._leave_race(now_s, call, attempt)
            return None
        del self._running[request_id]
        self._races.forget(request_id)
        released = replica.release(request_id)
        self._settle(call, replica.pool, released.streamed_tokens)
        if finished and self._promises is not None:
            self._promises.learn(replica.pool, released)
        call.workflow.ends.pop(request_id, None)
        self._window.update(now_s, replica)
        if settle:
            self._workflows.settle(call.workflow.workflow_id)
        return call

    # Attempts beside each other

    def attempt_of(self, request_id: RequestId, attempt: int) -> tuple[Waiting, Replica] | None:
        """Return the call and the replica of an attempt; ``None`` if it is over."""
        running = self._running.get(request_id)
        if running is None or running[0].attempt == attempt:
            return running
        second = self._races.seconds.get(request_id)
        return second if second is not None and second[0].hedge == attempt else None

    def hedge(self, now_s: float, actions: list[Action]) -> None:
        """Send calls that are late to a second replica, as far as that is worth it."""
        while (late := self._races.next_late(now_s)) is not None:
            call, replica, candidates = late
            request_id = call.request.request_id
            if self._weighing is not None:
                self._weighing.look(now_s, call, replica, [])
            call.hedge = call.attempt + 1
            self._races.seconds[request_id] = (call, replica)
            self._hold(now_s, call, replica)
            if self._weighing is not None:
                self._weighing.keep(call, replica)
            dispatch = Dispatch(
                request_id,
                replica.replica_id,
                call.hedge,
                self._priority(call, replica),
                now_s - call.request.arrival_s,
                candidates,
                hedge=True,
            )
            actions += self._granted(now_s, replica, dispatch)

    def decide_race(self, now_s: float, request_id: RequestId, attempt: int) -> list[Action]:
        """Let an attempt that begins to answer be the only one; stop the other."""
        if self.attempt_of(request_id, attempt) is None:
            return []
        second = self._races.seconds.get(request_id)
        if second is None or second[0].attempt == attempt:
            self._races.heard(now_s, request_id)
        else:
            self._races.overtaken(now_s, request_id)
        if second is None:
            return []
        call = second[0]
        lead_wins = call.attempt == attempt
        loser = self._end_race(now_s, call, "lost" if lead_wins else "won")
        return [Cancel(request_id, loser.replica_id, overtaken=not lead_wins)]

    def call_off(self, now_s: float, request_id: RequestId) -> list[Action]:
        """Stop the second attempt of a call, if there is one: nobody waits for it any more."""
        second = self._races.seconds.get(request_id)
        if second is None:
            return []
        loser = self._end_race(now_s, second[0], "cancelled")
        return [Cancel(request_id, loser.replica_id)]

    def _leave_race(self, now_s: float, call: Waiting, attempt: int) -> None:
        """Take in that one of two attempts broke."""
        self._end_race(now_s, call, "alone" if attempt == call.attempt else "broke")

    def _end_race(self, now_s: float, call: Waiting, outcome: HedgeOutcome) -> Replica:
        """Strike the attempt that is over from its ledgers, and return its replica."""
        request_id = call.request.request_id
        _, second = self._races.end(request_id, outcome)
        gone = second
        if outcome in ("won", "alone"):
            gone = self._running[request_id][1]
            self._running[request_id] = (call, second)
            self._races.forget(request_id)
            call.attempt = call.hedge
        gone.release(request_id)
        self._window.update(now_s, gone)
        return gone
