"""Several workers for one scheduler: do they decide as well as one process, and what do they cost?

    python benchmarks/workers.py quality [--rounds 5] [--workflows 150] [--rate 1.2]
    python benchmarks/workers.py shards  [--seeds 5]
    python benchmarks/workers.py cost    [--seconds 3]

``quality`` plays the same workflows through a live gateway over emulated engines, in one process
and with two workers in turn, and prints the 95th percentile of makespans with its 95 % interval
over rounds. ``shards`` simulates the design that was not chosen: as many schedulers as workers,
each with its share of the replicas and of the workflows. ``cost`` loads both with wrk and prints
the CPU that each process takes a call, from /proc.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace as changed
from pathlib import Path

import msgspec

from concertmaster import compose, local
from concertmaster.config import FleetFile
from concertmaster.demo import fleet_file
from concertmaster.gateway.replay import Replay
from concertmaster.observe.report import build_report
from concertmaster.policies.catalog import policy as policy_named
from concertmaster.workload.arrivals import ArrivalSpec
from concertmaster.workload.load import load_workloads
from concertmaster.workload.plan import Workload
from concertmaster.workload.records import RunRecords

HERE = Path(__file__).parent
POLICY = "least-tokens+las"
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 8: 2.36, 10: 2.26}
"""Student's t for a 95 % interval, by the count of values."""

UPSTREAM_PORT = 9941
BODY = '{"model":"qwen2.5-7b-instruct","messages":[{"role":"user","content":"%s"}]%s}'


def sample(rate_rps: float, workflows: int, seed: int) -> Workload:
    """Return the sample at a rate of workflows a second."""
    arrivals = ArrivalSpec.parse("poisson")
    return load_workloads(
        ["sample"], seed=seed, arrivals=arrivals, rate_rps=rate_rps, limit=workflows
    )


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and half of its 95 % interval."""
    count = len(values)
    spread = statistics.stdev(values) / count**0.5 if count > 1 else 0.0
    return statistics.mean(values), T95.get(count, 2.0) * spread


@contextmanager
def serving(text: str, folder: Path) -> Iterator[tuple[str, int]]:
    """Run ``concertmaster serve`` on a fleet file; yields its address and process."""
    path = folder / "fleet.toml"
    path.write_text(text)
    log = (folder / "log").open("a")
    process = subprocess.Popen(  # noqa: S603  # ours
        [
            str(Path(sys.executable).parent / "concertmaster"),
            "serve",
            "-c",
            str(path),
            "--port",
            "0",
        ],
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().partition("/v1 ")[0], process.pid
    finally:
        process.terminate()
        process.wait(60)
        log.close()


# Quality, live


def served_toml(file: FleetFile, urls: dict[str, str], workers: int) -> str:
    """Write the demo's fleet with the addresses of engines that run."""
    lines = ['name = "local"', "[gateway]", f'policy = "{POLICY}"', 'models = "recent"']
    lines += [f"workers = {workers}", "[emulator]", f"speedup = {file.emulator.speedup}"]
    for pool in file.pools:
        mine = [urls[f"{pool.name}-{number}"] for number in range(pool.count)]
        lines += ["[[pools]]", f'name = "{pool.name}"', f'model = "{pool.model}"']
        lines += [f'gpu = "{pool.gpu}"', f"max_sequences = {pool.max_sequences}"]
        lines += [f"endpoints = {mine}".replace("'", '"')]
    return "\n".join(lines)


