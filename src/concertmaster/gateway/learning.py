"""The driver's side of forecasts: timed and counted, taught by outcomes, kept in order."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from concertmaster.core.fleet import Pool
from concertmaster.core.forecast import NO_FORECAST, Forecast
from concertmaster.core.request import Request, RequestId, WorkflowId
from concertmaster.gateway.exchange import Exchange
from concertmaster.gateway.metrics import GatewayMetrics
from concertmaster.learning.figures import LoopFigures
from concertmaster.predictors.interface import NO_PROMPT, Awaiting, Completion, Predictor, Prompt

_log = logging.getLogger(__name__)
STUMBLED_S = 1.0
"""Seconds until the next turn after one that raised."""


@runtime_checkable
class Learner(Protocol):
    """A predictor with work of its own to do, see ``learning.loop.LearningLoop``."""

    reads_prompts: bool

    def predict(self, request: Request, prompt: Prompt = NO_PROMPT) -> Forecast:
        """Answer from what is known at arrival."""

    def learn(
        self,
        request: Request,
        completion: Completion,
        prompt: Prompt = NO_PROMPT,
        forecast: Forecast = NO_FORECAST,
        *,
        gpu: str = "",
    ) -> None:
        """Take in one outcome, and what it ran on."""

    def close(self, workflow_id: WorkflowId, success: float | None = None) -> None:
        """Take in that a workflow is over."""

    def failed(self, request_id: RequestId) -> None:
        """Take in that no answer will come."""

    def tick(self, now_s: float) -> float:
        """Do what is due, quickly; return seconds until the next turn."""

    def end(self) -> None:
        """Let go of everything; may wait."""

    @property
    def figures(self) -> LoopFigures:
        """What was counted so far."""


class Forecaster:
    """Asks a predictor, and tells it what came; one that learns by itself is given its turns.

    Args:
        predictor: Makes forecasts.
        metrics: Told of every forecast.
        clock: Seconds of the wall.
    """

    def __init__(
        self,
        predictor: Predictor,
        metrics: GatewayMetrics,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._predictor = predictor
        self._learner = predictor if isinstance(predictor, Learner) else None
        self._awaiting = predictor if isinstance(predictor, Awaiting) else None
        self._metrics = metrics
        self._clock = clock
        if self._learner is not None:
            metrics.learner = self._learner

    @property
    def reads_prompts(self) -> bool:
        """Whether it wants to see prompts."""
        return self._predictor.reads_prompts

    def predict(self, exchange: Exchange) -> Forecast:
        """Make the forecast of a call, and note it there."""
        if not exchange.teaches:
            return NO_FORECAST
        began_s = self._clock()
        forecast = self._predictor.predict(exchange.request, exchange.prompt)
        exchange.forecast = forecast
        self._metrics.forecast(forecast.source, self._clock() - began_s)
        return forecast

    def served(self, now_s: float, exchange: Exchange, pool: Pool) -> None:
        """Teach what came of a call, and what it ran on."""
        if not exchange.teaches:
            return
        completion = Completion(
            model=pool.model.name,
            output_tokens=exchange.tokens,
            finished_s=now_s,
            tool_call=bool(exchange.tool_call_ids),
        )
        request, prompt, forecast = exchange.request, exchange.prompt, exchange.forecast
        if self._learner is None:
            self._predictor.learn(request, completion, prompt, forecast)
        else:
            self._learner.learn(request, completion, prompt, forecast, gpu=pool.gpu)

    def failed(self, request_id: RequestId) -> None:
        """Tell that no answer will come."""
        if self._awaiting is not None:
            self._awaiting.failed(request_id)

    def close(self, workflow_id: WorkflowId, success: float | None = None) -> None:
        """Tell that a workflow is over, and its grade in 0…1 where someone graded it."""
        self._predictor.close(workflow_id, success)

    async def watch(self) -> None:
        """Give a learner its turns, until cancelled."""
        while self._learner is not None:
            due_s = self._turn(self._learner)
            await asyncio.sleep(due_s)

    def _turn(self, learner: Learner) -> float:
        try:
            return learner.tick(self._clock())
        except Exception:  # noqa: BLE001 - it may be broken in any way
            _log.exception("learning: a turn failed")
            return STUMBLED_S

    async def stop(self) -> None:
        """Let a learner write what is left."""
        if self._learner is not None:
            await asyncio.to_thread(self._learner.end)
