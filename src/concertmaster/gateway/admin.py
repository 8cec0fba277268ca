"""The admin door: what changes a gateway, on a port and with a key of its own."""

import hmac
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from concertmaster.core.errors import ForbiddenError, UnauthorizedError
from concertmaster.gateway.agent import AgentConnection, Message
from concertmaster.gateway.answers import json_answer, problem_answer
from concertmaster.gateway.keyring import OPEN_PATHS, Keyring, secret_in
from concertmaster.gateway.reach import AdminDoor
from concertmaster.state.keys import digest_of

if TYPE_CHECKING:
    from concertmaster.gateway.driver import Gateway


class Outcome(NamedTuple):
    """What came of reading the fleet file again.

    Attributes:
        changed: Keys that were taken up, with what they are by now.
        kept: Keys that need a restart: what was read before stays.
        problem: Why nothing was taken up; empty if the file is good.
    """

    changed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    problem: str = ""


class AdminRoutes:
    """Handlers that change a gateway.

    Attributes:
        gateway: Attached once it exists.
        reload: Reads the fleet file again; ``None`` where there is none.
        ending: Whether the gateway ends, after which nothing is undone.
    """

    def __init__(self) -> None:
        self.gateway: Gateway | None = None
        self.reload: Callable[[], Outcome] | None = None
        self.ending = False

    def routes(self) -> list[Route]:
        """Return the routes; all are POST."""
        return [
            Route("/admin/reload", self.read_again, methods=["POST"]),
            Route("/admin/drain", self.drain, methods=["POST"]),
            Route("/admin/resume", self.resume, methods=["POST"]),
        ]

    async def read_again(self, _: Request) -> Response:
        """Read the fleet file again, and answer what came of it."""
        if self.reload is None:
            return problem_answer(409, "no fleet file is followed", "no_file")
        outcome = self.reload()
        if outcome.problem:
            return problem_answer(400, outcome.problem, "invalid_config")
        return json_answer({"changed": outcome.changed, "needs_restart": outcome.kept})

    async def drain(self, _: Request) -> Response:
        """Take no new call; those in flight go on."""
        return self._draining(drains=True)

    async def resume(self, _: Request) -> Response:
        """Take calls again."""
        if self.ending:
            return problem_answer(409, "the gateway is shutting down", "shutting_down")
        return self._draining(drains=False)

    def _draining(self, *, drains: bool) -> Response:
        gateway = self.gateway
        assert gateway is not None, "the admin door opened before the gateway"
        gateway.draining = drains
        return json_answer({"draining": drains, "open_calls": gateway.open_exchanges})


class AdminDesk:
    """Takes messages that came by the admin door: none of them is a call to a model.

    Args:
        gateway: Minds the connections.
        side_door: Answers.
    """

    def __init__(
        self, gateway: "Gateway", side_door: Callable[[AgentConnection, Message], None]
    ) -> None:
        self._gateway = gateway
        self._side_door = side_door
        self.max_body_bytes = 1_000_000

    def name(self, headers: Mapping[bytes, bytes]) -> str:
        """Return what to call a message."""
        return self._gateway.name(headers)

    def take(self, agent: AgentConnection, message: Message) -> None:
        """Answer a message."""
        self._side_door(agent, message)

    def opened(self, agent: AgentConnection) -> None:
        """Note a connection."""
        self._gateway.opened(agent)

    def lost(self, agent: AgentConnection) -> None:
        """Note that it is gone."""
        self._gateway.lost(agent)


class AdminCheck:
    """Lets in who has the admin key, or an operator's: the ``Judge`` of the admin door.

    Args:
        door: Has the hash of the admin key.
        keyring: Knows operators; ``None`` without keys.
        count: Told of every refusal: its status, and 0 s.
    """

    def __init__(
        self, door: AdminDoor, keyring: Keyring | None, count: Callable[[int, float], None]
    ) -> None:
        self._door = door
        self._keyring = keyring
        self._count = count

    def __call__(self, target: bytes, headers: dict[bytes, bytes]) -> None:
        """Let a message in; it is on nobody's account.

        Raises:
            UnauthorizedError: It has no good key.
            ForbiddenError: Its key is good for calls only.
        """
        digest = digest_of(secret_in(headers))
        if target.partition(b"?")[0] in OPEN_PATHS or self._is_admins(digest):
            return
        holder = None if self._keyring is None else self._keyring.known(digest)
        if holder is not None and holder.operator:
            return
        wrong = ForbiddenError if holder is not None else UnauthorizedError
        self._count(wrong.status, 0.0)
        raise wrong("expected the admin key or an operator's API key")

    def _is_admins(self, digest: bytes) -> bool:
        ours = self._door.digest
        return bool(ours) and hmac.compare_digest(ours, digest)
