"""The ledger of a node's memory adds up, whatever is asked of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertmaster.core.hbm import NOTHING, Footprint, Holding, NodeMemory, both

holdings = st.builds(Holding, *(st.integers(0, 60) for _ in Holding._fields))
asked = st.lists(st.tuples(st.sampled_from("abc"), holdings), max_size=30)


@given(asked)
def test_what_fits_is_held_and_nothing_is_exceeded(steps: list[tuple[str, Holding]]) -> None:
    memory = NodeMemory(hbm_bytes=200, host_bytes=100)
    held: dict[str, Holding] = {}
    for name, holding in steps:
        after = {**held, name: holding}
        hbm = sum(one.hbm_bytes for one in after.values())
        host = sum(one.host_bytes for one in after.values())
        short = (max(0, hbm - 200), max(0, host - 100))
        assert memory.lacks(name, holding) == short
        assert memory.fits(name, holding) == (short == (0, 0))
        if short == (0, 0):
            memory.hold(name, holding)
            held = after
        else:
            with pytest.raises(AssertionError, match="would exceed"):
                memory.hold(name, holding)
        memory.validate()
    for name in held:
        memory.hold(name, NOTHING)
    assert (memory.free_hbm_bytes, memory.free_host_bytes) == (200, 100)


@given(holdings, holdings)
def test_on_its_way_a_replica_holds_what_either_end_does(one: Holding, other: Holding) -> None:
    way = both(one, other)

    assert all(
        part >= max(mine, theirs) for part, mine, theirs in zip(way, one, other, strict=True)
    )


@pytest.mark.parametrize("state", ["running", "sleeping", "host", "disk", "remote"])
def test_only_a_running_replica_holds_weights_and_kv_on_the_gpu(state: str) -> None:
    footprint = Footprint(
        weights_bytes=100, runtime_bytes=10, asleep_bytes=5, kv_block_bytes=2, least_kv_blocks=3
    )

    holding = footprint.at(state, 7)

    on_gpu = (holding.weights_bytes, holding.kv_bytes)
    assert on_gpu == ((100, 14) if state == "running" else (0, 0))
    assert holding.resident_bytes == {"running": 10, "sleeping": 5}.get(state, 0)
    assert holding.host_bytes == (100 if state in ("sleeping", "host") else 0)
