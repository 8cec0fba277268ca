"""How hard a text looks: lengths, numbers, marks and options, read off its characters.

These few numbers tell solved from unsolved questions about as well as a sentence encoder does.
"""

import re
from math import log1p, sqrt

import numpy as np
from numpy.typing import NDArray

from concertmaster.predictors.encoder import excerpt

READ_CHARS = 1_500
"""Characters read of a text: half at its head, half at its tail."""

_OPTION = re.compile(r"\n[A-J][.)] ")
_WORD = re.compile(r"[a-z']+")
_NUMBER = re.compile(r"\d[\d.,]*")
_SENTENCE_END = re.compile(r"[.?!](?:\s|$)")
_CAPITALS = re.compile(r"[A-Z]+")
_STARTS_WITH_NUMBER = re.compile(r"[\s$+-]*\d")

_MARKS = ("=", "(", "%", '"', "\n", ",", "/", "*", "+", "{", ":", ";")
_CUES = (
    "not", "except", "which", "what", "how many", "how much", "why", "following", "statement",
    "best", "most", "find", "determine", "calculate", "if ", "each", "total", "let ", "prove",
    "return", "def ", "select", "table", "__",
)  # fmt: skip
_ENDINGS = ("?", ":", ".")
_VAGUE = ("none of", "all of", "cannot be")

STEM_NAMES = (
    "chars", "stem_chars", "words", "word_chars", "long_words_ratio", "distinct_ratio", "numbers",
    "numbers_ratio", "largest_number", "decimals", "sentences", "capitals_ratio", "tex", "powers",
    "not_ascii",
)  # fmt: skip
OPTION_NAMES = (
    "options", "ten_options", "four_options", "option_chars", "option_chars_max",
    "option_chars_min", "option_chars_spread", "options_chars_total", "numeric_options_ratio",
    "option_digits_ratio", "option_letters_ratio", "vague_option", "option_commas", "true_or_false",
    "words_from_stem_ratio", "option_distinct_ratio",
)  # fmt: skip
NAMES: tuple[str, ...] = (
    *STEM_NAMES,
    *(f"mark {mark!r}" for mark in _MARKS),
    *(f"cue {cue!r}" for cue in _CUES),
    *(f"ends with {mark}" for mark in _ENDINGS),
    *OPTION_NAMES,
)
"""What each number says, in order; counts and lengths are logarithms of one more."""


def lexical(text: str) -> NDArray[np.float32]:
    """Read the numbers of `NAMES` off a text; any text has them, an empty one too."""
    stem, *options = _OPTION.split(excerpt(text, READ_CHARS))
    lower = stem.lower()
    words = _WORD.findall(lower)
    end = stem.rstrip()[-1:]
    return np.array(
        [
            *_of_stem(text, stem, words),
            *[log1p(stem.count(mark)) for mark in _MARKS],
            *[float(cue in lower) for cue in _CUES],
            *[float(end == mark) for mark in _ENDINGS],
            *_of_options(options, words),
        ],
        np.float32,
    )


def _of_stem(text: str, stem: str, words: list[str]) -> tuple[float, ...]:
    numbers = _NUMBER.findall(stem)
    count = len(words) or 1
    letters = len("".join(words))
    return (
        log1p(len(text)),
        log1p(len(stem)),
        log1p(len(words)),
        letters / count,
        sum([len(word) > 8 for word in words]) / count,
        len(set(words)) / count,
        log1p(len(numbers)),
        len(numbers) / (len(words) + len(numbers) or 1),
        log1p(max([_value(number) for number in numbers], default=0.0)),
        log1p(sum(["." in number[:-1] for number in numbers])),
        log1p(len(_SENTENCE_END.findall(stem))),
        len(_CAPITALS.findall(stem)) / count,
        log1p(stem.count("\\") + stem.count("$")),
        log1p(stem.count("^") + stem.count("_")),
        0.0 if text.isascii() else log1p(sum(not char.isascii() for char in stem)),
    )


def _value(number: str) -> float:
    """Size of a number as written; ``1,000`` is a thousand, very long ones count as 1e15."""
    digits = number.replace(",", "")
    whole = digits.split(".", 1)[0]
    return 1e15 if len(whole) > 15 else float(whole)


def _of_options(options: list[str], words: list[str]) -> tuple[float, ...]:
    if not options:
        return (0.0,) * len(OPTION_NAMES)
    count = len(options)
    sizes = [len(option) for option in options]
    chars = sum(sizes) or 1
    mean = chars / count
    joined = "\n".join(options).lower()
    letters = _WORD.findall(joined)
    option_words = [word for word in letters if len(word) > 3]
    known = set(words)
    distinct = len(set(option_words))
    total = len(option_words) or 1
    return (
        float(count),
        float(count == 10),
        float(count == 4),
        log1p(mean),
        log1p(max(sizes)),
        log1p(min(sizes)),
        log1p(sqrt(sum([(size - mean) ** 2 for size in sizes]) / count)),
        log1p(chars),
        sum([_STARTS_WITH_NUMBER.match(option) is not None for option in options]) / count,
        sum(map(len, _NUMBER.findall(joined))) / chars,
        len("".join(letters)) / chars,
        float(any(phrase in joined for phrase in _VAGUE)),
        joined.count(",") / count,
        float("\ntrue" in joined or "\nfalse" in joined or joined.startswith(("true", "yes"))),
        sum([word in known for word in option_words]) / total,
        distinct / total,
    )
