"""What the arrays of a store must look like, so that nothing breaks in the middle of serving."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from concertmaster.predictors.evidence import FEATURES, LEAN, TARGETS
from concertmaster.predictors.heads import FIGURES, HEAD_TARGETS, LEVELS
from concertmaster.predictors.laws import BINS
from concertmaster.predictors.lexical import NAMES
from concertmaster.predictors.model_names import TRAITS
from concertmaster.predictors.words import BUCKETS

Arrays = Mapping[str, npt.NDArray[np.generic]]


class MisshapenError(ValueError):
    """An array is missing or not what it should be; the text says which and why."""


class _Wanted(NamedTuple):
    """One array.

    Attributes:
        kind: "f" floats, "i" whole numbers, "U" texts.
        shape: Sizes; a name stands for any size, the same wherever it stands in the part.
    """

    kind: str
    shape: tuple[int | str, ...]


_Table = Mapping[str, _Wanted]


def check_part(name: str, arrays: Arrays, *, dims: int) -> None:
    """Check all arrays of one part of a store; parts that are not known need only be numbers.

    Args:
        name: Of the part.
        arrays: Its arrays by name.
        dims: Length of the encoder's vectors.

    Raises:
        MisshapenError: An array is missing, has another kind or shape, or a number that is
            not finite or out of range.
    """
    for key, array in arrays.items():
        if array.dtype.kind not in "fiuUb":
            raise MisshapenError(f"{key}: expected numbers or texts, found {array.dtype}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise MisshapenError(f"{key}: expected finite numbers, found others")
    _check_table(_TABLES.get(name, {}), arrays, {"dims": dims, "inputs": dims + len(NAMES)})
    if name in _CHECKS:
        _CHECKS[name](arrays)


def _check_table(table: _Table, arrays: Arrays, known: dict[str, int]) -> None:
    for key, wanted in table.items():
        if key not in arrays:
            raise MisshapenError(f"expected the array {key}, found none")
        array = arrays[key]
        if ("i" if array.dtype.kind == "u" else array.dtype.kind) != wanted.kind:
            raise MisshapenError(f"{key}: expected {_KINDS[wanted.kind]}, found {array.dtype}")
        if array.size or len(wanted.shape) == 1:
            _check_shape(key, wanted.shape, array.shape, known)
        elif known.get(str(wanted.shape[0])) != 0:
            raise MisshapenError(f"{key}: expected a row a group, found none")


def _check_shape(
    key: str, wanted: tuple[int | str, ...], found: tuple[int, ...], known: dict[str, int]
) -> None:
    sizes = tuple(
        known.setdefault(want, size) if isinstance(want, str) else want
        for want, size in zip(wanted, found, strict=False)
    )
    if len(wanted) != len(found) or sizes != found:
        shown = ", ".join(str(known.get(str(want), want)) for want in wanted)
        raise MisshapenError(f"{key}: expected shape ({shown}), found {found}")


def _check_least(arrays: Arrays, key: str, least: float) -> None:
    array = np.asarray(arrays[key], dtype=np.float64)
    if array.size and array.min() < least:
        raise MisshapenError(f"{key}: expected at least {least:g}, found {array.min():g}")


def _check_laws(arrays: Arrays) -> None:
    for name in LEAN:
        _check_least(arrays, f"{name}.counts", 0)
        _check_least(arrays, f"{name}.workflows", 0)
        _check_least(arrays, f"{name}.depths", 0)


def _check_heads(arrays: Arrays) -> None:
    if not np.asarray(arrays["words.rarity"], np.float64).all():
        raise MisshapenError("words.rarity: expected no zero")
    _check_forest(arrays, "tool_call", features=len(FEATURES), outputs=1)
    outputs = len(HEAD_TARGETS) * len(LEVELS)
    _check_forest(arrays, "quantiles", features=len(FIGURES), outputs=outputs)


def _check_forest(arrays: Arrays, name: str, *, features: int, outputs: int) -> None:
    """Check that trees are complete, ask for figures that there are, and fill all outputs."""
    asked = np.asarray(arrays[f"{name}.features"], dtype=np.int64)
    trees, inner = asked.shape
    stated = int(np.asarray(arrays[f"{name}.outputs"], dtype=np.int64)[0])
    if stated != outputs or not trees or trees % outputs:
        problem = f"expected trees for {outputs} outputs, found {trees} for {stated}"
        raise MisshapenError(f"{name}.outputs: {problem}")
    if inner < 1 or (inner + 1) & inner or arrays[f"{name}.leaves"].shape[1] != inner + 1:
        raise MisshapenError(f"{name}.leaves: expected complete trees, found {inner} forks")
    if asked.min() < 0 or asked.max() >= features:
        raise MisshapenError(f"{name}.features: expected 0 to {features - 1}")


def _check_success(arrays: Arrays) -> None:
    nets, wide, narrow = arrays["trunk_second"].shape
    outputs, gates = len(arrays["trunk_last_bias"]), np.asarray(arrays["trunk_gates"], np.int64)
    if len(arrays["trunk_first_bias"]) != nets * wide or not nets:
        raise MisshapenError(f"trunk_first_bias: expected {nets} networks of {wide}")
    if len(arrays["trunk_last"]) != nets * narrow:
        raise MisshapenError(f"trunk_last: expected {nets} networks of {narrow}")
    domains = outputs - len(gates)
    if domains < 1 or (gates.size and not 0 <= gates.min() <= gates.max() < domains):
        raise MisshapenError(f"trunk_gates: expected domains below {domains}")
    if not np.asarray(arrays["trunk_spread"], np.float64).all():
        raise MisshapenError("trunk_spread: expected no zero")


def _check_encoder(arrays: Arrays) -> None:
    if "vocab" in arrays:
        pieces = 1 + int((np.asarray(arrays["vocab"]) == ord("\n")).sum())
        if pieces != len(arrays["table"]):
            raise MisshapenError(f"table: expected {pieces} rows, found {len(arrays['table'])}")


def _check_baselines(arrays: Arrays) -> None:
    if 0 not in np.asarray(arrays["depths"]):
        raise MisshapenError("depths: expected the quantiles of everything, found none")


def _of_groups(prefix: str = "") -> dict[str, _Wanted]:
    groups = f"{prefix}groups"
    return {f"{prefix}paths": _Wanted("U", (groups,)), f"{prefix}depths": _Wanted("i", (groups,))}


def _of_law(name: str) -> dict[str, _Wanted]:
    return _of_groups(f"{name}.") | {
        f"{name}.counts": _Wanted("f", (f"{name}.groups", BINS)),
        f"{name}.workflows": _Wanted("f", (f"{name}.groups",)),
    }


def _of_forest(name: str) -> dict[str, _Wanted]:
    return {
        f"{name}.features": _Wanted("i", (f"{name}.trees", f"{name}.forks")),
        f"{name}.thresholds": _Wanted("f", (f"{name}.trees", f"{name}.forks")),
        f"{name}.leaves": _Wanted("f", (f"{name}.trees", f"{name}.leaves")),
        f"{name}.outputs": _Wanted("i", (1,)),
    }


_KINDS = {"f": "floats", "i": "whole numbers", "U": "texts"}
_TABLES: Mapping[str, _Table] = {
    "laws": {key: wanted for name in LEAN for key, wanted in _of_law(name).items()},
    "heads": {
        "words.weights": _Wanted("f", (len(HEAD_TARGETS), BUCKETS)),
        "words.rarity": _Wanted("f", (BUCKETS,)),
        "words.offsets": _Wanted("f", (len(HEAD_TARGETS),)),
        **_of_forest("tool_call"),
        **_of_forest("quantiles"),
    },
    "calibration": {
        "targets": _Wanted("U", ("groups",)),
        **_of_groups(),
        "offsets": _Wanted("f", ("groups", len(LEVELS))),
        "trusts": _Wanted("f", ("groups",)),
        "labels": _Wanted("f", ("groups",)),
    },
    "success": {
        "trunk_centre": _Wanted("f", ("inputs",)),
        "trunk_spread": _Wanted("f", ("inputs",)),
        "trunk_first": _Wanted("f", ("inputs", "hidden")),
        "trunk_first_bias": _Wanted("f", ("hidden",)),
        "trunk_second": _Wanted("f", ("nets", "wide", "narrow")),
        "trunk_second_bias": _Wanted("f", ("nets", 1, "narrow")),
        "trunk_last": _Wanted("f", ("deep", "traits")),
        "trunk_last_bias": _Wanted("f", ("traits",)),
        "trunk_gates": _Wanted("i", ("directions",)),
        "prior_of_name": _Wanted("f", (len(TRAITS), "traits")),
        "prior_spread": _Wanted("f", ("traits", "traits")),
        "models": _Wanted("U", ("names",)),
        "encoder": _Wanted("U", (1,)),
        "keys": _Wanted("U", ("models",)),
        "means": _Wanted("f", ("models", "traits")),
        "covariances": _Wanted("f", ("models", "traits", "traits")),
    },
    "baselines": {
        **_of_groups(),
        "quantiles": _Wanted("f", ("groups", len(TARGETS), len(LEVELS))),
    },
}
_ENCODER_TABLE: _Table = {
    "vocab": _Wanted("i", ("bytes",)),
    "table": _Wanted("i", ("pieces", "dims")),
    "scale": _Wanted("f", ("dims",)),
    "bias": _Wanted("f", ("dims",)),
}
_CHECKS: Mapping[str, Callable[[Arrays], None]] = {
    "laws": _check_laws,
    "heads": _check_heads,
    "success": _check_success,
    "baselines": _check_baselines,
}


def check_static_encoder(arrays: Arrays, *, dims: int) -> None:
    """Check the arrays of a static encoder.

    Raises:
        MisshapenError: As for ``check_part``.
    """
    _check_table(_ENCODER_TABLE, arrays, {"dims": dims})
    _check_encoder(arrays)
