"""Random histories on shared nodes, with a model of the hardware beside the core.

Whatever is loaded, demoted, grown or lost, in whatever order: the hardware never holds more
than it has, the ledger is what the hardware holds or is about to, and every call is answered.
"""

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule, run_state_machine_as_test

from builders import FOOTPRINT, a_fleet, a_pool, a_shared_fleet, a_sharing_pool
from concertmaster.core.actions import Action, Demote, Resize, Wake
from concertmaster.core.events import ReplicaDemoted, ReplicaReady
from concertmaster.core.fleet import Fleet, Readiness, Replica, ReplicaId
from test_scheduler_machine import REPLICAS, SCALINGS, Driver

HBM_BYTES, HOST_BYTES = 38_000_000_000, 33_000_000_000
"""Two models run with 4 GB of KV between them, and two lie in RAM."""

POLICIES = (
    "fcfs/expected:hold_s=5,residence=0.5",
    "fcfs/expected:hold_s=5,kv=worst-case",
    "stjf/lru-swap",
    "edf/qlm:kv=forecast",
    "least-tokens/lru-swap:kv=worst-case",
    "fcfs/no-colocation",
    "maestro:hold_s=5,residence=0.5,program_s=30",
)


class SharingDriver(Driver):
    """Carries out what is asked on hardware that refuses to be overfilled."""

    def __init__(self) -> None:
        super().__init__()
        self.kv_blocks = dict.fromkeys(self.core.replicas, FOOTPRINT.least_kv_blocks)
        self.bound: dict[ReplicaId, Readiness] = {}

    def fleet(self) -> Fleet:
        return a_shared_fleet(
            a_sharing_pool("p", model="m", max_sequences=2, kv_blocks=2000),
            a_sharing_pool("q", model="x", max_sequences=3, kv_blocks=2000),
            a_sharing_pool("s", model="asleep", max_sequences=2, kv_blocks=2000),
            nodes=2,
            hbm_bytes=HBM_BYTES,
            host_bytes=HOST_BYTES,
            states={"p-0": Readiness.RUNNING, "q-0": Readiness.HOST, "s-1": Readiness.SLEEPING},
        )

    # The hardware.

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Resize(replica_id, kv_blocks):
                    self.kv_blocks[replica_id] = kv_blocks
                    assert kv_blocks >= FOOTPRINT.least_kv_blocks
                case Demote(replica_id, readiness):
                    self.bound[replica_id] = readiness
                case Wake(replica_id):
                    self.kv_blocks[replica_id] = FOOTPRINT.least_kv_blocks
                case _:
                    pass
            super().perform([action])
            self.nothing_is_overfilled()

    def hbm_bytes(self, replica: Replica) -> int:
        """GPU memory that a process really takes: all that it runs with, from the load on."""
        if not replica.alive or replica.memory is None:
            return 0
        name = replica.replica_id
        if replica.readiness is Readiness.RUNNING or name in self.waking:
            kv_bytes = self.kv_blocks[name] * FOOTPRINT.kv_block_bytes
            return FOOTPRINT.weights_bytes + FOOTPRINT.runtime_bytes + kv_bytes
        return FOOTPRINT.asleep_bytes if replica.readiness is Readiness.SLEEPING else 0

    def host_bytes(self, replica: Replica) -> int:
        states = {replica.readiness, self.bound.get(replica.replica_id)}
        lies = states & {Readiness.SLEEPING, Readiness.HOST}
        shares = replica.alive and replica.memory is not None
        return FOOTPRINT.weights_bytes if lies and shares else 0

    @invariant()
    def nothing_is_overfilled(self) -> None:
        for i in "01":
            tenants = [r for name, r in self.core.replicas.items() if name.endswith(i)]
            assert sum(map(self.hbm_bytes, tenants)) <= HBM_BYTES
            assert sum(map(self.host_bytes, tenants)) <= HOST_BYTES

    @invariant()
    def grants_are_what_the_engines_were_told(self) -> None:
        for name, replica in self.core.replicas.items():
            if replica.memory is None:
                continue
            if replica.alive and replica.readiness is Readiness.RUNNING:
                assert replica.kv.capacity_blocks == self.kv_blocks[name]

    @invariant()
    def nobody_waits_beside_an_idle_replica_or_a_sleeping_one(self) -> None:
        """Not so on shared nodes, where others may be in the way; the end shows that it ends."""

    # What others do to it, as far as the hardware bears it.

    def check_wake(self, woken: Replica) -> None:
        if woken.memory is None:
            super().check_wake(woken)

    def busy_gpus(self) -> int:
        """Those of nodes that nobody shares; the others are full of models, not of replicas."""
        return sum(
            replica.readiness is Readiness.RUNNING or name in self.waking
            for name, replica in self.core.replicas.items()
            if replica.alive and replica.memory is None
        )

    @rule(name=st.sampled_from(REPLICAS))
    def make_ready(self, name: str) -> None:
        replica = self.core.replicas[ReplicaId(name)]
        memory = replica.memory
        if memory is None:
            super().make_ready(name)
            return
        asked = name in self.waking or replica.readiness is Readiness.RUNNING
        blocks = FOOTPRINT.least_kv_blocks
        if not replica.alive or not asked:
            held = memory.held(name)
            needed = FOOTPRINT.at("running", blocks).hbm_bytes - held.hbm_bytes
            if needed > memory.free_hbm_bytes:
                return
        self.waking.discard(ReplicaId(name))
        self.stopping.discard(ReplicaId(name))
        self.bound.pop(ReplicaId(name), None)
        self.feed(ReplicaReady(ReplicaId(name)))

    @rule(
        name=st.sampled_from(REPLICAS),
        readiness=st.sampled_from((Readiness.SLEEPING, Readiness.HOST, Readiness.REMOTE)),
    )
    def demote(self, name: str, readiness: Readiness) -> None:
        replica = self.core.replicas[ReplicaId(name)]
        memory = replica.memory
        if memory is None or memory.fits(name, FOOTPRINT.at(readiness)):
            self.bound.pop(ReplicaId(name), None)
            self.lose(ReplicaId(name), ReplicaDemoted(ReplicaId(name), readiness))

    @precondition(lambda self: self.stopping)
    @rule(data=st.data(), stops=st.booleans())
    def hear_of_stop(self, data: st.DataObject, *, stops: bool) -> None:
        replica_id = data.draw(st.sampled_from(sorted(self.stopping)))
        running = self.core.replicas[replica_id].readiness is Readiness.RUNNING
        if stops or not running:
            readiness = self.bound.pop(replica_id)
            self.lose(replica_id, ReplicaDemoted(replica_id, readiness))
        else:
            self.make_ready(replica_id)


