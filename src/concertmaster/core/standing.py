"""What a scaling policy sees of the fleet, and the question it answers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from concertmaster.core.fleet import Pool, PoolId
from concertmaster.core.request import ModelName


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A pool as it stands.

    Attributes:
        serving: Replicas that take calls.
        starting: Replicas on their way up.
        most: Replicas that could serve at once: those that died or that an operator drains
            are not among them.
        calls: Calls on its replicas, and its share of those that wait for several pools.
    """

    pool: Pool
    serving: int
    starting: int
    most: int
    calls: float

    @property
    def present(self) -> int:
        """Replicas that take calls or are about to."""
        return self.serving + self.starting


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What is asked of a model: how much comes in, and what live workflows still need.

    Attributes:
        tokens_per_s: Output tokens by which forecasts of what workflows need have grown, a
            second; workflows that end early, or go to another model, take theirs away.
        announcements_per_s: How often they grew: new workflows, and calls nobody foresaw.
        variance: Of the tokens announced in a second, as in a compound Poisson process.
        uncertainty_per_s: ``variance`` times it is the variance of ``tokens_per_s`` itself.
        owed_tokens: Output tokens that live workflows still need, by forecast.
        owed_workflows: Live workflows that need some.
        open_ratio: Calls open at once for each such workflow; below 1 where tools take long.
        prefill_ratio: Prompt tokens computed for an output token.
        context_tokens: KV tokens of a call, its answer half done.
    """

    tokens_per_s: float = 0.0
    announcements_per_s: float = 0.0
    variance: float = 0.0
    uncertainty_per_s: float = 0.0
    owed_tokens: int = 0
    owed_workflows: int = 0
    open_ratio: float = 1.0
    prefill_ratio: float = 0.0
    context_tokens: float = 1.0


NO_DEMAND = Demand()


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetStanding:
    """All that a scaling policy may know.

    Attributes:
        pools: In the order of the fleet file.
        gpus: Most GPUs that may be busy at once; ``None`` for no limit.
    """

    pools: Mapping[PoolId, Standing]
    demands: Mapping[ModelName, Demand] = field(default_factory=dict)
    gpus: int | None = None

    def demand(self, model: ModelName) -> Demand:
        """Return what is asked of a model; nothing if nobody has asked."""
        return self.demands.get(model, NO_DEMAND)


class Scaling(Protocol):
    """How many replicas should each pool have?"""

    @property
    def interval_s(self) -> float:
        """Seconds between two times of asking."""

    @property
    def settle_s(self) -> float:
        """A pool shrinks only to what was never too few for this long."""

    @property
    def memory_s(self) -> float:
        """An arrival counts towards rates with e^-1 of its weight after this long."""

    def targets(self, now_s: float, view: FleetStanding) -> Mapping[PoolId, int]:
        """Return replicas serving or starting, by pool; a pool left out stays as it is."""
