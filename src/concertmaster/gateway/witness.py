"""Those who see what becomes of calls: they keep books, and change nothing."""

from collections.abc import Callable
from typing import Protocol, TypeAlias

from concertmaster.core.actions import Action
from concertmaster.core.events import Event
from concertmaster.gateway.agent import Message
from concertmaster.gateway.exchange import Exchange


class Witness(Protocol):
    """Sees a call come, sees all that the core decides, and sees the call end, once."""

    def opened(self, exchange: Exchange, message: Message) -> None:
        """See a call that the core has not been told of yet; its head may be added to."""

    def noticed(self, now_s: float, event: Event, actions: list[Action]) -> None:
        """See an event and its actions, before they are carried out."""

    def ended(self, now_s: float, exchange: Exchange) -> None:
        """See a call that has got its answer, or will get none."""


Listener: TypeAlias = Callable[[float, Event, list[Action]], None]
"""Told of every event and the actions it led to."""


class Audience:
    """Passes events on to several listeners, in the order in which they came."""

    def __init__(self) -> None:
        self._listeners: list[Listener] = []

    def add(self, listener: Listener) -> None:
        """Let one more listen."""
        self._listeners.append(listener)

    def __call__(self, now_s: float, event: Event, actions: list[Action]) -> None:
        """Pass one event on."""
        for listener in self._listeners:
            listener(now_s, event, actions)
