"""All that keeps books of a gateway: metrics by label, receipts, telemetry, the log."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from concertmaster.config import GatewaySection
from concertmaster.core.errors import InputError
from concertmaster.core.scheduler import Scheduler
from concertmaster.gateway.driver import Gateway
from concertmaster.gateway.journal import Journal
from concertmaster.gateway.receipts import Receipts
from concertmaster.gateway.tally import Tally
from concertmaster.gateway.witness import Audience, Listener, Witness
from concertmaster.state.receipts import ReceiptFile

if TYPE_CHECKING:
    from concertmaster.gateway.telemetry import Telemetry


class Seeing:
    """The witnesses of one gateway.

    Args:
        scheduler: The core.
        settings: Which of them there are.
        speedup: Seconds of the gateway's clock in one of the wall.
        also: Told of every event too.

    Attributes:
        audience: To be told of every event.
        journal: To be told when the gateway starts.

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
        self.receipts = Receipts(scheduler, store)
        self._tally = Tally(scheduler)
        self._tally.receipts = self.receipts.counts
        self.journal = Journal(calls=settings.log_calls)
        self._witnesses: list[Witness] = [self._tally, self.receipts, self.journal]
        self._telemetry: Telemetry | None = None
        if settings.otel_url:
            self._telemetry = _telemetry(scheduler, settings, speedup)
            self._witnesses.append(self._telemetry)
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
        duties = (self.receipts.watch(), self.journal.sum_up(gateway.metrics))
        tasks = [asyncio.create_task(duty) for duty in duties]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.journal.stopped(sum(gateway.metrics.by_status.values()))
            await self.receipts.close()
            if self._telemetry is not None:
                await self._telemetry.close()


def _telemetry(scheduler: Scheduler, settings: GatewaySection, speedup: float) -> "Telemetry":
    where = "gateway.otel_url"
    if not settings.otel_url.startswith(("http://", "https://")):
        raise InputError("", where, f"expected http://HOST:PORT, found {settings.otel_url!r}")
    try:
        from concertmaster.gateway.telemetry import exporting  # noqa: PLC0415  # an optional extra
    except ModuleNotFoundError as missing:
        hint = "pip install 'concertmaster[otel]'"
        raise InputError("", where, f"{missing.name} is not installed", hint) from None
    return exporting(
        settings.otel_url,
        scheduler=scheduler,
        host=settings.host,
        port=settings.port,
        speedup=speedup,
    )
