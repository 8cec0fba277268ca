"""What was seen so far, and what it says of a call: the ground that the heads stand on.

Training replays recorded workflows through the same object that serves, so that a head
never meets a figure that it was not fitted on.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from concertmaster.core.forecast import NO_FORECAST, Forecast, Quantiles
from concertmaster.core.request import ModelName, Request, WorkflowId
from concertmaster.predictors.features import (
    HISTORY_FEATURES,
    LAW_FEATURES,
    PROMPT_FEATURES,
    TRACK_FEATURES,
    history_figures,
    prompt_figures,
    track_figures,
)
from concertmaster.predictors.history import MOST_CALLS, Closed, Finished, Histories, History
from concertmaster.predictors.interface import NO_PROMPT, Completion, Prompt
from concertmaster.predictors.laws import Law, LawTree, Path, path_of, stage_bucket

TARGETS = ("output_tokens", "remaining_tokens", "remaining_calls", "remaining_tool_s")
"""What is predicted by rank."""

_LAWS = (*TARGETS, "prompt_tokens")
LEAN = {
    "output_tokens": 3.0,
    "prompt_tokens": 3.0,
    "remaining_tokens": 8.0,
    "remaining_calls": 8.0,
    "remaining_tool_s": 8.0,
}
"""Workflows at which a group's own law and its parent's weigh the same, by quantity."""

MOST_SHARE, MOST_WORTH = 0.05, 16.0
"""What remained at one call moves the calibration as a twentieth of a label, and all calls of
one workflow together as at most sixteen. Calls of long workflows weigh as those of short ones
up to there: if they weighed less, what is stated of them would cover too little."""

_IN_FEATURES = TARGETS[:3]
FEATURES = (
    *PROMPT_FEATURES,
    *TRACK_FEATURES,
    *HISTORY_FEATURES,
    *(f"{target}_{name}" for target in _IN_FEATURES for name in LAW_FEATURES),
)
"""Names of the figures of a call, in the order of the vector."""

STEPS = ("global", "app", "app", "role", "role")
"""Which step of the fallback a law is, by the depth of its group; "model" lies between the
first two."""


class Look(NamedTuple):
    """What can be said of a call before any head spoke.

    Attributes:
        laws: Of each quantity, on the model that will most likely serve.
        model: That model; "" if nobody knows.
    """

    features: npt.NDArray[np.float32]
    laws: dict[str, Law]
    paths: Mapping[str, Path]
    model: ModelName

    @property
    def step(self) -> str:
        """The step of the fallback that knows the call's group."""
        law = self.laws["output_tokens"]
        if law.depth == 0 and law.by_model:
            return "model"
        return STEPS[law.depth] if law.depth >= 0 else "none"


