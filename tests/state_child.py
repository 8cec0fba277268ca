"""Everything that outlives a process, written by processes that are there to be killed.

Usage: state_child.py FOLDER. For each line on standard input, which is a seed, a process is made
that tells its id, and then for ever: what it will do, as JSON, and "done" once that is
acknowledged.
"""

import json
import os
import random
import sys
from contextlib import ExitStack, closing
from itertools import count
from pathlib import Path
from typing import Any

from builders import a_request
from concertmaster.core.request import ModelName, RequestId, WorkflowId
from concertmaster.learning.feedback import FeedbackStore
from concertmaster.predictors.interface import Completion
from concertmaster.state.account_file import AccountFile
from concertmaster.state.accounts import Spent
from concertmaster.state.key_file import KeyFile
from concertmaster.state.keys import Key, Limits
from concertmaster.state.receipts import ReceiptFile, Row

TENANTS, IN_ONE_GO, RECEIPTS_KEPT = 4, 3, 30
KINDS = ("key", "revoke", "limit", "spend", "receipts", "labels")
Order = tuple[str, int]


class Stores:
    """All files of a folder, open."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.keys = stack.enter_context(closing(KeyFile(folder / "keys.sqlite")))
        self.accounts = stack.enter_context(closing(AccountFile(folder / "keys.sqlite")))
        receipts = ReceiptFile(folder / "receipts.sqlite", most=RECEIPTS_KEPT)
        self.receipts = stack.enter_context(closing(receipts))
        self.labels = stack.enter_context(FeedbackStore(folder / "labels.sqlite"))

    def carry_out(self, order: Order) -> None:
        kind, number = order
        getattr(self, f"_{kind}")(number)

    def _key(self, number: int) -> None:
        tenant, digest = f"t{number % TENANTS}", number.to_bytes(32)
        key = Key(key_id=f"k{number}", digest=digest, shown="cm-", tenant=tenant, created_s=1.0)
        self.keys.create(key)

    def _revoke(self, number: int) -> None:
        good = [key.key_id for key in self.keys.issued() if key.revoked_s is None]
        if len(good) > TENANTS:
            self.keys.revoke(good[0], float(number))

    def _limit(self, number: int) -> None:
        for tenant in list(self.keys.tenants())[:1]:
            self.keys.limit(tenant, Limits(in_flight=number + 1))

    def _spend(self, number: int) -> None:
        spent = Spent(0.0, float(number + 1), 1.0)
        self.accounts.put(dict.fromkeys(list(self.keys.tenants())[:2], spent))

    def _receipts(self, number: int) -> None:
        names = [f"r{number}-{part}" for part in range(IN_ONE_GO)]
        self.receipts.add([Row(name, "w", "", name.encode()) for name in names])

    def _labels(self, number: int) -> None:
        for part in range(IN_ONE_GO):
            name, workflow = RequestId(f"l{number}-{part}"), WorkflowId(f"w{number}")
            self.labels.asked(a_request(name, workflow_id=workflow))
            self.labels.answered(name, Completion(model=ModelName("m"), output_tokens=number))
        self.labels.closed(WorkflowId(f"w{number}"))
        assert self.labels.flush()

    def holds(self) -> dict[str, Any]:
        """Return all that is in them."""
        return {
            "keys": [(key.key_id, key.revoked_s) for key in self.keys.issued()],
            "limits": {name: limits.in_flight for name, limits in self.keys.tenants().items()},
            "spent": {name: spent.tokens for name, spent in self.accounts.spent().items()},
            "receipts": self.receipts.of_workflow("w", None, 10 * RECEIPTS_KEPT),
            "labels": [
                (label.request_id, label.output_tokens, label.remaining_calls)
                for label in self.labels.rows()
            ],
        }


def orders(seed: int) -> Any:  # noqa: ANN401
    """Draw what to do: numbers are never drawn twice, whatever was done with other seeds."""
    rng = random.Random(seed)
    for number in count(1000 * seed):
        yield rng.choice(KINDS), number


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def write_until_killed(folder: Path, seed: int) -> None:
    say(str(os.getpid()))
    with ExitStack() as stack:
        stores = Stores(folder, stack)
        for order in orders(seed):
            say(json.dumps(order))
            stores.carry_out(order)
            say("done")


def main() -> None:
    for line in sys.stdin:
        child = os.fork()
        if not child:
            write_until_killed(Path(sys.argv[1]), int(line))
        os.waitpid(child, 0)
        say("killed")


if __name__ == "__main__":
    main()
