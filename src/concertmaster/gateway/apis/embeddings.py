"""OpenAI's Embeddings: passed through as they are to models whose pools serve them."""

from collections.abc import Collection

import msgspec

from concertmaster.core.errors import ModelNotFoundError
from concertmaster.core.request import ModelName
from concertmaster.gateway.apis.chat_request import wrong
from concertmaster.gateway.openai_api import AUTO, CallBody, read_fields


class EmbeddingsBody(msgspec.Struct):
    """A body of ``POST /v1/embeddings``; what is not named here goes on to the engine."""

    model: str
    input: msgspec.Raw = msgspec.Raw()
    metadata: msgspec.Raw = msgspec.Raw()
    session_id: object = None


_decode = msgspec.json.Decoder(EmbeddingsBody).decode


def embeddings_call(body: bytes, models: Collection[ModelName]) -> CallBody:
    """Return what the gateway decides on: the input as a prompt, one token as the answer.

    Args:
        body: As it came.
        models: Those whose pools serve embeddings.

    Raises:
        InvalidRequestError: A field is missing or wrong.
        ModelNotFoundError: No pool serves embeddings, or not with this model.
    """
    asked = read_fields(body, _decode)
    if len(asked.input) < 3 or bytes(asked.input) == b"null":
        raise wrong(
            "input",
            "a text, or a list of texts or tokens",
            bytes(asked.input).decode() or "nothing",
        )
    if not models:
        raise ModelNotFoundError(
            'no pool serves embeddings: a fleet file says so with serves = "embeddings"',
            param="model",
        )
    is_auto = asked.model == AUTO
    if not is_auto and asked.model not in models:
        known = ", ".join(sorted(models))
        problem = f'expected one of {known} or "auto", found "{asked.model}"'
        line = f"no pool serves embeddings of this model: {problem}"
        raise ModelNotFoundError(line, param="model")
    named = list[str](models) if is_auto else asked.model
    call = CallBody(model=named, prompt=asked.input, max_tokens=1)
    call.metadata, call.session_id = asked.metadata, asked.session_id
    return call