@pytest.mark.parametrize("policy", POLICIES)
def test_any_history_on_shared_nodes_keeps_every_promise(policy: str) -> None:
    class DriverOfPolicy(SharingDriver):
        pass

    DriverOfPolicy.policy = policy
    run_state_machine_as_test(
        DriverOfPolicy, settings=settings(max_examples=15, stateful_step_count=40)
    )


class MixedDriver(SharingDriver):
    """Two pools share nodes, a third has GPUs of its own that a scaling starts and stops."""

    policy = "fcfs/expected:hold_s=5,residence=0.5"

    def fleet(self) -> Fleet:
        shared = a_shared_fleet(
            a_sharing_pool("p", model="m", max_sequences=2, kv_blocks=2000),
            a_sharing_pool("q", model="x", max_sequences=3, kv_blocks=2000),
            nodes=2,
            hbm_bytes=HBM_BYTES,
            host_bytes=HOST_BYTES,
            states={"p-0": Readiness.RUNNING, "q-0": Readiness.HOST},
        )
        own = a_fleet(
            a_pool("s", model="asleep", max_sequences=2),
            replicas=2,
            states={"s-0": Readiness.DISK, "s-1": Readiness.SLEEPING},
        )
        return replace(
            shared,
            clusters=shared.clusters + own.clusters,
            nodes=shared.nodes + own.nodes,
            pools=shared.pools + own.pools,
            replicas={**shared.replicas, **own.replicas},
        )

    @invariant()
    def scaling_leaves_shared_nodes_alone(self) -> None:
        scaler = self.core._scaler
        assert scaler is not None
        assert set(scaler.view().pools) == {"s"}


@pytest.mark.parametrize("name", SCALINGS)
def test_any_history_of_shared_and_scaled_pools_keeps_every_promise(name: str) -> None:
    class DriverOfScaling(MixedDriver):
        scaling, limits = SCALINGS[name]

    run_state_machine_as_test(
        DriverOfScaling, settings=settings(max_examples=15, stateful_step_count=40)
    )
