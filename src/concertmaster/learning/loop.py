"""The loop that ties the parts: outcomes become labels, drift a challenger, a win a champion.

A forecast is made within a budget, by the champion or else by a baseline. Every completion
is kept as a label and held against its forecast. Once forecasts of a group hold no longer, a
challenger is trained on the labels by another process, answers unheard, and is installed
only if it wins. Between arrival and dispatch nothing here touches a disk, a process or a lock
that is held for long.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from concertmaster.core.forecast import NO_FORECAST, Forecast
from concertmaster.core.request import Request, RequestId, WorkflowId
from concertmaster.learning.budget import BUDGET_S, BudgetedPredictor
from concertmaster.learning.coverage import Coverage
from concertmaster.learning.drift import Drift, DriftWatch
from concertmaster.learning.feedback import FeedbackStore
from concertmaster.learning.figures import BUDGET, LABELS, LoopFigures
from concertmaster.learning.notices import log
from concertmaster.learning.shadow import Shadow, Verdict
from concertmaster.learning.upkeep import Challenger, School, Upkeep
from concertmaster.learning.watching import Watching
from concertmaster.predictors.interface import NO_PROMPT, Awaiting, Completion, Predictor, Prompt
from concertmaster.predictors.learned import LearnedPredictor
from concertmaster.predictors.recent import RecentLengths

ROUND_S = 1.0
"""Seconds between two rounds of upkeep."""

CHALLENGED_S = 0.02
"""Seconds between two turns of a challenger."""

CATCH_UP_S = 0.002
"""Seconds of the driver's thread that a challenger may take at each of its turns."""

MOST_OPEN = 10_000
"""Calls to remember until their outcome: whose workflow they are of, and who answered."""

TRAINED = frozenset({"output_tokens"})
"""What a challenger is trained and judged for; the rest adapts label by label alone."""


class Noting:
    """A predictor whose last answer can be asked for the figures that it rests on.

    Args:
        inner: Answers; its ``foresee``, where it has one, hands out figures.
    """

    def __init__(self, inner: Predictor) -> None:
        self.inner = inner
        self.reads_prompts = inner.reads_prompts
        self._foresee: Callable[..., tuple[Forecast, npt.NDArray[np.float32] | None]] | None
        self._foresee = getattr(inner, "foresee", None)
        self._asked: Request | None = None
        self._figures: npt.NDArray[np.float32] | None = None

    def predict(self, request: Request, prompt: Prompt = NO_PROMPT) -> Forecast:
        """Answer as the inner one does."""
        if self._foresee is None:
            forecast, figures = self.inner.predict(request, prompt), None
        else:
            forecast, figures = self._foresee(request, prompt)
        self._asked, self._figures = request, figures
        return forecast

    def inherit(self, other: "Noting") -> None:
        """Take over what another learnt of success, which no training does anew."""
        mine, theirs = self.inner, other.inner
        if isinstance(mine, LearnedPredictor) and isinstance(theirs, LearnedPredictor):
            mine.judge = theirs.judge

    def take(self, request: Request) -> tuple[bool, npt.NDArray[np.float32] | None]:
        """Say whether it was the last to answer this call, and from which figures."""
        mine, figures = self._asked is request, self._figures
        self._asked = self._figures = None
        return mine, figures if mine else None

    def learn(
        self,
        request: Request,
        completion: Completion,
        prompt: Prompt = NO_PROMPT,
        forecast: Forecast = NO_FORECAST,
    ) -> None:
        """Pass on."""
        self.inner.learn(request, completion, prompt, forecast)

    def close(self, workflow_id: WorkflowId, success: float | None = None) -> None:
        """Pass on."""
        self.inner.close(workflow_id, success)

    def failed(self, request_id: RequestId) -> None:
        """Pass on, if it wants to know."""
        if isinstance(self.inner, Awaiting):
            self.inner.failed(request_id)


def can_train() -> bool:
    """Whether LightGBM can be imported."""
    return find_spec("lightgbm") is not None


