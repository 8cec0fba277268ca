"""``concertmaster explain`` over receipts: a file, a live gateway, and what is not there."""

import asyncio
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from concertmaster.commands_explain import KEY_ENV
from gateway_rig import exactly, over_engines, play
from test_cli import Shell

FACTS = {"x_concertmaster_workflow_id": "w1", "x_concertmaster_role": "coder"}


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


@contextmanager
def serving(path: Path) -> Iterator[str]:
    """Serve from another thread, after one call that was served and one that was refused."""
    ready, over = threading.Event(), threading.Event()
    found: list[str] = []

    async def main() -> None:
        async with over_engines(2, receipts=str(path)) as (rig, _):
            for i in range(12):
                await rig.call({**exactly(8), "stream": True}, x_request_id=f"mine/{i}", **FACTS)
            await rig.call({"model": "\x1b[31mred"}, x_request_id="no")
            found.append(rig.url)
            ready.set()
            await asyncio.to_thread(over.wait, 20.0)

    thread = threading.Thread(target=lambda: play(main()))
    thread.start()
    try:
        assert ready.wait(20.0)
        yield found[0]
    finally:
        over.set()
        thread.join()


def test_a_receipt_is_told_from_a_live_gateway_and_from_its_file(
    shell: Shell, tmp_path: Path
) -> None:
    path = tmp_path / "receipts.sqlite"
    with serving(path) as url:
        live = shell("explain", "mine/11", "--url", url, "--json", tmp_path / "one.json")
        refused = shell("explain", "no", "--url", url)
        unknown = shell.refuses("explain", "nobody", "--url", url)
    kept = shell("explain", path, "mine/11")

    assert (live.code, live.err) == (0, "")
    assert live.out.startswith("mine/11   workflow w1   role coder   class interactive   policy ")
    assert "cost, seconds" in live.out
    assert "outcome   HTTP 200   8 tokens" in live.out
    assert "regret    " in live.out
    assert kept.out == live.out
    assert json.loads((tmp_path / "one.json").read_text())["id"] == "mine/11"
    assert "outcome   HTTP 404   model_not_found" in refused.out
    assert "\x1b" not in refused.out
    assert unknown == "REQUEST: nobody: the gateway keeps no receipt of such a call"
    missing = shell.refuses("explain", path, "nobody")
    assert missing == f"{path}: nobody: the file holds no receipt of such a call"


def test_a_gateway_that_is_not_there_is_said_in_one_line(shell: Shell) -> None:
    said = shell.refuses("explain", "r1", "--url", "http://127.0.0.1:1")
    assert said.startswith("--url: http://127.0.0.1:1: cannot be asked: ")
    assert said.endswith("(name a trace or a file of receipts first, or give --url)")
    assert "cannot be asked" in shell.refuses("explain", "r1", "--url", "http://[:x")


def test_a_key_comes_from_the_environment(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []

    async def fetch(*_: object, api_key: str, **__: object) -> tuple[int, bytes]:
        heard.append(api_key)
        return 401, b""

    monkeypatch.setenv(KEY_ENV, "secret")
    monkeypatch.setattr(sys.modules["concertmaster.commands_explain"], "fetch", fetch)
    said = shell.refuses("explain", "r1")
    assert said == f"--url: http://127.0.0.1:8000: the gateway wants a key (set {KEY_ENV})"
    assert heard == ["secret"]
