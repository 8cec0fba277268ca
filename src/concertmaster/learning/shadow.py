"""A challenger answers the calls of the champion, unheard, until it has won or lost.

Both are scored on the labels that come in from then on: pinball loss at all levels, in
log1p tokens, so that a short answer counts as much as a long one. The difference of the
two on each label is bet on; capital that begins at 1 and is multiplied at each label by
1 + stake · difference reaches 1 / level with probability ``level`` at most if the challenger
is not better, however often one looks (Ville's inequality; Waudby-Smith and Ramdas, arXiv
2010.09686). "Install only after validation" (SwarmX 2.2, ``adapt``) means that here.
"""

import logging
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from concertmaster.core.forecast import NO_FORECAST, UNKNOWN_OUTPUT_TOKENS, Forecast, Quantiles
from concertmaster.core.request import ModelName, Request, RequestId, WorkflowId
from concertmaster.learning.labels import LEVELS
from concertmaster.learning.notices import describe, log
from concertmaster.predictors.interface import NO_PROMPT, Awaiting, Completion, Predictor, Prompt

MOST_DIFFERENCE = 0.5
"""Differences of loss are clipped to this, so that no single label decides."""

MOST_OPEN = 10_000
"""Calls whose outcome is awaited; those beyond are not scored."""

MOST_STAKE = 0.8
COVERAGE_SLACK = {0.5: 0.03, 0.95: 0.015}
"""By level: how much farther off its coverage a challenger may be than the champion."""

_UNKNOWN = Quantiles.exactly(UNKNOWN_OUTPUT_TOKENS)
_SMOOTH = 0.1


class Verdict(StrEnum):
    """What is to become of a challenger."""

    UNDECIDED = "undecided"
    INSTALL = "install"
    DISCARD = "discard"


@dataclass(frozen=True, slots=True)
class Figures:
    """How a challenge stands, for log and metrics.

    Attributes:
        labels: Outcomes that both had answered.
        champion_pinball: Mean loss per label in log1p tokens.
        challenger_pinball: The same of the challenger.
        better: Capital bet on "the challenger is better"; it wins at 1 / level.
        worse: Capital bet on "the challenger is worse"; it loses at 1 / level.
        champion_coverage: By level of ``COVERAGE_SLACK``: share of outcomes at or below.
        challenger_coverage: The same of the challenger.
        reason: Why the verdict is what it is.
    """

    verdict: Verdict
    reason: str
    labels: int
    champion_pinball: float
    challenger_pinball: float
    better: float
    worse: float
    champion_coverage: dict[float, float]
    challenger_coverage: dict[float, float]


@dataclass(slots=True)
class _Record:
    """Sums of one side."""

    loss: float = 0.0
    covered: dict[float, int] = field(default_factory=lambda: dict.fromkeys(COVERAGE_SLACK, 0))

    def add(self, law: Quantiles, tokens: int) -> float:
        """Take in a label; return its loss."""
        loss = pinball(law, tokens)
        self.loss += loss
        for level in self.covered:
            self.covered[level] += tokens <= law.at(level)
        return loss

    def coverage(self, labels: int) -> dict[float, float]:
        return {level: hits / max(labels, 1) for level, hits in self.covered.items()}


@dataclass(slots=True)
class _Wager:
    """Capital on "the mean of what comes in is above zero"; inputs lie in -1…1.

    The stake rests on earlier inputs alone: their mean over their mean square, which grows
    capital fastest if they go on alike.
    """

    capital: float = 1.0
    inputs: int = 0
    total: float = 0.0
    squares: float = 0.25

    def add(self, value: float) -> None:
        stake = min(max(self.total / (self.squares + 1e-12), 0.0), MOST_STAKE)
        self.capital *= 1.0 + stake * value
        self.inputs += 1
        self.total += value
        self.squares += value * value


@dataclass(frozen=True, slots=True)
class _Asked:
    request: Request
    prompt: Prompt
    said: Forecast


@dataclass(frozen=True, slots=True)
class _Answered:
    request: Request
    completion: Completion
    prompt: Prompt


@dataclass(frozen=True, slots=True)
class _Over:
    workflow_id: WorkflowId
    success: float | None


