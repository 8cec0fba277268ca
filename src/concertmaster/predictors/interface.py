"""Predictors: they answer now and learn later, when the outcome is known."""

from typing import Protocol

from concertmaster.core.forecast import Forecast
from concertmaster.core.request import ModelName, Request


class Predictor(Protocol):
    """What will a call, and the rest of its workflow, need?"""

    def predict(self, request: Request) -> Forecast:
        """Answer from what is known at arrival. Must not change the predictor."""

    def learn(self, request: Request, model: ModelName, output_tokens: int) -> None:
        """Take in one outcome; they come late and in the order of finishing."""
