"""Builders of small stores that need no training library."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from builders import a_call, a_plan
from concertmaster.core.request import ModelName
from concertmaster.learning.baselines import fit_baselines
from concertmaster.learning.datasets import Question, seen_hashes
from concertmaster.learning.fit_success import Labelled
from concertmaster.learning.rehearsal import rehearse
from concertmaster.predictors.calibration import Calibration
from concertmaster.predictors.encoder import StaticEncoder
from concertmaster.predictors.evidence import FEATURES, Evidence
from concertmaster.predictors.forest import Forest
from concertmaster.predictors.heads import FIGURES, HEAD_TARGETS, LEVELS, Heads
from concertmaster.predictors.laws import logit
from concertmaster.predictors.lexical import NAMES
from concertmaster.predictors.manifest import EncoderFacts, Manifest, TrainedOn
from concertmaster.predictors.model_names import TRAITS
from concertmaster.predictors.store import pack_laws, write_store
from concertmaster.predictors.success import Prior, SuccessHead
from concertmaster.predictors.trunk import Trunk
from concertmaster.predictors.words import BUCKETS, WordScores
from concertmaster.workload.plan import WorkflowPlan

DIMS = 4
BIG, SMALL = ModelName("big-70b"), ModelName("small-8b")

Parts = dict[str, dict[str, npt.NDArray[Any]]]


def some_plans(count: int, *, seed: int = 0, app: str = "chat") -> list[WorkflowPlan]:
    """Chains of calls whose lengths depend on the role, two runs of each task."""
    rng = random.Random(seed)
    plans = []
    for i in range(count):
        calls = []
        for stage in range(rng.randint(1, 4)):
            role = ("planner", "coder")[stage % 2]
            calls.append(
                a_call(
                    stage,
                    role=role,
                    output_tokens=rng.randint(5, 20) * (10 if role == "coder" else 1),
                    max_output_tokens=4096,
                    tool_s=rng.random() if stage else 0.0,
                    prompt_text=f"task {i} of {role}",
                    model=BIG,
                )
            )
        plans.append(a_plan(f"{app}-{seed}-{i}", *calls, app=app, task=f"{app} {seed} {i // 2}"))
    return plans


def some_questions(count: int, *, seed: int = 0) -> list[Question]:
    """Questions that the big model solves more often than the small one."""
    rng = random.Random(seed)
    return [
        Question(
            question_id=f"q{seed}-{i}",
            key=f"group {seed} {i}",
            source="sums",
            labelled=Labelled(
                text=f"What is {rng.randint(1, 999)} + {i}?",
                correct={BIG: float(rng.random() < 0.8), SMALL: float(rng.random() < 0.4)},
                group=f"group {seed} {i}",
                source="sums",
            ),
        )
        for i in range(count)
    ]


def some_heads() -> Heads:
    """Heads whose quantiles are those of the laws, whatever the call."""
    odds = np.tile(logit(LEVELS), len(HEAD_TARGETS))
    return Heads(
        WordScores(
            np.zeros((len(HEAD_TARGETS), BUCKETS), np.float32),
            np.ones(BUCKETS, np.float32),
            np.zeros(len(HEAD_TARGETS), np.float32),
        ),
        _a_forest(np.zeros(1), len(FEATURES)),
        _a_forest(odds, len(FIGURES)),
    )


def _a_forest(values: npt.NDArray[Any], features: int) -> Forest:
    outputs = len(values)
    leaves = np.repeat(values, 4).reshape(outputs, 4).astype(np.float32)
    asked = np.tile(np.array([0, features - 1, 1], np.int16), (outputs, 1))
    return Forest(asked, np.zeros((outputs, 3), np.float32), leaves, outputs=outputs)


def an_encoder() -> StaticEncoder:
    table = np.arange(5 * DIMS, dtype=np.int8).reshape(5, DIMS)
    scale = np.ones(DIMS, np.float32)
    return StaticEncoder(
        ["[UNK]", "what", "is", "+", "?"], table, scale, np.full(DIMS, 0.1, np.float32)
    )


def a_success_head(encoder: str = f"static-{DIMS}") -> SuccessHead:
    """A head that knows two models; the text counts for little."""
    inputs, wide, narrow, traits = DIMS + len(NAMES), 3, 2, 2
    rng = np.random.default_rng(0)

    def some(*shape: int) -> npt.NDArray[np.float32]:
        return rng.normal(0, 0.1, shape).astype(np.float32)

    trunk = Trunk(
        centre=some(inputs),
        spread=np.ones(inputs, np.float32),
        first=some(inputs, wide),
        first_bias=some(wide),
        second=some(1, wide, narrow),
        second_bias=some(1, 1, narrow),
        last=some(narrow, traits),
        last_bias=some(traits),
        gates=np.zeros(1, np.int64),
    )
    spread: npt.NDArray[np.float32] = np.eye(traits, dtype=np.float32)
    known = {BIG: 1, SMALL: -1}
    loadings = {str(name): (some(traits) + shift, spread) for name, shift in known.items()}
    prior = Prior(some(len(TRAITS), traits), spread)
    return SuccessHead(trunk, prior, loadings, names=[BIG, SMALL], encoder=encoder)


def some_parts(plans: Sequence[WorkflowPlan]) -> Parts:
    evidence = Evidence()
    for _ in rehearse(plans, evidence):
        pass
    return {
        "laws": pack_laws(evidence),
        "heads": some_heads().arrays(),
        "calibration": Calibration(LEVELS).arrays(),
        "baselines": fit_baselines(plans),
        "success": a_success_head().arrays(),
        "encoder": an_encoder().arrays(),
    }


def a_manifest() -> Manifest:
    return Manifest(
        made="2026-01-02",
        trained_on=TrainedOn(names=("made up",), rows=3),
        figures={"loss": 0.125},
        encoder=EncoderFacts(name=f"static-{DIMS}", dims=DIMS),
    )


def a_store(
    folder: Path, plans: Sequence[WorkflowPlan] = (), **parts: dict[str, npt.NDArray[Any]] | None
) -> Path:
    """Write a store that has seen these plans; a part that is ``None`` is left out."""
    plans = plans or some_plans(6)
    chosen = {**some_parts(plans), **parts}
    kept = {name: arrays for name, arrays in chosen.items() if arrays is not None}
    write_store(folder, a_manifest(), kept, seen_hashes(plans, ()))
    return folder
