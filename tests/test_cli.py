import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from concertmaster import __version__, cli
from concertmaster.cli import app
from concertmaster.state.key_file import KeyFile

REPO = Path(__file__).parents[1]
FLEET = str(REPO / "examples/fleets/local.toml")
SCRIPT = (sys.executable, "-c", "from concertmaster.cli import main; main()")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPO / "src"), "PYTHONUNBUFFERED": "1"}
COMMANDS = ("demo", "serve", "engine", "simulate", "compare", "replay", "explain", "reproduce")
SUMMARY = {"mean", "p50", "p90", "p95", "p99"}
CONTRACT: dict[str, set[str] | None] = {
    "policy": None,
    "seed": None,
    "workflows": {"total", "completed", "rejected", "failed"},
    "requests": {"total", "completed", "rejected", "failed"},
    "makespan_s": SUMMARY,
    "e2e_s": SUMMARY,
    "ttft_s": SUMMARY,
    "tpot_s": SUMMARY,
    "e2e_per_output_token_s": {"mean"},
    "success_ratio": None,
    "slo_attainment_ratio": None,
    "goodput_rps": None,
    "by_class": {"interactive", "batch"},
    "kv": {"reserved_gb_s", "used_gb_s", "reserved_peak_gb", "preemptions", "refused"},
    "weights": {"cold_starts", "wakes", "ready_wait_s"},
    "fleet": {"gpu_s", "replica_starts", "replica_stops"},
    "scheduler": {"decisions", "decision_s_p50", "decision_s_p99"},
    "wall_s": None,
}
"""Keys of a report; they may grow, and none may change its name."""


class Said(NamedTuple):
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str


class Shell:
    """Runs commands in this process, as the installed script would."""

    def __init__(self, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self._patch = patch
        self._capture = capture

    def __call__(self, *args: object) -> Said:
        self._patch.setattr(sys, "argv", ["concertmaster", *map(str, args)])
        code: object = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        assert isinstance(code, int)
        return Said(code, *self._capture.readouterr())

    def refuses(self, *args: object) -> str:
        """Run what must fail; return its one line."""
        said = self(*args)
        assert said.code == 2, said
        assert "Traceback" not in said.err
        assert said.err.endswith("\n")
        assert said.err.count("\n") == 1, said.err
        return said.err.strip()


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


def simulation(*more: object) -> tuple[object, ...]:
    return ("simulate", "-f", FLEET, "-w", "sample", "-p", "least-tokens+las", *more)


# Help.


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    told = CliRunner().invoke(app, [command, "--help"])

    assert told.exit_code == 0
    assert f"Example: concertmaster {command}" in " ".join(told.output.split())


def test_every_command_is_tested_here() -> None:
    names = {one.name or one.callback.__name__ for one in app.registered_commands if one.callback}

    assert names >= set(COMMANDS)


def test_the_version_is_told(shell: Shell) -> None:
    assert shell("--version") == (0, f"concertmaster {__version__}\n", "")


# Bad input: one line, exit code 2.


def test_a_missing_fleet_file_is_named(shell: Shell) -> None:
    expected = "nowhere.toml: no such file (see examples/fleets/)"
    assert shell.refuses("serve", "-c", "nowhere.toml") == expected
    assert shell.refuses("engine", "-c", "nowhere.toml") == expected
    assert shell.refuses("simulate", "-f", "nowhere.toml", "-w", "sample", "-p", "las") == expected
    assert shell.refuses("compare", "-f", "nowhere.toml", "-w", "sample", "-p", "las") == expected


@pytest.mark.parametrize("command", ["serve", "simulate", "compare", "demo"])
def test_an_unknown_policy_is_refused_with_the_nearest(shell: Shell, command: str) -> None:
    where = {"serve": ("-c", FLEET), "demo": ()}.get(command, ("-f", FLEET, "-w", "sample"))
    line = shell.refuses(command, *where, "-p", "round-robbin")
    assert line.startswith(
        'policy: unknown policy "round-robbin" (did you mean "round-robin"? known: '
    )


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            ("-w", "nowhere"),
            "nowhere: expected a workload file, found nothing there (check the path)",
        ),
        (
            ("-w", "sample", "--arrivals", "sometimes"),
            (
                '--arrivals: unknown kind of arrivals "sometimes" '
                "(known: burst, gamma, poisson, step, trace)"
            ),
        ),
        (
            ("-w", "sample", "--limit", 0),
            "--limit: expected a whole number >= 1, found 0 (leave it out for all workflows)",
        ),
        (("-w", "sample", "--rate-scale", 0), "--rate-scale: expected above 0, found 0.0"),
    ],
)
@pytest.mark.parametrize("command", ["simulate", "compare", "replay"])
def test_a_bad_workload_is_refused_by_each_command_that_reads_one(
    shell: Shell, command: str, options: Sequence[object], line: str
) -> None:
    where = ("--url", "http://127.0.0.1:1") if command == "replay" else ("-f", FLEET, "-p", "las")
    assert shell.refuses(command, *where, *options) == line


