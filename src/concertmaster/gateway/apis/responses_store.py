"""Answers of the Responses API that a later call may go on from, in memory and bounded."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from concertmaster.gateway.agent import Message
from concertmaster.gateway.apis.chat_request import Fields
from concertmaster.gateway.keyring import TENANT_HEADER

_CREDENTIALS = (b"authorization", b"x-api-key", b"api-key", TENANT_HEADER)


def owner_of(message: Message) -> bytes:
    """Return a digest of the credentials of a call, or its tenant, to whom its answers are kept."""
    said = b"\n".join(message.headers.get(name, b"") for name in _CREDENTIALS)
    return hashlib.sha256(said).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResponse:
    """An answer and all that led to it.

    Attributes:
        owner: Digest of the credentials that it was made with.
        body: The response as it was sent.
        messages: The conversation, the answer included, in chat's words.
        workflow_id: The workflow that it was counted to.
    """

    owner: bytes
    body: bytes
    messages: bytes
    workflow_id: str

    @property
    def size_bytes(self) -> int:
        """Bytes that it holds."""
        return len(self.body) + len(self.messages)

    def said(self) -> Sequence[Fields]:
        """Return the conversation."""
        return msgspec.json.decode(self.messages, type=list[Fields])


class ResponseStore:
    """Keeps the answers used last.

    Args:
        max_responses: How many.
        max_bytes: How large they may be together.
    """

    def __init__(self, *, max_responses: int = 10_000, max_bytes: int = 256_000_000) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._by_id: OrderedDict[str, StoredResponse] = OrderedDict()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def add(self, response_id: str, response: StoredResponse) -> None:
        """Keep an answer, and drop those that were not used for longest."""
        self._drop(response_id)
        self._by_id[response_id] = response
        self.size_bytes += response.size_bytes
        while len(self._by_id) > self._max_responses or self.size_bytes > self._max_bytes:
            self._drop(next(iter(self._by_id)))

    def find(self, response_id: str, owner: bytes) -> StoredResponse | None:
        """Return an answer; ``None`` if it is not kept, or is another's."""
        response = self._by_id.get(response_id)
        if response is None or response.owner != owner:
            return None
        self._by_id.move_to_end(response_id)
        return response

    def delete(self, response_id: str, owner: bytes) -> bool:
        """Forget an answer; return whether it was there, and the caller's."""
        found = self.find(response_id, owner) is not None
        if found:
            self._drop(response_id)
        return found

    def _drop(self, response_id: str) -> None:
        gone = self._by_id.pop(response_id, None)
        if gone is not None:
            self.size_bytes -= gone.size_bytes
