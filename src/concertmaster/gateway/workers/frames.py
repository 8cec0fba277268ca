"""What workers and their scheduler tell each other about calls.

A call goes by a number that its worker gives it and never gives again. What is said of a number
that is not known is about a call that has ended meanwhile, and is passed over.
"""

from collections.abc import Sequence
from typing import TypeAlias

import msgspec

from concertmaster.config import GatewaySection
from concertmaster.core.request import ModelName
from concertmaster.engines.dialects import EngineKind
from concertmaster.gateway.reading import Reading


class Frame(msgspec.Struct, array_like=True, tag=True, gc=False):
    """One piece of news."""


# From a worker


class Hello(Frame, tag=0):
    """Its name: a number that stays when it is started again, and its process."""

    worker: int
    pid: int


class ToldTrail(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a prompt leaves of itself, see ``trails.Trail``.

    Attributes:
        latest: Tool calls that each of the latest messages is about.
    """

    ends: list[int]
    latest: list[list[bytes]]
    last: bytes

    def tool_calls(self, known: int) -> Sequence[bytes]:
        """Tool calls that the latest messages after the first ``known`` are about."""
        skipped = max(0, known - (len(self.ends) - len(self.latest)))
        return [one for ids in self.latest[skipped:] for one in ids]


class Called(Frame, tag=1):
    """A call came in.

    Attributes:
        headers: Those of its headers that the scheduler reads.
        trail: Only of a call that names no workflow.
    """

    number: int
    target: bytes
    headers: dict[bytes, bytes]
    takes_chunks: bool
    reading: Reading
    trail: ToldTrail | None


class Gone(Frame, tag=2):
    """Who asked is gone, or was answered by the worker itself."""

    number: int


class FirstToken(Frame, tag=3):
    """The first bytes of a stream are out."""

    number: int
    attempt: int


class Began(Frame, tag=4):
    """The first bytes of an answer that is no stream are out, and more will come."""

    number: int
    attempt: int


class Finished(Frame, tag=5):
    """An answer is complete."""

    number: int
    attempt: int
    status: int
    output_tokens: int
    tool_call_ids: list[bytes]


class Broke(Frame, tag=6):
    """An attempt failed.

    Attributes:
        alive: Whether the engine still takes connections.
        started: Whether the caller has seen anything of an answer.
    """

    number: int
    attempt: int
    status: int
    problem: str
    alive: bool
    started: bool


class Progress(Frame, tag=7):
    """How it goes.

    Attributes:
        tokens: Number, attempt and tokens of every stream that has gone on.
        answered: Statuses that the worker has answered by itself.
        cpu_s: What its process has used.
    """

    tokens: list[tuple[int, int, int]]
    answered: list[int]
    connections: int
    cpu_s: float


# From the scheduler


class Rules(Frame, tag=20):
    """How to serve; told first, and again when something has changed.

    Attributes:
        port: Where to listen.
        speedup: How much faster the scheduler's clock runs than the wall's.
        reads_prompts: Whether the predictor wants to see prompts.
    """

    settings: GatewaySection
    port: int
    speedup: float
    max_body_bytes: int
    reads_prompts: bool
    embedding_models: list[ModelName]


class Engine(Frame, tag=21):
    """A replica to which calls will be sent."""

    replica_id: str
    url: str
    kind: EngineKind
    api_key: str


class Send(Frame, tag=22):
    """Begin an attempt.

    Attributes:
        hedge: Whether it goes beside the attempt before, which goes on.
        request_id: What the call is named to its engine.
        headers: What is added to the head of the answer.
        traced: Headers of a trace that replace those of the caller.
    """

    number: int
    attempt: int
    hedge: bool
    replica_id: str
    model: str
    priority: int
    request_id: str
    headers: bytes
    traced: bytes


class Say(Frame, tag=23):
    """Send bytes to who asked.

    Attributes:
        held: Whether they begin a stream, or go on with it, before there is an answer.
    """

    number: int
    held: bool
    data: bytes


class End(Frame, tag=24):
    """The answer is complete with what was said."""

    number: int
    keep_alive: bool


class Cut(Frame, tag=25):
    """Cut the connection of who asked."""

    number: int


class Drop(Frame, tag=26):
    """Drop the connection of an attempt to its engine."""

    number: int
    attempt: int


class GiveUp(Frame, tag=27):
    """Drop it, and end the attempt: where an answer has begun, with an error."""

    number: int
    problem: str


FromWorker: TypeAlias = Hello | Called | Gone | FirstToken | Began | Finished | Broke | Progress
FromScheduler: TypeAlias = Rules | Engine | Send | Say | End | Cut | Drop | GiveUp
