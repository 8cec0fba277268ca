"""How long one kernel takes: matrix products, elementwise operators, all-reduces.

The coefficients are in ``kernels.json``, fitted by ``benchmarks/fit_step_time.py``; the formulas
are here. A matrix product takes the larger, softly, of the time to move its bytes and the time of
the best of a few tilings of its output, each running in waves over the multiprocessors. On top
goes a correction learnt from the measured shapes, weighted by how alike they are.
"""

import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from typing import Any

from concertmaster.physics.hardware import GPUS, Gpu

TILES = ((64, 64), (128, 64), (64, 128), (128, 128), (256, 64), (64, 256), (256, 128), (128, 256))
"""Output tiles (rows, columns) that a matrix product may be cut into."""

SPLITS = (1, 2, 4)
"""Ways in which the inner dimension may be split between multiprocessors."""

LIKENESS_TILES = ((64, 128), (128, 128), (256, 128))
"""Tilings by whose wave fill two products are compared."""

_SHAPE_OCTAVES = 2.0
_FILL_RATIO = 0.35


@dataclass(frozen=True, kw_only=True)
class ElementwiseFit:
    """Coefficients of one elementwise operator on one measured GPU.

    Attributes:
        floor_s: What the smallest call takes.
        column_s: Per element of one row: rows run side by side, their columns partly one by one.
        cached_per_s: Elements a second while they fit in the L2 cache.
        streamed_per_s: Elements a second beyond it.
        cached_elements: How many elements fit.
        sharpness: Exponent of the soft maximum of floor and streaming.
    """

    floor_s: float
    column_s: float
    cached_per_s: float
    streamed_per_s: float
    cached_elements: float
    sharpness: float

    def seconds(self, rows: float, columns: float, bandwidth_ratio: float = 1.0) -> float:
        """Seconds over ``rows`` times ``columns``; the ratio is to the measured GPU's bandwidth."""
        elements = rows * columns
        cached = min(elements, self.cached_elements)
        stream_s = cached / self.cached_per_s + (elements - cached) / self.streamed_per_s
        fixed_s = self.floor_s + self.column_s * columns
        p = self.sharpness
        return float((fixed_s**p + (stream_s / bandwidth_ratio) ** p) ** (1 / p))


@dataclass(frozen=True, kw_only=True)
class GemmFit:
    """Coefficients of matrix products on one measured GPU.

    Attributes:
        launch_s: What any product takes besides.
        bandwidth_ratio: Share of the peak memory bandwidth reached.
        sharpness: Exponent of the soft maximum of compute and memory.
        prologue: Inner steps' worth of time that a tile spends on filling and draining.
        wave_ratio: How much of a last, partly filled wave is paid; 1 is all of it.
        split_s: Extra seconds of a split inner dimension.
        tile_ratio: Share of the peak throughput reached by each of ``TILES``.
    """

    launch_s: float
    bandwidth_ratio: float
    sharpness: float
    prologue: float
    wave_ratio: float
    split_s: float
    tile_ratio: tuple[float, ...]

    def seconds(self, m: float, n: float, k: float, gpu: Gpu) -> float:
        """Seconds of an (m, k) by (k, n) product on a GPU with these public specifications."""
        bytes_per_s = gpu.hbm_bandwidth_bytes_per_s * self.bandwidth_ratio
        memory_s = 2 * (n * k + m * k + m * n) / bytes_per_s
        sm_flops = gpu.dense_bf16_flops / gpu.sms
        compute_s = math.inf
        for (rows, columns), ratio in zip(TILES, self.tile_ratio, strict=True):
            tiles = math.ceil(m / rows) * math.ceil(n / columns)
            inner_s = 2 * rows * columns / (sm_flops * ratio)
            for split in SPLITS:
                waves = tiles * split / gpu.sms
                waves += self.wave_ratio * (math.ceil(waves - 1e-9) - waves)
                tiled_s = max(waves, 1.0) * inner_s * (k / split + self.prologue)
                if split > 1:
                    tiled_s += self.split_s + 2 * split * m * n / bytes_per_s
                compute_s = min(compute_s, tiled_s)
        p = self.sharpness
        return float(self.launch_s + (compute_s**p + memory_s**p) ** (1 / p))