def played(workers: int, file: FleetFile, workload: Workload, folder: Path) -> RunRecords:
    """Play a workload through a gateway; its ledgers must be empty afterwards."""
    with ExitStack() as stack:
        urls = stack.enter_context(local.engines(file))
        named = {str(name): url for name, url in urls.items()}
        toml = served_toml(file, named, workers)
        url, _ = stack.enter_context(serving(toml, folder))
        player = Replay(url=url, workload=workload, speedup=file.emulator.speedup)
        records = compose.run_loop(player.run(policy=POLICY, seed=0))
        time.sleep(1.0)
        with urllib.request.urlopen(f"{url}/state", timeout=5) as reply:  # noqa: S310  # loopback
            state = msgspec.json.decode(reply.read())
        left = [one["running"] for one in state["replicas"]] + [state["waiting"]]
        assert not any(left), state
        assert all(one["kv_reserved_ratio"] == 0 for one in state["replicas"]), state
    return records


def quality(options: argparse.Namespace) -> None:
    """Print makespans of one process and of two workers."""
    file = msgspec.structs.replace(
        fleet_file(),
        emulator=msgspec.structs.replace(fleet_file().emulator, speedup=options.speedup),
    )
    figures: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as name:
        for number in range(options.rounds):
            workload = sample(options.rate, options.workflows, number)
            for workers in (1, 2) if number % 2 else (2, 1):
                report = build_report(played(workers, file, workload, Path(name)))
                figures[workers].append({**report["makespan_s"], **report["requests"]})
                print(f"round {number}, {workers}: {figures[workers][-1]}", file=sys.stderr)
    calls = sum(one["total"] for one in figures[1])
    print(f"{options.rounds} rounds of {options.workflows} workflows, {calls:,} calls each way")
    for figure in ("p50", "p95", "mean"):
        one, two = ([row[figure] for row in figures[workers]] for workers in (1, 2))
        ratio, within = interval([b / a for a, b in zip(one, two, strict=True)])
        print(
            f"makespan {figure:<5} one process {statistics.mean(one):7.2f} s   "
            f"two workers {statistics.mean(two):7.2f} s   ratio {ratio:.3f} +- {within:.3f}"
        )
    for workers, rows in figures.items():
        lost = sum(row["rejected"] + row["failed"] for row in rows)
        print(f"{workers}: {sum(row['completed'] for row in rows):,} answered, {lost:,} not")


# Shards, simulated


