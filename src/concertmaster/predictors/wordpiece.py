"""Words to subword ids: the uncased WordPiece of BERT, in plain Python.

A word is looked up once and remembered, so a prompt costs one dictionary look-up a word.
"""

import re
import unicodedata
from collections.abc import Sequence

UNKNOWN = "[UNK]"
MAX_WORD_CHARS = 100
"""Words longer than this are one unknown piece, as in BERT."""

_CHUNK_CHARS = 64
"""Chunks between spaces longer than this are not remembered."""

REMEMBERED = 16_384
"""Chunks whose ids are kept, about 200 bytes each."""

_ASCII_WORD = re.compile(r"[a-z0-9]+|[^\sa-z0-9]")
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


class WordPiece:
    """Splits text into the ids of a vocabulary.

    It differs from BERT only in rare control characters, which count as spaces here where
    Python's ``str.split`` says so.

    Args:
        vocab: Pieces by id; a piece that continues a word starts with ``##``.
        remembered: Chunks of text whose ids are kept, at most. Those that came lately stay:
            a text full of numbers and ids does not push out the words of a language.

    >>> WordPiece(["[UNK]", "play", "##ing", "!"]).ids("Playing!")
    [1, 2, 3]
    """

    def __init__(self, vocab: Sequence[str], *, remembered: int = REMEMBERED) -> None:
        self._ids = {piece: number for number, piece in enumerate(vocab)}
        self._unknown = (self._ids.get(UNKNOWN, 0),)
        self._longest = max((len(piece) for piece in self._ids), default=1)
        self._half = max(1, remembered // 2)
        self._fresh: dict[str, tuple[int, ...]] = {}
        self._older: dict[str, tuple[int, ...]] = {}

    def ids(self, text: str) -> list[int]:
        """Ids of the whole text, in order; no markers are added. Never raises."""
        found: list[int] = []
        for chunk in text.split():
            pieces = self._fresh.get(chunk)
            if pieces is None:
                pieces = self._recall(chunk)
            found += pieces
        return found

    def _recall(self, chunk: str) -> tuple[int, ...]:
        """Take a chunk that is not fresh from those before, else from scratch, and keep it."""
        pieces = self._older.get(chunk)
        if pieces is None:
            pieces = tuple(number for word in _words(chunk) for number in self._split(word))
        if len(chunk) <= _CHUNK_CHARS:
            if len(self._fresh) >= self._half:
                self._older, self._fresh = self._fresh, {}
            self._fresh[chunk] = pieces
        return pieces

    def _split(self, word: str) -> Sequence[int]:
        """Take the longest known piece from the left, again and again."""
        if len(word) > MAX_WORD_CHARS:
            return self._unknown
        pieces: list[int] = []
        start, mark = 0, ""
        while start < len(word):
            number, start = self._longest_piece(word, start, mark)
            if number is None:
                return self._unknown
            pieces.append(number)
            mark = "##"
        return pieces

    def _longest_piece(self, word: str, start: int, mark: str) -> tuple[int | None, int]:
        for end in range(min(len(word), start + self._longest), start, -1):
            number = self._ids.get(mark + word[start:end])
            if number is not None:
                return number, end
        return None, start


def _words(chunk: str) -> list[str]:
    """Lower-case words and single punctuation marks of a text without spaces."""
    if chunk.isascii():
        return _ASCII_WORD.findall(_UNSEEN.sub("", chunk).lower())
    plain = "".join(map(_spaced, unicodedata.normalize("NFD", _visible(chunk).lower())))
    return plain.split()


def _visible(chunk: str) -> str:
    """Drop control, format, private, surrogate and unassigned characters."""
    return "".join(char for char in chunk if unicodedata.category(char)[0] != "C")


def _spaced(char: str) -> str:
    """Drop accents; set punctuation and Chinese characters apart."""
    category = unicodedata.category(char)
    if category == "Mn" or char == "\ufffd":
        return ""
    apart = category[0] == "P" or _is_chinese(ord(char))
    return f" {char} " if apart or (char.isascii() and not char.isalnum()) else char


def _is_chinese(point: int) -> bool:
    return (
        0x4E00 <= point <= 0x9FFF
        or 0x3400 <= point <= 0x4DBF
        or 0xF900 <= point <= 0xFAFF
        or 0x20000 <= point <= 0x2CEAF
        or 0x2F800 <= point <= 0x2FA1F
    )