def test_an_oracle_does_not_serve(shell: Shell) -> None:
    assert shell.refuses("serve", "-c", FLEET, "-p", "oracle-stjf") == (
        "policy: oracle-stjf: an oracle reads the truth, so it cannot serve (use it in simulate)"
    )


def test_a_port_in_use_is_said_by_gateway_and_engine(shell: Shell) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        line = f"127.0.0.1:{port}: port {port} is in use (choose another with --port)"
        assert shell.refuses("serve", "-c", FLEET, "--port", port) == line
        engine = str(REPO / "examples/engine.toml")
        assert shell.refuses("engine", "-c", engine, "--port", port) == line


def test_an_impossible_address_to_listen_on_is_said(shell: Shell, tmp_path: Path) -> None:
    line = "port: expected 0 to 65535, found 70000"
    assert shell.refuses("serve", "-c", FLEET, "--port", 70_000) == line
    assert shell.refuses("engine", "-c", REPO / "examples/engine.toml", "--port", 70_000) == line
    assert shell.refuses("demo", "--port", -1) == "port: expected 0 to 65535, found -1"
    KeyFile(tmp_path / "k.sqlite").close()
    fleet = tmp_path / "fleet.toml"
    keys = f"\n[gateway]\nkeys = '{tmp_path / 'k.sqlite'}'\n"
    fleet.write_text(Path(FLEET).read_text() + keys)
    assert shell.refuses("serve", "-c", fleet, "--host", "192.0.2.1").startswith(
        "192.0.2.1:8000: cannot listen: "
    )


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:8000", "https://127.0.0.1:8000", "http://", "http://x:99999", "http://x:0", "x"],
)
def test_a_url_that_is_none_is_refused(shell: Shell, url: str) -> None:
    line = shell.refuses("replay", "--url", url, "-w", "sample")
    assert line == f"--url: {url}: expected http://HOST:PORT"


def test_nobody_at_the_url_is_said(shell: Shell) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
    line = shell.refuses("replay", "--url", url, "-w", "sample", "--limit", 1)
    assert line == (
        f"--url: {url}: nobody answers: [Errno 111] Connection refused "
        "(start one with concertmaster serve)"
    )


def test_bad_numbers_are_refused(shell: Shell) -> None:
    url = ("--url", "http://127.0.0.1:1", "-w", "sample")
    assert shell.refuses("replay", *url, "--speedup", 0) == (
        "--speedup: expected above 0, found 0.0"
    )
    fleet = ("-f", FLEET, "-w", "sample", "-p", "las")
    assert shell.refuses("compare", *fleet, "--seeds", 0) == "--seeds: expected at least 1, found 0"
    assert shell.refuses("compare", *fleet, "-p", "las") == (
        "--policy: a policy is named twice (name each once)"
    )


