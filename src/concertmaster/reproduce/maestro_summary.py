"""Claims, tables and plots of the study of memory."""

from collections.abc import Mapping, Sequence

from concertmaster.observe.compare import mean
from concertmaster.observe.plot_kinds import Line, LinePlot, Plot, Span, StatePlot, TimelinePlot
from concertmaster.reproduce import maestro_world as world
from concertmaster.reproduce.maestro_arms import (
    ALONE,
    EDF,
    EDF_EXPECTED,
    FCFS,
    NO_FETCH,
    ORACLE,
    OURS,
    PAGED,
    RIVALS,
    WITHOUT,
    WORST,
)
from concertmaster.reproduce.maestro_world import (
    BRIEF,
    CONTENTION,
    EIGHT,
    SIXTEEN,
    THREE,
    TIGHT,
    TWENTY_FOUR,
    TWO,
)
from concertmaster.reproduce.study import Cell, Claim, Estimate, Results, Summary, Table

LOW, MEDIUM, HIGH = CONTENTION.values()
RESERVED, USED, PREEMPTIONS = "kv.reserved_gb_s", "kv.used_gb_s", "kv.preemptions"
MET, COMPLETED_RPS = "workflows.met_ratio", "completed_rps"
MET_PEOPLE, MET_PROGRAMS = "interactive.met_ratio", "batch.met_ratio"
WAIT_PEOPLE = "by_class.interactive.queue_wait_s.mean"
WAIT_PROGRAMS = "by_class.batch.queue_wait_s.mean"
P95_PROGRAMS, P95_ALL = "batch.p95_s", "all.p95_s"
STOPS, COLD, WAKES = "fleet.replica_stops", "weights.cold_starts", "weights.wakes"

SHOWN = {
    "attained": MET,
    "people": MET_PEOPLE,
    "programs": MET_PROGRAMS,
    "wait of people, s": WAIT_PEOPLE,
    "wait of programs, s": WAIT_PROGRAMS,
    "P95 of people, s": "interactive.p95_s",
    "P95 of programs, s": P95_PROGRAMS,
    "workflows/s": COMPLETED_RPS,
}
MEMORY = {
    "KV reserved, GB s": RESERVED,
    "KV used, GB s": USED,
    "reserved for people, GB s": "by_class.interactive.kv_reserved_gb_s",
    "reserved for programs, GB s": "by_class.batch.kv_reserved_gb_s",
    "preemptions": PREEMPTIONS,
    "put away": STOPS,
    "woken": WAKES,
    "cold starts": COLD,
    "waits without a replica": "absent_ratio",
    "models served": "served_models",
}


def summary(results: Results) -> Summary:
    """Sum up all that was run."""
    return Summary(
        claims=(
            *_kv(results),
            *_promises(results),
            *_weights(results),
            *_clusters(results),
        ),
        tables=tuple(
            table
            for setting in results.settings
            for load in results.loads
            if _arms(results, setting, load)
            for table in (
                _table("Promises", SHOWN, results, setting, load),
                _table("Memory", MEMORY, results, setting, load),
            )
        ),
        plots=_plots(results),
        notes=(
            "contention is low, medium or high at "
            + ", ".join(f"{load:g}" for load in CONTENTION.values())
            + " workflows/s for each machine of eight GPUs",
            "a workflow that lost a call counts as missed, and as 3,600 s in P95",
            "waits are of calls that were dispatched",
        ),
    )


def _values(
    results: Results, figure: str, arm: str, *, setting: str = EIGHT, load: float = HIGH
) -> list[float]:
    return results.values(figure, setting=setting, arm=arm, load=load)


def _ratio(
    results: Results,
    figure: str,
    mine: str,
    theirs: str,
    *,
    setting: str = EIGHT,
    load: float = HIGH,
) -> list[float]:
    return results.ratios(figure, mine, theirs, settings=[setting], loads=[load])


def _less(results: Results, figure: str, mine: str, theirs: str) -> list[float]:
    return results.differences(figure, mine, theirs, settings=[EIGHT], loads=[HIGH])


# Claims.


