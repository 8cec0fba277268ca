"""Fit the step-time model to measured kernels, write the coefficients, print the errors.

Run: ``python benchmarks/fit_step_time.py [FOLDER]``. The folder holds ``linear_ops.parquet`` and
``all_reduce.parquet``. The shipped coefficients are fitted to all rows; the tables come from fits
that have not seen the rows, or the model, that they are judged on.
"""

import argparse
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from concertmaster.physics import kernels, step_time
from concertmaster.physics.hardware import GPUS, Gpu
from concertmaster.physics.kernels import MEASURED, SPLITS, TILES, KernelFit
from concertmaster.physics.models import ModelCard

Floats = npt.NDArray[np.float64]

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "gpu_profiles"
SHIPPED = ROOT / "src" / "concertmaster" / "physics" / "kernels.json"
SOURCE = "microsoft/vidur (MIT licence), data/profiling, medians of measured kernels"

_TILE_EDGES = [*range(64, 1025, 64), *range(1152, 2049, 128), 2304, 2560, 3072, 3584]
KNOTS = (1, 8, 16, 17, 32, 33, *(n for edge in _TILE_EDGES for n in (edge, edge + 1)), 4096)
"""Token counts at which corrections are kept: both sides of each tile's edge."""

NUGGET = 0.1
GEMM_START = (3e-6, 0.8, 4.0, 128.0, 0.8, 2e-6)
GEMM_NAMES = tuple(kernels.GemmFit.__dataclass_fields__)[: len(GEMM_START)]
ELEMENTWISE_START = (2e-6, 1e-10, 6e11, 3e11, 5e6, 3.0)
ELEMENTWISE_NAMES = tuple(kernels.ElementwiseFit.__dataclass_fields__)
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
    "act": ("mlp_act",),
    **{name: (name,) for name in ("rope", "add", "embedding")},
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
        """Whether the first table is judged on this token count; about one in seven is chosen."""
        return hashlib.sha256(f"{self.tokens}".encode()).digest()[0] % 5 == 0


Judged = tuple[str, str, list[Row], KernelFit]
"""GPU, model, the rows to judge on and the fit to judge."""


def read_rows(folder: Path) -> list[Row]:
    """Read the linear operators, repeated measurements as they are."""
    table = pq.read_table(folder / "linear_ops.parquet")
    columns = {**OPERATORS, "embedding": "emb_ms"}
    return [
        Row(
            gpu=record["gpu"],
            model=measured_card(record),
            tensor_parallel=record["num_tensor_parallel_workers"],
            tokens=record["num_tokens"],
            seconds={k: record[v] / 1e3 for k, v in columns.items() if record[v] is not None},
        )
        for record in table.to_pylist()
    ]


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
        source=SOURCE,
        parallel_block=record["post_attention_layernorm_ms"] is None,
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
        moves = theta + 1e-3 * np.eye(len(theta))
        jacobian = np.stack([(residual(move) - r) / 1e-3 for move in moves], axis=1)
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
    scalars = dict(zip(GEMM_NAMES, np.exp(theta[: len(GEMM_START)]).tolist(), strict=True))
    for ratio in ("bandwidth_ratio", "wave_ratio"):
        scalars[ratio] = min(scalars[ratio], 1.0)
    return {**scalars, "tile_ratio": (1 / (1 + np.exp(-theta[len(GEMM_START) :]))).tolist()}


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
    return np.asarray(fit["launch_s"] + (compute_s**p + memory_s**p) ** (1 / p))


def gemm_samples(rows: Iterable[Row]) -> Floats:
    """Columns m, n, k, seconds of every measured product up to the last knot."""
    samples = [
        (row.tokens, *shape, row.seconds[name])
        for row in rows
        if row.tokens <= KNOTS[-1]
        for name, shape in step_time.gemm_shapes(row.model, row.tensor_parallel).items()
    ]
    return np.array(samples, dtype=np.float64).T


def fit_gemm(samples: Floats, gpu: Gpu) -> dict[str, Any]:
    """Fit the formula of matrix products to a sample of the measurements."""
    count = samples.shape[1]
    chosen = np.random.default_rng(0).choice(count, min(6000, count), replace=False)
    m, n, k, seconds = samples[:, chosen]
    start = np.concatenate([np.log(GEMM_START), np.full(len(TILES), 0.8)])

    def predict(theta: Floats) -> Floats:
        return gemm_seconds(_gemm_coefficients(theta), m, n, k, gpu)

    return rounded(_gemm_coefficients(levenberg_marquardt(predict, start, np.log(seconds))))


def fit_corrections(samples: Floats, gemm: Mapping[str, Any], gpu: Gpu) -> dict[str, list[int]]:
    """Find what the formula misses at each knot, as weights of measured shapes in per mille."""
    m, n, k, seconds = samples
    missed = np.log(seconds / gemm_seconds(gemm, m, n, k, gpu))
    shapes = sorted({(int(a), int(b)) for a, b in zip(n, k, strict=True)})
    rows_of = [(n == a) & (k == b) for a, b in shapes]
    at_knots = np.array([_at_knots(m[here], missed[here]) for here in rows_of])
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
    return np.asarray(np.linalg.solve(normal, hats.T @ missed), dtype=np.float64)


