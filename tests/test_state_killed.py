"""``kill -9`` at any instant: all that was acknowledged is there, and nothing by halves.

``STATE_KILLS=500 pytest tests/test_state_killed.py`` kills that often, ``STATE_SEED`` draws other
instants.
"""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any

import pytest

from concertmaster.learning import label_schema
from concertmaster.state import key_file, receipts
from state_child import Order, Stores

TESTS = Path(__file__).parent
KILLS = int(os.environ.get("STATE_KILLS", "15"))
SEED = int(os.environ.get("STATE_SEED", "1"))
MOST_S = 0.15
"""How long a process lives, at most."""

SCHEMAS = {
    "keys": key_file.SCHEMA,
    "receipts": receipts.SCHEMA,
    "labels": label_schema.SCHEMA,
}


class Nursery:
    """Makes processes that write, and kills them."""

    def __init__(self, orders: IO[str], said: IO[str]) -> None:
        self._orders, self._said = orders, said

    def kill_one(
        self, seed: int, lives_s: float, *, opens: bool
    ) -> tuple[list[Order], Order | None]:
        """Return what a process had acknowledged when it was killed, and what it had begun.

        Args:
            seed: Of what it does.
            lives_s: How long it lives ...
            opens: ... from its birth, else from its first order on.
        """
        print(seed, file=self._orders, flush=True)
        pid = int(self._said.readline())
        lines = [] if opens else [self._said.readline()]
        time.sleep(lives_s)
        os.kill(pid, signal.SIGKILL)
        acknowledged: list[Order] = []
        begun: Order | None = None
        for line in chain(lines, iter(self._said.readline, "killed\n")):
            if line == "done\n" and begun is not None:
                acknowledged.append(begun)
                begun = None
            elif line.endswith("]\n"):
                begun = tuple(json.loads(line))
        return acknowledged, begun


@contextmanager
def nursery(folder: Path) -> Iterator[Nursery]:
    with subprocess.Popen(  # noqa: S603  # ours
        [sys.executable, str(TESTS / "state_child.py"), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent / 'src'}:{TESTS}"},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield Nursery(process.stdin, process.stdout)
        finally:
            process.kill()


def check_files(folder: Path) -> None:
    for name, schema in SCHEMAS.items():
        with closing(sqlite3.connect(folder / f"{name}.sqlite")) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert db.execute("PRAGMA foreign_key_check").fetchall() == []
            assert db.execute("PRAGMA user_version").fetchone() == (len(schema.migrations),)
            assert db.execute("PRAGMA application_id").fetchone() == (schema.mark,)


def held(folder: Path) -> dict[str, Any]:
    with ExitStack() as stack:
        return Stores(folder, stack).holds()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_kill_9_at_any_instant_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    killed, spared = tmp_path / "killed", tmp_path / "spared"
    rng, changes = random.Random(SEED), 0
    with nursery(killed) as nurse, ExitStack() as stack:
        twin = Stores(spared, stack)
        for number in range(KILLS):
            acknowledged, begun = nurse.kill_one(
                number, rng.uniform(0.0, MOST_S), opens=number % 3 == 0
            )
            for order in acknowledged:
                twin.carry_out(order)
            if (killed / "labels.sqlite").exists():
                found = held(killed)
                if begun is not None and found != twin.holds():
                    twin.carry_out(begun)
                assert found == twin.holds(), (acknowledged[-1:], begun)
                check_files(killed)
            changes += len(acknowledged)
    assert changes > 0
