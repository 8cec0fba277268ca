"""A predictor in a process of its own: whoever asks waits no longer than it can afford."""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from concertmaster.core.forecast import Forecast
from concertmaster.core.request import Request
from concertmaster.predictors.interface import NO_PROMPT, Predictor, Prompt


def _answer(questions: Connection, build: Callable[[], Predictor]) -> None:
    predictor = build()
    while True:
        try:
            number, request, prompt = questions.recv()
        except EOFError:
            return
        questions.send((number, predictor.predict(request, prompt)))


class RemotePredictor:
    """Asks a predictor in a child process.

    Args:
        build: Makes the predictor, in the child; a function of a module, so that it travels.
    """

    def __init__(self, build: Callable[[], Predictor]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, far_end = context.Pipe()
        self.process = context.Process(target=_answer, args=(far_end, build), daemon=True)
        self.process.start()
        far_end.close()
        self._asked = 0

    def forecast(
        self, request: Request, prompt: Prompt = NO_PROMPT, *, within_s: float
    ) -> Forecast | None:
        """Return what is predicted; ``None`` if it does not come in time or nobody is there.

        An answer that comes too late is thrown away when the next is awaited.
        """
        self._asked += 1
        ends_s = time.monotonic() + within_s
        try:
            self._pipe.send((self._asked, request, prompt))
            while self._pipe.poll(max(0.0, ends_s - time.monotonic())):
                number, forecast = self._pipe.recv()
                if number == self._asked:
                    answer: Forecast = forecast
                    return answer
        except (EOFError, OSError):  # the process is gone
            return None
        return None

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self.process.join(timeout=1.0)
        if self.process.is_alive():
            self.process.terminate()
