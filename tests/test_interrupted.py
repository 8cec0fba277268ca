"""Ctrl-C as a terminal sends it: to the command and all processes that it has started."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
CODE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # background shells ignore it
from concertmaster.cli import main
main()
"""
COMPARE = (
    *("compare", "-f", str(REPO / "examples/fleets/small-big.toml"), "-w", "sample"),
    *("-p", "round-robin", "-p", "las", "--arrivals", "poisson", "--rate", "2"),
    *("--seeds", "100", "--jobs", "2"),
)


def children_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []


def group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells of children")
@pytest.mark.parametrize("command", [("demo",), COMPARE], ids=["demo", "compare"])
def test_ctrl_c_ends_a_command_and_its_processes_with_one_word(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    with subprocess.Popen(  # noqa: S603  # ours
        [sys.executable, "-c", CODE, *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPO / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as child:
        try:
            for _ in range(600):
                if len(children_of(child.pid)) >= 2:
                    break
                time.sleep(0.1)
            os.killpg(child.pid, signal.SIGINT)
            _, err = child.communicate(timeout=30)
            for _ in range(100):
                if not (left := group_is_alive(child.pid)):
                    break
                time.sleep(0.1)
        finally:
            if group_is_alive(child.pid):
                os.killpg(child.pid, signal.SIGKILL)
    assert child.returncode == 130
    assert err.splitlines()[-1:] == ["stopped"]
    assert "Traceback" not in err
    assert not left
