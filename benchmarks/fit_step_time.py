"""Fit the step-time model to measured kernels, write the coefficients, print the errors.

Run: ``python benchmarks/fit_step_time.py [FOLDER]``. The folder holds ``linear_ops.parquet`` and
``all_reduce.parquet``. The shipped coefficients are fitted to all rows; the tables come from fits
that have not seen the rows, or the model, that they are judged on.
"""

import argparse
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from concertmaster.physics import kernels
from concertmaster.physics.hardware import GPUS, Gpu
from concertmaster.physics.kernels import MEASURED, SPLITS, TILES, KernelFit
from concertmaster.physics.models import ModelCard
from concertmaster.physics.step_time import (
    elementwise_columns,
    gemm_shapes,
    layer_linear_s,
    operators_s,
)

Floats = npt.NDArray[np.float64]

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "src" / "concertmaster" / "physics" / "kernels.json"
SOURCE = "microsoft/vidur (MIT licence), data/profiling, medians of measured kernels"

_TILE_EDGES = [*range(64, 1025, 64), *range(1152, 2049, 128), 2304, 2560, 3072, 3584]
KNOTS = (1, 8, 16, 17, 32, 33, *(n for edge in _TILE_EDGES for n in (edge, edge + 1)), 4096)
"""Token counts at which corrections are kept: both sides of each tile's edge."""