def test_a_plot_of_an_unknown_kind_is_refused_before_any_work(shell: Shell) -> None:
    line = shell.refuses("compare", "-f", FLEET, "-w", "sample", "-p", "las", "--plot", "x.pdf")
    assert line == '--plot: expected a file that ends in .png or .svg, found "x.pdf"'


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('model = "qwen2.5-7b-instruct"\ngpu = "a40"\nspedup = 2\n', 'unknown key "spedup"'),
        ('model = "qwen2.5-7b-instruct"\n', 'missing key "gpu"'),
        ('model = "qwen2.5-7b-instruct"\ngpu = "a40"\nport = "x"\n', "port: expected `int`"),
        ('model = "qwen"\ngpu = "a40"\n', 'unknown model "qwen"'),
        ("model =\n", "not a TOML file: "),
    ],
)
def test_a_faulty_engine_file_is_refused_with_its_place(
    shell: Shell, tmp_path: Path, text: str, problem: str
) -> None:
    path = tmp_path / "engine.toml"
    path.write_text(text)
    line = shell.refuses("engine", "-c", path)
    assert problem in line
    if "spedup" in text:
        assert line == (
            f'{path}: unknown key "spedup" (did you mean "speedup"? known: '
            + line.partition("known: ")[2]
        )


def test_a_pool_without_endpoints_cannot_be_served(shell: Shell) -> None:
    assert "has no endpoints to serve from" in shell.refuses(
        "serve", "-c", REPO / "examples/fleets/small-big.toml"
    )


