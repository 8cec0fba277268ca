"""Keeps receipts: the latest in memory, and all of them in a store if there is one.

A receipt is best effort, and no call waits for one. Those of calls that ended within the last
``FLUSH_S`` are lost if the process is killed; what was written stays.
"""

import asyncio
import logging
import sqlite3
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple, TypeVar

from concertmaster.core.actions import Action, Dispatch
from concertmaster.core.errors import InputError
from concertmaster.core.events import Event
from concertmaster.core.request import ModelName, RequestId
from concertmaster.core.scheduler import Scheduler
from concertmaster.gateway.agent import Message
from concertmaster.gateway.exchange import Exchange
from concertmaster.gateway.keyring import TENANT_HEADER
from concertmaster.gateway.receipt import MOST_ID_CHARS, Attempt, Record, record_of
from concertmaster.gateway.receipt_fields import Fields, fields_in, receipt_of
from concertmaster.gateway.receipt_sheet import packed, sheet_of
from concertmaster.gateway.tally import RECEIPTS
from concertmaster.state.receipts import ReceiptStore, Row

FLUSH_S = 1.0
RECENT = 1000
MOST_PENDING = 20_000
"""Receipts that wait to be written; beyond that the oldest are dropped."""

MOST_ATTEMPTS = 8
MOST_LISTED = 100

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class _Open(NamedTuple):
    exchange: Exchange
    owner: str
    arrived_unix_s: float
    attempts: list[Attempt]


def owner_of(message: Message) -> str:
    """Return the tenant that a message is of; "" where there are no keys."""
    if message.quota is None:
        return ""
    return message.headers.get(TENANT_HEADER, b"").decode("latin-1")


class Receipts:
    """A witness that writes down what it saw.

    Args:
        scheduler: Says what was weighed, if it weighs.
        store: Keeps receipts beyond the latest; ``None`` for memory only.
        wall: Seconds since 1970.
        recent: How many are kept in memory.

    Attributes:
        counts: What became of receipts.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        store: ReceiptStore | None = None,
        *,
        wall: Callable[[], float] = lambda: time.time_ns() / 1e9,
        recent: int = RECENT,
    ) -> None:
        self._scheduler = scheduler
        self._store = store
        self._wall = wall
        self._most = recent
        self._open: dict[RequestId, _Open] = {}
        self._recent: OrderedDict[tuple[str, str], Record] = OrderedDict()
        self._pending: deque[tuple[str, Record]] = deque()
        self._thread = ThreadPoolExecutor(1, "receipts") if store is not None else None
        self._blind = False
        self.counts: dict[str, int] = dict.fromkeys(RECEIPTS, 0)

    # Witness

    def opened(self, exchange: Exchange, message: Message) -> None:
        """Begin a receipt."""
        entry = _Open(exchange, owner_of(message), self._wall(), [])
        self._open[exchange.request.request_id] = entry

    def noticed(self, now_s: float, event: Event, actions: list[Action]) -> None:
        """Take down dispatches."""
        for action in actions:
            if isinstance(action, Dispatch):
                self._dispatched(now_s, action)

    def _dispatched(self, now_s: float, action: Dispatch) -> None:
        weighing = self._scheduler.weighing
        weighed = None if weighing is None else weighing.take(action.request_id)
        entry = self._open.get(action.request_id)
        if entry is not None and len(entry.attempts) < MOST_ATTEMPTS:
            model = self._scheduler.replicas[action.replica_id].pool.model.name
            entry.attempts.append(Attempt(now_s, model, action, weighed))

    def ended(self, now_s: float, exchange: Exchange) -> None:
        """Close a receipt."""
        entry = self._open.pop(exchange.request.request_id, None)
        if entry is None:
            return
        record = self._record(entry, now_s)
        self.counts["taken"] += 1
        key = entry.owner, record.request_id
        self._recent[key] = record
        self._recent.move_to_end(key)
        if len(self._recent) > self._most:
            self._recent.popitem(last=False)
        if self._store is not None:
            self._pending.append((entry.owner, record))
            self._bound()

    def _record(self, entry: _Open, ended_s: float | None) -> Record:
        return record_of(
            entry.exchange,
            entry.attempts,
            policy=self._scheduler.policy.name,
            ended_s=ended_s,
            arrived_unix_s=entry.arrived_unix_s,
        )

    def _bound(self) -> None:
        while len(self._pending) > MOST_PENDING:
            self._pending.popleft()
            self.counts["dropped"] += 1

    # Questions

    async def find(self, request_id: str, owner: str | None) -> Fields | None:
        """Return the latest receipt of a request, under way or over; ``None`` if there is none.

        Args:
            request_id: As the answer's ``x-request-id``.
            owner: Whose it must be; ``None`` for anybody's.
        """
        entry = self._open.get(RequestId(request_id))
        if entry is not None and owner in (None, entry.owner):
            return self._receipt(self._record(entry, None))
        name = request_id[:MOST_ID_CHARS]
        for (its_owner, its_id), record in reversed(self._recent.items()):
            if its_id == name and owner in (None, its_owner):
                return self._receipt(record)
        store = self._store
        if store is None:
            return None
        await self.flush()
        body = await self._aside(lambda: store.find(name, owner))
        return None if body is None else fields_in(body)

    async def of_workflow(self, workflow_id: str, owner: str | None, most: int) -> list[Fields]:
        """Return receipts of a workflow whose calls are over, newest first."""
        store = self._store
        if store is None:
            records = self._of_workflow(workflow_id, owner)
            return [self._receipt(record) for record in islice(records, most)]
        await self.flush()
        bodies = await self._aside(lambda: store.of_workflow(workflow_id, owner, most))
        return [fields_in(body) for body in bodies]

    def _of_workflow(self, workflow_id: str, owner: str | None) -> Iterable[Record]:
        for (its_owner, _), record in reversed(self._recent.items()):
            if record.workflow_id == workflow_id and owner in (None, its_owner):
                yield record

    def _models(self) -> list[ModelName]:
        return sorted({pool.model.name for pool in self._scheduler.pools.values()})

    def _receipt(self, record: Record) -> Fields:
        return receipt_of(record, self._models())

    # The store

    async def watch(self) -> None:
        """Write now and then what is there, for ever."""
        while self._store is not None:
            await asyncio.sleep(FLUSH_S)
            await self.flush()

    async def flush(self) -> None:
        """Write what is there; if that fails it is kept for the next time, up to a bound."""
        store = self._store
        if store is None or not self._pending:
            return
        batch, models = list(self._pending), self._models()
        self._pending.clear()
        try:
            await self._aside(lambda: store.add([_row(*one, models) for one in batch]))
        except (sqlite3.Error, InputError) as error:
            self._failed(batch, error)
        else:
            self.counts["written"] += len(batch)
            self._blind = False

    def _failed(self, batch: list[tuple[str, Record]], error: Exception) -> None:
        if not self._blind:
            _log.error(
                "receipts cannot be written: %s", error, extra={"event": "receipts_unwritten"}
            )
        self._blind = True
        self._pending.extendleft(reversed(batch))
        self._bound()

    async def close(self) -> None:
        """Write what is left and let go of the store."""
        await self.flush()
        if self._store is not None:
            await self._aside(self._store.close)
        if self._thread is not None:
            self._thread.shutdown()

    async def _aside(self, task: Callable[[], _T]) -> _T:
        """Run something in the one thread that touches the store."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, task)


def _row(owner: str, record: Record, models: list[ModelName]) -> Row:
    body = packed(sheet_of(record, models))
    return Row(record.request_id, record.workflow_id, owner, body)