NUGGET = 0.1
GEMM_START = np.concatenate([np.log([3e-6, 0.8, 4, 128, 0.8, 2e-6]), np.full(len(TILES), 0.8)])
OPERATORS = {
    "input_norm": "input_layernorm_ms",
    "qkv": "attn_pre_proj_ms",
    "rope": "attn_rope_ms",
    "attention_output": "attn_post_proj_ms",
    "post_attention_norm": "post_attention_layernorm_ms",
    "mlp_up": "mlp_up_proj_ms",
    "mlp_act": "mlp_act_ms",
    "mlp_down": "mlp_down_proj_ms",
    "add": "add_ms",
}
ELEMENTWISE = {
    "norm": ("input_norm", "post_attention_norm"),
    "rope": ("rope",),
    "act": ("mlp_act",),
    "add": ("add",),
    "embedding": ("embedding",),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured row: seconds of each operator that the model has."""

    gpu: str
    model: ModelCard
    tensor_parallel: int
    tokens: int
    seconds: Mapping[str, float]

    @property
    def layer_s(self) -> float:
        """Sum of the linear operators of one layer."""
        return sum(self.seconds[name] for name in OPERATORS if name in self.seconds)

    @property
    def held_out(self) -> bool:
        """Whether this token count is in the fifth that the first table is judged on."""
        return hashlib.sha256(f"{self.tokens}".encode()).digest()[0] % 5 == 0


def read_rows(folder: Path) -> list[Row]:
    """Read the linear operators, repeated measurements as they are."""
    table = pq.read_table(folder / "linear_ops.parquet")
    return [_row(record) for record in table.to_pylist()]


def _row(record: dict[str, Any]) -> Row:
    columns = {**OPERATORS, "embedding": "emb_ms"}
    seconds = {k: record[v] / 1e3 for k, v in columns.items() if _known(record[v])}
    return Row(
        gpu=record["gpu"],
        model=measured_card(record),
        tensor_parallel=record["num_tensor_parallel_workers"],
        tokens=record["num_tokens"],
        seconds=seconds,
    )


def _known(value: float | None) -> bool:
    return value is not None and not np.isnan(value)


def measured_card(record: dict[str, Any]) -> ModelCard:
    """Return the shapes of one measured layer."""
    return ModelCard(
        name=record["model"],
        layers=1,
        hidden=record["n_embd"],
        heads=record["n_head"],
        kv_heads=record["n_kv_head"],
        head_dim=record["n_embd"] // record["n_head"],
        intermediate=record["n_expanded_embd"],
        vocab=record["vocab_size"],
        gated_mlp=record["use_gated_mlp"],
        tied_embeddings=False,
        context_tokens=4096,
        experts=1,
        active_experts=1,
        source=SOURCE,
        parallel_block=not _known(record["post_attention_layernorm_ms"]),
    )


def levenberg_marquardt(
    predict: Callable[[Floats], Floats], start: Floats, target: Floats, rounds: int = 40
) -> Floats:
    """Fit logarithms to ``target`` in the mean of soft absolute errors."""

    def residual(theta: Floats) -> Floats:
        return np.log(predict(theta)) - target

    def loss(r: Floats) -> float:
        return float(np.sqrt(1e-4 + r * r).mean())

    theta, r, damping = start, residual(start), 1e-2
    for _ in range(rounds):
        steps = 1e-3 * np.eye(len(theta))
        jacobian = np.stack([(residual(theta + step) - r) / 1e-3 for step in steps], axis=1)
        weighted = (jacobian / np.sqrt(1e-3 + r * r)[:, None]).T
        normal, gradient = weighted @ jacobian, weighted @ r
        ridge = np.diag(np.diag(normal) + 1e-6 * len(r))
        for _ in range(8):
            moved = theta - np.clip(np.linalg.solve(normal + damping * ridge, gradient), -0.5, 0.5)
            moved_r = residual(moved)
            if loss(moved_r) < loss(r):
                theta, r, damping = moved, moved_r, damping / 3
                break
            damping *= 4
        else:
            break
    return theta


def _gemm_coefficients(theta: Floats) -> dict[str, Any]:
    launch_s, bandwidth, sharpness, prologue, wave, split_s = np.exp(theta[:6]).tolist()
    return {
        "launch_s": launch_s,
        "bandwidth_ratio": min(bandwidth, 1.0),
        "sharpness": sharpness,
        "prologue": prologue,
        "wave_ratio": min(wave, 1.0),
        "split_s": split_s,
        "tile_ratio": (1 / (1 + np.exp(-theta[6:]))).tolist(),
    }


def gemm_seconds(fit: Mapping[str, Any], m: Floats, n: Floats, k: Floats, gpu: Gpu) -> Floats:
    """``GemmFit.seconds`` over arrays."""
    rate = gpu.hbm_bandwidth_bytes_per_s * fit["bandwidth_ratio"]
    memory_s = 2 * (n * k + m * k + m * n) / rate
    compute_s = np.full(len(m), np.inf)
    for (rows, columns), ratio in zip(TILES, fit["tile_ratio"], strict=True):
        tiles = np.ceil(m / rows) * np.ceil(n / columns)
        inner_s = 2 * rows * columns / (gpu.dense_bf16_flops / gpu.sms * ratio)
        for split in SPLITS:
            waves = tiles * split / gpu.sms
            waves = waves + fit["wave_ratio"] * (np.ceil(waves - 1e-9) - waves)
            tiled_s = np.maximum(waves, 1.0) * inner_s * (k / split + fit["prologue"])
            extra_s = fit["split_s"] + 2 * split * m * n / rate if split > 1 else 0.0
            compute_s = np.minimum(compute_s, tiled_s + extra_s)
    p = fit["sharpness"]
    soft: Floats = fit["launch_s"] + (compute_s**p + memory_s**p) ** (1 / p)
    return soft


def gemm_samples(rows: Iterable[Row]) -> Floats:
    """Columns m, n, k, seconds of every measured product up to the last knot."""
    samples = [
        (row.tokens, *shape, row.seconds[name])
        for row in rows
        if row.tokens <= KNOTS[-1]
        for name, shape in gemm_shapes(row.model, row.tensor_parallel).items()
    ]
    return np.array(samples, dtype=np.float64).T


def fit_gemm(samples: Floats, gpu: Gpu) -> dict[str, Any]:
    """Fit the formula of matrix products to a sample of the measurements."""
    count = samples.shape[1]
    chosen = np.random.default_rng(0).choice(count, min(6000, count), replace=False)
    m, n, k, seconds = samples[:, chosen]
    theta = levenberg_marquardt(
        lambda theta: gemm_seconds(_gemm_coefficients(theta), m, n, k, gpu),
        GEMM_START,
        np.log(seconds),
    )
    return rounded(_gemm_coefficients(theta))


def fit_corrections(samples: Floats, gemm: Mapping[str, Any], gpu: Gpu) -> dict[str, list[int]]:
    """Find what the formula misses at each knot, as weights of measured shapes in per mille."""
    m, n, k, seconds = samples
    missed = np.log(seconds / gemm_seconds(gemm, m, n, k, gpu))
    shapes = sorted({(int(a), int(b)) for a, b in zip(n, k, strict=True)})
    at_knots = np.array(
        [_at_knots(m[here], missed[here]) for here in ((n == a) & (k == b) for a, b in shapes)]
    )
    weights = np.empty_like(at_knots)
    for i, tokens in enumerate(KNOTS):
        fills = [kernels.wave_fill(tokens, a, gpu.sms) for a, _ in shapes]
        pairs = list(zip(shapes, fills, strict=True))
        alike = np.array([[kernels.likeness(*one, *other) for other in pairs] for one in pairs])
        weights[:, i] = np.linalg.solve(alike + NUGGET * np.eye(len(shapes)), at_knots[:, i])
    rows = np.rint(1000 * weights).astype(int).tolist()
    return {f"{a}x{b}": row for (a, b), row in zip(shapes, rows, strict=True)}


def _at_knots(tokens: Floats, missed: Floats) -> Floats:
    """Least squares of a piecewise linear curve through noisy points, a little smoothed."""
    hats = np.stack([np.interp(tokens, KNOTS, unit) for unit in np.eye(len(KNOTS))], axis=1)
    edges = np.diff(np.eye(len(KNOTS)), axis=0)[np.diff(KNOTS) > 1]
    normal = hats.T @ hats + 0.03 * edges.T @ edges + 1e-6 * np.eye(len(KNOTS))
    curve: Floats = np.linalg.solve(normal, hats.T @ missed).astype(np.float64)
    return curve


def fit_elementwise(rows: Sequence[Row], operator: str) -> tuple[dict[str, float], list[int]]:
    """Fit the formula of one elementwise operator, and what it misses at each knot."""
    samples = [
        (row.tokens, _columns(row)[operator], row.seconds[name])
        for row in rows
        for name in ELEMENTWISE[operator]
        if name in row.seconds
    ]
    m, columns, seconds = np.array(samples, dtype=np.float64).T
    names = list(kernels.ElementwiseFit.__dataclass_fields__)

    def predict(theta: Floats) -> Floats:
        floor, column, cached_rate, rate, fits, p = np.exp(theta)
        cached = np.minimum(m * columns, fits)
        stream = cached / cached_rate + (m * columns - cached) / rate
        soft: Floats = ((floor + column * columns) ** p + stream**p) ** (1 / p)
        return soft

    start = np.log([2e-6, 1e-10, 6e11, 3e11, 5e6, 3.0])
    theta = levenberg_marquardt(predict, start, np.log(seconds))
    missed = 1000 * _at_knots(m, np.log(seconds / predict(theta)))
    fitted = rounded(dict(zip(names, np.exp(theta).tolist(), strict=True)))
    return fitted, np.rint(missed).astype(int).tolist()


def _columns(row: Row) -> dict[str, float]:
    return elementwise_columns(row.model, row.tensor_parallel)


def rounded(table: Mapping[str, Any]) -> dict[str, Any]:
    """Keep four significant digits."""
    return {
        key: [float(f"{v:.4g}") for v in value]
        if isinstance(value, list)
        else float(f"{value:.4g}")
        for key, value in table.items()
    }


def fit_gpu(rows: Sequence[Row], measured_as: str) -> dict[str, Any]:
    """Fit everything about one measured GPU."""
    gpu, samples = GPUS[MEASURED[measured_as]], gemm_samples(rows)
    gemm = fit_gemm(samples, gpu)
    elementwise = {name: fit_elementwise(rows, name) for name in ELEMENTWISE}
    return {
        "gemm": gemm,
        "elementwise": {name: fitted for name, (fitted, _) in elementwise.items()},
        "elementwise_permille": {name: missed for name, (_, missed) in elementwise.items()},
        "weights_permille": fit_corrections(samples, gemm, gpu),
    }


def fit_all_reduce(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Fit latency and ring rate of each topology, to the faster of repeated measurements."""
    fastest: dict[tuple[str, int], dict[int, float]] = defaultdict(dict)
    for record in pq.read_table(folder / "all_reduce.parquet").to_pylist():
        times = fastest[record["topology"], record["num_workers"]]
        size, seconds = record["size_bytes"], record["all_reduce_ms"] / 1e3
        times[size] = min(seconds, times.get(size, seconds))
    tables: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for (topology, workers), times in sorted(fastest.items()):
        tables[topology][str(workers)] = _fit_ring(workers, times)
    return dict(tables)


def _fit_ring(workers: int, times: Mapping[int, float]) -> dict[str, float]:
    traffic = 2 * (workers - 1) / workers * np.array(list(times), dtype=np.float64)
    seconds = np.array(list(times.values()))

    def predict(theta: Floats) -> Floats:
        line: Floats = np.exp(theta[0]) + traffic / np.exp(theta[1])
        return line

    theta = levenberg_marquardt(predict, np.log([3e-5, 1e11]), np.log(seconds))
    error = np.median(np.abs(predict(theta) / seconds - 1))
    base_s, rate = np.exp(theta).tolist()
    return rounded({"base_s": base_s, "bytes_per_s": rate, "median_error_ratio": error})


def load(measured_as: str, table: Mapping[str, Any]) -> KernelFit:
    """Turn fitted coefficients into what the simulator runs."""
    return kernels.kernel_fit(GPUS[MEASURED[measured_as]], table, KNOTS)


def errors(rows: Iterable[Row], fit: KernelFit) -> Floats:
    """Relative error of a layer's total linear time, row by row."""
    return np.array(
        [
            layer_linear_s(row.model, fit.measured_on, row.tensor_parallel, row.tokens, fit)
            / row.layer_s
            - 1
            for row in rows
        ]
    )


def curve_errors(rows: Sequence[Row], fit: KernelFit) -> Floats:
    """Return the same error for rows read off a curve between knots, as the simulator does."""
    predicted = []
    curves: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        key = row.model.name, row.tensor_parallel
        if key not in curves:
            args = row.model, fit.measured_on, row.tensor_parallel
            curves[key] = [layer_linear_s(*args, n, fit) for n in KNOTS]
        predicted.append(kernels.interpolate(KNOTS, curves[key], row.tokens) / row.layer_s - 1)
    return np.array(predicted)


def _line(label: str, error: Floats, curve: Floats) -> str:
    cells = [100 * np.percentile(np.abs(e), q) for e in (error, curve) for q in (50, 95)]
    return f"{label:<34}{len(error):>6}" + "".join(f"{cell:>9.1f}" for cell in cells)


def _by_model(rows: Iterable[Row]) -> dict[str, list[Row]]:
    models: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        models[row.model.name].append(row)
    return dict(sorted(models.items()))


def print_table(title: str, judged: Iterable[tuple[str, str, list[Row], KernelFit]]) -> None:
    """Print median and P95 absolute percentage errors of total layer time."""
    print(f"\n{title}\n{'GPU, model':<34}{'rows':>6}{'median':>9}{'P95':>9}", end="")
    print(f"{'curve':>9}{'P95':>9}")
    for gpu, model, rows, fit in judged:
        near = [row for row in rows if row.tokens <= KNOTS[-1]]
        print(_line(f"{gpu} {model}", errors(near, fit), curve_errors(near, fit)))


def print_operators(gpu: str, rows: Sequence[Row], fit: KernelFit) -> None:
    """Print the errors operator by operator."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        args = row.model, fit.measured_on, row.tensor_parallel, row.tokens, fit
        for name, seconds in operators_s(*args).items():
            if name in row.seconds:
                found[name].append(seconds / row.seconds[name] - 1)
        width = row.model.hidden
        seconds = fit.elementwise_s("embedding", row.tokens, width, fit.measured_on)
        found["embedding"].append(seconds / row.seconds["embedding"] - 1)
    for name, error in found.items():
        q50, q95 = np.percentile(np.abs(error), (50, 95))
        print(f"{gpu + ' ' + name:<34}{len(error):>6}{100 * q50:>9.1f}{100 * q95:>9.1f}")


def report(rows: Sequence[Row]) -> None:
    """Print all tables; each fit has not seen what it is judged on."""
    by_gpu = {gpu: [row for row in rows if row.gpu == gpu] for gpu in MEASURED}
    kept = {g: load(g, fit_gpu([r for r in rs if not r.held_out], g)) for g, rs in by_gpu.items()}
    held = {gpu: [row for row in rs if row.held_out] for gpu, rs in by_gpu.items()}
    print_table(
        "Held-back token counts, error of layer time in %",
        ((g, m, rs, kept[g]) for g in held for m, rs in _by_model(held[g]).items()),
    )
    print_table("Leave one model out, error of layer time in %", leave_one_out(by_gpu))
    print(f"\nHeld-back token counts, error by operator in %\n{'GPU, operator':<34}", end="")
    print(f"{'rows':>6}{'median':>9}{'P95':>9}")
    for gpu, rs in held.items():
        print_operators(gpu, [row for row in rs if row.tokens <= KNOTS[-1]], kept[gpu])


def leave_one_out(
    by_gpu: Mapping[str, Sequence[Row]],
) -> Iterable[tuple[str, str, list[Row], KernelFit]]:
    """Fit to all models but one and judge on that one, for each in turn."""
    for gpu, rows in by_gpu.items():
        for model, judged in _by_model(rows).items():
            others = [row for row in rows if row.model.name != model]
            yield gpu, model, judged, load(gpu, fit_gpu(others, gpu))


def write(path: Path, rows: Sequence[Row], folder: Path) -> None:
    """Fit to all rows and write the shipped coefficients, one shape a line."""
    table = {
        "source": SOURCE,
        "knots_tokens": KNOTS,
        "all_reduce": fit_all_reduce(folder),
        "gpus": {gpu: fit_gpu([r for r in rows if r.gpu == gpu], gpu) for gpu in MEASURED},
    }
    text = json.dumps(table, indent=1)
    for numbers in {text[a:b] for a, b in _number_lists(text)}:
        text = text.replace(numbers, "".join(numbers.split()))
    path.write_text(text + "\n", encoding="utf-8")


def _number_lists(text: str) -> Iterable[tuple[int, int]]:
    start = text.find("[")
    while start >= 0:
        end = text.index("]", start) + 1
        yield start, end
        start = text.find("[", end)


def main() -> None:
    """Read, write, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = ROOT.parent / "shared" / "data" / "gpu_profiles"
    parser.add_argument("folder", nargs="?", type=Path, default=default)
    folder = parser.parse_args().folder
    rows = read_rows(folder)
    write(SHIPPED, rows, folder)
    report(rows)


if __name__ == "__main__":
    main()