def sharded(file: FleetFile, workload: Workload, shards: int, seed: int) -> RunRecords:
    """Simulate several schedulers, each with its share of replicas and of workflows."""
    calls, workflows, longest_s = [], [], 0.0
    for shard in range(shards):
        pools = [
            msgspec.structs.replace(pool, replicas=pool.count // shards) for pool in file.pools
        ]
        mine = tuple(
            one for one in workload if zlib.crc32(one.workflow_id.encode()) % shards == shard
        )
        fleet = compose.build_fleet(msgspec.structs.replace(file, pools=pools), name="share")
        part = changed(workload, workflows=mine)
        records = compose.simulate(fleet, part, POLICY, seed=seed)
        calls += records.calls
        workflows += records.workflows
        longest_s = max(longest_s, records.duration_s)
    return RunRecords(
        policy=POLICY,
        seed=seed,
        calls=calls,
        workflows=workflows,
        gauges=None,
        decision_s=[],
        duration_s=longest_s,
        wall_s=0.0,
    )


def shards(options: argparse.Namespace) -> None:
    """Print makespans by the count of schedulers."""
    text = """
[[pools]]
name = "small"
model = "qwen2.5-1.5b-instruct"
gpu = "a40"
replicas = 8
max_sequences = 4
[[pools]]
name = "medium"
model = "qwen2.5-7b-instruct"
gpu = "a40"
replicas = 8
max_sequences = 4
"""
    file = msgspec.convert(tomllib.loads(text), FleetFile)
    policy_named(POLICY)
    print("16 replicas; ratio of the same seed's makespans to those under one scheduler")
    for rate in (2.0, 4.0, 5.0):
        found: dict[int, list[dict[str, float]]] = {}
        for seed in range(options.seeds):
            workload = sample(rate, 1500, seed)
            for count in (1, 2, 4, 8):
                report = build_report(sharded(file, workload, count, seed))
                found.setdefault(count, []).append(report["makespan_s"])
        for count, rows in found.items():
            line = [f"{rate:g} workflows/s, {count} schedulers"]
            for figure in ("p50", "p95"):
                ratios = [a[figure] / b[figure] for a, b in zip(rows, found[1], strict=True)]
                mean, within = interval(ratios)
                value = statistics.mean(row[figure] for row in rows)
                line.append(f"{figure} {value:7.2f} s, ratio {mean:.3f} +- {within:.3f}")
            print("   ".join(line))


# Cost


def children(pid: int) -> dict[str, int]:
    """Return the processes of a gateway by what they do."""
    found = {"gateway": pid}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat, words = (folder / "stat").read_text(), (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if int(stat.rpartition(")")[2].split()[1]) != pid:
            continue
        if b"workers.worker" in words:
            found[f"worker {words.split(bytes(1))[-2].decode()}"] = int(folder.name)
        elif b"commands_serve" in words:
            found["scheduler"] = int(folder.name)
    return found


def cpu_s(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wrk(url: str, body: str, seconds: float, connections: int) -> tuple[int, int]:
    """Load an address; return the calls that were answered, and errors."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(f"wrk.method='POST'\nwrk.body='{body}'\n")
        script.write("wrk.headers['content-type']='application/json'\n")
        script.write("done=function(s,l,r) io.write('N '..s.requests..' '..s.errors.status..'\\n')")
        script.write(" end\n")
        script.flush()
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:.0f}s", "-s", script.name]
        done = subprocess.run(  # noqa: S603  # the load generator
            [*command, f"{url}/v1/chat/completions"], capture_output=True, text=True, check=True
        )
    answered, errors = done.stdout.rpartition("N ")[2].split()
    return int(answered), int(errors)


def cost(options: argparse.Namespace) -> None:
    """Print CPU a call, by process."""
    prompts = {"json": BODY % ("x" * 500, ""), "stream": BODY % ("x" * 500, ',"stream":true')}
    prompts["json of 20 kB"] = BODY % ("word " * 4000, "")
    fleet = (HERE / "gateway/fleet.toml").read_text().replace("9901", str(UPSTREAM_PORT))
    upstream = subprocess.Popen(  # noqa: S603  # ours
        [sys.executable, str(HERE / "gateway/upstream.py"), str(UPSTREAM_PORT)]
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            for models in ("recent", "default"):
                for workers in (1, 2):
                    head = f'[gateway]\nworkers = {workers}\nmodels = "{models}"\n'
                    text = fleet.replace("[gateway]\n", head)
                    with serving(text, Path(folder)) as (url, pid):
                        for kind, body in prompts.items():
                            _cost_of(url, pid, f"{models}, {kind}, {workers}", body, options)
    finally:
        upstream.terminate()
        upstream.wait()


def _cost_of(url: str, pid: int, what: str, body: str, options: argparse.Namespace) -> None:
    wrk(url, body, 1, 16)
    parts = children(pid)
    before = {name: cpu_s(one) for name, one in parts.items()}
    calls, errors = wrk(url, body, options.seconds, options.connections)
    used = {name: 1e6 * (cpu_s(one) - before[name]) / calls for name, one in parts.items()}
    shown = "   ".join(
        f"{name} {micro:.0f} us" for name, micro in sorted(used.items()) if micro > 1
    )
    print(f"{what:<30}{calls / options.seconds:8,.0f} calls/s   {shown}   {errors} errors")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("part", choices=["quality", "shards", "cost"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workflows", type=int, default=150)
    parser.add_argument("--rate", type=float, default=1.2, help="workflows a second")
    parser.add_argument("--speedup", type=float, default=4.0, help="of the emulated engines")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--connections", type=int, default=32)
    options = parser.parse_args()
    {"quality": quality, "shards": shards, "cost": cost}[options.part](options)


if __name__ == "__main__":
    main()
