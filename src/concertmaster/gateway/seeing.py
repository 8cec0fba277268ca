"""All that keeps books of a gateway: metrics by label, receipts, telemetry, the log."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from concertmaster.config import GatewaySection
from concertmaster.core.scheduler import Scheduler
from concertmaster.gateway.driver import Gateway
from concertmaster.gateway.journal import Journal
from concertmaster.gateway.receipts import Receipts
from concertmaster.gateway.tally import Tally
from concertmaster.gateway.witness import Audience, Listener, Witness
from concertmaster.state.receipts import ReceiptFile


class Seeing:
    """The witnesses of one gateway.

    Args:
        scheduler: The core.
        settings: Which of them there are.
        speedup: Seconds of the gateway's clock in one of the wall.
        also: Told of every event too.

    Attributes:
        audience: To be told of every event.

    Raises:
        InputError: A file or an option of theirs is amiss.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        settings: GatewaySection,
        *,
        speedup: float = 1.0,
        also: Listener | None = None,
    ) -> None:
        store = None
        if settings.receipts:
            store = ReceiptFile(Path(settings.receipts), most=settings.receipts_kept)
        self.receipts = Receipts(scheduler, store, speedup=speedup)
        self._tally = Tally(scheduler)
        self._tally.receipts = self.receipts.counts
        self._journal = Journal(calls=settings.log_calls)
        self._witnesses: list[Witness] = [self._tally, self.receipts, self._journal]
        self.audience = Audience()
        if also is not None:
            self.audience.add(also)
        for witness in self._witnesses:
            self.audience.add(witness.noticed)

    @asynccontextmanager
    async def over(self, gateway: Gateway) -> AsyncIterator[None]:
        """Keep books of a gateway until the block ends; then write what is left."""
        gateway.metrics.tally = self._tally
        gateway.metrics.witnesses = tuple(self._witnesses)
        duties = (self.receipts.watch(), self._journal.sum_up(gateway.metrics))
        tasks = [asyncio.create_task(duty) for duty in duties]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.receipts.close()
