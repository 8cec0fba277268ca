"""Plays a workload against a live gateway as agents would, open loop, and takes the times.

A workflow starts when its plan says, whatever became of the others; a call is made once all
it waits for is answered. Every answer is streamed.
"""

import asyncio
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import quote

import msgspec

from concertmaster.core.errors import InputError
from concertmaster.core.request import PREFIX_CHUNK_TOKENS, ModelName, Request
from concertmaster.engines.openai_http import fetch
from concertmaster.gateway.clock import scaled_clock
from concertmaster.gateway.exchange import Exchange
from concertmaster.gateway.openai_api import BYTES_PER_TOKEN
from concertmaster.gateway.upstream import EngineLink
from concertmaster.workload.agents import Agents
from concertmaster.workload.plan import Call, WorkflowPlan, Workload
from concertmaster.workload.records import CallRecord, RunRecords

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 600.0
_ERROR_CODE = re.compile(r'"code":"(\w+)"')
_MODEL_HEADER = b"x-concertmaster-model: "
_REPLICA_HEADER = b"x-concertmaster-replica: "
_WAIT_HEADER = b"x-concertmaster-queue-wait-ms: "
_EVENT = b"data: "
_ERROR_EVENT = b'data: {"error"'
_REJECTIONS = frozenset(
    {"queue_full", "waited_too_long", "no_replica", "too_late", "shutting_down"}
)


