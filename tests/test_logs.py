"""The log: one line an event of note, in text or JSON, and never a prompt or a key in it."""

import asyncio
import io
import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertmaster.config_files import load_fleet
from concertmaster.core.errors import InputError
from concertmaster.core.events import ReplicaDied, ReplicaReady
from concertmaster.core.fleet import ReplicaId
from concertmaster.gateway.journal import Journal
from concertmaster.observe import logs
from concertmaster.observe.logs import LogForm, log_to, redacted
from concertmaster.state.keys import new_key
from gateway_rig import CHAT, Heard, a_call, an_answer, over_upstreams, play, until

MARKER = "zanzibar-7731"
FLEET = Path(__file__).parents[1] / "examples/fleets/local.toml"


class Log:
    """Everything that was logged, in one form."""

    def __init__(self, out: io.StringIO) -> None:
        self._out = out

    @property
    def text(self) -> str:
        return self._out.getvalue()

    def events(self, name: str = "") -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.text.splitlines()]
        return [one for one in found if name in ("", one["event"])]


@pytest.fixture(name="restored", autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def a_log(form: LogForm = "json") -> Log:
    out = io.StringIO()
    log_to(form, out)
    return Log(out)


# Form.


def test_a_line_of_json_has_its_event_and_its_facts() -> None:
    log = a_log()
    logging.getLogger("x.y").warning("say %s", "it", extra={"event": "said", "times": 2})
    (line,) = log.events()
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "warning",
        "logger": "x.y",
        "event": "said",
        "message": "say it",
        "times": 2,
    }


@pytest.mark.parametrize("form", ["json", "text"])
def test_an_exception_is_told_by_type_and_place_and_not_by_what_it_quotes(form: LogForm) -> None:
    log = a_log(form)
    try:
        int(MARKER)
    except ValueError:
        logging.getLogger("x").exception("it failed")
    assert MARKER not in log.text
    assert "ValueError" in log.text
    assert "test_logs.py" in log.text


@given(st.text())
def test_one_event_is_one_line_whatever_it_says(said: str) -> None:
    for formatter in (logs.JsonFormatter(), logs.TextFormatter()):
        record = logging.makeLogRecord({"msg": "%s", "args": (said,), "levelname": "INFO"})
        line = formatter.format(record)
        assert line.isprintable()


def test_keys_are_taken_out_of_what_is_logged() -> None:
    secret = new_key("t", now_s=1.0)[1]
    for form in ("json", "text"):
        log = a_log(form)
        logging.getLogger("x").info("bad: %r and Bearer abc.def", secret, extra={"f": secret})
        assert secret not in log.text
        assert "abc.def" not in log.text
        assert "[redacted]" in log.text
    assert redacted("request cm-12 of sk-yline") == "request cm-12 of sk-yline"


def test_the_form_is_a_setting_with_two_values(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(FLEET.read_text() + '\n[gateway]\nlog = "jsn"\n')
    with pytest.raises(InputError, match=r'gateway.log: unknown log "jsn" \(did you mean "json"'):
        load_fleet(path)


# Events.


def test_engines_that_go_and_come_have_a_line_each() -> None:
    log = a_log()

    async def main() -> None:
        async with over_upstreams(health_interval_s=0.02) as (rig, upstream):
            upstream.healthy = False
            await until(lambda: not rig.replica().alive)
            await asyncio.sleep(0.1)
            upstream.healthy = True
            await until(lambda: rig.replica().alive)

    play(main())
    assert [one["replica"] for one in log.events("engine_down")] == ["p-0"]
    assert [one["replica"] for one in log.events("engine_up")] == ["p-0"]
    assert len(log.events("started")) == len(log.events("stopped")) == 1


def test_a_replica_that_dies_again_before_it_is_back_is_no_news() -> None:
    log, journal = a_log(), Journal()
    died, ready = ReplicaDied(ReplicaId("p-0")), ReplicaReady(ReplicaId("p-0"))
    for event in (died, died, ready, died):
        journal.noticed(0.0, event, [])
    assert [one["event"] for one in log.events()] == ["engine_down", "engine_up", "engine_down"]


def test_refusals_are_summed_up_and_silence_is_silent() -> None:
    log, journal = a_log(), Journal()
    before = journal.tell_refusals(Counter(), Counter({"queue_full": 3}))
    before = journal.tell_refusals(before, Counter({"queue_full": 3}))
    journal.tell_refusals(before, Counter({"queue_full": 5, "too_long": 1}))
    assert [(one["refused"], one["reasons"]) for one in log.events("refusals")] == [
        (3, {"queue_full": 3}),
        (3, {"queue_full": 2, "too_long": 1}),
    ]


@pytest.mark.parametrize("wanted", [True, False])
def test_calls_have_lines_only_if_that_is_wanted(*, wanted: bool) -> None:
    log = a_log()

    async def main() -> None:
        async with over_upstreams(log_calls=wanted) as (rig, _):
            await rig.call({}, x_request_id="r1")
            await rig.call({"model": "unknown"}, x_request_id="r2")

    play(main())
    found = [(one["request"], one["status"], one["outcome"]) for one in log.events("call")]
    assert found == [("r1", 200, "served"), ("r2", 404, "rejected")] * wanted


@pytest.mark.parametrize("form", ["json", "text"])
def test_no_prompt_and_no_key_is_in_the_log(form: LogForm, monkeypatch: pytest.MonkeyPatch) -> None:
    log = a_log(form)
    secret = "sk-" + "abcdefgh" * 4

    async def fails(heard: Heard, out: asyncio.StreamWriter) -> None:
        status = "500 Oops" if b"fail" in heard.body else "200 OK"
        out.write(an_answer(b'{"error":"' + heard.body[:80].replace(b'"', b"'") + b'"}', status))

    async def main() -> None:
        async with over_upstreams(fails, may_log=True, log_calls=True) as (rig, _):
            rig.http.headers["authorization"] = f"Bearer {secret}"
            said = [{"role": "user", "content": f"tell of {MARKER}"}]
            assert (await rig.call({"messages": said})).status == 200
            assert (await rig.call({"messages": said, "fail": 1})).status == 502
            assert (await rig.ask("POST", CHAT, f'{{"messages": "{MARKER}'.encode())).status == 400
            assert (await rig.ask("GET", f"/nothing?api_key={secret}")).status == 404

            def breaks(*_: object) -> None:
                raise RuntimeError(f"{MARKER} {secret}")

            monkeypatch.setattr(rig.gateway.metrics, "opened", breaks)
            wire = await rig.wire()
            wire.send(a_call())
            assert (await wire.answer())[0] == 500

    play(main())
    assert "RuntimeError" in log.text
    assert MARKER not in log.text
    assert secret not in log.text
    assert ReplicaId("p-0") in log.text
