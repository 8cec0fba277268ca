"""Freeing memory of a shared node: the steps there are, and the cheapest that suffice."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from concertmaster.core.fleet import Readiness, Replica
from concertmaster.core.promise import spare_blocks
from concertmaster.core.request import PREFIX_CHUNK_TOKENS, ServiceClass
from concertmaster.core.tenancy import Residency, Step, Want
from concertmaster.core.waking import rest_of


class Plan(NamedTuple):
    """Steps that free enough.

    Attributes:
        steps: One a replica at the most.
        price_s: What they cost in sum.
    """

    steps: tuple[Step, ...] = ()
    price_s: float = 0.0

    def and_then(self, other: "Plan") -> "Plan":
        """Return both, one after the other."""
        return Plan((*self.steps, *other.steps), self.price_s + other.price_s)


def steps_of(
    replica: Replica, want: Want, replicas: int, *, now_s: float, since_s: float
) -> list[Step]:
    """Return what could be taken from a replica, the gentlest step first.

    Args:
        replica: One that neither loads nor leaves.
        want: What is asked of its model.
        replicas: Of its model that run.
        now_s: The instant.
        since_s: When it came up.
    """
    if not replica.alive or replica.memory is None:
        return []
    if replica.readiness is Readiness.SLEEPING:
        return [_moved("unload", replica, want, Readiness.HOST)]
    if replica.readiness is not Readiness.RUNNING:
        return []
    return [*_kv_steps(replica, want), _demotion(replica, want, now_s, since_s, replicas)]


def _kv_steps(replica: Replica, want: Want) -> list[Step]:
    footprint, pool = replica.pool.footprint, replica.pool
    spare = spare_blocks(replica)
    if footprint is None or not spare:
        return []
    chunk_blocks = PREFIX_CHUNK_TOKENS // pool.block_tokens
    cached = min(spare, len(replica.prefixes) * chunk_blocks)
    block_bytes = footprint.kv_block_bytes
    steps = []
    if spare > cached:
        free_bytes = (spare - cached) * block_bytes
        steps.append(Step(kind="shrink", replica=replica, hbm_bytes=free_bytes, want=want))
    if cached:
        redo_s = cached * pool.block_tokens * pool.prefill_token_s
        whole_bytes = spare * block_bytes
        steps.append(
            Step(kind="drop", replica=replica, hbm_bytes=whole_bytes, want=want, redo_s=redo_s)
        )
    return steps


def _demotion(replica: Replica, want: Want, now_s: float, since_s: float, replicas: int) -> Step:
    busy_s = max((c.decode_tokens for c in replica.in_flight.values()), default=0)
    return _moved(
        "drain" if replica.in_flight else "demote",
        replica,
        want,
        rest_of(replica),
        unused_s=now_s - max(since_s, replica.last_used_s),
        resident_s=now_s - since_s,
        replicas=replicas,
        busy_s=busy_s * replica.pool.decode_token_s * replica.pace,
        busy_interactive=any(
            call.request.service_class is ServiceClass.INTERACTIVE
            for call in replica.in_flight.values()
        ),
    )


def _moved(  # the facts of a step
    kind: str,
    replica: Replica,
    want: Want,
    to: Readiness,
    *,
    unused_s: float = 0.0,
    resident_s: float = math.inf,
    replicas: int = 1,
    busy_s: float = 0.0,
    busy_interactive: bool = False,
) -> Step:
    footprint, ready_s = replica.pool.footprint, replica.pool.ready_s
    assert footprint is not None
    freed_bytes = replica.holding().hbm_bytes - footprint.at(to).hbm_bytes
    return Step(
        kind=kind,  # type: ignore[arg-type]  # one of the kinds
        replica=replica,
        to=to,
        hbm_bytes=freed_bytes,
        want=want,
        back_s=ready_s.get(to, 0.0) - ready_s.get(replica.readiness, 0.0),
        unused_s=unused_s,
        resident_s=resident_s,
        replicas=max(1, replicas),
        busy_s=busy_s,
        busy_interactive=busy_interactive,
    )


def cheapest(
    steps: Iterable[Step], lacking_bytes: int, residency: Residency, want: Want
) -> Plan | None:
    """Choose steps that free enough: the cheapest first, and none that turns out superfluous.

    Returns:
        ``None`` if all that is allowed does not free enough.
    """
    if lacking_bytes <= 0:
        return Plan()
    priced = [
        (price_s, i, step)
        for i, step in enumerate(steps)
        if (price_s := residency.price_s(step, want)) is not None
    ]
    chosen: dict[str, tuple[float, Step]] = {}
    freed_bytes = 0
    for price_s, _, step in sorted(priced, key=lambda one: one[:2]):
        if freed_bytes >= lacking_bytes:
            break
        before = chosen.get(step.replica.replica_id)
        gain_bytes = step.hbm_bytes - (before[1].hbm_bytes if before else 0)
        if gain_bytes > 0:
            chosen[step.replica.replica_id] = (price_s, step)
            freed_bytes += gain_bytes
    if freed_bytes < lacking_bytes:
        return None
    return _pruned(list(chosen.values()), freed_bytes - lacking_bytes)


def ending(steps: Iterable[Step], count: int, residency: Residency, want: Want) -> Plan | None:
    """Return the steps that end so many replicas, or ``None`` if one of them may not be ended."""
    ends = [one for one in steps if one.kind in ("demote", "drain")]
    prices_s = [s for one in ends if (s := residency.price_s(one, want)) is not None]
    return None if len(prices_s) < count else Plan(tuple(ends), sum(prices_s))


def _pruned(chosen: Sequence[tuple[float, Step]], spare_bytes: int) -> Plan:
    """Leave out what is not needed, the dearest first."""
    kept = []
    for price_s, step in sorted(chosen, key=lambda one: -one[0]):
        if step.hbm_bytes <= spare_bytes:
            spare_bytes -= step.hbm_bytes
        else:
            kept.append((price_s, step))
    return Plan(tuple(step for _, step in kept), sum(price_s for price_s, _ in kept))
