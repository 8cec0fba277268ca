"""What an engine says it serves, beside what the fleet file says of it."""

from collections.abc import Mapping

import msgspec


class _Meta(msgspec.Struct):
    n_ctx: int | None = None
    n_ctx_train: int | None = None


class _Entry(msgspec.Struct):
    id: str
    max_model_len: int | None = None
    meta: _Meta | None = None


class _List(msgspec.Struct):
    data: list[_Entry]


def served_models(body: bytes) -> Mapping[str, int | None]:
    """Read ``GET /v1/models``: tokens that a prompt and its answer may have, if it says so.

    vLLM and SGLang say ``max_model_len``, llama.cpp ``meta.n_ctx``, Ollama nothing.

    Raises:
        ValueError: It is no list of models.

    >>> served_models(b'{"data":[{"id":"a","max_model_len":4096},{"id":"b"}]}')
    {'a': 4096, 'b': None}
    """
    try:
        entries = msgspec.json.decode(body, type=_List).data
    except msgspec.DecodeError as error:
        raise ValueError(f"/v1/models is no list of models: {error}") from None
    return {one.id: one.max_model_len or _context(one.meta) for one in entries}


def _context(meta: _Meta | None) -> int | None:
    return None if meta is None else meta.n_ctx or meta.n_ctx_train


def contradiction(served: Mapping[str, int | None], model: str, context_tokens: int) -> str:
    """Say where an engine and the fleet file disagree; empty if they do not.

    >>> contradiction({"a": 4096}, "b", 4096)
    'it serves a, not b: set served_name, or start it with b'
    >>> contradiction({"a": 2048}, "a", 4096)
    'it takes 2048 tokens, the fleet file says 4096: calls in between would fail'
    >>> contradiction({"a": None}, "a", 4096)
    ''
    """
    if model not in served:
        names = ", ".join(sorted(served)) or "nothing"
        return f"it serves {names}, not {model}: set served_name, or start it with {model}"
    limit = served[model]
    if limit is not None and limit < context_tokens:
        return (
            f"it takes {limit} tokens, the fleet file says {context_tokens}: "
            "calls in between would fail"
        )
    return ""