class _Ear:
    """Hears one answer: its beginning for the record, its bytes for nothing.

    Attributes:
        begun: All up to its first event, comments of a stream that was held among it.
        first_s: When that event came.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.begun = b""
        self.first_s: float | None = None
        self.done: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._clock = clock

    def write(self, data: bytes) -> None:
        if self.first_s is None:
            self.begun += data
            if _EVENT in self.begun:
                self.first_s = self._clock()

    def finished(self, *, keep_alive: bool) -> None:
        self.settle("")

    def abort(self) -> None:
        self.settle("cut")

    def settle(self, problem: str) -> None:
        if not self.done.done():
            self.done.set_result(problem)

    @property
    def error(self) -> str:
        """The error that a stream ended with at once; empty if it did not."""
        return self.begun.partition(_ERROR_EVENT)[2].decode(errors="replace")

    def header(self, name: bytes) -> str:
        """Find a header, or the comment that stands for it in a stream that was held."""
        line = self.begun.partition(name)[2].partition(b"\n")[0]
        return line.decode("latin-1").rstrip("\r")


@dataclass(kw_only=True)
class Replay:
    """One workload against one gateway.

    Attributes:
        speedup: Workload seconds that pass in a second; times are reported in workload seconds.
        bare_prompts: Whether the text of a prompt is the recorded one alone, as predictors see
            it in a simulation, and what it lacks in size stands in a field that nobody reads.
            Real engines need prompts of full size.
        progress: Told how many workflows are over.
    """

    url: str
    workload: Workload
    speedup: float = 1.0
    bare_prompts: bool = False
    progress: Callable[[int], None] | None = None

    async def run(self, *, policy: str, seed: int) -> RunRecords:
        """Play everything to its end and return what came of it.

        Raises:
            InputError: Nobody answers at the URL.
        """
        await check_gateway(self.url)
        self._clock = scaled_clock(self.speedup)
        self._link = EngineLink(self.url, self, lambda _: b"", connect_timeout_s=CONNECT_TIMEOUT_S)
        self._agents = Agents(self.workload)
        try:
            async with asyncio.TaskGroup() as tasks:
                for plan in self.workload:
                    tasks.create_task(self._play(tasks, plan))
        finally:
            self._link.close()
        now_s = self._clock()
        return RunRecords(
            policy=policy,
            seed=seed,
            calls=self._agents.calls,
            workflows=self._agents.workflows,
            gauges=None,
            decision_s=[],
            duration_s=now_s,
            wall_s=now_s / self.speedup,
        )

    async def _sleep_until(self, time_s: float) -> None:
        await asyncio.sleep(max(0.0, (time_s - self._clock()) / self.speedup))

    async def _play(self, tasks: asyncio.TaskGroup, plan: WorkflowPlan) -> None:
        await self._sleep_until(plan.arrival_s)
        for call in self._agents.begin(plan):
            tasks.create_task(self._make(tasks, plan, call, self._clock()))

    async def _make(
        self, tasks: asyncio.TaskGroup, plan: WorkflowPlan, call: Call, ready_s: float
    ) -> None:
        await self._sleep_until(ready_s + call.tool_s)
        request, record = self._agents.call(self._clock(), plan.workflow_id, call)
        ear, exchange = await self._ask(plan, call, request)
        self._note(record, ear, exchange)
        if record.outcome != "served":
            await self._end(plan)
            return
        record.finished_s = self._clock()
        freed = self._agents.finish(record.finished_s, request, call, ModelName(record.model))
        for child in freed:
            tasks.create_task(self._make(tasks, plan, child, record.finished_s))
        if self._agents.is_over(plan.workflow_id) and self.progress is not None:
            self.progress(self._agents.over)
        await self._end(plan)

    async def _end(self, plan: WorkflowPlan) -> None:
        """Tell the gateway once that a workflow is over, and how well it went if that is known."""
        if not self._agents.is_settled(plan.workflow_id):
            return
        body = msgspec.json.encode({"success": self._agents.success(plan.workflow_id)})
        path = f"/v1/workflows/{quote(plan.workflow_id, safe='')}/grade"
        with suppress(
            OSError, TimeoutError
        ):  # it teaches; the workflow has been served all the same
            await fetch("POST", self.url, path, body=body, timeout_s=CONNECT_TIMEOUT_S)

    async def _ask(self, plan: WorkflowPlan, call: Call, request: Request) -> tuple[_Ear, Exchange]:
        ear = _Ear(self._clock)
        body = call_body(call, request, bare=self.bare_prompts)
        exchange = Exchange(request, ear, b"", body, model_named="", streams=True)
        self._link.send(exchange, call_head(plan, call, request, len(body)) + body)
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                exchange.error_text = await ear.done
        except TimeoutError:
            exchange.error_text = "timed out"
            exchange.over = True
            if exchange.engine is not None:
                exchange.engine.cancel()
        return ear, exchange

    def _note(self, record: CallRecord, ear: _Ear, exchange: Exchange) -> None:
        record.model, record.replica_id = ear.header(_MODEL_HEADER), ear.header(_REPLICA_HEADER)
        record.first_token_s = ear.first_s
        record.output_tokens = exchange.tokens
        wait_ms = ear.header(_WAIT_HEADER)
        if wait_ms:
            record.dispatched_s = record.arrival_s + float(wait_ms) / 1000
        exchange.error_text = exchange.error_text or ear.error
        if exchange.error_text or exchange.status != 200:
            reason = _reason(exchange)
            rejected = reason in _REJECTIONS or exchange.status in (400, 404, 429, 503)
            self._agents.refuse(record, "rejected" if rejected else "failed", reason)
        else:
            record.outcome = "served"

    # Outcomes

    def began(self, exchange: Exchange) -> None:
        """Note nothing: only streams say when they begin."""

    def first_token(self, exchange: Exchange) -> None:
        """Leave it to the ear: a stream may begin with comments."""

    def finished(self, exchange: Exchange, output_tokens: int) -> None:
        """Take the count of tokens."""
        exchange.tokens = output_tokens

    def broke(self, exchange: Exchange, problem: str, *, alive: bool) -> None:
        """Note a call that got no answer."""
        assert isinstance(exchange.caller, _Ear)
        exchange.caller.settle(problem)


def _reason(exchange: Exchange) -> str:
    """Say briefly why a call was not served: the code of its error body if it has one."""
    code = _ERROR_CODE.search(exchange.error_text)
    return code[1] if code else exchange.error_text or f"HTTP {exchange.status}"


async def check_gateway(url: str) -> None:
    """Make sure that somebody answers.

    Raises:
        InputError: Nobody does.
    """
    try:
        await fetch("GET", url, "/health", timeout_s=CONNECT_TIMEOUT_S)
    except (OSError, TimeoutError) as error:
        problem = f"nobody answers: {str(error) or 'no answer in time'}"
        raise InputError("--url", url, problem, "start one with concertmaster serve") from None


def call_head(plan: WorkflowPlan, call: Call, request: Request, body_bytes: int) -> bytes:
    """Request line and headers: whose call it is, and its true size for emulated engines."""
    lengths = [str(call.output_tokens)]
    lengths += [f"{model}={one.output_tokens}" for model, one in sorted(call.outcomes.items())]
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "host: gateway",
        "content-type: application/json",
        f"content-length: {body_bytes}",
        f"x-request-id: {request.request_id}",
        f"x-concertmaster-workflow-id: {plan.workflow_id}",
        f"x-concertmaster-app: {plan.app}",
        f"x-concertmaster-template: {plan.template}",
        f"x-concertmaster-role: {call.role}",
        f"x-concertmaster-step: {call.step}",
        f"x-concertmaster-stage: {call.stage}",
        f"x-concertmaster-parent: {','.join(request.parents)}",
        f"x-concertmaster-class: {plan.service_class.value}",
        f"x-emulator-output-tokens: {';'.join(lengths)}",
        f"x-emulator-prompt-tokens: {call.prompt_tokens}",
        f"x-emulator-prefix: {','.join(map(str, call.prefix_hashes))}",
    ]
    if request.deadline_s is not None:
        left_ms = 1000 * (request.deadline_s - request.arrival_s)
        lines.append(f"x-concertmaster-deadline-ms: {max(1, round(left_ms))}")
    return "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n"


def call_body(call: Call, request: Request, *, bare: bool = False) -> bytes:
    """Build a chat body of the call's size, whose text repeats where its prefix does.

    With ``bare`` the repeating part is in a field before the text, see ``Replay``.
    """
    size = BYTES_PER_TOKEN * call.prompt_tokens
    chunk = BYTES_PER_TOKEN * PREFIX_CHUNK_TOKENS
    blocks = [f"{one:020d} ".ljust(chunk, ".") for one in call.prefix_hashes]
    said = call.prompt_text if bare else ""
    message = {"filler": ""} if bare else {}
    message |= {"role": "user", "content": said}
    left = max(1, size - len(msgspec.json.encode([message])))
    tail = f"{request.request_id} " + ("" if bare else f"{call.prompt_text[:200]} ")
    message["filler" if bare else "content"] = ("".join(blocks) + tail).ljust(size, ".")[:left]
    return msgspec.json.encode(
        {
            "model": request.models or "auto",
            "messages": [message],
            "max_tokens": call.max_output_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )
