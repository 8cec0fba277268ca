"""Gateway overhead beside other routers and nginx: one upstream, one run, in turn.

Each round loads every proxy once, so that a drift of the machine's speed meets all of them.
Figures are medians over rounds; added latency is a proxy's percentile minus the direct one.

    python benchmarks/gateway/compare.py --peers PEERS_VENV

README.md beside this file says how to make PEERS_VENV.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

from concertmaster.state.key_file import KeyFile
from concertmaster.state.keys import new_key

HERE = Path(__file__).parent
NATIVE = HERE.parents[1] / ".native"
"""What ``make native`` compiles; measured as ``compiled`` if it is there."""
UPSTREAM_PORT = 9901
PORTS = {
    "direct": UPSTREAM_PORT,
    "concertmaster": 9902,
    "sglang-router": 9903,
    "litellm": 9904,
    "nginx": 9905,
    "compiled": 9906,
    "vllm-router": 9907,
    "smg": 9908,
    "relay": 9909,
    "scheduling": 9910,
    "everything": 9911,
    "compiled-everything": 9912,
}
VARIANTS: Mapping[str, tuple[str, str]] = {
    "concertmaster": ("least-tokens", ""),
    "relay": ("round-robin", 'models = "recent"'),
    "scheduling": ("least-tokens+las", 'models = "recent"'),
    "everything": ("least-tokens+las", 'keys = "{folder}/keys"\nreceipts = "{folder}/{name}"'),
}
"""Policy and further settings. Lengths seen lately are the least that can be forecast."""

START_TIMEOUT_S = 90.0

NGINX = """
worker_processes 1; daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 4096; }}
http {{
  access_log off; client_body_temp_path {folder}; proxy_temp_path {folder};
  fastcgi_temp_path {folder}; uwsgi_temp_path {folder}; scgi_temp_path {folder};
  upstream engine {{ server 127.0.0.1:{upstream}; keepalive 256; }}
  server {{
    listen 127.0.0.1:{port}; keepalive_requests 10000000;
    location / {{
      proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; tcp_nodelay on;
    }}
  }}
}}
"""
LITELLM = """
model_list:
  - model_name: qwen2.5-7b-instruct
    litellm_params:
      model: openai/qwen2.5-7b-instruct
      api_base: "http://127.0.0.1:{upstream}/v1"
      api_key: none
"""


def commands(peers: Path, folder: Path) -> dict[str, list[str]]:
    """How each server is started; those whose program is missing are left out."""
    (folder / "nginx.conf").write_text(
        NGINX.format(folder=folder, upstream=UPSTREAM_PORT, port=PORTS["nginx"])
    )
    (folder / "litellm.yaml").write_text(LITELLM.format(upstream=UPSTREAM_PORT))
    python = Path(sys.executable)
    compiled = ["/usr/bin/env", f"PYTHONPATH={NATIVE}"]
    all_of_them = {
        "direct": [str(python), str(HERE / "upstream.py"), str(UPSTREAM_PORT)],
        **{name: serve(python, folder, name) for name in VARIANTS},
        "compiled": [*compiled, *serve(python, folder, "concertmaster", "compiled")],
        "compiled-everything": [
            *compiled,
            *serve(python, folder, "everything", "compiled-everything"),
        ],
        "sglang-router": router(peers / "bin/sglang-router", "sglang-router", "launch"),
        "smg": router(peers / "bin/smg", "smg", "launch"),
        "vllm-router": router(peers / "bin/vllm-router", "vllm-router"),
        "litellm": [
            str(peers / "bin/litellm"),
            "--config",
            str(folder / "litellm.yaml"),
            "--host",
            "127.0.0.1",
            "--port",
            str(PORTS["litellm"]),
        ],
        "nginx": ["/usr/sbin/nginx", "-c", str(folder / "nginx.conf"), "-p", str(folder)],
    }
    if not NATIVE.exists():
        del all_of_them["compiled"], all_of_them["compiled-everything"]
    return {name: command for name, command in all_of_them.items() if Path(command[0]).exists()}


def serve(python: Path, folder: Path, variant: str, name: str = "") -> list[str]:
    """Start our gateway on the benchmark's fleet, as a variant has it."""
    name = name or variant
    policy, more = VARIANTS[variant]
    text = (HERE / "fleet.toml").read_text()
    named = text.replace('"least-tokens"', f'"{policy}"')
    settings = more.format(folder=folder, name=f"{name}.sqlite")
    fleet = folder / f"{name}.toml"
    fleet.write_text(named.replace("[gateway]\n", f"[gateway]\n{settings}\n"))
    program = str(python.parent / "concertmaster")
    return [program, "serve", "-c", str(fleet), "--port", str(PORTS[name])]


def router(program: Path, name: str, *command: str) -> list[str]:
    """Start one of SGLang's router and its relatives, with its lightest policy."""
    options = {
        "worker-urls": f"http://127.0.0.1:{UPSTREAM_PORT}",
        "host": "127.0.0.1",
        "port": str(PORTS[name]),
        "policy": "round_robin",
        "log-level": "error",
        "prometheus-port": str(PORTS[name] + 100),
    }
    pairs = [part for key, value in options.items() for part in (f"--{key}", value)]
    return [str(program), *command, *pairs]