class Shadow:
    """A predictor that may be challenged; what it answers comes from the champion alone.

    The challenger is spoken to in ``catch_up``, which the driver calls when no caller waits:
    it hears what the champion heard, in the same order, later. So it cannot delay an answer,
    whatever it does. One that raises, is slow or falls behind is discarded.

    Args:
        champion: Answers; its errors are the caller's.
        clock: Seconds, for the challenger's time alone.
        level: Probability with which a challenger that is not better may be installed.
        min_labels: Labels before a verdict for it.
        max_labels: Labels after which it is discarded if it has not won.
        budget_s: Seconds that an answer of the challenger may take on average; one may take
            ten times that.
        max_behind: Things the challenger may have yet to hear; prompts are kept until then.

    Attributes:
        counts: Verdicts so far, for metrics.
        reads_prompts: Whether either of the two does.
    """

    def __init__(
        self,
        champion: Predictor,
        clock: Callable[[], float],
        *,
        level: float = 0.01,
        min_labels: int = 200,
        max_labels: int = 5_000,
        budget_s: float = 0.02,
        max_behind: int = 1_000,
    ) -> None:
        self.champion = champion
        self.reads_prompts = champion.reads_prompts
        self._clock = clock
        self._level = level
        self._min_labels = min_labels
        self._max_labels = max_labels
        self._budget_s = budget_s
        self._max_behind = max_behind
        self.counts: Counter[Verdict] = Counter()
        self._challenger: Predictor | None = None
        self._begin()
        self._verdict = Verdict.DISCARD
        self._reason = "nobody has challenged"

    def _begin(self) -> None:
        self._verdict = Verdict.UNDECIDED
        self._reason = ""
        self._heard: deque[_Asked | _Answered | _Over] = deque()
        self._open: OrderedDict[RequestId, tuple[Forecast, Forecast]] = OrderedDict()
        self._ours, self._theirs = _Record(), _Record()
        self._better, self._worse = _Wager(), _Wager()
        self._answer_s = 0.0

    def challenge(self, challenger: Predictor) -> None:
        """Let another predictor compete from here on; one before it is forgotten."""
        self._challenger = challenger
        self.reads_prompts = self.champion.reads_prompts or challenger.reads_prompts
        self._begin()

    @property
    def verdict(self) -> Verdict:
        """Of the latest challenger; once it is ``INSTALL``, it is the champion."""
        return self._verdict

    @property
    def is_challenged(self) -> bool:
        """True while a challenger listens."""
        return self._challenger is not None

    @property
    def figures(self) -> Figures:
        """How the latest challenge stands, or ended."""
        labels = self._better.inputs
        return Figures(
            verdict=self._verdict,
            reason=self._reason,
            labels=labels,
            champion_pinball=self._ours.loss / max(labels, 1),
            challenger_pinball=self._theirs.loss / max(labels, 1),
            better=self._better.capital,
            worse=self._worse.capital,
            champion_coverage=self._ours.coverage(labels),
            challenger_coverage=self._theirs.coverage(labels),
        )

    # A predictor.

    def predict(self, request: Request, prompt: Prompt = NO_PROMPT) -> Forecast:
        """Answer as the champion does."""
        said = self.champion.predict(request, prompt)
        self._hear(_Asked(request, prompt, said))
        return said

    def learn(
        self,
        request: Request,
        completion: Completion,
        prompt: Prompt = NO_PROMPT,
        forecast: Forecast = NO_FORECAST,
    ) -> None:
        """Teach the champion; the challenger learns in ``catch_up``, beside its own forecast."""
        self.champion.learn(request, completion, prompt, forecast)
        self._hear(_Answered(request, completion, prompt))

    def close(self, workflow_id: WorkflowId, success: float | None = None) -> None:
        """Tell the champion; the challenger hears of it in ``catch_up``."""
        self.champion.close(workflow_id, success)
        self._hear(_Over(workflow_id, success))

    def failed(self, request_id: RequestId) -> None:
        """Tell the champion; what a challenger keeps of the call goes with the challenge."""
        if isinstance(self.champion, Awaiting):
            self.champion.failed(request_id)

    def _hear(self, told: _Asked | _Answered | _Over) -> None:
        if self._challenger is None:
            return
        self._heard.append(told)
        if len(self._heard) > self._max_behind:
            self._discard("fell behind", logging.WARNING)

    # The challenge.

    def catch_up(self, limit_s: float = 0.005) -> Verdict:
        """Let the challenger hear what it has missed; for when no caller waits.

        Args:
            limit_s: Seconds after which no further call of it is begun.
        """
        began_s = self._clock()
        while self._heard and self._challenger is not None:
            self._tell(self._challenger, self._heard.popleft())
            if self._clock() - began_s >= limit_s:
                break
        if self._verdict is Verdict.INSTALL and self._challenger and not self._heard:
            self.champion = self._challenger
            self._retire()
        return self._verdict

    def _tell(self, challenger: Predictor, told: _Asked | _Answered | _Over) -> None:
        began_s = self._clock()
        try:
            match told:
                case _Asked(request, prompt, said):
                    self._await_outcome(request, said, challenger.predict(request, prompt))
                case _Answered(request, completion, prompt):
                    both = self._open.pop(request.request_id, None)
                    if both is not None and self._verdict is Verdict.UNDECIDED:
                        self._score(completion, *both)
                    theirs = NO_FORECAST if both is None else both[1]
                    challenger.learn(request, completion, prompt, theirs)
                case _Over(workflow_id, success):
                    challenger.close(workflow_id, success)
        except Exception as error:  # noqa: BLE001 - a challenger may be broken in any way
            self._discard(f"raised {describe(error)}", logging.WARNING)
            return
        self._time(self._clock() - began_s)

    def _await_outcome(self, request: Request, ours: Forecast, theirs: Forecast) -> None:
        self._open[request.request_id] = (ours, theirs)
        if len(self._open) > MOST_OPEN:
            self._open.popitem(last=False)

    def _time(self, took_s: float) -> None:
        self._answer_s += _SMOOTH * (took_s - self._answer_s)
        if took_s > 10 * self._budget_s or self._answer_s > self._budget_s:
            slow = f"slow: {took_s:.3f} s, {self._answer_s:.3f} s on average"
            self._discard(slow, logging.WARNING)

    def _score(self, completion: Completion, ours: Forecast, theirs: Forecast) -> None:
        model, tokens = completion.model, completion.output_tokens
        our_loss = self._ours.add(_law(ours, model), tokens)
        their_loss = self._theirs.add(_law(theirs, model), tokens)
        if not math.isfinite(their_loss):
            raise ValueError("a forecast is not a number")
        gain = our_loss - their_loss if math.isfinite(our_loss) else MOST_DIFFERENCE
        clipped = min(max(gain / MOST_DIFFERENCE, -1.0), 1.0)
        self._better.add(clipped)
        self._worse.add(-clipped)
        self._judge()

    def _judge(self) -> None:
        labels = self._better.inputs
        if self._worse.capital >= 1 / self._level:
            self._discard("worse")
        elif labels >= self._min_labels and self._better.capital >= 1 / self._level:
            if lost := self._lost_coverage(labels):
                self._discard(lost)
            else:
                self._end(Verdict.INSTALL, "better")
        elif labels >= self._max_labels:
            self._discard("no better")

    def _lost_coverage(self, labels: int) -> str:
        ours, theirs = self._ours.coverage(labels), self._theirs.coverage(labels)
        for level, slack in COVERAGE_SLACK.items():
            if abs(theirs[level] - level) > abs(ours[level] - level) + slack:
                return f"loses coverage at {level}: {theirs[level]:.3f}"
        return ""

    def _discard(self, reason: str, severity: int = logging.INFO) -> None:
        self._retire()
        self._end(Verdict.DISCARD, reason, severity)

    def _retire(self) -> None:
        """Let go of the challenger, and of the prompts that it had yet to hear."""
        self._challenger = None
        self.reads_prompts = self.champion.reads_prompts
        self._heard.clear()
        self._open.clear()

    def _end(self, verdict: Verdict, reason: str, severity: int = logging.INFO) -> None:
        self._verdict, self._reason = verdict, reason
        self.counts[verdict] += 1
        f = self.figures
        log.log(
            severity,
            "shadow: verdict=%s reason=%r labels=%d pinball=%.4f champion_pinball=%.4f better=%.3g",
            *(verdict, reason, f.labels, f.challenger_pinball, f.champion_pinball, f.better),
        )


def pinball(law: Quantiles, tokens: float) -> float:
    """Mean pinball loss over ``LEVELS`` in log1p tokens.

    >>> pinball(Quantiles.exactly(9.0), 9.0)
    0.0
    """
    actual = math.log1p(tokens)
    loss = 0.0
    for level in LEVELS:
        missed = actual - math.log1p(max(law.at(level), 0.0))
        loss += max(level * missed, (level - 1.0) * missed)
    return loss / len(LEVELS)


def _law(forecast: Forecast, model: ModelName) -> Quantiles:
    return forecast.output_law(model) or _UNKNOWN
