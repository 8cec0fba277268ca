"""Fleet and engine files: what is wrong is said in one line, with its place and a remedy."""

from dataclasses import replace
from pathlib import Path

import pytest

from concertmaster.compose import build_fleet, commands, endpoints
from concertmaster.config import EngineFile, FleetFile
from concertmaster.config_files import load_engine, load_fleet
from concertmaster.core.errors import InputError
from concertmaster.core.fleet import Fleet, Readiness, ReplicaId, ScalingLimits
from concertmaster.core.request import ModelName
from concertmaster.gateway.server import controls_of
from concertmaster.physics.hardware import gpu, ready_s
from concertmaster.physics.models import model_card

POOL = """
[[pools]]
name = "a"
model = "llama-3.1-8b-instruct"
gpu = "a100-80g"
"""
POOL_KEYS = (
    "api_key_env, block_tokens, cluster, command, control, endpoints, engine, gpu, kv_blocks, "
    "least_replicas, max_batch_tokens, max_sequences, memory_ratio, model, name, nodes, "
    "prefix_caching, replicas, scheduling, served_name, serves, state, stopped, tensor_parallel"
)
CLUSTER_KEYS = "known: name, network_ms"
NODE_KEYS = "known: cluster, gpu, gpus, host_gb, memory_ratio, name"
FILE_KEYS = "known: clusters, emulator, gateway, name, nodes, pools, scaling"
ENGINES = "known: llama.cpp, ollama, openai, sglang, vllm"
STATES = "known: disk, host, remote, running, sleeping"
MOST = "max_sequences (256)"
STEP_HINT = "each sequence decodes a token a step"
STOPPED_HINT = "choose sleeping, host, disk or remote"
GPUS_HINT = "it must hold what runs at the start, and least_replicas of each pool and one more"
SCALING_KEYS = "known: cooldown_s, gpus, most_changes"
COUNT_HINT = "leave replicas out to count endpoints"
GATEWAY_KEYS = (
    "admin, admin_key_env, body_timeout_s, breaker_error_ratio, breaker_failures, "
    "breaker_pause_s, chunk_timeout_s, connect_timeout_s, feedback, first_byte_timeout_s, "
    "forecast_budget_ms, head_timeout_s, health_interval_s, hold_s, host, keys, log, log_calls, "
    "max_body_mb, models, most_connections, most_lag_ms, most_open, otel_url, policy, port, "
    "receipts, receipts_kept, redact_labels, retry_ratio, seed, tls_cert, tls_key, "
    "total_timeout_s, window_s, workers"
)
FAULTS = ("[faults]\nstall = 1", "[faults]\nerror_ratio = 2.0")
EXAMPLES = sorted((Path(__file__).parents[1] / "examples" / "fleets").glob("*.toml"))


def loaded(folder: Path, text: str) -> FleetFile:
    path = folder / "fleet.toml"
    path.write_text(text)
    return load_fleet(path)


def built(folder: Path, text: str) -> Fleet:
    return build_fleet(loaded(folder, text), name="fleet")


def refusal(folder: Path, text: str) -> str:
    """The message for a fleet file, without the folder."""
    with pytest.raises(InputError) as refused:
        built(folder, text)
    return str(refused.value).replace(f"{folder}/", "")


# What is right.


def test_the_least_fleet_file_is_one_pool(tmp_path: Path) -> None:
    fleet = built(tmp_path, POOL)

    (pool,) = fleet.pools
    assert list(fleet.replicas) == ["a-0"]
    assert (fleet.name, fleet.gpus) == ("fleet", 1)
    assert (pool.model.name, pool.gpu, pool.tensor_parallel) == (
        *("llama-3.1-8b-instruct", "a100-80g"),
        1,
    )
    assert pool.model.context_tokens == model_card("llama-3.1-8b-instruct").context_tokens
    assert 100_000 < pool.kv_tokens < 600_000
    assert pool.curve.step_s(1, 1000) > 0


