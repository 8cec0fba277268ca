"""Routers: which pools may serve a call."""

from collections.abc import Sequence
from dataclasses import dataclass

from concertmaster.core.fleet import Pool, PoolId
from concertmaster.core.forecast import Forecast
from concertmaster.core.request import Request


@dataclass(frozen=True, slots=True)
class AnyPool:
    """Every pool that can hold the call; quality is not looked at."""

    def route(
        self, request: Request, forecast: Forecast, pools: Sequence[Pool]
    ) -> tuple[PoolId, ...]:
        """Keep the fleet's order."""
        return tuple(pool.pool_id for pool in pools)


@dataclass(frozen=True, slots=True)
class SurestPools:
    """The pools whose model is most likely to solve the call.

    With a clairvoyant forecast these are the models that do solve it, or all of them if
    none does; with no forecast of success every pool is as good as another.
    """

    def route(
        self, request: Request, forecast: Forecast, pools: Sequence[Pool]
    ) -> tuple[PoolId, ...]:
        """Compare the success forecast of each pool's model."""
        best = max(forecast.success.get(pool.model.name, 0.0) for pool in pools)
        return tuple(
            pool.pool_id for pool in pools if forecast.success.get(pool.model.name, 0.0) == best
        )