def test_a_file_that_cannot_be_written_is_named(shell: Shell, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    said = shell(*simulation("--limit", 2, "--json", blocked / "report.json"))
    assert said.code == 2
    assert said.err.startswith(f"{blocked}/report.json: cannot write: ")


# Work.


def check_contract(report: dict[str, Any]) -> None:
    for key, parts in CONTRACT.items():
        assert key in report
        assert parts is None or parts <= set(report[key]), key
    for one in report["by_class"].values():
        assert {"slo_attainment_ratio", "makespan_s", "queue_wait_s"} <= set(one)


def test_simulate_writes_a_report_with_every_key_of_the_contract(
    shell: Shell, tmp_path: Path
) -> None:
    path = tmp_path / "deep" / "report.json"
    said = shell(*simulation("--limit", 5, "--json", path, "--seed", 3))
    assert (said.code, said.err) == (0, "")
    assert "SLO attainment" in said.out
    report = json.loads(path.read_text())
    check_contract(report)
    assert (report["policy"], report["seed"]) == ("least-tokens+las", 3)
    assert report["workflows"]["total"] == 5


def test_explain_says_where_a_call_went_and_knows_which_calls_there_are(
    shell: Shell, tmp_path: Path
) -> None:
    trace = tmp_path / "one.trace.jsonl"
    said = shell(*simulation("--limit", 2, "--trace", trace))
    hint = re.search(r"next: concertmaster explain (\S+) (\S+)\n", said.out)
    assert hint is not None
    known = hint[2]
    told = shell("explain", trace, known)
    shell("explain", trace, known, "--json", str(tmp_path / "one.json"))
    story = json.loads((tmp_path / "one.json").read_text())
    assert "RequestArrived" in story[0]["event"]
    assert story[-1]["event"]["RequestFinished"]["request_id"] == known
    assert (told.code, told.err) == (0, "")
    assert told.out.startswith(f"{known}   workflow ")
    assert "cost, seconds" in told.out
    assert "outcome   served" in told.out
    assert shell.refuses("explain", trace, "nobody/0") == (
        f"REQUEST: nobody/0: the trace holds no such call (the first one is {known})"
    )
    missing = shell.refuses("explain", tmp_path / "none.jsonl", known)
    assert missing.startswith(f"{tmp_path}/none.jsonl: cannot read a trace: ")


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG\r\n"), ("svg", b"<?xml")])
def test_compare_writes_its_table_and_its_picture(
    shell: Shell, tmp_path: Path, suffix: str, magic: bytes
) -> None:
    out, plot = tmp_path / "compare.json", tmp_path / f"plot.{suffix}"
    policies = ("-p", "round-robin", "-p", "least-tokens+las")
    common = ("-f", FLEET, "-w", "sample", "--limit", 3, "--seeds", 1, "--jobs", 1)
    said = shell("compare", *common, *policies, "--json", out, "--plot", plot)
    assert (said.code, said.err) == (0, "")
    comparison = json.loads(out.read_text())
    assert list(comparison["policies"]) == ["round-robin", "least-tokens+las"]
    for both in comparison["policies"].values():
        assert set(both) == {"mean", "ci95"}
        check_contract(both["mean"])
    assert comparison["pairs"]
    assert plot.read_bytes().startswith(magic)


# Servers, as processes of their own.


@contextmanager
def running(*args: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start a server command; yields it and the address that it prints."""
    process = subprocess.Popen(  # noqa: S603  # our own command
        [*SCRIPT, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.match(r"(http://127\.0\.0\.1:\d+)/v1 ", line)
        if address is None:
            process.kill()
            pytest.fail(f"no address in {line!r}: {process.communicate()[1]}")
        yield process, address[1]
    finally:
        process.kill()
        process.communicate()


def stop(process: subprocess.Popen[str], number: signal.Signals) -> Said:
    started_s = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert time.monotonic() - started_s < 2.0
    return Said(process.returncode, out, err)


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=5) as response:  # noqa: S310  # loopback
        body: bytes = response.read()
        return body


def test_an_engine_and_a_gateway_serve_a_replay_and_stop_at_a_signal(
    shell: Shell, tmp_path: Path
) -> None:
    engine_file, fleet_file = tmp_path / "engine.toml", tmp_path / "fleet.toml"
    trace, report = tmp_path / "live.trace.jsonl", tmp_path / "live.json"
    model = 'model = "qwen2.5-1.5b-instruct"\ngpu = "a40"\n'
    engine_file.write_text(model + "speedup = 200\nport = 0\n")
    with running("engine", "-c", engine_file) as (engine, engine_url):
        assert b"0.33" in get(f"{engine_url}/version")
        pool = f'[[pools]]\nname = "p"\n{model}endpoints = ["{engine_url}"]\n'
        fleet_file.write_text(f"[emulator]\nspeedup = 200\n{pool}")
        serving = running("serve", "-c", fleet_file, "--port", 0, "--trace", trace)
        with serving as (gateway, url):
            assert b'"id":"auto"' in get(f"{url}/v1/models")
            load = ("-w", "sample", "--limit", 3, "--speedup", 200, "--json", report)
            said = shell("replay", "--url", url, *load)
            assert (said.code, said.err) == (0, "")
            check_contract(json.loads(report.read_text()))
            assert json.loads(report.read_text())["workflows"]["completed"] == 3
            with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as idle:
                idle.sendall(b"GET /events HTTP/1.1\r\nhost: x\r\n\r\n")
                assert idle.recv(100)
                stopped = stop(gateway, signal.SIGINT)
        assert stopped.code == 0
        assert "Traceback" not in stopped.err
        stopped = stop(engine, signal.SIGTERM)
        assert (stopped.code, stopped.err) == (0, "")
    call_id = re.search(rb'"request_id":"([^"]+)"', trace.read_bytes())
    assert call_id is not None
    assert "outcome   served" in shell("explain", trace, call_id[1].decode()).out


def test_a_gateway_whose_engines_are_dead_serves_says_so_and_stops_at_a_signal() -> None:
    with running("serve", "-c", FLEET, "--port", 0) as (gateway, url):
        assert get(f"{url}/livez") == b""
        stopped = stop(gateway, signal.SIGINT)
    assert stopped.code == 0
    assert "replica small-0 at http://127.0.0.1:8101 is not serving: " in stopped.err
    assert "Traceback" not in stopped.err


def test_the_demo_plays_live_and_simulated_and_compares_them(tmp_path: Path) -> None:
    out = tmp_path / "demo.json"
    options = ["demo", "--workflows", "3", "-p", "least-tokens+las", "--json", str(out)]
    done = subprocess.run(  # noqa: S603  # our own command
        [*SCRIPT, *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=ENVIRONMENT,
    )
    assert (done.returncode, done.stderr) == (0, "")
    reports = json.loads(out.read_text())["policies"]
    live, simulated = (reports[f"least-tokens+las, {kind}"] for kind in ("live", "simulated"))
    for both in (live, simulated):
        check_contract(both["mean"])
        assert both["mean"]["workflows"] == {
            "total": 3,
            "completed": 3,
            "rejected": 0,
            "failed": 0,
        }
    ratio = live["mean"]["makespan_s"]["mean"] / simulated["mean"]["makespan_s"]["mean"]
    assert 0.8 < ratio < 1.3