def test_every_key_of_a_fleet_file_reaches_its_place(tmp_path: Path) -> None:
    text = """
        name = "mine"
        [[clusters]]
        name = "east"
        [[clusters]]
        name = "west"
        network_ms = 40
        [[nodes]]
        name = "n1"
        gpu = "h100"
        gpus = 8
        cluster = "west"
        [[pools]]
        name = "a"
        model = "llama-3-70b-instruct"
        gpu = "h100"
        replicas = 2
        tensor_parallel = 4
        cluster = "west"
        state = "sleeping"
        kv_blocks = 1000
        block_tokens = 32
        max_batch_tokens = 4096
        max_sequences = 64
        scheduling = "priority"
        prefix_caching = false
    """

    fleet = built(tmp_path, text)

    (pool,) = fleet.pools
    assert fleet.name == "mine"
    assert (pool.kv_blocks, pool.block_tokens, pool.kv_tokens) == (1000, 32, 32_000)
    assert (pool.max_batch_tokens, pool.max_sequences) == (4096, 64)
    assert (pool.priority_scheduling, pool.prefix_caching) == (True, False)
    for _, node, state in fleet.replicas.values():
        assert (node.node_id, node.cluster.network_s, state) == ("n1", 0.04, Readiness.SLEEPING)


def test_a_model_goes_by_the_name_that_it_is_served_under(tmp_path: Path) -> None:
    plain = built(tmp_path, POOL).pools[0]
    ours = built(tmp_path, POOL + 'served_name = "team/ours"').pools[0]

    assert ours.model == replace(plain.model, name=ModelName("team/ours"))
    assert (ours.curve, ours.kv_blocks) == (plain.curve, plain.kv_blocks)


def test_scaling_keeps_one_of_what_runs_and_stops_to_where_the_rest_lies(tmp_path: Path) -> None:
    asleep = POOL.replace('"a"', '"z"') + 'state = "sleeping"\n'
    said = POOL.replace('"a"', '"s"') + 'replicas = 2\nstopped = "host"\nleast_replicas = 2\n'
    limits = "[scaling]\ngpus = 9\nmost_changes = 3\ncooldown_s = 7\n"

    fleet = built(tmp_path, POOL + asleep + said + limits)

    assert [(pool.least_replicas, pool.stopped) for pool in fleet.pools] == [
        (1, Readiness.DISK),
        (0, Readiness.SLEEPING),
        (2, Readiness.HOST),
    ]
    assert fleet.limits == ScalingLimits(gpus=9, most_changes=3, cooldown_s=7.0)
    assert built(tmp_path, POOL).limits == ScalingLimits()


@pytest.mark.parametrize(
    ("lines", "kind", "stopped"),
    [
        ("", "vllm", Readiness.DISK),
        ('endpoints = ["http://x:1"]', "vllm", Readiness.SLEEPING),
        ('endpoints = ["http://x:1"]\nstopped = "disk"', "vllm", Readiness.DISK),
        ('endpoints = ["http://x:1"]\nstate = "host"', "vllm", Readiness.HOST),
        ('endpoints = ["http://x:1"]\ncontrol = "ollama"', "ollama", Readiness.DISK),
        ('endpoints = ["http://x:1"]\ncommand = ["serve"]', "process", Readiness.DISK),
        (
            'endpoints = ["http://x:1"]\ncommand = ["serve"]\ncontrol = "vllm"',
            "vllm",
            Readiness.SLEEPING,
        ),
    ],
)
def test_control_follows_from_the_rest_and_says_where_weights_go(
    tmp_path: Path, lines: str, kind: str, stopped: Readiness
) -> None:
    file = loaded(tmp_path, POOL + lines)

    assert controls_of(file) == {ReplicaId("a-0"): kind}
    assert build_fleet(file, name="fleet").pools[0].stopped is stopped


def test_endpoints_count_replicas_and_keep_their_order(tmp_path: Path) -> None:
    file = loaded(tmp_path, POOL + 'endpoints = ["http://x:1", "http://y:2/"]')

    assert endpoints(file) == {ReplicaId("a-0"): "http://x:1", ReplicaId("a-1"): "http://y:2/"}
    assert list(build_fleet(file, name="f").replicas) == ["a-0", "a-1"]


def test_a_command_is_run_with_the_port_of_its_endpoint(tmp_path: Path) -> None:
    line = 'endpoints = ["http://x:81", "http://x"]\ncommand = ["vllm", "--port={port}"]\n'
    others = POOL.replace('"a"', '"z"') + 'endpoints = ["http://y:1"]'

    assert commands(loaded(tmp_path, POOL + line + others)) == {
        ReplicaId("a-0"): ("vllm", "--port=81"),
        ReplicaId("a-1"): ("vllm", "--port=80"),
    }