def make_key(path: Path) -> str:
    """Make the key that all callers send; who has no keys drops it."""
    key, secret = new_key("benchmark", now_s=0.0)
    with closing(KeyFile(path)) as store:
        store.create(key)
    return secret


@contextlib.contextmanager
def running(command: list[str], port: int, log: Path) -> Iterator[None]:
    """Run a server until the block ends."""
    env = os.environ | {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
    }
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env=env)  # noqa: S603
        try:
            wait_for(port, process, log)
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_for(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until a chat call is answered."""
    body = {"model": "qwen2.5-7b-instruct", "messages": [{"role": "user", "content": "hi"}]}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json", "x-api-key": os.environ["KEY"]},
    )
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310
                answer.read()
                return
        except OSError:
            time.sleep(0.2)
    sys.exit(f"{process.args!r} does not answer; see its log:\n{log.read_text()[-2000:]}")


def load(
    port: int, connections: int, seconds: float, *, stream: bool, seed: int | None
) -> dict[str, float]:
    """Load with wrk; requests per second and percentiles in ms. With a seed prompts are new."""
    fresh = {} if seed is None else {"SEED": str(seed)}
    out = subprocess.run(  # noqa: S603
        [
            "/usr/bin/wrk",
            "-t1",
            f"-c{connections}",
            f"-d{seconds:g}s",
            "--latency",
            "-s",
            str(HERE / "post.lua"),
            f"http://127.0.0.1:{port}/v1/chat/completions",
        ],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"STREAM": str(int(stream))} | fresh,
    ).stdout
    bad = re.search(r"Non-2xx or 3xx responses: (\d+)", out)
    if bad or "Socket errors" in out:
        print(f"port {port}: {out}", file=sys.stderr)
    return {
        "rps": float(re.findall(r"Requests/sec:\s+([\d.]+)", out)[0]),
        "p50_ms": milliseconds(re.findall(r"50%\s+([\d.]+\w+)", out)[0]),
        "p99_ms": milliseconds(re.findall(r"99%\s+([\d.]+\w+)", out)[0]),
    }


def milliseconds(text: str) -> float:
    """Read wrk's ``1.23ms``."""
    value, unit = re.findall(r"([\d.]+)([a-z]+)", text)[0]
    return float(value) * {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60000.0}[unit]


Rows = dict[tuple[str, str, int], list[dict[str, float]]]


def measure(names: list[str], rounds: int, seconds: float, *, fresh: bool) -> Rows:
    """Load every proxy in turn, round after round."""
    rows: Rows = {}
    seeds = itertools.count(1)
    for one in range(rounds):
        for kind in ("json", "stream"):
            for connections in (16, 64):
                seed = next(seeds) if fresh else None
                for name in names:
                    streams = kind == "stream"
                    figures = load(PORTS[name], connections, seconds, stream=streams, seed=seed)
                    rows.setdefault((kind, name, connections), []).append(figures)
                    print(
                        f"round {one + 1} {kind} {connections:>2} {name:<20} "
                        f"{figures['rps']:>9,.0f} rps",
                        file=sys.stderr,
                    )
    return rows


def show(rows: Rows, names: list[str]) -> dict[str, dict[str, float]]:
    """Print medians and ratios."""
    table: dict[str, dict[str, float]] = {}
    for kind, connections in (("json", 16), ("json", 64), ("stream", 16), ("stream", 64)):
        print(f"\n{kind}, {connections} connections")
        print(f"{'':<20}{'req/s':>10}{'of ours':>9}{'added P50 ms':>14}{'added P99 ms':>14}")
        median = {
            name: {
                key: statistics.median(row[key] for row in rows[kind, name, connections])
                for key in ("rps", "p50_ms", "p99_ms")
            }
            for name in names
        }
        for name in names:
            mine, direct = median[name], median["direct"]
            ours = mine["rps"] / median["concertmaster"]["rps"]
            added = mine["p50_ms"] - direct["p50_ms"], mine["p99_ms"] - direct["p99_ms"]
            print(f"{name:<20}{mine['rps']:>10,.0f}{ours:>9.3f}{added[0]:>14.3f}{added[1]:>14.3f}")
            table[f"{kind}-{connections}-{name}"] = mine
    return table


def main() -> None:
    """Start everything, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--peers", type=Path, default=Path("peers"), help="venv of the peers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--only", nargs="*", help="names to measure; default: all that are there")
    parser.add_argument("--fresh", action="store_true", help="send no prompt twice to a proxy")
    parser.add_argument("--json", type=Path, help="write the medians here")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ["KEY"] = make_key(folder / "keys")
        found = commands(options.peers, folder)
        names = [
            name
            for name in found
            if not options.only or name in (*options.only, "direct", "concertmaster")
        ]
        for name in names:
            stack.enter_context(running(found[name], PORTS[name], folder / f"{name}.log"))
        rows = measure(names, options.rounds, options.seconds, fresh=options.fresh)
        table = show(rows, names)
    if options.json:
        options.json.write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
