"""Where the weights of an emulated engine lie, and the time that moving them takes."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from concertmaster.core.fleet import Readiness

Residency = Literal["loading", "awake", "falling_asleep", "asleep", "reloading", "waking"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveTimes:
    """Engine seconds that moving weights takes.

    Attributes:
        load_s: From the start until it serves.
        sleep_s: From the GPU.
        wake_s: From RAM to the GPU.
        reload_s: From disk to the GPU, by an engine that runs.
    """

    load_s: float = 0.0
    sleep_s: float = 1.0
    wake_s: float = 2.0
    reload_s: float = 10.0


class Residence:
    """The states that weights pass through. Whoever asks for a move is called back at its end.

    Args:
        times: How long moves take.
        lies: Where the weights lie at the start: ``running``, or it begins asleep.
        speedup: Engine seconds that pass in a second.
    """

    def __init__(self, times: MoveTimes, lies: Readiness, speedup: float) -> None:
        self.state: Residency = "loading" if lies is Readiness.RUNNING else "asleep"
        self._times = times
        self._lies = lies
        self._speedup = speedup
        self._change: asyncio.TimerHandle | None = None
        self._on_change: list[Callable[[], None]] = []

    def start(self) -> None:
        """Load the weights, unless it begins asleep."""
        if self.state == "loading":
            self._pass_through("loading", "awake", self._times.load_s)

    def close(self) -> None:
        """Stop moving."""
        if self._change is not None:
            self._change.cancel()
        self._change = None

    @property
    def asleep(self) -> bool:
        """Whether the weights are off the GPU, or on their way."""
        return self.state not in {"awake", "loading"}

    @property
    def dropped(self) -> bool:
        """Whether there are weights on disk only: what it generates now would be noise."""
        return self._lies in (Readiness.DISK, Readiness.REMOTE)

    def fall_asleep(self, lies: Readiness, then: Callable[[], None]) -> bool:
        """Free the GPU.

        False if weights are on their way to it; then nothing changes. Nor does it where it
        sleeps already.
        """
        if self.state == "awake":
            self._lies = lies
            self._pass_through("falling_asleep", "asleep", self._times.sleep_s)
        return self._when(("falling_asleep", "asleep"), then)

    def reload(self, then: Callable[[], None]) -> bool:
        """Read dropped weights again, still without serving. False unless it sleeps."""
        if self.state == "asleep" and self.dropped:
            self._lies = Readiness.SLEEPING
            self._pass_through("reloading", "asleep", self._times.reload_s)
        return self._when(("reloading", "asleep"), then)

    def wake_up(self, then: Callable[[], None]) -> bool:
        """Serve again, with noise if weights were dropped. False if it is still busy to sleep."""
        if self.state == "asleep":
            self._pass_through("waking", "awake", 0.0 if self.dropped else self._times.wake_s)
        return self._when(("loading", "waking", "awake"), then)

    def load(self, then: Callable[[], None]) -> bool:
        """Serve again, from wherever the weights lie. False if it is still busy to sleep."""
        if self.state in {"asleep", "reloading"} and (self.dropped or self.state == "reloading"):
            return self.reload(lambda: self._rise(then))
        return self.wake_up(then)

    def _rise(self, then: Callable[[], None]) -> None:
        """Go on after the weights were read, which took them to the GPU."""
        if self.state == "asleep":
            self._pass_through("waking", "awake", 0.0)
        self._when(("waking", "awake"), then)

    def _pass_through(self, state: Residency, end: Residency, duration_s: float) -> None:
        self.state = state
        if duration_s:
            loop = asyncio.get_running_loop()
            self._change = loop.call_later(duration_s / self._speedup, self._arrive, end)
        else:
            self._arrive(end)

    def _arrive(self, end: Residency) -> None:
        self.state = end
        self._change = None
        callbacks, self._on_change = self._on_change, []
        for callback in callbacks:
            callback()

    def _when(self, states: tuple[Residency, ...], then: Callable[[], None]) -> bool:
        """Call back at the last of these states, which lead to each other, or refuse."""
        if self.state not in states:
            return False
        if self._change is None:
            then()
        else:
            self._on_change.append(then)
        return True
