"""Models that come and go under 200 workflows: every call is answered once, or refused."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from builders import a_fleet, a_pool
from concertmaster.compose import build_fleet
from concertmaster.config_files import load_fleet
from concertmaster.core.events import Event, ReplicaDemoted, ReplicaDied, ReplicaReady
from concertmaster.core.fleet import Fleet, Readiness, ReplicaId, ScalingLimits
from concertmaster.engines import control
from concertmaster.engines.control import ControlKind
from concertmaster.engines.emulator import Emulator
from concertmaster.engines.faults import Faults
from concertmaster.gateway import holding, service
from concertmaster.policies.catalog import policy
from gateway_rig import Rig, over_engines, play, until
from swap_load import Load, Tally, play_load

MODELS = ("a", "b", "c", "d")
SPEEDUP = 20.0
LOAD = Load(models=MODELS, calls=(2, 3), pause_s=0.5, patience_s=20.0)


def a_crowded_fleet() -> Fleet:
    """Four models, and GPUs for two."""
    pools = [
        a_pool(one, model=one, least_replicas=0, stopped=Readiness.SLEEPING, max_sequences=64)
        for one in MODELS
    ]
    states = dict.fromkeys(("c-0", "d-0"), Readiness.SLEEPING)
    return a_fleet(*pools, states=states, limits=ScalingLimits(gpus=2, cooldown_s=0.0))


def ended(engine: Emulator) -> tuple[float, float]:
    """Calls that an engine finished, and that it broke off."""
    text = engine.metrics.render().decode()
    ends = {
        reason: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        for reason in ("length", "abort")
        if line.startswith("vllm:request_success_total") and f'"{reason}"' in line
    }
    return ends.get("length", 0.0), ends.get("abort", 0.0)


async def mend_once_it_failed(rig: Rig, engine: Emulator) -> None:
    await until(lambda: ReplicaDied(ReplicaId("d-0")) in rig.history, seconds=10.0)
    engine.faults = Faults()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "LOOK_S", 0.02)
    monkeypatch.setattr(holding, "FIRST_S", 0.05)
    monkeypatch.setattr(control, "POLL_S", 0.01)
    monkeypatch.setattr(control, "RETRY_S", 0.01)


def check(tally: Tally, engines: Sequence[Emulator], history: Sequence[Event]) -> None:
    """Every call has one outcome, engines ran each served call once, and models did swap."""
    assert not tally.lost
    assert tally.workflows == 200
    assert tally.served > 300
    assert tally.held > 0
    ran, broken = (sum(ends) for ends in zip(*map(ended, engines), strict=True))
    assert tally.served <= ran <= tally.served + tally.left
    assert broken <= tally.left
    for kind in (ReplicaReady, ReplicaDemoted):
        assert sum(isinstance(event, kind) for event in history) >= 3


@pytest.mark.parametrize("kind", ["vllm", "llama.cpp", "ollama"])
def test_no_call_is_lost_and_none_answered_twice_while_models_swap(
    kind: ControlKind,
) -> None:
    async def main() -> None:
        swaps = policy("las/reactive:interval_s=2,settle_s=2")
        fleet = a_crowded_fleet()
        controls: Mapping[ReplicaId, ControlKind] = dict.fromkeys(fleet.replicas, kind)
        engine = {"sleep_s": 0.5, "wake_s": 2.0, "reload_s": 4.0}
        async with over_engines(
            fleet=fleet,
            policy=swaps,
            engine=engine,
            speedup=SPEEDUP,
            controls=controls,
            health_interval_s=0.1,
            hold_s=10.0,
        ) as (rig, engines):
            for one in engines[2:]:
                one.fall_asleep(lambda: None)
            engines[3].faults = Faults(wakes="fails")
            mending = asyncio.create_task(mend_once_it_failed(rig, engines[3]))
            tally = await play_load(rig.port, LOAD, workflows=200, for_s=0.0, seed=1)
            await mending
            await rig.idle()
            check(tally, engines, rig.history)
            assert set(tally.refused) == {"no_replica"}

    play(main())


SHARED = """
[[nodes]]
name = "n0"
gpu = "a100-40g"
gpus = 1
host_gb = 96
[[nodes]]
name = "n1"
gpu = "a100-40g"
gpus = 1
host_gb = 96
"""


def a_shared_fleet(folder: Path) -> Fleet:
    """Four models of 15 GB, and two GPUs that hold two of them each at the most."""
    text = SHARED
    for i, model in enumerate(MODELS):
        text += f'[[pools]]\nname = "{model}"\nserved_name = "{model}"\ngpu = "a100-40g"\n'
        text += 'model = "qwen2.5-7b-instruct"\nnodes = ["n0", "n1"]\nkv_blocks = 2000\n'
        text += f'state = "{"running" if i == 0 else "sleeping"}"\nmax_sequences = 64\n'
    path = folder / "fleet.toml"
    path.write_text(text)
    return build_fleet(load_fleet(path), name="shared", served=True)


@pytest.mark.parametrize("name", ["maestro", "fcfs/lru-swap"])
def test_no_call_is_lost_while_models_share_gpus(name: str, tmp_path: Path) -> None:
    async def main() -> None:
        fleet = a_shared_fleet(tmp_path)
        engine = {"sleep_s": 0.3, "wake_s": 0.9}
        async with over_engines(
            fleet=fleet, policy=policy(name), engine=engine, speedup=SPEEDUP, hold_s=10.0
        ) as (rig, engines):
            for one, (_, _, state) in zip(engines, fleet.replicas.values(), strict=True):
                if state is Readiness.SLEEPING:
                    one.fall_asleep(lambda: None)
            tally = await play_load(rig.port, LOAD, workflows=200, for_s=0.0, seed=2)
            await rig.idle()
            check(tally, engines, rig.history)
            assert not tally.refused
            for replica in rig.gateway.scheduler.replicas.values():
                assert replica.memory is not None
                replica.memory.validate()

    play(main())
