"""Fleet files whose pools share nodes."""

import random
from pathlib import Path

import pytest

from concertmaster.compose import build_fleet
from concertmaster.config import FleetFile
from concertmaster.config_files import load_fleet
from concertmaster.core.errors import InputError
from concertmaster.core.fleet import Fleet, Readiness, Replica
from concertmaster.core.scheduler import Scheduler
from concertmaster.policies.catalog import policy

NODE = '[[nodes]]\nname = "n"\ngpu = "a100-40g"\ngpus = 1\nhost_gb = 64\n'


def pool(name: str, model: str = "qwen2.5-7b-instruct", more: str = "") -> str:
    facts = f'name = "{name}"\nmodel = "{model}"\ngpu = "a100-40g"\n'
    return f'[[pools]]\n{facts}nodes = ["n"]\n{more}\n'


def loaded(folder: Path, text: str) -> FleetFile:
    path = folder / "fleet.toml"
    path.write_text(text)
    return load_fleet(path)


def built(folder: Path, text: str) -> Fleet:
    return build_fleet(loaded(folder, text), name="fleet")


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(InputError) as refused:
        built(folder, text)
    return str(refused.value).replace(str(folder) + "/", "")


def replicas(folder: Path, text: str) -> dict[str, Replica]:
    return {str(one.replica_id): one for one in built(folder, text).build()}


def test_pools_that_name_a_node_share_its_memory(tmp_path: Path) -> None:
    text = NODE + pool("a") + pool("b", more='state = "sleeping"') + pool("c", more='state="disk"')

    found = replicas(tmp_path, text)

    a, b, c = (found[name] for name in ("a-0", "b-0", "c-0"))
    memory = a.memory
    assert memory is not None
    assert memory is b.memory is c.memory
    memory.validate()
    assert a.holding().weights_bytes == a.pool.model.weights_bytes
    assert a.kv.capacity_blocks * a.pool.block_tokens == 4096
    assert (b.holding().hbm_bytes, b.holding().host_bytes) == (
        500_000_000,
        b.pool.model.weights_bytes,
    )
    held = a.holding().hbm_bytes + b.holding().hbm_bytes
    assert memory.free_hbm_bytes == int(40 * 1024**3 * 0.9) - held
    assert a.reach_blocks > 100 * a.kv.capacity_blocks / 16
    assert c.readiness is Readiness.DISK
    assert c.reach_blocks < c.pool.kv_blocks, "what others hold is not in reach"


def test_a_pool_that_names_no_node_stays_off_shared_ones(tmp_path: Path) -> None:
    apart = '[[pools]]\nname = "z"\nmodel = "qwen2.5-7b-instruct"\ngpu = "a100-40g"\n'

    problem = refusal(tmp_path, NODE + pool("a") + apart)

    assert problem.startswith("fleet: pools.z: no node has 1 free a100-40g for replica 0")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            pool("a").replace('["n"]', '["m"]'),
            'fleet.toml: pools[0].nodes: unknown node "m" (known: n)',
        ),
        (
            pool("a").replace("a100-40g", "h100"),
            (
                "fleet.toml: pools[0].nodes: expected all GPUs of n (1 x a100-40g), found 1 x h100 "
                "in a (models that share a node span all its GPUs; write a larger machine as "
                "several nodes)"
            ),
        ),
        (
            pool("a", more="replicas = 2"),
            (
                "fleet.toml: pools[0].replicas: expected one replica a node (1), found 2 "
                "(leave it out)"
            ),
        ),
        (
            pool("a", "qwen2.5-32b-instruct"),
            "fleet: pools.a.nodes: it needs 69.8 GB, n has 38.7 (name a node with more GPUs)",
        ),
        (
            pool("a", "qwen2.5-14b-instruct") + pool("b"),
            (
                "fleet: nodes.n: expected at least 52.3 GB of GPU memory for what lies there at "
                'the start, found 38.7 GB (set state = "disk" for some of its pools)'
            ),
        ),
        (
            pool("a", "qwen2.5-32b-instruct").replace("32b", "14b")
            + "".join(pool(f"b{i}", more='state = "host"') for i in range(5)),
            (
                "fleet: nodes.n: expected at least 76.2 GB of RAM (host_gb) for what lies there at "
                'the start, found 64.0 GB (set state = "disk" for some of its pools)'
            ),
        ),
    ],
)
def test_what_cannot_be_shared_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    assert refusal(tmp_path, NODE + text) == problem


def served(folder: Path, text: str) -> Fleet:
    return build_fleet(loaded(folder, text), name="fleet", served=True)


def test_engines_that_are_served_keep_the_kv_that_they_were_started_with(tmp_path: Path) -> None:
    lines = 'kv_blocks = 2000\nendpoints = ["http://x:1"]'
    beside = f'{lines}\nstate = "sleeping"'
    fleet = served(tmp_path, NODE + pool("a", more=lines) + pool("b", more=beside))
    scheduler = Scheduler(fleet, policy("fcfs/expected"), random.Random(0))

    for replica in scheduler.replicas.values():
        footprint = replica.pool.footprint
        assert footprint is not None
        assert replica.kv.capacity_blocks == footprint.least_kv_blocks == 2000
        assert replica.pool.kv_blocks == replica.reach_blocks == 2000


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (
            "",
            (
                "fleet: pools.a.kv_blocks: expected what the engines were started with, as nodes "
                "are shared; found nothing (add kv_blocks = NUMBER)"
            ),
        ),
        ("kv_blocks = 200000", "fleet: pools.a.nodes: it needs "),
    ],
)
def test_who_serves_shared_nodes_says_what_kv_engines_have(
    tmp_path: Path, lines: str, problem: str
) -> None:
    with pytest.raises(InputError) as refused:
        served(tmp_path, NODE + pool("a", more=lines))

    assert str(refused.value).startswith(problem)
