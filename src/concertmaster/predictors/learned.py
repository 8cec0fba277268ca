"""The predictor that was trained: laws of groups, heads on top, kept honest by calibration.

Where the heads say nothing the law of the call's group answers, and that law leans on
coarser groups; so the step of the fallback is the finest group that was seen.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from concertmaster.core.forecast import NO_FORECAST, Forecast, Quantiles
from concertmaster.core.request import ModelName, Request, RequestId, WorkflowId
from concertmaster.predictors.calibration import Calibration
from concertmaster.predictors.evidence import TARGETS, Evidence, Look, group_of
from concertmaster.predictors.heads import HEAD_TARGETS, LEVELS, Heads
from concertmaster.predictors.history import Closed
from concertmaster.predictors.interface import NO_PROMPT, Completion, Prompt
from concertmaster.predictors.judge import Judge
from concertmaster.predictors.laws import Floats, Law, Path, expit, logit
from concertmaster.predictors.shares import ModelShares

_AS_STATED = np.array(LEVELS)
_LAW_ODDS = logit(LEVELS)
_LAW_ODDS_OF_ALL: Floats = np.tile(_LAW_ODDS, (len(TARGETS), 1))
assert TARGETS[: len(HEAD_TARGETS)] == HEAD_TARGETS, "heads come first"


class LearnedPredictor:
    """Forecasts a call and the rest of its workflow.

    Args:
        evidence: What was seen so far.
        heads: The fitted part; without it laws alone answer.
        calibration: Offsets and trust, of training and of what came since.
        models: Models of the fleet: each gets quantiles of its own.
        judge: Forecasts success; without it nobody does.
        adapt: Whether labels move laws, calibration and success; histories they move in any
            case.
    """

    reads_prompts = True

    def __init__(
        self,
        evidence: Evidence,
        heads: Heads | None,
        calibration: Calibration | None = None,
        *,
        models: Sequence[ModelName] = (),
        judge: Judge | None = None,
        adapt: bool = True,
    ) -> None:
        self.evidence = evidence
        self.calibration = calibration or Calibration(LEVELS)
        self.heads = heads
        self._models = tuple(models)
        self.judge = judge
        self._adapt = adapt
        self._shares = ModelShares()

    def predict(self, request: Request, prompt: Prompt = NO_PROMPT) -> Forecast:
        """Answer from what is known at arrival."""
        return self.foresee(request, prompt)[0]

    def foresee(
        self, request: Request, prompt: Prompt = NO_PROMPT
    ) -> tuple[Forecast, npt.NDArray[np.float32] | None]:
        """Answer, and tell the ``FIGURES`` that the heads saw; ``None`` without heads."""
        look = self.evidence.look(request, prompt)
        asks, odds, figures = None, None, None
        if self.heads is not None:
            figures = self.heads.figures(look.features, prompt.text)
            asks, odds = float(figures[-1]), self.heads.odds(figures)
        levels = self._levels(group_of(request), odds)
        laws = {
            target: quantiles(look.laws[target], row)
            for target, row in zip(TARGETS, levels, strict=True)
        }
        most, judge = request.max_output_tokens, self.judge
        answers = self._on("output_tokens", request, look, laws, levels[0])
        answer = laws["output_tokens"]
        capped = answer.cap(most)
        forecast = Forecast(
            output_tokens=capped,
            output_tokens_on={
                model: capped if law is answer else law.cap(most) for model, law in answers.items()
            },
            remaining_tokens=laws["remaining_tokens"],
            remaining_tokens_on=self._on("remaining_tokens", request, look, laws, levels[1]),
            remaining_by=self._shares.of(request),
            remaining_calls=laws["remaining_calls"],
            remaining_tool_s=laws["remaining_tool_s"],
            success={} if judge is None else judge.foresee(request, prompt.text, self._of(request)),
            tool_call=asks,
            source=look.step,
        )
        return forecast, figures

    def learn(
        self,
        request: Request,
        completion: Completion,
        prompt: Prompt = NO_PROMPT,
        forecast: Forecast = NO_FORECAST,
    ) -> None:
        """Take in one outcome and hold it against its forecast."""
        stated = forecast.output_law(completion.model)
        if self._adapt and stated is not None:
            law = self.evidence.output_law(request, completion.model)
            self.calibration.learn(
                "output_tokens",
                group_of(request),
                stated,
                quantiles(law, _AS_STATED),
                completion.output_tokens,
            )
        self.evidence.learn(request, completion, prompt, forecast, keep=self._adapt)
        if self._adapt:
            self._shares.note(request, completion)
        if self.judge is not None:
            self.judge.answered(request, completion.model)

    def failed(self, request_id: RequestId) -> None:
        """Let go of a call that no answer will come of."""
        if self.judge is not None:
            self.judge.failed(request_id)

    def close(self, workflow_id: WorkflowId, success: float | None = None) -> None:
        """Take in that a workflow is over, and hold what remained against its forecasts.

        A grade moves success, even where it comes after the end; one outside 0…1 does nothing.
        """
        if self._adapt and self.judge is not None and success is not None and 0 <= success <= 1:
            self.judge.graded(workflow_id, success)
        self._shares.close(workflow_id)
        for closed in self.evidence.close(workflow_id, keep=self._adapt):
            if self._adapt:
                self._settle(closed)

    def _settle(self, closed: Closed) -> None:
        for target, truth in closed.truth.items():
            stated = closed.stated.get(target)
            if stated is not None:
                law = quantiles(self.evidence.laws[target].law(closed.path), _AS_STATED)
                self.calibration.learn(target, closed.group, stated, law, truth, worth=closed.share)

    def _levels(self, group: Path, head_odds: npt.NDArray[np.float32] | None) -> Floats:
        """Return the ranks whose counts are the quantiles: heads and law, then the offsets.

        A row for each of ``TARGETS``; those without a head go by the law.
        """
        odds = _LAW_ODDS_OF_ALL
        if head_odds is not None:
            trust = np.array([[self.calibration.trust(name, group)] for name in HEAD_TARGETS])
            odds = odds.copy()
            # the heads' share is taken in their own precision
            odds[: len(trust)] = trust.astype(np.float32) * head_odds + (1 - trust) * _LAW_ODDS
        offsets = self.calibration.all_offsets(TARGETS, group)
        return expit(np.maximum.accumulate(odds + offsets, axis=1))

    def _of(self, request: Request) -> Sequence[ModelName]:
        """Return the models that may answer a call."""
        return request.models or self._models

    def _on(
        self,
        target: str,
        request: Request,
        look: Look,
        laws: Mapping[str, Quantiles],
        levels: Floats,
    ) -> dict[ModelName, Quantiles]:
        """Read a quantity's law on each model; a law that was read is not read again."""
        read, found = {look.laws[target]: laws[target]}, {}
        for model in self._of(request):
            same = model == look.model
            law = look.laws[target] if same else self.evidence.law_on(target, request, model)
            if law not in read:
                read[law] = quantiles(law, levels)
            found[model] = read[law]
        return found


def quantiles(law: Law, levels: Floats) -> Quantiles:
    """Read a law at the given ranks as quantiles at ``LEVELS``."""
    return Quantiles(LEVELS, law.quantiles(levels))
