"""What the emulated engine does wrong on request."""

import dataclasses
import random
from dataclasses import dataclass
from typing import Literal

import msgspec

from concertmaster.core.errors import InputError, InvalidRequestError, unknown_name

_WHERE = "faults"


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """How often an answer goes wrong, and how. Times are the engine's, before the speed-up.

    Attributes:
        error_ratio: Calls answered with 500 at once.
        full_ratio: Calls answered with 429 at once.
        stall_ratio: Calls whose answer pauses for ``stall_s``, anywhere before its last token.
        drip_s: Least time between two tokens of one answer.
        death_ratio: Calls whose connection is cut before the answer is complete.
        rename_metrics: Gauges appear under other names, as after an upgrade.
        wakes: ``well``; or ``fails`` or ``never`` when it sleeps and is told to wake.
    """

    error_ratio: float = 0.0
    full_ratio: float = 0.0
    stall_ratio: float = 0.0
    stall_s: float = 10.0
    drip_s: float = 0.0
    death_ratio: float = 0.0
    rename_metrics: bool = False
    wakes: Literal["well", "fails", "never"] = "well"

    def __post_init__(self) -> None:
        for name in ("error_ratio", "full_ratio", "stall_ratio", "death_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidRequestError(
                    f"{_WHERE}: {name} must be between 0 and 1, got {getattr(self, name)}",
                    param=name,
                )
        for name in ("stall_s", "drip_s"):
            if getattr(self, name) < 0:
                raise InvalidRequestError(
                    f"{_WHERE}: {name} must not be negative, got {getattr(self, name)}", param=name
                )

    @classmethod
    def from_json(cls, body: bytes) -> "Faults":
        """Read an object of field names; what it leaves out has its default."""
        try:
            fields = msgspec.json.decode(body or b"{}", type=dict[str, object])
            known = {field.name for field in dataclasses.fields(cls)}
            for name in fields:
                if name not in known:
                    raise unknown_name("", _WHERE, "key", name, known)
            return msgspec.convert(fields, cls)
        except (msgspec.MsgspecError, InputError) as error:
            message = str(error)
            place = "" if message.startswith(_WHERE) else f"{_WHERE}: "
            raise InvalidRequestError(place + message) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFaults:
    """What will go wrong with one answer.

    Attributes:
        stall_after_tokens: Tokens sent before the stall; ``None`` for no stall.
        death_after_tokens: Tokens sent before the connection is cut; ``None`` if it is not.
    """

    stall_after_tokens: int | None = None
    stall_s: float = 0.0
    drip_s: float = 0.0
    death_after_tokens: int | None = None

    @property
    def any(self) -> bool:
        """Whether anything will."""
        return (
            self.stall_after_tokens is not None
            or self.death_after_tokens is not None
            or self.drip_s > 0
        )


NO_FAULTS = AnswerFaults()


def draw_faults(faults: Faults, output_tokens: int, rng: random.Random) -> AnswerFaults:
    """Decide what goes wrong with an answer of that length."""
    if not (faults.stall_ratio or faults.death_ratio or faults.drip_s):
        return NO_FAULTS
    stalls = rng.random() < faults.stall_ratio
    dies = rng.random() < faults.death_ratio
    return AnswerFaults(
        stall_after_tokens=rng.randrange(output_tokens) if stalls else None,
        stall_s=faults.stall_s,
        drip_s=faults.drip_s,
        death_after_tokens=rng.randrange(1, max(2, output_tokens)) if dies else None,
    )