@dataclass(frozen=True, kw_only=True)
class AllReduceFit:
    """Latency and ring rate of an all-reduce between ``workers`` GPUs.

    Attributes:
        workers: GPUs that took part in the measurement.
        base_s: What the smallest message takes.
        bytes_per_s: Rate of one GPU's traffic, of 2 (n - 1) / n bytes a message byte.
    """

    workers: int
    base_s: float
    bytes_per_s: float

    def seconds(self, message_bytes: float, workers: int) -> float:
        """Seconds to sum a message of this size over ``workers`` GPUs."""
        traffic = 2 * (workers - 1) / workers * message_bytes
        return self.base_s + traffic / self.bytes_per_s


@dataclass(frozen=True, kw_only=True)
class KernelFit:
    """Everything fitted to the kernels of one measured GPU.

    Attributes:
        measured_on: The GPU that was measured, with its public specifications.
        gemm: Formula of matrix products.
        elementwise: Formula of each elementwise operator, by name.
        elementwise_corrections: What those formulas miss at each knot, as logarithms.
        knots_tokens: Token counts at which corrections are known.
        shapes: Measured products, as (n, k).
        weights: For each knot, the weight of each shape in the correction.
    """

    measured_on: Gpu
    gemm: GemmFit
    elementwise: Mapping[str, ElementwiseFit]
    elementwise_corrections: Mapping[str, tuple[float, ...]]
    knots_tokens: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    weights: tuple[tuple[float, ...], ...]
    _corrections: dict[tuple[int, int], tuple[float, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def gemm_s(self, tokens: float, n: int, k: int, gpu: Gpu) -> float:
        """Seconds of one product; the correction goes to GPUs with as many multiprocessors."""
        formula_s = self.gemm.seconds(tokens, n, k, gpu)
        if gpu.sms != self.measured_on.sms:
            return formula_s
        return formula_s * math.exp(self._correction(tokens, n, k))

    def elementwise_s(self, operator: str, tokens: float, columns: float, gpu: Gpu) -> float:
        """Seconds of one elementwise operator over ``tokens`` rows."""
        measured = self.measured_on.hbm_bandwidth_bytes_per_s
        formula_s = self.elementwise[operator].seconds(
            tokens, columns, gpu.hbm_bandwidth_bytes_per_s / measured
        )
        missed = interpolate(self.knots_tokens, self.elementwise_corrections[operator], tokens)
        return formula_s * math.exp(missed)

    def _correction(self, tokens: float, n: int, k: int) -> float:
        known = self._corrections.get((n, k))
        if known is None:
            known = tuple(self._correction_at(i, n, k) for i in range(len(self.knots_tokens)))
            self._corrections[n, k] = known
        return interpolate(self.knots_tokens, known, tokens)

    def _correction_at(self, knot: int, n: int, k: int) -> float:
        tokens, sms = self.knots_tokens[knot], self.measured_on.sms
        here = wave_fill(tokens, n, sms)
        return sum(
            weight * likeness((n, k), here, shape, wave_fill(tokens, shape[0], sms))
            for shape, weight in zip(self.shapes, self.weights[knot], strict=True)
        )


@lru_cache(maxsize=65536)
def wave_fill(tokens: int, n: int, sms: int) -> tuple[float, ...]:
    """Share of the waves' slots that hold a tile, for each of ``LIKENESS_TILES``."""
    fills = []
    for rows, columns in LIKENESS_TILES:
        waves = math.ceil(tokens / rows) * math.ceil(n / columns) / sms
        fills.append(waves / math.ceil(waves))
    return tuple(fills)


def likeness(
    shape: tuple[int, int],
    fill: Sequence[float],
    other: tuple[int, int],
    other_fill: Sequence[float],
) -> float:
    """How alike two products (n, k) over equally many tokens are: 1 is the same, 0 is not at all.

    >>> likeness((4096, 4096), (1.0,), (4096, 4096), (1.0,))
    1.0
    """
    octaves = sum(abs(math.log2(a / b)) for a, b in zip(shape, other, strict=True))
    fills = sum(abs(a - b) for a, b in zip(fill, other_fill, strict=True))
    return math.exp(-octaves / _SHAPE_OCTAVES - fills / _FILL_RATIO)


def interpolate(xs: Sequence[int], ys: Sequence[float], x: float) -> float:
    """Piecewise linear, constant past either end.

    >>> interpolate((1, 3), (10.0, 20.0), 2), interpolate((1, 3), (10.0, 20.0), 9)
    (15.0, 20.0)
    """
    if x <= xs[0]:
        return ys[0]
    if x >= xs[-1]:
        return ys[-1]
    i = bisect_right(xs, x)
    return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])


