"""The gateway's clock, and calls while it jumps."""

import asyncio
import time
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertmaster.gateway import server
from concertmaster.gateway.clock import steady
from gateway_rig import hangs, over_upstreams, play

STEPS_S = st.lists(st.floats(-40, 40), min_size=2)


@given(STEPS_S)
def test_time_goes_on_by_every_step_forwards_and_by_none_backwards(steps_s: list[float]) -> None:
    read = steady(iter([*accumulate(steps_s)]).__next__)

    shown_s = [read() for _ in steps_s]

    for (before_s, after_s), step_s in zip(pairwise(shown_s), steps_s[1:], strict=True):
        assert after_s - before_s == pytest.approx(max(0.0, step_s), abs=1e-9)


def test_a_call_ends_in_time_though_the_clock_jumps_back(monkeypatch: pytest.MonkeyPatch) -> None:
    behind_s = 0.0
    monkeypatch.setattr(server, "scaled_clock", lambda _: lambda: time.monotonic() - behind_s)

    async def main() -> None:
        nonlocal behind_s
        async with over_upstreams(hangs, hangs, total_timeout_s=0.4) as (rig, _):
            call = asyncio.create_task(rig.call({"stream": False}))
            await asyncio.sleep(0.1)
            behind_s = 30.0
            assert (await call).status == 504
            await rig.idle()

    play(main())