def fit_elementwise(rows: Sequence[Row], operator: str) -> tuple[dict[str, float], list[int]]:
    """Fit the formula of one elementwise operator, and what it misses at each knot."""
    samples = [
        (
            row.tokens,
            step_time.elementwise_columns(row.model, row.tensor_parallel)[operator],
            row.seconds[name],
        )
        for row in rows
        for name in ELEMENTWISE[operator]
        if name in row.seconds and row.tokens <= KNOTS[-1]
    ]
    m, columns, seconds = np.array(samples, dtype=np.float64).T

    def predict(theta: Floats) -> Floats:
        floor, column, cached_rate, rate, fits, p = np.exp(theta)
        cached = np.minimum(m * columns, fits)
        stream = cached / cached_rate + (m * columns - cached) / rate
        return np.asarray(((floor + column * columns) ** p + stream**p) ** (1 / p))

    theta = levenberg_marquardt(predict, np.log(ELEMENTWISE_START), np.log(seconds))
    missed = 1000 * _at_knots(m, np.log(seconds / predict(theta)))
    fitted = rounded(dict(zip(ELEMENTWISE_NAMES, np.exp(theta).tolist(), strict=True)))
    return fitted, np.rint(missed).astype(int).tolist()


def rounded(table: Mapping[str, Any]) -> dict[str, Any]:
    """Keep four significant digits."""
    return dict(json.loads(json.dumps(table), parse_float=lambda text: float(f"{float(text):.4g}")))


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
        return np.asarray(np.exp(theta[0]) + traffic / np.exp(theta[1]))

    theta = levenberg_marquardt(predict, np.log([3e-5, 1e11]), np.log(seconds))
    error = np.median(np.abs(predict(theta) / seconds - 1))
    names = "base_s", "bytes_per_s", "median_error_ratio"
    return rounded(dict(zip(names, [*np.exp(theta).tolist(), error], strict=True)))


def load(measured_as: str, table: Mapping[str, Any]) -> KernelFit:
    """Turn fitted coefficients into what the simulator runs."""
    return kernels.kernel_fit(GPUS[MEASURED[measured_as]], table, KNOTS)


def errors(rows: Sequence[Row], fit: KernelFit) -> tuple[Floats, Floats]:
    """Return the relative errors of layer time: of the formula, and read off a rate curve."""

    @lru_cache
    def curve(model: ModelCard, tensor_parallel: int) -> list[float]:
        args = model, fit.measured_on, tensor_parallel
        return step_time.non_decreasing([step_time.layer_linear_s(*args, n, fit) for n in KNOTS])

    formula, read_off = [], []
    for row in rows:
        args = row.model, fit.measured_on, row.tensor_parallel, row.tokens, fit
        formula.append(step_time.layer_linear_s(*args) / row.layer_s - 1)
        curve_s = curve(row.model, row.tensor_parallel)
        read_off.append(kernels.interpolate(KNOTS, curve_s, row.tokens) / row.layer_s - 1)
    return np.array(formula), np.array(read_off)


def _line(label: str, *errors: Floats) -> str:
    cells = [100 * np.percentile(np.abs(error), q) for error in errors for q in (50, 95)]
    return f"{label:<34}{len(errors[0]):>6}" + "".join(f"{cell:>9.1f}" for cell in cells)


def _head(title: str, *names: str) -> str:
    return f"\n{title}\n{'GPU':<34}{'rows':>6}" + "".join(f"{name:>9}" for name in names)


def _by_model(rows: Sequence[Row]) -> dict[str, list[Row]]:
    names = sorted({row.model.name for row in rows})
    return {name: [row for row in rows if row.model.name == name] for name in names}


def print_table(title: str, judged: Iterable[Judged]) -> None:
    """Print median and P95 absolute percentage errors of total layer time."""
    print(_head(title, "median", "P95", "curve", "P95"))
    for gpu, model, rows, fit in judged:
        near = [row for row in rows if row.tokens <= KNOTS[-1]]
        print(_line(f"{gpu} {model}", *errors(near, fit)))


def print_operators(gpu: str, rows: Sequence[Row], fit: KernelFit) -> None:
    """Print the errors operator by operator."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        args = row.model, fit.measured_on, row.tensor_parallel, row.tokens, fit
        for name, seconds in step_time.operators_s(*args).items():
            if name in row.seconds:
                found[name].append(seconds / row.seconds[name] - 1)
    for name, error in found.items():
        print(_line(f"{gpu} {name}", np.array(error)))


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
    print(_head("Held-back token counts, error by operator in %", "median", "P95"))
    for gpu, rs in held.items():
        print_operators(gpu, [row for row in rs if row.tokens <= KNOTS[-1]], kept[gpu])


def leave_one_out(by_gpu: Mapping[str, Sequence[Row]]) -> Iterable[Judged]:
    """Fit to all models but one, and those of the same shapes, and judge on that one."""
    for gpu, rows in by_gpu.items():
        for model, judged in _by_model(rows).items():
            shapes = step_time.gemm_shapes(judged[0].model, 1)
            others = [row for row in rows if step_time.gemm_shapes(row.model, 1) != shapes]
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
    one_line = re.sub(r"\[[^]]*\]", lambda found: "".join(found[0].split()), text)
    path.write_text(one_line + "\n", encoding="utf-8")


def main() -> None:
    """Read, write, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=DATA)
    folder = parser.parse_args().folder
    write(SHIPPED, rows := read_rows(folder), folder)
    report(rows)


if __name__ == "__main__":
    main()
