"""What a forecast costs: one call at a time, one thread, with the store that ships.

    OMP_NUM_THREADS=1 python benchmarks/forecast_speed.py [--models FOLDER] [--candidates 10]

Every prompt is new, some 500 tokens long, and ten models are candidates, unless said
otherwise. Chances of success are worked out when somebody reads them, and timed apart. Times
are medians and the ninth decile over calls; memory is what loading adds to the process.
"""

import argparse
import json
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from concertmaster.core.errors import InputError
from concertmaster.core.request import ModelName, Request, RequestId, WorkflowId
from concertmaster.predictors.interface import Completion, Prompt
from concertmaster.predictors.learned import LearnedPredictor
from concertmaster.predictors.store import load_predictor

CALLS = 400
WORDS = 380
MODELS = tuple(
    ModelName(name)
    for name in (
        "llama-3.1-8b-instruct", "llama-3.1-70b-instruct", "qwen2.5-3b-instruct",
        "qwen2.5-7b-instruct", "qwen2.5-32b-instruct", "qwen2.5-72b-instruct",
        "mixtral-8x7b-instruct-v0.1", "phi-3-mini-4k-instruct", "yi-34b", "gemma-7b",
    )
)  # fmt: skip
TEXT = (
    "sort the list of numbers and return its median value because every query must join "
    "orders with customers where price exceeds average while proving that integers divide "
    "error table not found try again search page click result write tests plan next step"
)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, help="folder of a store; default: the shipped one")
    parser.add_argument("--candidates", type=int, default=len(MODELS), help="how many models")
    parser.add_argument("--json", type=Path, help="write the figures here")
    asked = parser.parse_args()
    before_mib = _memory_mib()
    try:
        predictor = load_predictor(asked.models, models=MODELS[: asked.candidates])
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    figures = {"loaded_mib": _memory_mib() - before_mib, "process_mib": _memory_mib()}
    figures |= measured(predictor)
    for name, value in figures.items():
        print(f"{name:<40}{value:>10.3f}")
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=1))
    return 0


def measured(predictor: LearnedPredictor) -> dict[str, float]:
    """Return milliseconds: the whole forecast, and the parts of it."""
    rng = random.Random(0)
    calls = [(_request(i), _prompt(rng)) for i in range(CALLS)]
    others = [(_request(i), _prompt(rng)) for i in range(CALLS)]
    looks = [predictor.evidence.look(request, prompt) for request, prompt in others]
    heads = predictor.heads
    assert heads is not None, "a store holds heads"
    figures = {
        "heads": [
            _ms(heads.predict, look.features, other[1].text)
            for look, other in zip(looks, others, strict=True)
        ],
        "whole forecast": [_ms(predictor.predict, *call) for call in calls],
        "the same prompt again": [_ms(predictor.predict, *calls[-1]) for _ in range(CALLS)],
    }
    fresh = [(_request(i), _prompt(rng)) for i in range(CALLS)]
    stated = [predictor.predict(*call).success for call in fresh]
    figures["chances of success, new prompt"] = [_ms(dict, chances) for chances in stated]
    figures["learn"] = [
        _ms(predictor.learn, request, Completion(model=MODELS[0], output_tokens=100), prompt)
        for request, prompt in calls
    ]
    return {
        f"{name}, {which} ms": value
        for name, times in figures.items()
        for which, value in (("P50", statistics.median(times)), ("P90", _decile(times)))
    }


def _request(i: int) -> Request:
    return Request(
        request_id=RequestId(f"r{i}"),
        workflow_id=WorkflowId(f"w{i // 4}"),
        arrival_s=float(i),
        prompt_tokens=500,
        max_output_tokens=4096,
        app="intercode_sql",
        role="agent",
        stage=i % 4,
    )


def _prompt(rng: random.Random) -> Prompt:
    text = " ".join(rng.choices(TEXT.split(), k=WORDS))
    return Prompt(text=text, chars=len(text))


def _ms(call: Callable[..., object], *arguments: object) -> float:
    begun_s = time.perf_counter()
    call(*arguments)
    return 1000 * (time.perf_counter() - begun_s)


def _decile(times: list[float]) -> float:
    return statistics.quantiles(times, n=10)[-1]


def _memory_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main())
