"""Grows boosted trees with LightGBM and packs them for serving, where it is not needed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from concertmaster.core.errors import InputError
from concertmaster.predictors.forest import Forest

DEPTH = 5
GROWTH: Mapping[str, object] = {
    "learning_rate": 0.05,
    "num_leaves": 16,
    "max_depth": DEPTH,
    "min_data_in_leaf": 200,
    "feature_fraction": 0.3,
    "bagging_fraction": 0.6,
    "bagging_freq": 1,
    "lambda_l2": 5.0,
    "path_smooth": 10.0,
    "max_bin": 63,
    "verbosity": -1,
    "deterministic": True,
    "force_row_wise": True,
}
"""Small trees, much smoothing: the public data holds few workflows of most apps."""

Array = npt.NDArray[np.floating[Any]]


def lightgbm() -> Any:  # noqa: ANN401
    """Import LightGBM.

    Raises:
        InputError: It is not installed.
    """
    try:
        import lightgbm  # noqa: PLC0415  # an extra: only training needs it
    except ImportError:
        remedy = "pip install 'concertmaster[train]'"
        raise InputError("train", "", "training needs LightGBM", remedy) from None
    return lightgbm


def grow(
    figures: Array,
    labels: Sequence[Array],
    objectives: Sequence[Mapping[str, object]],
    weights: Array,
    *,
    rounds: int,
    seed: int,
    threads: int = 1,
    progress: Callable[[], None] | None = None,
) -> Forest:
    """Grow one sum of trees for each pair of labels and objective.

    Rows whose label is NaN are left out.
    """
    library = lightgbm()
    trees: list[tuple[npt.NDArray[np.int16], Array, Array]] = []
    data = None
    for labels_of_one, objective in zip(labels, objectives, strict=True):
        known = ~np.isnan(labels_of_one)
        if data is None or not known.all():
            data = library.Dataset(
                figures[known],
                free_raw_data=False,
                params={
                    "max_bin": GROWTH["max_bin"],
                    "feature_pre_filter": False,  # objectives may ask for smaller leaves
                    "verbosity": -1,
                },
            )
        data.set_label(labels_of_one[known])
        data.set_weight(weights[known])
        settings = {**GROWTH, **objective, "seed": seed, "num_threads": threads}
        booster = library.train(settings, data, rounds)
        model = booster.dump_model()["tree_info"]
        packed = [_packed(tree["tree_structure"]) for tree in model]
        packed += [_packed({"leaf_value": 0.0})] * (rounds - len(packed))
        trees += packed
        if not known.all():
            data = None
        if progress is not None:
            progress()
    features, thresholds, leaves = (np.stack(parts) for parts in zip(*trees, strict=True))
    return Forest(
        features.astype(np.int16),
        thresholds.astype(np.float32),
        leaves.astype(np.float32),
        outputs=len(labels),
    )


def _packed(tree: Mapping[str, Any]) -> tuple[npt.NDArray[np.int16], Array, Array]:
    """Lay a tree out as a complete one."""
    inner = 2**DEPTH - 1
    features = np.zeros(inner, dtype=np.int16)
    thresholds = np.zeros(inner, dtype=np.float32)
    leaves = np.zeros(inner + 1, dtype=np.float32)
    _place(tree, 0, features, thresholds, leaves)
    return features, thresholds, leaves


def _place(
    node: Mapping[str, Any],
    at: int,
    features: npt.NDArray[np.int16],
    thresholds: Array,
    leaves: Array,
) -> None:
    inner = len(features)
    if at >= inner:
        leaves[at - inner] = node["leaf_value"]
        return
    branches = node, node
    if "split_feature" in node:
        features[at] = node["split_feature"]
        thresholds[at] = _rounded_down(node["threshold"])
        branches = node["left_child"], node["right_child"]
    for i, branch in enumerate(branches, start=1):
        _place(branch, 2 * at + i, features, thresholds, leaves)


def _rounded_down(threshold: float) -> np.float32:
    """Return the largest float32 that is not above: figures are float32 and go left if equal."""
    near = np.float32(threshold)
    return near if near <= threshold else np.nextafter(near, np.float32(-np.inf))