def test_replicas_fill_nodes_in_order_and_those_that_sleep_take_no_gpu(tmp_path: Path) -> None:
    nodes = "".join(
        f'[[nodes]]\nname = "n{i}"\ngpu = "a100-80g"\ngpus = {gpus}\n'
        for i, gpus in ((1, 2), (2, 4))
    )
    asleep = POOL.replace('"a"', '"z"') + 'state = "disk"\nreplicas = 3\n'

    fleet = built(tmp_path, POOL + "replicas = 3\ntensor_parallel = 2\n" + asleep + nodes)

    placed = {replica: str(node.node_id) for replica, (_, node, _) in fleet.replicas.items()}
    assert placed == {
        "a-0": "n1",
        "a-1": "n2",
        "a-2": "n2",
        "z-0": "n1",
        "z-1": "n1",
        "z-2": "n1",
    }


def test_weights_split_over_gpus_are_ready_sooner(tmp_path: Path) -> None:
    card, hardware = model_card("llama-3.1-8b-instruct"), gpu("a100-80g")

    (pool,) = built(tmp_path, POOL + "tensor_parallel = 4").pools

    assert pool.ready_s[Readiness.RUNNING] == 0.0
    assert pool.ready_s[Readiness.DISK] == ready_s("disk", card.weights_bytes / 4, hardware)
    ranked = [pool.ready_s[state] for state in Readiness]
    assert ranked == sorted(ranked)


def test_an_engine_file_names_a_model_and_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "engine.toml"
    path.write_text('model = "llama-3.1-8b-instruct"\ngpu = "h100"\n[faults]\nerror_ratio = 0.5\n')

    engine = load_engine(path)

    assert isinstance(engine, EngineFile)
    assert (engine.model, engine.gpu, engine.port) == ("llama-3.1-8b-instruct", "h100", 8100)
    assert engine.faults.error_ratio == 0.5


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_fleet_can_be_built(path: Path) -> None:
    assert build_fleet(load_fleet(path), name=path.stem).replicas


