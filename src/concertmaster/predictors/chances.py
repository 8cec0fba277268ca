"""Chances that are worked out once somebody asks for one: few policies ever do."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from concertmaster.core.request import ModelName


class Chances(Mapping[ModelName, float]):
    """Chance of each model to solve a prompt, 0…1; whenever it is read, it says the same.

    Args:
        models: Whom there is a chance of, each once.
        make: Works the chances out, in the order of ``models``; asked once at most. It must
            rest on nothing that changes.
    """

    __slots__ = ("_found", "_make", "_models")

    def __init__(
        self, models: Sequence[ModelName], make: Callable[[], Sequence[float]] | None
    ) -> None:
        self._models = models
        self._make = make
        self._found: dict[ModelName, float] = {}

    @property
    def read(self) -> bool:
        """Whether anybody has asked."""
        return self._make is None

    def __getitem__(self, model: ModelName) -> float:
        """Return the chance of a model."""
        make = self._make
        if make is not None and model in self._models:  # threads may meet here: they find the same
            self._found = dict(zip(self._models, make(), strict=True))
            self._make = None
        return self._found[model]

    def __iter__(self) -> Iterator[ModelName]:
        """Iterate over the models; works nothing out."""
        return iter(self._models)

    def __len__(self) -> int:
        """Count the models; works nothing out."""
        return len(self._models)

    def __contains__(self, model: object) -> bool:
        """Whether there is a chance of a model; works nothing out."""
        return model in self._models

    def __repr__(self) -> str:
        """Show them as a dictionary does."""
        return repr(dict(self))