class LearningLoop:
    """A predictor that keeps its labels, notices when it no longer holds, and is replaced.

    Args:
        champion: Answers at first.
        clock: Seconds of the wall; forecasts are timed by it.
        budget_s: Seconds that a forecast may take.
        store: Keeps labels; none are kept without, and nothing is trained.
        school: Trains challengers; without, the champion stays.
        watch: Looks for drift.
        executor: Runs upkeep, one round at a time; a thread of its own by default.
        run: Set before the names of calls and workflows in the store: the gateway's own
            names begin anew with each start.
        can_train: Whether what training needs is installed.
        shadow: Settings of ``Shadow``.

    Attributes:
        reads_prompts: Whether the champion does, or its challenger.
    """

    def __init__(
        self,
        champion: Predictor,
        clock: Callable[[], float],
        *,
        budget_s: float = BUDGET_S,
        store: FeedbackStore | None = None,
        school: School | None = None,
        watch: DriftWatch | None = None,
        executor: Executor | None = None,
        run: str = "",
        can_train: Callable[[], bool] = can_train,
        **shadow: Any,  # noqa: ANN401 - whatever Shadow takes
    ) -> None:
        self._champion = Noting(champion)
        self._shadow = Shadow(self._champion, clock, **shadow)
        self._answers = BudgetedPredictor(self._shadow, RecentLengths(), clock, budget_s=budget_s)
        self.reads_prompts = self._shadow.reads_prompts
        self._store = store
        self._school = school if store is not None else None
        self._watching = Watching(watch)
        self._coverage = Coverage()
        executor = executor or ThreadPoolExecutor(1, thread_name_prefix="learning")
        self._upkeep = Upkeep(store, self._school, executor)
        self._run = f"{run}/" if run else ""
        self._can_train = can_train
        self._drift: Counter[tuple[str, str]] = Counter()
        self._trainings: Counter[str] = Counter()
        self._asked: OrderedDict[RequestId, tuple[WorkflowId, bool]] = OrderedDict()
        self._wanted = False
        self._challenger: Path | None = None
        self._next_round_s = float("-inf")

    # A predictor.

    def predict(self, request: Request, prompt: Prompt = NO_PROMPT) -> Forecast:
        """Answer within the budget, and note what the answer rests on."""
        forecast = self._answers.predict(request, prompt)
        mine, figures = self._champion.take(request)
        self._asked[request.request_id] = request.workflow_id, mine
        if len(self._asked) > MOST_OPEN:
            self._asked.popitem(last=False)
        if self._store is not None:
            self._store.asked(self._named(request), forecast, features=figures, text=prompt.text)
        return forecast

    def learn(
        self,
        request: Request,
        completion: Completion,
        prompt: Prompt = NO_PROMPT,
        forecast: Forecast = NO_FORECAST,
        *,
        gpu: str = "",
    ) -> None:
        """Take in an outcome: a label, and a look at whether forecasts hold.

        Args:
            request: The call.
            completion: What came of it.
            prompt: What the predictor read of it.
            forecast: What was said of it.
            gpu: What it ran on.
        """
        self._answers.learn(request, completion, prompt, forecast)
        if self._store is not None:
            name = RequestId(self._run + request.request_id)
            self._store.answered(name, completion, gpu=gpu)
        self._coverage.learn(request, completion.model, completion.output_tokens, forecast)
        _, mine = self._asked.pop(request.request_id, ("", False))
        said = forecast if mine else NO_FORECAST  # what a fallback says tells nothing of it
        alarm = self._watching.learn(request, completion, said, gpu)
        if alarm is not None:
            self._drifted(alarm)

    def failed(self, request_id: RequestId) -> None:
        """Take in that no answer will come."""
        workflow_id, _ = self._asked.pop(request_id, (None, False))
        if workflow_id is not None:
            self._watching.cut(workflow_id)
        self._answers.failed(request_id)
        if self._store is not None:
            self._store.failed(RequestId(self._run + request_id))

    def close(self, workflow_id: WorkflowId, success: float | None = None) -> None:
        """Take in that a workflow is over: what remained at each of its calls is known.

        A grade may come then or later; one outside 0…1 is taken for none.
        """
        if success is not None and not 0.0 <= success <= 1.0:
            self._upkeep.notices.warn("grade refused", found=success)
            success = None
        for alarm in self._watching.close(workflow_id, success):
            self._drifted(alarm)
        self._answers.close(workflow_id, success)
        self._coverage.close(workflow_id)
        if self._store is not None:
            self._store.closed(WorkflowId(self._run + workflow_id), success)

    def _named(self, request: Request) -> Request:
        if not self._run:
            return request
        return replace(
            request,
            request_id=RequestId(self._run + request.request_id),
            workflow_id=WorkflowId(self._run + request.workflow_id),
        )

    # Off the hot path.

    def tick(self, now_s: float) -> float:
        """Let a challenger catch up, and see to upkeep; return seconds until the next turn.

        Takes ``CATCH_UP_S`` and one answer of a challenger at most.

        Args:
            now_s: Seconds of the wall.
        """
        self._shadow.catch_up(CATCH_UP_S)
        self._settle()
        if now_s >= self._next_round_s:
            self._next_round_s = now_s + ROUND_S
            self._turn(now_s)
        self.reads_prompts = self._shadow.reads_prompts
        return CHALLENGED_S if self._shadow.is_challenged else ROUND_S

    def end(self) -> None:
        """Write what is left and let go of everything; waits, so not for the hot path."""
        self._upkeep.end()

    @property
    def figures(self) -> LoopFigures:
        """What was counted so far, for metrics."""
        labels = Counter[str]() if self._store is None else self._store.counts
        budget, verdicts = self._answers.counts, self._shadow.counts
        decided = (Verdict.INSTALL, Verdict.DISCARD)
        return LoopFigures(
            budget={kind: budget[kind] for kind in BUDGET},
            drift=dict(self._drift),
            labels={kind: labels[kind] for kind in LABELS},
            failed_flushes=labels["unwritable"],
            trainings=dict(self._trainings),
            challengers={verdict.value: verdicts[verdict] for verdict in decided},
            coverage=self._coverage.ratios(),
        )

    def _drifted(self, drift: Drift) -> None:
        target, *group = drift.group
        self._drift[target, drift.kind.value] += 1
        log.warning(
            "learning: drift target=%s kind=%s group=%r since_s=%.0f p50=%.2f p95=%.2f bias=%.2f",
            target,
            drift.kind.value,
            "/".join(group)[:200],
            drift.since_s,
            drift.health.coverage_p50,
            drift.health.coverage_p95,
            drift.health.bias,
        )
        if self._school is None or self._challenger is not None or target not in TRAINED:
            return
        if self._can_train():
            self._wanted = True
        else:
            remedy = "pip install 'concertmaster[train]'"
            self._upkeep.notices.warn("training needs LightGBM", remedy=remedy)

    def _turn(self, now_s: float) -> None:
        brought = self._upkeep.turn(now_s, wanted=self._wanted)
        if brought.ended:
            self._trainings[brought.ended] += 1
        if brought.challenger is not None:
            self._challenge(brought.challenger)

    def _challenge(self, challenger: Challenger) -> None:
        self._wanted = False
        self._challenger = challenger.path
        self._shadow.challenge(Noting(challenger.predictor))
        log.info("learning: challenger path=%s", challenger.path)

    def _settle(self) -> None:
        """Note the end of a challenge; the shadow's line in the log has its figures."""
        if self._challenger is None or self._shadow.is_challenged:
            return
        if self._shadow.verdict is Verdict.INSTALL and self._school is not None:
            self._school.champion = self._challenger
            self._crown()
            self._watching.reset()
            log.info("learning: installed path=%s", self._challenger)
        self._challenger = None

    def _crown(self) -> None:
        champion = self._shadow.champion
        assert isinstance(champion, Noting), "the loop installs no other kind"
        champion.inherit(self._champion)
        self._champion = champion
