"""Embeddings of the emulated engine: vectors that mean nothing, alike for like texts.

Each input is prefilled as a call of its own, as in vLLM; nothing is decoded.
"""

import base64
import math
import random
import struct
from collections.abc import Sequence
from hashlib import blake2b
from typing import Literal

import msgspec

from concertmaster.core.errors import InvalidRequestError, ModelNotFoundError
from concertmaster.core.request import RequestId
from concertmaster.engines.emulator import Emulator, FinishReason
from concertmaster.engines.emulator_calls import parse, prefix_hashes, tokens_in
from concertmaster.engines.http_server import HttpExchange
from concertmaster.physics.batching import EngineCall

DIMENSIONS = 384
MOST_DIMENSIONS = 4096
MOST_INPUTS = 2048


class EmbeddingsBody(msgspec.Struct):
    """What is to be embedded: texts, or lists of token ids."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None

    def texts(self) -> list[str]:
        """Give each input as text; token ids are written as four bytes each."""
        given = self.input
        if isinstance(given, str):
            return [given]
        if given and isinstance(given[0], int):
            return [_as_text(given)]
        return [_as_text(one) if isinstance(one, list) else str(one) for one in given]


class Embeddings:
    """The vectors of one request, sent once the engine has read all inputs.

    Raises:
        CallerError: vLLM would refuse it too.
    """

    def __init__(self, emulator: Emulator, number: str, exchange: HttpExchange) -> None:
        body = parse(exchange.body, EmbeddingsBody)
        self._exchange = exchange
        self._emulator = emulator
        self._size = DIMENSIONS if body.dimensions is None else body.dimensions
        self._texts = body.texts()
        self._as_base64 = body.encoding_format == "base64"
        self._check(body)
        self._calls = [_call(f"{number}-{i}", text) for i, text in enumerate(self._texts)]
        for call in self._calls:
            emulator.settings.check_fits(call)
        self._missing = len(self._calls)

    def begin(self) -> None:
        """Hand the inputs to the engine."""
        answers = [self._emulator.answer(call, _Read(self), "stop") for call in self._calls]

        def cancel() -> None:
            for answer in answers:
                self._emulator.cancel(answer)

        self._exchange.on_disconnect = cancel

    def read(self) -> None:
        """Note that one input has been read; the last one sends the answer."""
        self._missing -= 1
        if self._missing:
            return
        tokens = sum(call.prompt_tokens for call in self._calls)
        body = {
            "object": "list",
            "model": self._emulator.model_name,
            "data": [self._item(index, text) for index, text in enumerate(self._texts)],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        self._exchange.respond(200, msgspec.json.encode(body))

    def cut(self) -> None:
        """Close the connection without an answer."""
        self._exchange.abort()

    def _item(self, index: int, text: str) -> dict[str, object]:
        vector: object = vector_of(text, self._size)
        if self._as_base64:
            packed = struct.pack(f"<{self._size}f", *vector_of(text, self._size))
            vector = base64.b64encode(packed).decode()
        return {"object": "embedding", "index": index, "embedding": vector}

    def _check(self, body: EmbeddingsBody) -> None:
        if body.model is not None and body.model != self._emulator.model_name:
            raise ModelNotFoundError(f"The model `{body.model}` does not exist.", param="model")
        if not 1 <= len(self._texts) <= MOST_INPUTS:
            problem = f"expected 1 to {MOST_INPUTS} inputs, got {len(self._texts)}"
            raise InvalidRequestError(f"input: {problem}", param="input")
        if not 1 <= self._size <= MOST_DIMENSIONS:
            problem = f"expected 1 to {MOST_DIMENSIONS}, got {self._size}"
            raise InvalidRequestError(f"dimensions: {problem}", param="dimensions")
        longest = max(map(tokens_in, self._texts))
        if longest >= self._emulator.max_model_tokens:
            most = self._emulator.max_model_tokens
            problem = f"an input of {longest} tokens is longer than the model takes, {most}"
            raise InvalidRequestError(f"input: {problem}", param="input")


class _Read:
    """Where the one token goes that says that an input has been read."""

    streams = False
    congested = False

    def __init__(self, embeddings: Embeddings) -> None:
        self._embeddings = embeddings

    def deliver(self, tokens: int, finish_reason: FinishReason | None) -> None:
        """Note the end; an engine that falls asleep has read nothing."""
        if finish_reason == "abort":
            self._embeddings.cut()
        elif finish_reason is not None:
            self._embeddings.read()

    def cut(self) -> None:
        """Break off."""
        self._embeddings.cut()


def vector_of(text: str, size: int) -> list[float]:
    """Draw a vector of length 1 from a text.

    >>> a, b = vector_of("x", 8), vector_of("x", 8)
    >>> a == b, round(sum(part * part for part in a), 9)
    (True, 1.0)
    """
    rng = random.Random(blake2b(text.encode(), digest_size=8).digest())
    parts = [rng.gauss(0.0, 1.0) for _ in range(size)]
    length = math.hypot(*parts)
    return [part / length for part in parts]


def _call(request_id: str, text: str) -> EngineCall:
    return EngineCall(
        request_id=RequestId(request_id),
        prompt_tokens=tokens_in(text),
        output_tokens=1,
        prefix_hashes=prefix_hashes(text),
        priority=0,
    )


def _as_text(token_ids: Sequence[object]) -> str:
    return "".join(f"{token:>4}" for token in token_ids)
