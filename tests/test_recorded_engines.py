"""What real engines answered, as it was recorded, is understood and passed on byte for byte."""

import asyncio
import json
from pathlib import Path

import pytest

from builders import a_fleet, a_pool
from concertmaster.engines.dialects import DIALECTS
from concertmaster.engines.discovery import served_models
from gateway_rig import Heard, Script, over_upstreams, play
from recorded_engines import ASKED, RECORDED

RELEASES = sorted(RECORDED.glob("vllm-*"))


def said(release: Path, name: str) -> bytes:
    return (release / f"{name}.http").read_bytes()


def body(answer: bytes) -> bytes:
    """Return the body of an answer that is not chunked."""
    return answer.partition(b"\r\n\r\n")[2]


def events(answer: bytes) -> list[bytes]:
    return [line for line in answer.splitlines() if line.startswith(b"data: ")]


def replays(release: Path, name: str) -> Script:
    """Answer calls with one recording, and whoever asks for models and figures with theirs."""

    async def script(heard: Heard, out: asyncio.StreamWriter) -> None:
        asides = (one for one in ("models", "metrics") if ASKED[one][0] in heard.line)
        out.write(said(release, next(asides, name)))
        out.close()

    return script


def test_there_are_recordings() -> None:
    assert RELEASES
    for release in RELEASES:
        assert {path.stem for path in release.iterdir()} == {*ASKED}


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
def test_every_figure_of_a_release_is_found(release: Path) -> None:
    reading = DIALECTS["vllm"].read(body(said(release, "metrics")))

    assert reading.missing == ()
    assert reading.values == {"running": 0.0, "waiting": 0.0, "kv_ratio": 0.0}


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
def test_models_and_limits_of_a_release_are_read(release: Path) -> None:
    assert served_models(body(said(release, "models"))) == {"small": 512}


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
@pytest.mark.parametrize("name", ["chat", "too-long", "stream"])
def test_an_answer_of_a_release_is_passed_on(release: Path, name: str) -> None:
    answer = said(release, name)

    async def main() -> None:
        fleet = a_fleet(a_pool(model="small"))
        async with over_upstreams(replays(release, name), fleet=fleet) as (rig, _):
            reply = await rig.call({**(ASKED[name][1] or {})})
            assert reply.status == int(answer.split()[1])
            if name == "stream":
                assert events(reply.body) == events(answer)
            else:
                assert json.loads(reply.body) == json.loads(body(answer))
            await rig.idle()
            if name != "too-long":
                assert await rig.metric("concertmaster_output_tokens_total") == 4.0

    play(main())
