"""What callers write and no file shall hold: addresses, keys, numbers of phones and cards.

Found by form, so it errs on the side of taking out: a long word of capitals, small letters and
digits is taken for a secret, whatever it is. Names of people and streets have no form, and stay.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import TypeAlias

LONGEST_CHARS = 320
"""Of what can be cut in two and then not be known by its form: a mail address."""

LEAST_SECRET_CHARS = 32
_DIGEST_BYTES = 6
_KEPT_NAMES = 4096

_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]{0,32}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,32}PRIVATE KEY-----|\Z)",
    re.DOTALL,
)
_LOGIN = re.compile(r"(?<=://)[^\s/:@]{0,128}:[^\s/@]{1,256}(?=@)")
_MAIL = re.compile(r"[\w.!#$%&'*+/=?^`{|}~-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,8}")
_BEARER = re.compile(r"\b(?:bearer|authorization\W{1,4}basic)\s{1,4}[\w.~+/=-]{8,}", re.IGNORECASE)
_SAID = re.compile(
    r"(?<![A-Za-z])"
    r"(?:pass(?:word|wd|phrase)?|secret|token|credential|(?:api|access|private)[_ -]?key)s?"
    r"[\"']?\s{0,4}[:=]\s{0,4}[\"']?[^\s\"',;]{4,}",
    re.IGNORECASE,
)
_KEY = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?:sk|pk|rk|cm|hf|npm|pypi|whsec|glpat|gsk|xai|xox[abeoprs]|gh[oprsu]|github_pat)[-_]"
    r"[A-Za-z0-9_-]{8,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}"
    r"|AIza[A-Za-z0-9_-]{30,}"
    r"|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*)?)"
)
_DIGITS = re.compile(r"[0-9](?:[ -]?[0-9]){12,}")
_GROUP = re.compile(r"[0-9]+[ -]?")
_CARD_DIGITS = range(13, 20)
_MOST_GROUPS = 5
_PHONE = re.compile(
    r"(?<![\w+])(?:\+[0-9][0-9 ()./-]{6,18}[0-9]"
    r"|\(?[0-9]{3}\)?[ .-][0-9]{3}[ .-][0-9]{4}"
    r"|0[0-9]{2,5}[ /-][0-9]{4,10}|00[0-9]{8,13})(?![0-9])"
)
_LONG = re.compile(rf"[A-Za-z0-9+/_-]{{{LEAST_SECRET_CHARS},}}={{0,2}}")
_HEX = re.compile(r"[0-9a-f]+|[0-9A-F]+")
_KINDS = tuple(re.compile(kind) for kind in ("[a-z]", "[A-Z]", "[0-9]"))

_Put: TypeAlias = str | Callable[[re.Match[str]], str]


def _cards(found: re.Match[str]) -> str:
    """Take out cards from a row of digits, which may have others before and after them."""
    groups: list[str] = _GROUP.findall(found[0])
    kept, first = "", 0
    while first < len(groups):
        end = _end_of_card(groups, first)
        kept += groups[first] if end == first else "[card]"
        first = max(end, first + 1)
    return kept


def _end_of_card(groups: Sequence[str], first: int) -> int:
    """Return where a card ends that begins with a group; the group itself if none does."""
    ends = range(min(len(groups), first + _MOST_GROUPS), first, -1)
    return next((end for end in ends if is_card("".join(groups[first:end]))), first)


def _long(found: re.Match[str]) -> str:
    word = found[0]
    mixed = all(kind.search(word) for kind in _KINDS)
    return "[secret]" if mixed or _HEX.fullmatch(word) else word


_RULES: Sequence[tuple[str, re.Pattern[str], _Put]] = (
    ("PRIVATE KEY", _PRIVATE_KEY, "[key]"),
    ("@", _LOGIN, "[key]"),
    ("@", _MAIL, "[mail]"),
    ("", _BEARER, "[key]"),
    ("", _SAID, "[key]"),
    ("", _KEY, "[key]"),
    ("", _DIGITS, _cards),
    ("", _PHONE, "[phone]"),
    ("", _LONG, _long),
)
"""What a text must hold for a rule to be worth a look, the rule, and what stands there then."""


def is_card(digits: str) -> bool:
    """Say whether these are 13 to 19 digits, spaces and dashes aside, that end as a card's (Luhn).

    >>> is_card("4111 1111 1111 1111"), is_card("4111 1111 1111 1112")
    (True, False)
    """
    values = [int(one) for one in reversed(digits) if one.isdecimal()]
    if len(values) not in _CARD_DIGITS:
        return False
    doubled = (sum(divmod(2 * value, 10)) for value in values[1::2])
    return (sum(values[::2]) + sum(doubled)) % 10 == 0


def redacted(text: str) -> str:
    """Put ``[mail]``, ``[key]``, ``[card]``, ``[phone]`` or ``[secret]`` where one of them stood.

    >>> redacted("ask bob@example.com, +49 30 1234567, with sk-abcdef0123456789")
    'ask [mail], [phone], with [key]'
    """
    for needed, rule, put in _RULES:
        if needed in text:
            text = rule.sub(put, text)
    return text


class Redactor:
    """Redacts names too, so that what belongs together still does.

    Args:
        salt: At most 64 bytes that nobody else knows, drawn anew in each process: without it, who
            has the file could try addresses until one fits.

    Attributes:
        word: ``redacted``, for names that come again.
        identity: The same for names by which rows are joined; what was redacted ends in a digest.
    """

    def __init__(self, salt: bytes) -> None:
        self._salt = salt
        self.word = lru_cache(_KEPT_NAMES)(redacted)
        self.identity = lru_cache(_KEPT_NAMES)(self._identity)

    def _identity(self, name: str) -> str:
        safe = redacted(name)
        if safe == name:
            return name
        digest = blake2b(name.encode("utf-8", "replace"), key=self._salt, digest_size=_DIGEST_BYTES)
        return f"{safe[:128]}#{digest.hexdigest()}"

    def excerpt(self, text: str, most_chars: int) -> str:
        """Return the beginning of a text, and nothing of what was cut in two at its end."""
        if len(text) <= most_chars:
            return redacted(text)
        return redacted(text[: most_chars + LONGEST_CHARS])[:-LONGEST_CHARS][:most_chars]
