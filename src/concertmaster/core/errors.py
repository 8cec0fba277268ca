"""The exception tree: whose fault it is decides the family.

::

    ConcertmasterError
      InputError          a file, flag or name is wrong; exit code 2, one line, no traceback
      CallerError         the caller can mend it (4xx)
        InvalidRequestError   400
        UnauthorizedError     401
        ForbiddenError        403
        ModelNotFoundError    404
        TooLargeError         413
        QuotaError            429
      FleetError          we can mend it (5xx, and 429 when the line is full)
"""

import difflib
from collections.abc import Collection, Sequence


class ConcertmasterError(Exception):
    """Whatever this package raises on purpose."""


class InputError(ConcertmasterError):
    """Something the user wrote is wrong: where, expected, found, remedy.

    >>> problem = 'expected an integer >= 1, got "64"'
    >>> print(InputError("fleet.toml", "pools[1].replicas", problem, "remove the quotes"))
    fleet.toml: pools[1].replicas: expected an integer >= 1, got "64" (remove the quotes)
    """

    def __init__(self, file: str, where: str, problem: str, hint: str = "") -> None:
        super().__init__(file, where, problem, hint)
        self.file = file
        self.where = where
        self.problem = problem
        self.hint = hint

    def __str__(self) -> str:
        """One line: find it, mend it."""
        line = ": ".join(part for part in (self.file, self.where, self.problem) if part)
        return line + (f" ({self.hint})" if self.hint else "")


def unknown_name(file: str, where: str, kind: str, name: str, known: Collection[str]) -> InputError:
    """Build the error for a name that is not known, with the nearest one that is.

    >>> print(unknown_name("fleet.toml", "pools[0]", "key", "replcas", {"replicas", "model"}))
    fleet.toml: pools[0]: unknown key "replcas" (did you mean "replicas"? known: model, replicas)
    """
    close = difflib.get_close_matches(name, known, n=1)
    guess = f'did you mean "{close[0]}"? ' if close else ""
    hint = f"{guess}known: {', '.join(sorted(known)) or 'none'}"
    return InputError(file, where, f'unknown {kind} "{name}"', hint)


class CallerError(ConcertmasterError):
    """The caller sent what cannot be served.

    Attributes:
        status: HTTP status to answer.
        headers: What goes with the answer.
    """

    status = 400
    error_type = "invalid_request_error"
    code: str | None = None
    param: str | None = None
    headers: Sequence[tuple[bytes, bytes]] = ()

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidRequestError(CallerError):
    """A field of the request is missing or wrong."""

    code = "invalid_request"


class UnauthorizedError(CallerError):
    """It came without an API key, or with one that is not good."""

    status = 401
    code = "invalid_api_key"
    headers = ((b"www-authenticate", b"Bearer"),)


class ForbiddenError(CallerError):
    """The API key is good, but not for this."""

    status = 403
    error_type = "permission_error"
    code = "permission_denied"


class ModelNotFoundError(CallerError):
    """No pool of the fleet serves the model that was asked for."""

    status = 404
    error_type = "not_found_error"
    code = "model_not_found"


class TooLargeError(CallerError):
    """The body is larger than the gateway accepts."""

    status = 413
    code = "request_too_large"


class QuotaError(CallerError):
    """The caller has used what it may use for now; ``headers`` say when to try again."""

    status = 429
    error_type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, headers: Sequence[tuple[bytes, bytes]]) -> None:
        super().__init__(message)
        self.headers = headers
