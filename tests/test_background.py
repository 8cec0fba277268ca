"""Training in the background: it may crash, hang, or be killed, and nobody waits for it."""

import logging
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from concertmaster.core.errors import InputError
from concertmaster.learning.background import (
    NICE,
    BackgroundTrainer,
    Done,
    Failed,
    Idle,
    Running,
    State,
)

HERE = Path(__file__).parent
SRC = HERE.parent / "src"
PATIENCE_S = 60.0


@pytest.fixture
def trainer() -> Iterator[BackgroundTrainer]:
    with BackgroundTrainer(cooldown_s=0.0) as one:
        yield one


# What a child may do; at the top of a module, so that it pickles.


def write_store(folder: Path, content: str) -> Path:
    folder.mkdir()
    (folder / "weights").write_text(f"{content} {os.nice(0)} {os.environ['OMP_NUM_THREADS']}")
    return folder


def write_nothing(folder: Path) -> Path:
    return folder


def raise_with_prompt() -> Path:
    raise ValueError("cannot learn from 'a secret'")


def raise_input_error() -> Path:
    raise InputError("labels.sqlite", "user_version", "expected 1, found 2")


def run_out_of_memory() -> Path:
    raise MemoryError


def leave_without_a_word() -> Path:
    os._exit(3)


def be_killed() -> Path:
    os.kill(os.getpid(), signal.SIGKILL)
    return Path()


def crash() -> Path:
    os.kill(os.getpid(), signal.SIGSEGV)
    return Path()


def exit_politely() -> Path:
    sys.exit("enough")


def hang(pid_file: Path) -> Path:
    pid_file.write_text(str(os.getpid()))
    time.sleep(600.0)
    return pid_file


# Helpers.


def until(condition: object, what: str) -> None:
    assert callable(condition)
    for _ in range(int(PATIENCE_S / 0.02)):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError(f"{what} did not happen within {PATIENCE_S} s")


def end_of(trainer: BackgroundTrainer, now_s: float = 0.0) -> State:
    """Poll until it is over."""
    states: list[State] = []

    def is_over() -> bool:
        states.append(trainer.poll(now_s))
        return states[-1] != Running()

    until(is_over, "the end")
    return states[-1]


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that is dead but not reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


# Ends.


def test_a_training_ends_with_the_folder_it_wrote(
    trainer: BackgroundTrainer, tmp_path: Path
) -> None:
    assert trainer.poll(0.0) == Idle()
    assert trainer.start(0.0, write_store, tmp_path / "store", "seven")

    assert end_of(trainer) == Done(tmp_path / "store")
    assert trainer.poll(0.0) == Idle()
    assert trainer.counts == {"done": 1}
    weights = (tmp_path / "store" / "weights").read_text()
    assert weights == f"seven {min(NICE, os.nice(0) + NICE)} 1"


@pytest.mark.parametrize(
    ("train", "reason"),
    [
        (raise_with_prompt, "ValueError at test_background.py:"),
        (raise_input_error, "InputError: 'labels.sqlite: user_version: expected 1, found 2'"),
        (run_out_of_memory, "MemoryError at test_background.py:"),
        (leave_without_a_word, "exit code 3"),
        (be_killed, "killed by SIGKILL"),
        (crash, "killed by SIGSEGV"),
        (exit_politely, "SystemExit at test_background.py:"),
    ],
)
def test_a_training_that_breaks_is_a_failure_with_a_reason(
    trainer: BackgroundTrainer, caplog: pytest.LogCaptureFixture, train: object, reason: str
) -> None:
    assert trainer.start(0.0, train)  # type: ignore[arg-type]

    state = end_of(trainer)
    assert isinstance(state, Failed)
    assert state.reason.startswith(reason)
    assert "secret" not in state.reason + caplog.text
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert trainer.counts == {"failed": 1}


def test_a_result_that_is_not_there_is_a_failure(
    trainer: BackgroundTrainer, tmp_path: Path
) -> None:
    trainer.start(0.0, write_nothing, tmp_path / "store")

    assert end_of(trainer) == Failed(f"wrote nothing at {tmp_path / 'store'}")


def test_what_does_not_pickle_is_the_callers_error(trainer: BackgroundTrainer) -> None:
    with pytest.raises((AttributeError, pickle.PicklingError), match="pickle"):
        trainer.start(0.0, lambda: Path() / "local")

    assert trainer.may_start(0.0)


def test_a_process_that_cannot_be_made_is_a_failure(
    trainer: BackgroundTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("concertmaster.learning.background._CONTEXT.Process.start", refuse)
    assert not trainer.start(0.0, run_out_of_memory)

    assert trainer.poll(0.0) == Idle()
    assert trainer.counts == {"failed": 1}


# Time.


def test_a_training_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    with BackgroundTrainer(timeout_s=100.0) as trainer:
        trainer.start(5.0, hang, tmp_path / "pid")
        until((tmp_path / "pid").exists, "the beginning")
        assert trainer.poll(104.9) == Running()

        assert end_of(trainer, 105.0) == Failed("took longer than 100 s")


def test_polling_waits_for_nothing(trainer: BackgroundTrainer, tmp_path: Path) -> None:
    trainer.start(0.0, hang, tmp_path / "pid")
    began_s = time.monotonic()
    for _ in range(1_000):
        assert trainer.poll(0.0) == Running()

    assert time.monotonic() - began_s < 5.0


def test_one_runs_at_a_time(trainer: BackgroundTrainer, tmp_path: Path) -> None:
    assert trainer.start(0.0, hang, tmp_path / "pid")

    assert not trainer.may_start(1e9)
    assert not trainer.start(1e9, hang, tmp_path / "other")


def test_the_next_waits_for_a_cooldown_that_doubles_with_failures(tmp_path: Path) -> None:
    with BackgroundTrainer(cooldown_s=10.0, most_cooldown_s=35.0) as trainer:
        now_s, waits_s = 0.0, []
        for train in (run_out_of_memory, run_out_of_memory, run_out_of_memory, "well", "well"):
            if train == "well":
                assert trainer.start(now_s, write_store, tmp_path / f"{now_s}", "")
            else:
                assert trainer.start(now_s, train)  # type: ignore[arg-type]
            end_of(trainer, now_s)
            wait_s = next(s for s in range(100) if trainer.may_start(now_s + s))
            waits_s.append(wait_s)
            now_s += wait_s

    assert waits_s == [20, 35, 35, 10, 10]


# No process is left behind.


def test_closing_kills_what_runs(tmp_path: Path) -> None:
    with BackgroundTrainer() as trainer:
        trainer.start(0.0, hang, tmp_path / "pid")
        until((tmp_path / "pid").exists, "the beginning")
        pid = int((tmp_path / "pid").read_text() or 0)

    assert not is_alive(pid)
    trainer.close()


def test_a_training_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from test_background import BackgroundTrainer, hang
        if __name__ == "__main__":
            trainer = BackgroundTrainer()
            trainer.start(0.0, hang, Path(sys.argv[1]))
            time.sleep(600.0)
    """)
    script, pid_file = tmp_path / "parent.py", tmp_path / "pid"
    script.write_text(program)
    where = {**os.environ, "PYTHONPATH": f"{SRC}:{HERE}"}
    with subprocess.Popen(  # noqa: S603 - our own program
        [sys.executable, str(script), str(pid_file)], env=where
    ) as parent:
        until(lambda: pid_file.exists() and pid_file.read_text(), "the beginning")
        pid = int(pid_file.read_text())
        assert is_alive(pid)
        parent.send_signal(signal.SIGKILL)

    until(lambda: not is_alive(pid), "the end of the child")