def kernel_fit(measured_on: Gpu, table: Mapping[str, Any], knots: Sequence[int]) -> KernelFit:
    """Build the fit of one measured GPU from its part of ``kernels.json``."""
    gemm = dict(table["gemm"])
    gemm["tile_ratio"] = tuple(gemm["tile_ratio"])
    shapes = [tuple(map(int, name.split("x"))) for name in table["weights_permille"]]
    columns = table["weights_permille"].values()
    return KernelFit(
        measured_on=measured_on,
        gemm=GemmFit(**gemm),
        elementwise={k: ElementwiseFit(**v) for k, v in table["elementwise"].items()},
        elementwise_corrections={
            operator: tuple(missed / 1000 for missed in row)
            for operator, row in table["elementwise_permille"].items()
        },
        knots_tokens=tuple(knots),
        shapes=tuple((n, k) for n, k in shapes),
        weights=tuple(tuple(w / 1000 for w in row) for row in zip(*columns, strict=True)),
    )


@lru_cache(maxsize=1)
def _shipped() -> dict[str, Any]:
    text = files("concertmaster.physics").joinpath("kernels.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


MEASURED: Mapping[str, str] = {"a40": "a40", "a100": "a100-80g", "h100": "h100"}
"""The measured GPUs, and which entry of ``GPUS`` each of them is."""


@lru_cache(maxsize=len(MEASURED))
def shipped_fit(measured_as: str) -> KernelFit:
    """Return the shipped fit of one of ``MEASURED``."""
    table = _shipped()
    gpu = GPUS[MEASURED[measured_as]]
    return kernel_fit(gpu, table["gpus"][measured_as], table["knots_tokens"])


@lru_cache(maxsize=256)
def all_reduce_fit(gpu: Gpu, workers: int) -> AllReduceFit:
    """Return the measured all-reduce that is nearest to this many of this GPU.

    GPUs on NVLink take the table of an A100 or H100 server. Those on PCIe take that of four A100
    in pairs, whose traffic crosses PCIe 4.0, at the rate of their own link.
    """
    tables = _shipped()["all_reduce"]
    key = f"{gpu.measured_as}_dgx" if gpu.interconnect == "nvlink" else "a100_pairwise_nvlink"
    counts = [4] if gpu.interconnect == "pcie" else sorted(map(int, tables[key]))
    nearest = min(counts, key=lambda count: (abs(count - workers), count))
    found = tables[key][str(nearest)]
    scale = 1.0
    if gpu.interconnect == "pcie":
        scale = gpu.pcie_bytes_per_s / GPUS["a100-80g"].pcie_bytes_per_s
    return AllReduceFit(
        workers=nearest, base_s=found["base_s"], bytes_per_s=found["bytes_per_s"] * scale
    )