class Evidence:
    """Laws of all groups and the histories of live workflows.

    Args:
        most_workflows: Live workflows to keep the history of.
    """

    def __init__(self, *, most_workflows: int = 20_000) -> None:
        self.laws = {name: LawTree(lean_workflows=LEAN[name]) for name in _LAWS}
        self.histories = Histories(most_workflows=most_workflows)

    def look(self, request: Request, prompt: Prompt) -> Look:
        """Say what is known of a call at its arrival."""
        history = self.histories.seen(request.workflow_id) or _NO_HISTORY
        model = likely_model(request, history)
        paths = paths_of(request, model)
        laws = {name: self.laws[name].law(paths[name]) for name in _LAWS}
        track = history.track(request)
        figures = [
            *prompt_figures(request, prompt, laws["prompt_tokens"]),
            *track_figures(request, track),
            *history_figures(request, history, track),
        ]
        for target in _IN_FEATURES:
            figures += laws[target].shape()
        return Look(np.array(figures, dtype=np.float32), laws, paths, model)

    def output_law(self, request: Request, model: ModelName) -> Law:
        """Return the law of a call's output tokens on one model."""
        return self.law_on("output_tokens", request, model)

    def law_on(self, target: str, request: Request, model: ModelName) -> Law:
        """Return the law of a quantity where one model serves."""
        return self.laws[target].law(paths_of(request, model)[target])

    def learn(
        self,
        request: Request,
        completion: Completion,
        prompt: Prompt = NO_PROMPT,
        forecast: Forecast = NO_FORECAST,
        *,
        keep: bool = True,
    ) -> None:
        """Take in a finished call; without ``keep`` only its own workflow remembers it."""
        history = self.histories.of(request.workflow_id)
        paths = paths_of(request, completion.model)
        rank = self.laws["output_tokens"].law(paths["output_tokens"]).rank(completion.output_tokens)
        worth = 1 / (1 + history.track(request).calls)
        if len(history.finished) < MOST_CALLS:
            history.finished.append(
                Finished(
                    path=paths["remaining_tokens"],
                    group=group_of(request),
                    output_tokens=completion.output_tokens,
                    pause_s=history.pause_s(request),
                    stated=_stated(forecast),
                )
            )
        history.add(request, completion, rank, after_tool=prompt.after_tool)
        if keep:
            self._add("output_tokens", paths, completion.output_tokens, worth)
            self._add("prompt_tokens", paths, request.prompt_tokens, worth)

    def close(self, workflow_id: WorkflowId, *, keep: bool = True) -> list[Closed]:
        """Take in that a workflow is over: what remained at each of its calls is known."""
        history = self.histories.drop(workflow_id)
        closed = [] if history is None else settled(history.finished)
        for call in closed if keep else ():
            for target, truth in call.truth.items():
                self.laws[target].add(call.path, truth, worth=call.worth)
        return closed

    def _add(self, name: str, paths: Mapping[str, Path], count: float, worth: float) -> None:
        self.laws[name].add(paths[name], count, worth=worth)


def settled(finished: Sequence[Finished]) -> list[Closed]:
    """Return what remained at each call of a workflow, last call first.

    The first label of a group counts as one workflow, the others add nothing to that.
    """
    tokens, tool_s = 0, 0.0
    seen: set[Path] = set()
    closed = []
    share = min(MOST_SHARE, MOST_WORTH / max(1, len(finished)))
    for calls, call in enumerate(reversed(finished), start=1):
        tokens += call.output_tokens
        truth = dict(zip(TARGETS[1:], (float(tokens), float(calls), tool_s), strict=True))
        worth = float(call.path not in seen)
        closed.append(Closed(call.path, call.group, call.stated, truth, worth, share))
        seen.add(call.path)
        tool_s += call.pause_s
    return closed


def _stated(forecast: Forecast) -> dict[str, Quantiles]:
    stated = {target: getattr(forecast, target) for target in TARGETS[1:]}
    return {target: law for target, law in stated.items() if law is not None}


_NO_HISTORY = History()


def likely_model(request: Request, history: History) -> ModelName:
    """Return the only model allowed, else the one that answered last, else ""."""
    return request.models[0] if len(request.models) == 1 else history.model


def paths_of(request: Request, model: ModelName) -> Mapping[str, Path]:
    """Return the group of a call in the laws of each quantity."""
    bucket = stage_bucket(request.stage or 0)
    return _paths(request.app, request.template, bucket, f"{request.role}/{request.step}", model)


@lru_cache(4_096)
def _paths(app: str, template: str, bucket: str, role: str, model: str) -> Mapping[str, Path]:
    call = path_of(app, template, role, model)
    rest = path_of(app, template, bucket, role, model)
    return {
        "output_tokens": call,
        "prompt_tokens": call,
        "remaining_tokens": rest,
        "remaining_calls": rest,
        "remaining_tool_s": rest,
    }


def group_of(request: Request) -> Path:
    """Return the group whose coverage is kept: app and role."""
    return _group(request.app, f"{request.role}/{request.step}")


@lru_cache(4_096)
def _group(app: str, role: str) -> Path:
    return path_of(app, role)