# What is wrong.


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "replcas = 2",
            f'pools[0]: unknown key "replcas" (did you mean "replicas"? known: {POOL_KEYS})',
        ),
        ("zzz = 2", f'pools[0]: unknown key "zzz" (known: {POOL_KEYS})'),
        (
            "[gateway]\nprot = 1",
            f'gateway: unknown key "prot" (did you mean "port"? known: {GATEWAY_KEYS})',
        ),
        (
            "[emulator]\nspeed = 2",
            'emulator: unknown key "speed" (did you mean "speedup"? known: speedup)',
        ),
        (
            '[[nodes]]\nname = "n"\ngpu = "h100"\ngpu_count = 2',
            f'nodes[0]: unknown key "gpu_count" ({NODE_KEYS})',
        ),
        (
            '[[clusters]]\nname = "c"\nnetwork = 2',
            f'clusters[0]: unknown key "network" (did you mean "network_ms"? {CLUSTER_KEYS})',
        ),
        ("replicas = 0", "pools[0].replicas: expected at least 1, found 0"),
        ('replicas = "4"', "pools[0].replicas: expected `int | null`, got `str` (found '4')"),
        ("replicas = true", "pools[0].replicas: expected `int | null`, got `bool` (found True)"),
        ("replicas = 2.5", "pools[0].replicas: expected `int | null`, got `float` (found 2.5)"),
        ("tensor_parallel = 0", "pools[0].tensor_parallel: expected at least 1, found 0"),
        ("block_tokens = 0", "pools[0].block_tokens: expected at least 1, found 0"),
        ("max_sequences = -1", "pools[0].max_sequences: expected at least 1, found -1"),
        ("max_batch_tokens = 0", "pools[0].max_batch_tokens: expected at least 1, found 0"),
        ("kv_blocks = 0", "pools[0].kv_blocks: expected at least 1, found 0"),
        ("block_tokens = 24", "pools[0].block_tokens: expected a divisor of 256, found 24"),
        (
            "max_batch_tokens = 100",
            f"pools[0].max_batch_tokens: expected at least {MOST}, found 100 ({STEP_HINT})",
        ),
        (
            'state = "asleep"',
            f'pools[0].state: unknown state "asleep" (did you mean "sleeping"? {STATES})',
        ),
        (
            'scheduling = "lifo"',
            'pools[0].scheduling: unknown scheduling "lifo" (known: fcfs, priority)',
        ),
        (
            'endpoints = ["http://x:1", "http://x:2"]\ncommand = ["serve"]',
            "pools[0].command: expected {port} in it, as 2 replicas cannot share one",
        ),
        (
            'control = "lama.cpp"',
            (
                'pools[0].control: unknown control "lama.cpp" (did you mean "llama.cpp"? '
                "known: llama.cpp, none, ollama, process, vllm)"
            ),
        ),
        (
            'control = "process"',
            'pools[0].control: a process needs a command (add command = ["PROGRAM", ...])',
        ),
        (
            'control = "ollama"\ncommand = ["ollama", "serve"]',
            (
                'pools[0].control: expected "process", or "vllm" if it can sleep too, '
                'found "ollama" (the gateway starts and ends a command itself)'
            ),
        ),
        (
            'control = "none"\nstate = "disk"',
            (
                'pools[0].control: nothing wakes replicas whose state is "disk" '
                '(set state = "running")'
            ),
        ),
        (
            'control = "ollama"\nstopped = "sleeping"',
            (
                'pools[0].control: "ollama" keeps no weights in RAM once stopped '
                '(set stopped = "disk")'
            ),
        ),
        ("[gateway]\nhold_s = 0", "gateway.hold_s: expected a number above 0, found 0"),
        (
            'stopped = "running"',
            f"pools[0].stopped: a stopped replica does not run ({STOPPED_HINT})",
        ),
        (
            'stopped = "asleep"',
            f'pools[0].stopped: unknown stopped "asleep" (did you mean "sleeping"? {STATES})',
        ),
        ("least_replicas = 2", "pools[0].least_replicas: expected 0 to replicas (1), found 2"),
        ("least_replicas = -1", "pools[0].least_replicas: expected at least 0, found -1"),
        (
            "[scaling]\ngpu = 2",
            f'scaling: unknown key "gpu" (did you mean "gpus"? {SCALING_KEYS})',
        ),
        ("[scaling]\nmost_changes = 0", "scaling.most_changes: expected at least 1, found 0"),
        ("[scaling]\ncooldown_s = -1", "scaling.cooldown_s: expected at least 0, found -1"),
        (
            "replicas = 3\n[scaling]\ngpus = 2",
            f"scaling.gpus: expected at least 3, found 2 ({GPUS_HINT})",
        ),
        (
            'state = "disk"\ntensor_parallel = 2\n[scaling]\ngpus = 1',
            f"scaling.gpus: expected at least 2, found 1 ({GPUS_HINT})",
        ),
        ("[emulator]\nspeedup = 0", "emulator.speedup: expected a number above 0, found 0"),
        ("[gateway]\nwindow_s = -1", "gateway.window_s: expected at least 0, found -1"),
        (
            '[[clusters]]\nname = "c"\nnetwork_ms = -4',
            "clusters[0].network_ms: expected at least 0, found -4",
        ),
        (
            '[[nodes]]\nname = "n"\ngpu = "h100"\ngpus = 0',
            "nodes[0].gpus: expected at least 1, found 0",
        ),
        ("memory_ratio = 1.5", "pools[0].memory_ratio: expected at most 1, found 1.5"),
        ("memory_ratio = 0", "pools[0].memory_ratio: expected a number above 0, found 0"),
        (
            'endpoints = "http://x:1"',
            "pools[0].endpoints: expected `array`, got `str` (found 'http://x:1')",
        ),
        (
            'endpoints = ["http://x:1", "ftp://x:1"]',
            "pools[0].endpoints[1]: expected http://HOST:PORT or https://HOST, found 'ftp://x:1'",
        ),
        (
            'endpoints = ["http://x:1/v1?k"]',
            "pools[0].endpoints[0]: expected http://HOST:PORT or https://HOST, found 'http://x:1/v1?k'",
        ),
        (
            'engine = "vlm"',
            f'pools[0].engine: unknown engine "vlm" (did you mean "vllm"? {ENGINES})',
        ),
        (
            'endpoints = ["http://x:1"]\nreplicas = 2',
            f"pools[0].endpoints: expected one endpoint a replica (2), found 1 ({COUNT_HINT})",
        ),
        ("[gateway]\nport = '8'", "gateway.port: expected `int`, got `str` (found '8')"),
        (
            'cluster = "west"\n[[clusters]]\nname = "wets"',
            'pools: unknown cluster "west" (did you mean "wets"? known: wets)',
        ),
        ('cluster = "west"', 'pools: unknown cluster "west" (known: none)'),
        (
            '[[nodes]]\nname = "n"\ngpu = "h100"\ngpus = 1\ncluster = "x"',
            'nodes: unknown cluster "x" (known: none)',
        ),
        (POOL, 'pools: the name "a" is used twice'),
        (
            '[[clusters]]\nname = "c"\n[[clusters]]\nname = "c"',
            'clusters: the name "c" is used twice',
        ),
    ],
)
def test_a_wrong_line_in_a_pool_is_named(tmp_path: Path, line: str, message: str) -> None:
    assert refusal(tmp_path, POOL + line) == f"fleet.toml: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pools = []", "pools: expected at least one pool, found none"),
        ("", 'missing key "pools"'),
        ("pools = 3", "pools: expected `array`, got `int` (found 3)"),
        ('[[pools]]\nname = "a"', 'pools[0]: missing key "model"'),
        (
            "nam = 'x'\n" + POOL,
            f'unknown key "nam" (did you mean "name"? {FILE_KEYS})',
        ),
        ("a = = 3", "not a TOML file: Invalid value (at line 1, column 5)"),
    ],
)
def test_a_file_that_is_no_fleet_is_refused(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, text) == f"fleet.toml: {message}"


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_bytes(b"\xff\xfe")

    with pytest.raises(InputError, match=r"fleet\.toml: not a TOML file: 'utf-8' codec"):
        load_fleet(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    messages = []
    for path in (tmp_path / "no.toml", tmp_path):
        with pytest.raises(InputError) as refused:
            load_fleet(path)
        messages.append(str(refused.value))

    assert messages == [
        f"{tmp_path}/no.toml: no such file (see examples/fleets/)",
        f"{tmp_path}: expected a TOML file, found a folder",
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("llama-3.1-8b-instruct", "lama-3.1-8b-instruct", 'unknown model "lama-3.1-8b-instruct"'),
        ("a100-80g", "a100-8g", 'unknown gpu "a100-8g"'),
    ],
)
def test_a_model_or_gpu_that_is_not_known_is_refused_with_the_nearest(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    found = refusal(tmp_path, POOL.replace(old, new))

    assert found.startswith(f'fleet.toml: pools[0]: {message} (did you mean "{old}"? known: ')


def test_weights_that_do_not_fit_are_refused_with_what_is_missing(tmp_path: Path) -> None:
    assert refusal(tmp_path, POOL.replace("3.1-8b", "3.1-70b")) == (
        "fleet: pools.a.tensor_parallel: llama-3.1-70b-instruct on 1 x a100-80g needs 134.4 GiB "
        "on each GPU for weights and activations, 72.0 GiB are available "
        "(raise tensor_parallel or choose a larger GPU)"
    )


def test_more_replicas_than_nodes_can_hold_are_refused(tmp_path: Path) -> None:
    node = '[[nodes]]\nname = "n"\ngpu = "a100-80g"\ngpus = 5\n'

    assert refusal(tmp_path, POOL + "replicas = 3\ntensor_parallel = 2\n" + node) == (
        "fleet: pools.a: no node has 2 free a100-80g for replica 2 "
        "(add a [[nodes]] entry or fewer replicas)"
    )


def test_a_node_with_other_gpus_does_not_help(tmp_path: Path) -> None:
    node = '[[nodes]]\nname = "n"\ngpu = "h100"\ngpus = 8\n'

    assert refusal(tmp_path, POOL + node) == (
        "fleet: pools.a: no node has 1 free a100-80g for replica 0 "
        "(add a [[nodes]] entry or fewer replicas)"
    )


def test_a_pool_without_endpoints_cannot_be_served_from(tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        endpoints(loaded(tmp_path, POOL))

    assert str(refused.value) == (
        'fleet: pools[0].endpoints: pool "a" has no endpoints to serve from '
        '(add endpoints = ["http://HOST:PORT", ...])'
    )


def test_an_engine_file_is_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "engine.toml"
    messages = []
    for line in ("speedup = 0", "speedups = 1", "kv_blocks = 0", *FAULTS):
        path.write_text(f'model = "llama-3.1-8b-instruct"\ngpu = "h100"\n{line}\n')
        with pytest.raises(InputError) as refused:
            load_engine(path)
        messages.append(str(refused.value).replace(f"{tmp_path}/", "").partition("? known")[0])

    assert messages == [
        "engine.toml: speedup: expected a number above 0, found 0",
        'engine.toml: unknown key "speedups" (did you mean "speedup"',
        "engine.toml: kv_blocks: expected at least 1, found 0",
        'engine.toml: faults: unknown key "stall" (did you mean "stall_s"',
        "engine.toml: faults: error_ratio must be between 0 and 1, got 2.0",
    ]
