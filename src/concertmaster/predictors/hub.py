"""Sentence encoders that run a network: heavier, optional, loaded only when asked for.

``OnnxEncoder`` needs the extra ``encoders``, ``HubEncoder`` the extra ``hub``.
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concertmaster.core.errors import InputError
from concertmaster.predictors.encoder import Vectors, excerpt, unit_rows

WINDOW_TOKENS = 510
STRIDE_TOKENS = 255
MAX_WINDOWS = 8
"""Windows read of one text: half from its head, half from its tail."""

_CHARS_PER_TEXT = MAX_WINDOWS * STRIDE_TOKENS * 6
"""Characters tokenised of one text: more than its windows hold."""


def optional(module: str, extra: str) -> ModuleType:
    """Import a module of an optional extra, or say which extra is missing.

    Raises:
        InputError: The module is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise InputError(
            "",
            "encoder",
            f"{module} is not installed",
            f"pip install 'concertmaster[{extra}]'",
        ) from error


def windows(ids: Sequence[int]) -> list[list[int]]:
    """Overlapping windows over token ids; of many, the first and the last few.

    >>> [len(window) for window in windows(list(range(600)))]
    [510, 345]
    """
    last = max(0, len(ids) - WINDOW_TOKENS)
    starts = [*range(0, last, STRIDE_TOKENS)]
    starts.append(-(-last // STRIDE_TOKENS) * STRIDE_TOKENS)
    if len(starts) > MAX_WINDOWS:
        starts = starts[: MAX_WINDOWS // 2] + starts[-MAX_WINDOWS // 2 :]
    return [list(ids[start : start + WINDOW_TOKENS]) for start in starts]


def marks(marked: Sequence[int], plain: Sequence[int]) -> tuple[list[int], list[int]]:
    """Ids that a tokenizer puts before and after a text.

    >>> marks([101, 7, 8, 102], [7, 8])
    ([101], [102])
    """
    for start in range(len(marked) - len(plain) + 1):
        if list(marked[start : start + len(plain)]) == list(plain):
            return list(marked[:start]), list(marked[start + len(plain) :])
    return [], []


def _pooled(parts: Sequence[tuple[NDArray[np.float32], int]]) -> NDArray[np.float32]:
    """Mean of the vectors of windows, by their tokens."""
    weights = np.array([tokens for _, tokens in parts], np.float32)
    vectors = np.stack([vector for vector, _ in parts])
    mean: NDArray[np.float32] = weights @ vectors / weights.sum()
    return mean


class OnnxEncoder:
    """A BERT-like sentence encoder as an ONNX file, mean pooled.

    Args:
        folder: Holds ``model.onnx`` and ``tokenizer.json``.

    Raises:
        InputError: The extra ``encoders`` is not installed, or a file is missing.
    """

    def __init__(self, folder: Path) -> None:
        runtime, tokenizers = (
            optional("onnxruntime", "encoders"),
            optional("tokenizers", "encoders"),
        )
        for file in ("model.onnx", "tokenizer.json"):
            if not (folder / file).is_file():
                raise InputError(str(folder), file, "not found", "export the encoder first")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = runtime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._inputs = {entry.name for entry in self._session.get_inputs()}
        self._marks = marks(*[self._ids("a", marked=marked) for marked in (True, False)])
        self.name = f"onnx:{folder}"
        self.dims = int(self._run([]).shape[1])

    def encode(self, texts: Sequence[str]) -> Vectors:
        """One row a text; see `Encoder`."""
        rows = [self._text(text) for text in texts]
        return unit_rows(np.stack(rows)) if rows else np.zeros((0, self.dims), np.float32)

    def _ids(self, text: str, *, marked: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=marked).ids)

    def _text(self, text: str) -> NDArray[np.float32]:
        ids = self._ids(_clean(text), marked=False)
        if not ids:
            return np.zeros(self.dims, np.float32)
        return _pooled([(self._run(part).mean(axis=0), len(part)) for part in windows(ids)])

    def _run(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Token vectors of one window, shape (tokens, dims)."""
        row = np.array([[*self._marks[0], *ids, *self._marks[1]]], np.int64)
        feeds = {
            "input_ids": row,
            "attention_mask": np.ones_like(row),
            "token_type_ids": np.zeros_like(row),
        }
        wanted = {name: value for name, value in feeds.items() if name in self._inputs}
        tokens: NDArray[np.float32] = self._session.run(None, wanted)[0][0]
        return tokens


class HubEncoder:
    """Any text encoder that transformers can load by name or path, mean pooled.

    Args:
        model: Name on the hub, or a folder.

    Raises:
        InputError: The extra ``hub`` is not installed, or the model cannot be loaded.
    """

    def __init__(self, model: str) -> None:
        self._torch = optional("torch", "hub")
        transformers = optional("transformers", "hub")
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model)
            self._model: Any = transformers.AutoModel.from_pretrained(model).eval()
        except (OSError, ValueError) as error:
            raise InputError(model, "encoder", "cannot be loaded", str(error)) from error
        self._marks = marks(self._ids("a", marked=True), self._ids("a", marked=False))
        self.name = f"hub:{model}"
        self.dims = int(self._model.config.hidden_size)

    def encode(self, texts: Sequence[str]) -> Vectors:
        """One row a text; see `Encoder`."""
        rows = [self._text(text) for text in texts]
        return unit_rows(np.stack(rows)) if rows else np.zeros((0, self.dims), np.float32)

    def _text(self, text: str) -> NDArray[np.float32]:
        ids = self._ids(_clean(text), marked=False)
        if not ids:
            return np.zeros(self.dims, np.float32)
        return _pooled([(self._window(part), len(part)) for part in windows(ids)])

    def _ids(self, text: str, *, marked: bool) -> list[int]:
        ids = self._tokenizer(text, add_special_tokens=marked, verbose=False)["input_ids"]
        return [int(number) for number in ids]

    def _window(self, ids: Sequence[int]) -> NDArray[np.float32]:
        torch = self._torch
        with torch.inference_mode():
            row = torch.tensor([[*self._marks[0], *ids, *self._marks[1]]])
            tokens = self._model(input_ids=row, attention_mask=torch.ones_like(row))
        mean: NDArray[np.float32] = tokens.last_hidden_state[0].mean(dim=0).float().numpy()
        return mean


def _clean(text: str) -> str:
    """Cut to what the windows can hold, without lone surrogates."""
    kept = excerpt(text, _CHARS_PER_TEXT)
    return kept.encode("utf-8", "replace").decode("utf-8")
