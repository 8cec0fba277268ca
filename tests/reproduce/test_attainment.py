"""A yes or no that is certain early is the one of the whole run."""

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import a_plan, a_workload
from concertmaster import compose
from concertmaster.core.request import ServiceClass, WorkflowId
from concertmaster.reproduce.attainment import Enough, attained
from concertmaster.reproduce.draw import draw
from concertmaster.reproduce.fleets import study_fleet
from concertmaster.reproduce.window import middle_of
from concertmaster.workload.load import load_source
from concertmaster.workload.plan import Workload
from concertmaster.workload.records import WorkflowRecord

WITHIN_S = 10.0

Run = Sequence[tuple[float, float | None]]
"""Of each workflow its arrival and its makespan; none if it was lost."""

quarters = st.integers(0, 200).map(lambda count: count / 4)
runs = st.lists(st.tuples(quarters, st.none() | quarters), min_size=2, max_size=40)


def arriving(run: Run) -> Workload:
    return a_workload(*(a_plan(f"{name:03d}", arrival_s=at) for name, (at, _) in enumerate(run)))


def a_record(name: WorkflowId, arrival_s: float, makespan_s: float) -> WorkflowRecord:
    return WorkflowRecord(
        workflow_id=name,
        app="",
        service_class=ServiceClass.INTERACTIVE,
        arrival_s=arrival_s,
        deadline_s=None,
        finished_s=arrival_s + makespan_s,
        outcome="completed",
    )


class Recorded:
    """Plays what is known already, and counts what was looked at."""

    def __init__(self, drawn: Mapping[int, Run]) -> None:
        self.workloads = {seed: arriving(run) for seed, run in drawn.items()}
        self.makespans_s = {
            (seed, f"{name:03d}"): makespan_s
            for seed, run in drawn.items()
            for name, (_, makespan_s) in enumerate(run)
        }
        self.played: list[int] = []
        self.shown = 0

    def __call__(self, workload: Workload, seed: int, enough: Enough) -> None:
        self.played.append(seed)
        asked = [(plan, self.makespans_s[seed, plan.workflow_id]) for plan in workload]
        over = [
            a_record(plan.workflow_id, plan.arrival_s, makespan_s)
            for plan, makespan_s in asked
            if makespan_s is not None
        ]
        for record in sorted(over, key=lambda one: one.finished_s or 0.0):
            self.shown += 1
            if enough(record):
                return

    def says(self, share: float) -> bool:
        return attained(self.workloads, self, within_s=WITHIN_S, share=share)

    def share(self) -> float:
        middles = [
            self.makespans_s[seed, plan.workflow_id]
            for seed, workload in self.workloads.items()
            for plan in middle_of(workload)
        ]
        return sum(one is not None and one <= WITHIN_S for one in middles) / len(middles)


@given(st.lists(runs, min_size=1, max_size=3), st.floats(0.0, 1.0))
def test_the_early_answer_is_that_of_the_whole_run(drawn: list[Run], share: float) -> None:
    play = Recorded(dict(enumerate(drawn)))
    assert play.says(share) == (play.share() >= share)


@pytest.mark.parametrize("makespan_s", [0.5 * WITHIN_S, 2 * WITHIN_S])
def test_runs_end_once_the_answer_is_certain(makespan_s: float) -> None:
    play = Recorded({0: [(float(at), makespan_s) for at in range(100)]})
    assert play.says(0.5) == (makespan_s < WITHIN_S)
    assert play.shown < 60


def test_a_run_that_settles_it_is_the_last() -> None:
    play = Recorded({seed: [(float(at), None) for at in range(20)] for seed in (0, 1)})
    assert not play.says(0.9)
    assert play.played == [0]


@pytest.mark.parametrize("rate_rps", [0.1, 3.0])
def test_a_simulation_ends_at_the_first_yes(rate_rps: float) -> None:
    templates = load_source("research:workflows=20", seed=0).plans
    drawn = draw(templates, workflows=30, rate_rps=rate_rps, seed=0)
    shown: list[WorkflowRecord] = []

    def enough(over: WorkflowRecord) -> bool:
        shown.append(over)
        return len(shown) == 5

    fleet = study_fleet("research-a100-a40", times=1)
    cut = compose.simulate(fleet, drawn, "fcfs", seed=0, enough=enough)
    whole = compose.simulate(fleet, drawn, "fcfs", seed=0)
    assert len(shown) == 5
    assert sum(one.finished_s is not None for one in cut.workflows) == 5
    assert cut.duration_s < whole.duration_s