def _kv(results: Results) -> tuple[Claim, ...]:
    """KV reserved against promising the cap; preemptions and throughput against paging."""
    return (
        *(
            Claim.over_seeds(
                name,
                f"KV reserved, GB s, {OURS} / {WORST}, {what}",
                _ratio(results, RESERVED, OURS, WORST, setting=setting, load=MEDIUM),
                "at most",
                1 - 0.672,
                note=_shares(results, setting),
            )
            for name, what, setting in (
                ("kv-reserved", "caps of 4,096 tokens", EIGHT),
                ("kv-reserved-tight", "caps as tight as recorded answers allow", TIGHT),
            )
        ),
        Claim.over_seeds(
            "kv-preemptions",
            f"preemptions under high contention, {OURS} less {PAGED}",
            _less(results, PREEMPTIONS, OURS, PAGED),
            "at most",
            0.0,
        ),
        Claim.over_seeds(
            "kv-throughput",
            f"workflows/s under high contention, {OURS} / {PAGED}",
            _ratio(results, COMPLETED_RPS, OURS, PAGED),
            "at least",
            1.0,
            by_interval=True,
        ),
    )


def _shares(results: Results, setting: str) -> str:
    """Say what share of what each promises is used."""
    shares = (
        (arm, mean(_ratio_of(results, setting, arm, USED, RESERVED))) for arm in (OURS, WORST)
    )
    return ", ".join(f"{arm} uses {100 * share:.0f} % of it" for arm, share in shares)


def _ratio_of(results: Results, setting: str, arm: str, top: str, bottom: str) -> list[float]:
    pairs = zip(
        _values(results, top, arm, setting=setting, load=MEDIUM),
        _values(results, bottom, arm, setting=setting, load=MEDIUM),
        strict=True,
    )
    return [one / other for one, other in pairs]


def _promises(results: Results) -> tuple[Claim, ...]:
    """Attainment, waits and the price that programs pay, under high contention."""

    def attained(arm: str) -> float:
        return mean(_values(results, MET, arm))

    best = max((EDF, EDF_EXPECTED), key=attained)
    return (
        *(
            Claim.over_seeds(
                name,
                f"attainment under high contention, {OURS} less {rival}{what}",
                _less(results, MET, OURS, rival),
                "at least",
                least,
            )
            for name, rival, what, least in (
                ("slo-edf", EDF, "", 0.236),
                ("slo-edf-best", best, ", the best form of edf", 0.236),
                ("slo-oracle", ORACLE, "", -0.08),
            )
        ),
        Claim.over_seeds(
            "wait-interactive",
            f"mean wait of people under high contention, {OURS} / {FCFS}",
            _ratio(results, WAIT_PEOPLE, OURS, FCFS),
            "at most",
            1 - 0.848,
        ),
        Claim.over_seeds(
            "batch-p95",
            f"P95 makespan of programs under high contention, {OURS} / {FCFS}",
            _ratio(results, P95_PROGRAMS, OURS, FCFS),
            "at most",
            1.3,
        ),
    )


def _weights(results: Results) -> tuple[Claim, ...]:
    """Sharing against one model a node; swaps; fetching ahead."""

    def briefly(figure: str, arm: str) -> float:
        return results.value(figure, Cell(setting=BRIEF, arm=arm, load=LOW, seed=0))

    return (
        Claim.over_seeds(
            "models-served",
            f"models served on 8 GPUs, {OURS} less {ALONE}",
            [briefly("served_models", OURS) - briefly("served_models", ALONE)],
            "at least",
            1.0,
            note="of 11 that are asked for; of one seed",
        ),
        Claim.over_seeds(
            "shared-p95-8",
            f"P95 makespan on 8 GPUs, low contention, {OURS} / {ALONE}",
            [briefly(P95_ALL, OURS) / briefly(P95_ALL, ALONE)],
            "at most",
            1.0,
            note="what is not served counts as an hour; of one seed",
        ),
        Claim.over_seeds(
            "shared-p95-16",
            f"P95 makespan on 16 GPUs, medium contention, {OURS} / {ALONE}",
            _ratio(results, P95_ALL, OURS, ALONE, setting=SIXTEEN, load=MEDIUM),
            "at most",
            1.0,
        ),
        Claim.over_seeds(
            "put-away",
            f"models put away under high contention, {OURS} / {FCFS}",
            _ratio(results, STOPS, OURS, FCFS),
            "at most",
            1 / 3,
        ),
        Claim.over_seeds(
            "prefetch",
            f"mean wait of people under high contention, {OURS} / {NO_FETCH}",
            _ratio(results, WAIT_PEOPLE, OURS, NO_FETCH),
            "at most",
            1.0,
        ),
    )


