"""What ``concertmaster explain`` does: a trace, a file of receipts or a gateway is asked."""

import asyncio
import os
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec

from concertmaster.core.errors import InputError
from concertmaster.engines.address import Address
from concertmaster.engines.openai_http import fetch
from concertmaster.gateway.receipt_fields import fields_in
from concertmaster.observe import console as show
from concertmaster.observe.receipts import show_receipt
from concertmaster.observe.trace import TraceReader
from concertmaster.state.receipts import ReceiptFile

KEY_ENV = "CONCERTMASTER_API_KEY"
TIMEOUT_S = 10.0
_SQLITE = b"SQLite format 3\0"


def explain(*, where: str, request: str | None, url: str, json: Path | None) -> None:
    """Print why a call went where it went.

    Args:
        where: A trace, a file of receipts, or the id of a call if ``request`` is not given.
        request: The id of a call.
        url: The gateway that is asked if no file is named.
        json: Where to write it too.

    Raises:
        InputError: Nobody knows the call, or cannot be asked.
    """
    if request is None:
        receipt = asyncio.run(_asked(url, where))
    elif _is_database(Path(where)):
        receipt = _read(Path(where), request)
    else:
        _explain_trace(Path(where), request, json)
        return
    show_receipt(show.console(), receipt)
    if json is not None:
        show.write_json(receipt, json)


def _explain_trace(trace: Path, request: str, json: Path | None) -> None:
    reader = TraceReader(trace)
    show.explain(show.console(), reader, request)
    if json is not None:
        show.write_json(show.story(reader, request), json)


def _is_database(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_SQLITE)) == _SQLITE
    except OSError:
        return False


def _read(path: Path, request: str) -> dict[str, Any]:
    with closing(ReceiptFile.existing(path)) as store:
        found = store.find(request, None)
    if found is None:
        raise InputError(str(path), request, "the file holds no receipt of such a call")
    return fields_in(found)


async def _asked(url: str, request: str) -> dict[str, Any]:
    path = f"/v1/decisions/{quote(request)}"
    try:
        Address.of(url)
        status, body = await fetch(
            "GET", url, path, api_key=os.environ.get(KEY_ENV, ""), timeout_s=TIMEOUT_S
        )
    except (OSError, TimeoutError, ValueError) as error:
        hint = "name a trace or a file of receipts first, or give --url"
        raise InputError("--url", url, f"cannot be asked: {error}", hint) from None
    if status in {401, 403}:
        raise InputError("--url", url, "the gateway wants a key", f"set {KEY_ENV}")
    if status != 200:
        raise InputError("REQUEST", request, "the gateway keeps no receipt of such a call")
    return msgspec.json.decode(body, type=dict[str, Any])
