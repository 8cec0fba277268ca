"""What engines say of themselves: kinds, names, limits, keys; and what is made of it."""

import asyncio
import json
import logging
import ssl
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import a_fleet, a_pool
from concertmaster.config_files import load_fleet
from concertmaster.core.errors import InputError
from concertmaster.core.fleet import ReplicaId
from concertmaster.engines.dialects import DIALECTS, EngineKind, with_priority
from concertmaster.engines.discovery import served_models
from concertmaster.gateway.peers import Peer, peers_of
from gateway_rig import (
    Heard,
    Rig,
    Upstream,
    a_rig,
    an_answer,
    over_engines,
    play,
    says_hello,
    until,
)

P0 = ReplicaId("p-0")

EXPOSED: Mapping[EngineKind, str] = {
    "vllm": """# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:num_requests_waiting{engine="1",model_name="m"} 0.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 1.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.75
""",
    "sglang": """# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{model_name="m"} 5.0
# TYPE sglang:num_queue_reqs gauge
sglang:num_queue_reqs{model_name="m"} 1.0
# TYPE sglang:token_usage gauge
sglang:token_usage{model_name="m"} 0.75
""",
    "llama.cpp": """# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 5
# TYPE llamacpp:requests_deferred gauge
llamacpp:requests_deferred 1
""",
    "ollama": "",
    "openai": "",
}
"""What each kind exposes, cut to the figures of interest."""

MODELS = json.dumps({"object": "list", "data": [{"id": "m"}]})


# Dialects.


@pytest.mark.parametrize("kind", DIALECTS)
def test_every_signal_of_a_kind_is_found_in_what_it_exposes(kind: EngineKind) -> None:
    reading = DIALECTS[kind].read(EXPOSED[kind].encode())

    assert reading.missing == ()
    expected = {"running": 5.0, "waiting": 1.0, "kv_ratio": 0.75}
    assert reading.values == {signal: expected[signal] for signal in DIALECTS[kind].names}


def test_an_older_name_is_read_and_a_longer_one_is_not() -> None:
    older = "vllm:gpu_cache_usage_perc 0.5\nvllm:num_requests_running_now 7\n"
    values, missing = DIALECTS["vllm"].read(older.encode())

    assert values == {"kv_ratio": 0.5}
    assert missing == ("running", "waiting")


@given(
    st.dictionaries(st.text(), st.integers() | st.text() | st.none(), max_size=4),
    st.integers(-(2**40), 2**40),
)
def test_a_priority_is_added_to_any_body_and_wins(body: dict[str, Any], priority: int) -> None:
    changed = json.loads(with_priority(json.dumps(body).encode(), priority))

    assert changed == {**body, "priority": priority}


@pytest.mark.parametrize("body", [b"", b"[]", b'{"data":[{}]}', b'{"data":3}'])
def test_what_is_no_list_of_models_is_said_to_be_none(body: bytes) -> None:
    with pytest.raises(ValueError, match="no list of models"):
        served_models(body)


def test_limits_are_read_as_each_kind_writes_them() -> None:
    kinds = [
        {"id": "vllm", "max_model_len": 10},
        {"id": "llama.cpp", "meta": {"n_ctx": 20, "n_ctx_train": 99}},
        {"id": "ollama"},
    ]

    assert served_models(json.dumps({"data": kinds}).encode()) == {
        "vllm": 10,
        "llama.cpp": 20,
        "ollama": None,
    }


# The watch.


class Engine(Upstream):
    """An upstream that says what it serves."""

    def __init__(self, *, models: str = MODELS, exposed: str = EXPOSED["vllm"]) -> None:
        super().__init__(says_hello)
        self.models = models
        self.exposed = exposed
        self.asked: list[Heard] = []

    def _control(self, heard: Heard) -> bytes:
        self.asked.append(heard)
        for path, said in (("/v1/models", self.models), ("/metrics", self.exposed)):
            if path in heard.line:
                return an_answer(said.encode())
        return super()._control(heard)


@asynccontextmanager
async def over_engine(engine: Engine, kind: EngineKind = "vllm") -> AsyncIterator[Rig]:
    async with (
        engine,
        a_rig({P0: engine.url}, peers={P0: Peer(kind)}, health_interval_s=0.05) as rig,
    ):
        yield rig


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, "concertmaster.gateway.engine_watch")
    return caplog


def line(name: str, **labels: str) -> str:
    both = {"pool": "p", "replica": "p-0", **labels}
    inner = ",".join(f'{key}="{value}"' for key, value in both.items())
    return f"concertmaster_{name}{{{inner}}}"


def test_what_an_engine_says_is_shown_beside_our_own_count() -> None:
    async def main() -> None:
        async with over_engine(Engine()) as rig:
            await until(lambda: rig.gateway.engines.readings, "a reading")

            assert await rig.metric(line("engine_requests", state="running")) == 5.0
            assert await rig.metric(line("engine_requests", state="waiting")) == 1.0
            assert await rig.metric(line("engine_kv_ratio")) == 0.75
            assert await rig.metric(line("engine_foreign_requests")) == 6.0
            assert await rig.metric(line("engine_missing_metrics")) == 0.0

    play(main())


def test_a_renamed_figure_is_told_once_and_counted(told: pytest.LogCaptureFixture) -> None:
    renamed = EXPOSED["vllm"].replace("kv_cache_usage_perc", "kv_cache_use")

    async def main() -> None:
        engine = Engine(exposed=renamed)
        async with over_engine(engine) as rig:
            await until(lambda: len(engine.asked) > 9, "several looks")

            assert await rig.metric(line("engine_missing_metrics")) == 1.0

    play(main())
    (said,) = (one for one in told.messages if "/metrics" in one)
    assert said.endswith(
        "/metrics has no vllm:kv_cache_usage_perc (nearest: vllm:kv_cache_use); "
        "names are of vllm 0.33"
    )


