"""What it costs to keep books of a call: metrics by label, receipts, the span.

    python benchmarks/seeing.py

Plays the life of a call through each witness without any socket: it is opened, dispatched,
finished. Then what a receipt takes in the thread that writes them, and its size on the disk.
"""

import random
import sys
import tempfile
import time
from pathlib import Path

from concertmaster.core.actions import Dispatch
from concertmaster.core.events import RequestArrived, RequestFinished
from concertmaster.core.forecast import Forecast
from concertmaster.core.request import ModelName
from concertmaster.core.scheduler import Scheduler
from concertmaster.gateway.agent import Message
from concertmaster.gateway.exchange import Exchange
from concertmaster.gateway.journal import Journal
from concertmaster.gateway.receipt_sheet import packed, sheet_of
from concertmaster.gateway.receipts import Receipts
from concertmaster.gateway.tally import Tally
from concertmaster.gateway.witness import Witness
from concertmaster.policies.catalog import policy
from concertmaster.state.receipts import ReceiptFile, Row

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.decisions import FORECAST, a_fleet, requests

CALLS, ROUNDS = 3000, 5
MESSAGE = Message(b"POST", b"/v1/chat/completions", {}, b"", keep_alive=True)


class Nobody:
    """A caller that reads nothing."""

    def write(self, data: bytes) -> None:
        """Take bytes."""

    def finished(self, *, keep_alive: bool) -> None:
        """Take the end."""

    def abort(self) -> None:
        """Be cut off."""


def witnesses(scheduler: Scheduler) -> dict[str, Witness]:
    """Return what can be measured."""
    found: dict[str, Witness] = {
        "metrics by label": Tally(scheduler),
        "receipts": Receipts(scheduler),
        "log": Journal(),
    }
    try:
        found["OpenTelemetry"] = a_telemetry(scheduler)
    except ModuleNotFoundError:
        print("OpenTelemetry is not installed, and left out")
    return found


def a_telemetry(scheduler: Scheduler) -> Witness:
    """Make spans that go nowhere."""
    from opentelemetry.sdk.metrics import MeterProvider  # noqa: PLC0415  # an optional extra
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415

    from concertmaster.gateway.telemetry import Telemetry  # noqa: PLC0415

    return Telemetry(
        TracerProvider(), MeterProvider(), scheduler=scheduler, host="127.0.0.1", port=1
    )


def per_call_s(name: str) -> float:
    """Seconds that one witness takes for a call."""
    scheduler = Scheduler(
        a_fleet(4, max_sequences=256), policy("least-tokens+las"), random.Random(0), weighs=True
    )
    witness, taken_s = witnesses(scheduler)[name], 0.0
    source = requests(random.Random(0))
    for _ in range(CALLS):
        request = next(source)
        exchange = Exchange(request, Nobody(), b"", b"", model_named="m", streams=False)
        exchange.forecast = FORECAST
        arrived = RequestArrived(request, FORECAST)
        begun_s = time.perf_counter()
        witness.opened(exchange, MESSAGE)
        taken_s += time.perf_counter() - begun_s
        actions = scheduler.handle(request.arrival_s, arrived)
        (dispatch,) = (one for one in actions if isinstance(one, Dispatch))
        exchange.replica_id, exchange.status, exchange.tokens = dispatch.replica_id, 200, 50
        exchange.dispatched_s = request.arrival_s
        finished = RequestFinished(request.request_id, 1, 50)
        begun_s = time.perf_counter()
        witness.noticed(request.arrival_s, arrived, actions)
        witness.ended(request.arrival_s + 1.0, exchange)
        witness.noticed(request.arrival_s + 1.0, finished, [])
        taken_s += time.perf_counter() - begun_s
        scheduler.handle(request.arrival_s, finished)
    return taken_s / CALLS


def writing_s() -> tuple[float, float, float]:
    """Return seconds to make a receipt, to write one of a batch, and its bytes on the disk."""
    scheduler = Scheduler(
        a_fleet(4, max_sequences=256), policy("least-tokens+las"), random.Random(0), weighs=True
    )
    receipts = Receipts(scheduler, recent=CALLS)
    source = requests(random.Random(0))
    for _ in range(CALLS):
        request = next(source)
        exchange = Exchange(request, Nobody(), b"", b"", model_named="m", streams=False)
        exchange.forecast, exchange.status, exchange.tokens = FORECAST, 200, 50
        receipts.opened(exchange, MESSAGE)
        arrived = RequestArrived(request, Forecast())
        receipts.noticed(0.0, arrived, scheduler.handle(request.arrival_s, arrived))
        receipts.ended(request.arrival_s + 1.0, exchange)
        scheduler.handle(request.arrival_s, RequestFinished(request.request_id, 1, 50))
    begun_s = time.perf_counter()
    rows = [
        Row(one.request_id, one.workflow_id, "", packed(sheet_of(one, [ModelName("m")])))
        for one in receipts._recent.values()  # noqa: SLF001
    ]
    made_s = (time.perf_counter() - begun_s) / CALLS
    with tempfile.TemporaryDirectory() as folder:
        store = ReceiptFile(Path(folder) / "receipts.sqlite", most=10**6)
        begun_s = time.perf_counter()
        store.add(rows)
        wrote_s = (time.perf_counter() - begun_s) / CALLS
        store.close()
        size = sum(one.stat().st_size for one in Path(folder).iterdir()) / CALLS
    return made_s, wrote_s, size


def main() -> None:
    """Measure and print."""
    scheduler = Scheduler(a_fleet(4, max_sequences=1), policy("random"), random.Random(0))
    for name in witnesses(scheduler):
        found = sorted(1e6 * per_call_s(name) for _ in range(ROUNDS))
        print(f"{name:>20}{found[0]:>8.1f} to {found[-1]:.1f} us a call")
    made_s, wrote_s, size = writing_s()
    print(f"in their own thread: {1e6 * made_s:.1f} us to make a receipt, ", end="")
    print(f"{1e6 * wrote_s:.1f} us to write it, {size:,.0f} bytes on the disk")


if __name__ == "__main__":
    main()