def _clusters(results: Results) -> tuple[Claim, ...]:
    """Half of the GPUs 80 ms away, and in the full grid a third 20 and a third 80 ms."""
    pairs = [
        (f"{name}-{said}", far, near, load, said)
        for name, far, near in (("clusters", TWO, SIXTEEN), ("clusters-three", THREE, TWENTY_FOUR))
        for said, load in CONTENTION.items()
        if results.has(setting=far, arm=OURS, load=load)
    ]
    return tuple(
        Claim.over_seeds(
            name,
            f"attainment of people, {said} contention, {far} less {near}",
            [
                there - here
                for there, here in zip(
                    _values(results, MET_PEOPLE, OURS, setting=far, load=load),
                    _values(results, MET_PEOPLE, OURS, setting=near, load=load),
                    strict=True,
                )
            ],
            "at least",
            -0.03,
        )
        for name, far, near, load, said in pairs
    )


# Tables.


def _arms(results: Results, setting: str, load: float) -> list[str]:
    return [arm for arm in results.arms if results.has(setting=setting, arm=arm, load=load)]


def _table(
    title: str, columns: Mapping[str, str], results: Results, setting: str, load: float
) -> Table:
    said = next(name for name, one in CONTENTION.items() if one == load)
    return Table(
        title=f"{title}, {setting}, {said} contention",
        columns=("arm", *columns, "without"),
        rows=tuple(
            (
                arm,
                *(
                    Estimate.of(_values(results, figure, arm, setting=setting, load=load))
                    for figure in columns.values()
                ),
                WITHOUT.get(arm, ""),
            )
            for arm in _arms(results, setting, load)
        ),
    )


# Plots.


def _plots(results: Results) -> Mapping[str, Plot]:
    return {
        "maestro-attainment": LinePlot(
            title="Workflows in time, 8 GPUs",
            x_label="workflows/s for each machine of eight GPUs",
            y_label="share in time",
            panels={
                "all": _lines(results, MET),
                "people": _lines(results, MET_PEOPLE),
                "programs": _lines(results, MET_PROGRAMS),
            },
        ),
        "maestro-memory": TimelinePlot(
            title="KV promised and used under high contention, 8 GPUs, first seed",
            bands={
                f"{arm}, GB": [_timeline(results, arm, what) for what in ("reserved", "used")]
                for arm in (OURS, WORST, PAGED)
            },
        ),
        **{
            f"maestro-weights-{name}": _weights_map(results, arm)
            for name, arm in (("ours", OURS), ("lru-swap", FCFS))
        },
    }


def _lines(results: Results, figure: str) -> list[Line]:
    return [_line(results, arm, figure) for arm in RIVALS]


def _line(results: Results, arm: str, figure: str) -> Line:
    loads = [*CONTENTION.values()]
    points = [Estimate.of(_values(results, figure, arm, load=load)) for load in loads]
    means, halves = [one.mean for one in points], [one.half for one in points]
    return Line(label=arm, x=loads, y=means, half=halves)


def _series(results: Results, figure: str, arm: str) -> Sequence[float]:
    return results.series(figure, setting=EIGHT, arm=arm, load=HIGH)[0]


def _timeline(results: Results, arm: str, what: str) -> Line:
    times_s = _series(results, "memory_at_s", arm)
    return Line(label=what, x=times_s, y=_series(results, f"memory_{what}_gb", arm))


def _weights_map(results: Results, arm: str) -> StatePlot:
    """Which model served where: a row for each model on each node on which it ever did."""
    replicas = [*world.fleet_of(EIGHT).replicas.values()]
    rows: dict[str, list[Span]] = {}
    columns = (
        _series(results, name, arm) for name in ("served_replica", "served_from_s", "served_to_s")
    )
    for place, begin_s, end_s in zip(*columns, strict=True):
        pool, node, _ = replicas[int(place)]
        span = Span(start_s=begin_s, end_s=end_s, state=pool.pool_id)
        rows.setdefault(f"{node.node_id} {pool.pool_id}", []).append(span)
    return StatePlot(
        title=f"Weights in service, {arm}, 8 GPUs, high contention, first seed",
        rows=dict(sorted(rows.items())),
        states=[pool.pool_id for pool in world.fleet_of(EIGHT).pools],
    )