@pytest.mark.parametrize(
    ("models", "problem"),
    [
        (MODELS.replace('"m"', '"other"'), "it serves other, not m"),
        (MODELS.replace('"m"', '"m", "max_model_len": 4096'), "it takes 4096 tokens"),
        ("none", "/v1/models is no list of models"),
    ],
)
def test_an_engine_that_is_not_as_the_fleet_file_says_is_told_of(
    models: str, problem: str, told: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        engine = Engine(models=models)
        async with over_engine(engine):
            await until(lambda: len(engine.asked) > 9, "several looks")

    play(main())
    assert [problem in one for one in told.messages] == [True]


def test_an_engine_without_figures_is_not_asked_for_them() -> None:
    async def main() -> None:
        engine = Engine()
        async with over_engine(engine, "ollama") as rig:
            await until(lambda: len(engine.asked) > 4, "several looks")
            assert (await rig.call()).status == 200

        assert not [one for one in engine.asked if "/metrics" in one.line]

    play(main())


def test_emulated_engines_are_what_they_say(told: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with over_engines(2, health_interval_s=0.05) as (rig, _):
            await until(lambda: len(rig.gateway.engines.readings) == 2, "readings")

    play(main())
    assert told.messages == []


# Priorities, keys, remote engines.


@pytest.mark.parametrize(
    ("kind", "header", "field"),
    [("vllm", "1", None), ("sglang", None, -1), ("ollama", None, None)],
)
def test_a_priority_goes_along_as_the_engine_takes_it(
    kind: EngineKind, header: str | None, field: int | None
) -> None:
    """The second of two calls of a workflow ranks behind the first under shortest service."""

    async def main() -> None:
        fleet = a_fleet(a_pool(priority_scheduling=True))
        engine = Engine()
        async with engine, a_rig({P0: engine.url}, fleet=fleet, peers={P0: Peer(kind)}) as rig:
            for _ in range(2):
                await rig.call(x_workflow_id="w")

        second = engine.heard[1]
        ranks = (second.headers.get("x-vllm-priority"), second.json.get("priority"))
        assert [rank is None for rank in ranks] == [header is None, field is None]

    play(main())


def test_a_remote_engine_gets_its_own_key_at_its_own_path() -> None:
    async def main() -> None:
        engine = Engine()
        peers = {P0: Peer("openai", "theirs")}
        async with (
            engine,
            a_rig({P0: f"{engine.url}/api/v1"}, peers=peers, health_interval_s=0.05) as rig,
        ):
            reply = await rig.call(authorization="Bearer ours", x_api_key="ours")
            await until(lambda: len(engine.asked) > 2, "probes")

        (heard,) = engine.heard
        assert reply.status == 200
        assert heard.line == "POST /api/v1/chat/completions HTTP/1.1"
        assert heard.headers["authorization"] == "Bearer theirs"
        assert "ours" not in str(heard.headers)
        assert {one.line for one in engine.asked} == {"GET /api/v1/models HTTP/1.1"}
        assert {one.headers["authorization"] for one in engine.asked} == {"Bearer theirs"}

    play(main())


def test_a_remote_engine_is_called_over_tls_and_its_certificate_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = _certificate(tmp_path)
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(certificate, key)

    async def main() -> int:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
            writer.write(an_answer(b'{"usage":{"completion_tokens":1}}'))
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=server_side)
        port = server.sockets[0].getsockname()[1]
        async with server:
            peers = {P0: Peer("openai")}
            async with a_rig({P0: f"https://127.0.0.1:{port}"}, peers=peers) as rig:
                return (await rig.call()).status

    assert play(main()) >= 500
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert play(main()) == 200


def _certificate(folder: Path) -> tuple[Path, Path]:
    certificate, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    try:
        subprocess.run(command, check=True, capture_output=True)  # noqa: S603
    except FileNotFoundError:
        pytest.skip("needs the openssl program to make a certificate")
    return certificate, key


def _fleet_file(folder: Path, lines: str) -> Path:
    path = folder / "fleet.toml"
    path.write_text(
        '[[pools]]\nname = "a"\nmodel = "llama-3.1-8b-instruct"\ngpu = "a100-80g"\n' + lines
    )
    return path


@pytest.mark.parametrize(
    ("lines", "kind"),
    [
        ("", "vllm"),
        ('control = "ollama"', "ollama"),
        ('control = "none"', "vllm"),
        ('engine = "sglang"', "sglang"),
        ('engine = "openai"\ncontrol = "none"', "openai"),
    ],
)
def test_the_kind_is_as_said_else_as_controlled_else_vllm(
    lines: str, kind: EngineKind, tmp_path: Path
) -> None:
    assert peers_of("f", load_fleet(_fleet_file(tmp_path, lines)), {}) == {"a-0": Peer(kind)}


def test_a_key_comes_from_the_environment_and_must_be_there(tmp_path: Path) -> None:
    file = load_fleet(_fleet_file(tmp_path, 'api_key_env = "REMOTE_KEY"'))

    assert peers_of("f", file, {"REMOTE_KEY": "k"}) == {"a-0": Peer("vllm", "k")}
    with pytest.raises(InputError) as refused:
        peers_of("f", file, {})
    assert str(refused.value) == (
        "f: pools[0].api_key_env: the environment has no REMOTE_KEY (export REMOTE_KEY=…)"
    )
