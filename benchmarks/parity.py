"""Is the simulator right? The same workflows through it and through a live gateway.

    python benchmarks/parity.py [-w WORKLOAD] [--workflows 500] [--policy least-tokens+las]

Prints the makespans of both and the order of dispatches: of all pairs of calls that the
simulator dispatches at least a given time apart, the share that the gateway dispatched in
the same order.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from msgspec.structs import replace

from concertmaster import compose, local
from concertmaster.core.actions import Dispatch
from concertmaster.demo import fleet_file
from concertmaster.gateway.replay import Replay
from concertmaster.observe.report import build_report
from concertmaster.observe.trace import Header, TraceReader, TraceWriter
from concertmaster.workload.arrivals import ArrivalSpec
from concertmaster.workload.load import load_workloads

APART_S = (0.0, 0.1, 0.5, 2.0)


def dispatched_s(trace: Path) -> dict[str, float]:
    """Instant of each call's first dispatch, by id."""
    found: dict[str, float] = {}
    for entry in TraceReader(trace).entries():
        for action in entry.actions:
            if isinstance(action, Dispatch):
                found.setdefault(action.request_id, entry.now_s)
    return found


def same_order(simulated: dict[str, float], live: dict[str, float], apart_s: float) -> float:
    """Share of pairs at least ``apart_s`` apart in simulation that are in that order live."""
    names = sorted(simulated, key=lambda name: (simulated[name], name))
    agree = pairs = 0
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            if simulated[second] - simulated[first] >= apart_s:
                pairs += 1
                agree += live[first] <= live[second]
    return agree / pairs if pairs else 1.0


def main() -> int:
    """Run both and compare; exit code 1 if a makespan differs by more than a tenth."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("-w", "--workload", nargs="*", default=["sample"])
    parser.add_argument("--workflows", type=int, default=500)
    parser.add_argument("--policy", default="least-tokens+las")
    parser.add_argument("--rate", type=float, help="workflows a second; default: as recorded")
    parser.add_argument("--speedup", type=float, default=4.0)
    options = parser.parse_args()
    file = replace(fleet_file(), emulator=replace(fleet_file().emulator, speedup=options.speedup))
    fleet = compose.build_fleet(file, name="local")
    workload = load_workloads(
        options.workload,
        seed=0,
        arrivals=ArrivalSpec.parse("poisson") if options.rate else None,
        rate_rps=options.rate,
        limit=options.workflows,
    )
    with tempfile.TemporaryDirectory() as folder:
        traces = {name: Path(folder) / f"{name}.trace.jsonl" for name in ("simulated", "live")}
        header = Header(trace=1, fleet="local", policy=options.policy, seed=0)
        with TraceWriter(traces["simulated"], header) as observe:
            simulated = build_report(
                compose.simulate(fleet, workload, options.policy, seed=0, observe=observe)
            )
        with (
            local.engines(file) as urls,
            local.gateway(file, urls, options.policy, trace=traces["live"]) as url,
        ):
            player = Replay(url=url, workload=workload, speedup=options.speedup)
            live = build_report(compose.run_loop(player.run(policy=options.policy, seed=0)))
        orders = {name: dispatched_s(trace) for name, trace in traces.items()}
    print(
        f"{len(workload)} workflows, {workload.requests:,} calls, policy {options.policy}, "
        f"{options.speedup:g} x real time\n"
    )
    print(f"{'':<18}{'simulated':>10}{'live':>10}{'live / simulated':>18}")
    worst = 0.0
    for group, figure in (
        ("makespan_s", "p50"),
        ("makespan_s", "p95"),
        ("makespan_s", "mean"),
        ("ttft_s", "p50"),
    ):
        a, b = simulated[group][figure], live[group][figure]
        print(f"{group + ' ' + figure:<18}{a:>10.2f}{b:>10.2f}{b / a:>18.3f}")
        if group == "makespan_s" and figure != "mean":
            worst = max(worst, abs(b / a - 1))
    for kind in ("completed", "rejected", "failed"):
        print(f"{kind:<18}{simulated['requests'][kind]:>10,}{live['requests'][kind]:>10,}")
    print("\nsame dispatch order, of pairs apart by at least")
    for apart_s in APART_S:
        share = same_order(orders["simulated"], orders["live"], apart_s)
        print(f"{apart_s:>8.1f} s {100 * share:>8.2f} %")
    return int(worst > 0.1)


if __name__ == "__main__":
    sys.exit(main())
