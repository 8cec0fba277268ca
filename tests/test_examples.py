"""Every shipped fleet loads and serves a few workflows; every engine file gives an engine."""

from pathlib import Path

import pytest

from concertmaster.compose import build_emulator, build_fleet, endpoints, simulate
from concertmaster.config_files import load_engine, load_fleet
from concertmaster.core.fleet import Fleet, Readiness
from concertmaster.observe.report import build_report
from concertmaster.workload.load import load_workloads
from concertmaster.workload.plan import Workload

EXAMPLES = Path(__file__).parents[1] / "examples"
FLEETS = {path.stem: path for path in sorted((EXAMPLES / "fleets").glob("*.toml"))}
every_fleet = pytest.mark.parametrize("name", FLEETS)


def fleet(name: str) -> Fleet:
    return build_fleet(load_fleet(FLEETS[name]), name=name)


@pytest.fixture(scope="module")
def sample() -> Workload:
    return load_workloads(["sample"], seed=0, limit=12, rate_scale=10.0)


def test_the_fleets_that_the_docs_promise_are_here() -> None:
    promised = (
        "one-model small-big three-sizes mixed-gpus tight-memory two-clusters local contended "
        "shared-gpus"
    )

    assert set(FLEETS) == set(promised.split())


@every_fleet
@pytest.mark.parametrize("policy", ["round-robin", "least-tokens+las", "prefix-affinity+edf"])
def test_the_sample_completes_on_it(name: str, policy: str, sample: Workload) -> None:
    of = fleet(name)
    shared = any(node.shared for node in of.nodes)
    report = build_report(simulate(of, sample, f"{policy}/expected" if shared else policy, seed=0))

    assert report["workflows"] == {"total": 12, "completed": 12, "rejected": 0, "failed": 0}


@every_fleet
def test_it_bears_the_name_of_its_file_and_says_what_it_is(name: str) -> None:
    assert fleet(name).name == name
    assert FLEETS[name].read_text().startswith("# ")


def test_mixed_gpus_is_one_model_on_unlike_gpus() -> None:
    pools = fleet("mixed-gpus").pools

    assert len({pool.model.name for pool in pools}) == 1
    assert len({pool.gpu for pool in pools}) == len(pools) == 5


def test_tight_memory_has_ten_models_for_eight_gpus_of_40_gb() -> None:
    tight = fleet("tight-memory")
    running = [pool for pool, _, state in tight.replicas.values() if state is Readiness.RUNNING]

    assert len({pool.model.name for pool in tight.pools}) == 10
    assert sum(pool.tensor_parallel for pool in running) == 8
    assert sum(node.gpus for node in tight.nodes) == 8
    assert {node.gpu for node in tight.nodes} == {"a100-40g"}
    states = {state for _, _, state in tight.replicas.values()}
    assert states == {Readiness.RUNNING, Readiness.SLEEPING, Readiness.HOST, Readiness.DISK}


def test_two_clusters_serve_from_both() -> None:
    two = fleet("two-clusters")
    near, far = two.clusters

    assert (near.network_s, far.network_s) == (0.001, 0.06)
    assert {node.cluster for _, node, _ in two.replicas.values()} == {near, far}


def test_local_is_the_fleet_of_the_demo_and_can_be_served() -> None:
    assert FLEETS["local"].resolve().name == "demo.toml"
    assert len(set(endpoints(load_fleet(FLEETS["local"])).values())) == 5


def test_the_engine_file_gives_an_engine_of_the_local_fleet() -> None:
    file = load_engine(EXAMPLES / "engine.toml")
    local = load_fleet(FLEETS["local"])
    pool = next(pool for pool in local.pools if pool.model == file.model)

    assert build_emulator(file).model_name == file.model
    assert f"http://{file.host}:{file.port}" in pool.endpoints
    assert file.speedup == local.emulator.speedup
