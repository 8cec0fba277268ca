"""Rate curves: how long one engine iteration takes, for a model on so many GPUs of one kind."""

from collections.abc import Sequence
from functools import lru_cache

from concertmaster.core.cost import RateCurve
from concertmaster.core.errors import InputError
from concertmaster.physics.hardware import Gpu
from concertmaster.physics.kernels import KernelFit, all_reduce_fit, shipped_fit
from concertmaster.physics.models import BF16_BYTES, ModelCard

CPU_S = 1.5e-3
"""CPU work between two iterations: scheduling, input preparation, sampling, output.

Assumed, not fitted. The vLLM V1 post (blog.vllm.ai, 2025-01-27) puts the GPU's share of a step at
about 5 ms for an 8B model on an H100, where single streams are served at 6 to 7 ms a token.
"""

ATTENTION_FLOOR_S = 5e-6
"""Least time of one layer's attention kernel: that of the smallest measured norm, 4 to 7 µs."""

SEQUENCE_S = 5e-6
"""Bookkeeping of one sequence in one iteration. Assumed: 256 sequences add about 1.3 ms."""

KV_BANDWIDTH_RATIO = 0.75
"""Share of the peak memory bandwidth at which decoding reads the KV cache.

Assumed, a little below the 0.77 to 0.93 fitted to matrix products, since pages are scattered.
"""

PREFILL_FLOPS_RATIO = 0.55
"""Share of the peak throughput of prefill attention.

Source: FlashAttention-2 (arXiv 2307.08691), causal forward with heads of 128 on an A100: 170 to
190 of 312 TFLOP/s at 2k to 16k tokens.
"""

HEAD_TOKENS = 256
"""Most rows of the language-model head: engines compute logits only where a token is sampled.

Equals the default cap on running sequences in vLLM, ``max_num_seqs``.
"""

RESERVE_BYTES = 3 * 1024**3
"""Memory of one GPU kept for activations and the runtime.

Source: vLLM pull request 11743, profile of an 80 GB GPU: 2.95 GiB of activations at most.
"""

TAIL_TOKENS = (6144, 8192, 12288, 16384, 24576, 32768)
"""Breakpoints of a curve beyond the measured token counts."""

_GIB = 1024**3


def gemm_shapes(model: ModelCard, tensor_parallel: int) -> dict[str, tuple[int, int]]:
    """Output and inner width (n, k) of one layer's matrix products on one GPU, by name.

    >>> from concertmaster.physics.models import model_card
    >>> gemm_shapes(model_card("llama-3.1-8b-instruct"), 2)["qkv"]
    (3072, 4096)
    """
    query = model.heads // tensor_parallel * model.head_dim
    key_value = max(1, model.kv_heads // tensor_parallel) * model.head_dim
    inner = model.intermediate // tensor_parallel
    return {
        "qkv": (query + 2 * key_value, model.hidden),
        "attention_output": (model.hidden, query),
        "mlp_up": ((2 if model.gated_mlp else 1) * inner, model.hidden),
        "mlp_down": (model.hidden, inner),
    }


def elementwise_columns(model: ModelCard, tensor_parallel: int) -> dict[str, float]:
    """Elements of one token that each elementwise operator goes through on one GPU.

    Those of ``act`` count a gated MLP, which reads two and writes one, as 1; those of ``add``
    count one residual, of which a parallel block has two.
    """
    shapes = gemm_shapes(model, tensor_parallel)
    query = shapes["attention_output"][1]
    inner = shapes["mlp_down"][1] * model.active_experts
    return {
        "norm": model.hidden,
        "rope": query + (shapes["qkv"][0] - query) / 2,
        "act": inner if model.gated_mlp else inner * 2 / 3,
        "add": model.hidden * (2 if model.parallel_block else 1),
        "embedding": model.hidden,
    }


def operators_s(
    model: ModelCard, gpu: Gpu, tensor_parallel: int, tokens: int, fit: KernelFit | None = None
) -> dict[str, float]:
    """Seconds of each linear operator of one layer over ``tokens`` tokens, by name.

    Args:
        model: Whose layer.
        gpu: Where it runs.
        tensor_parallel: GPUs that share the layer; the all-reduces are not in here.
        tokens: Rows of the batch, at least 1.
        fit: Coefficients to use in place of the shipped ones.
    """
    used = fit or shipped_fit(gpu.measured_as)
    shapes = gemm_shapes(model, tensor_parallel)
    columns = elementwise_columns(model, tensor_parallel)
    norm_s = used.elementwise_s("norm", tokens, columns["norm"], gpu)
    return {
        "input_norm": norm_s,
        "qkv": used.gemm_s(tokens, *shapes["qkv"], gpu),
        "rope": used.elementwise_s("rope", tokens, columns["rope"], gpu),
        "attention_output": used.gemm_s(tokens, *shapes["attention_output"], gpu),
        "post_attention_norm": 0.0 if model.parallel_block else norm_s,
        "mlp_act": used.elementwise_s("act", tokens, columns["act"], gpu),
        **_mlp_s(model, gpu, tokens, shapes, used),
        "add": used.elementwise_s("add", tokens, columns["add"], gpu),
    }


def _mlp_s(
    model: ModelCard, gpu: Gpu, tokens: int, shapes: dict[str, tuple[int, int]], fit: KernelFit
) -> dict[str, float]:
    (up, hidden), (_, inner) = shapes["mlp_up"], shapes["mlp_down"]
    chosen = tokens * model.active_experts
    if model.experts == 1:
        up_s = fit.gemm_s(tokens, up, hidden, gpu)
        down_s = fit.gemm_s(tokens, hidden, inner, gpu)
        return {"mlp_up": up_s, "mlp_down": down_s}
    touched = touched_experts(model, tokens)
    rows = max(1.0, chosen / touched)
    return {
        "router": fit.gemm.seconds(tokens, model.experts, hidden, gpu),
        "mlp_up": fit.gemm.seconds(rows, up * touched, hidden, gpu),
        "mlp_down": fit.gemm.seconds(rows, hidden * touched, inner, gpu),
    }


def touched_experts(model: ModelCard, tokens: int) -> float:
    """How many experts of a layer a batch reads, if each token chooses evenly and on its own.

    >>> from concertmaster.physics.models import model_card
    >>> touched_experts(model_card("mixtral-8x7b-instruct"), 1)
    2.0
    """
    missed_ratio = (1 - model.active_experts / model.experts) ** tokens
    return model.experts * (1 - missed_ratio)


def layer_linear_s(
    model: ModelCard, gpu: Gpu, tensor_parallel: int, tokens: int, fit: KernelFit | None = None
) -> float:
    """Seconds of all linear operators of one layer, all-reduces and attention apart."""
    return sum(operators_s(model, gpu, tensor_parallel, tokens, fit).values())


def all_reduce_s(model: ModelCard, gpu: Gpu, tensor_parallel: int, tokens: int) -> float:
    """Seconds to sum one layer's partial results over the GPUs, once; a layer does it twice."""
    if tensor_parallel == 1:
        return 0.0
    message_bytes = tokens * model.hidden * BF16_BYTES
    return all_reduce_fit(gpu, tensor_parallel).seconds(message_bytes, tensor_parallel)


def ends_s(model: ModelCard, gpu: Gpu, tensor_parallel: int, tokens: int) -> float:
    """Seconds of the embedding and the language-model head, once an iteration."""
    fit = shipped_fit(gpu.measured_as)
    embedding_s = fit.elementwise_s("embedding", tokens, model.hidden, gpu)
    vocab = -(-model.vocab // tensor_parallel)
    return embedding_s + fit.gemm_s(min(tokens, HEAD_TOKENS), vocab, model.hidden, gpu)


def iteration_linear_s(model: ModelCard, gpu: Gpu, tensor_parallel: int, tokens: int) -> float:
    """Seconds of everything in one iteration that depends on the tokens alone."""
    layer_s = layer_linear_s(model, gpu, tensor_parallel, tokens)
    layer_s += 2 * all_reduce_s(model, gpu, tensor_parallel, tokens)
    return model.layers * layer_s + ends_s(model, gpu, tensor_parallel, tokens)


def non_decreasing(seconds: Sequence[float]) -> list[float]:
    """Level out drops, so that more tokens never take less time; the mean stays the same.

    Measured products do drop, by up to 13 %, where the library changes its tiling; a scheduler
    must not be rewarded for sending more.

    >>> non_decreasing([1.0, 3.0, 2.0, 4.0])
    [1.0, 2.5, 2.5, 4.0]
    """
    levels: list[tuple[float, int]] = []
    for value in seconds:
        total, count = value, 1
        while levels and levels[-1][0] / levels[-1][1] > total / count:
            before, many = levels.pop()
            total, count = total + before, count + many
        levels.append((total, count))
    return [total / count for total, count in levels for _ in range(count)]


@lru_cache(maxsize=256)
def rate_curve(model: ModelCard, gpu: Gpu, tensor_parallel: int = 1) -> RateCurve:
    """How long iterations of this model take on this many GPUs of this kind.

    Raises:
        InputError: The model's heads or MLP cannot be shared evenly between the GPUs.

    >>> from concertmaster.physics.hardware import GPUS
    >>> from concertmaster.physics.models import MODELS
    >>> curve = rate_curve(MODELS["llama-3.1-8b-instruct"], GPUS["a100-80g"])
    >>> 0.011 < curve.step_s(1, 1000) < 0.014
    True
    """
    _check_split(model, tensor_parallel)
    tokens = shipped_fit(gpu.measured_as).knots_tokens + TAIL_TOKENS
    linear_s = [iteration_linear_s(model, gpu, tensor_parallel, n) for n in tokens]
    flops = gpu.dense_bf16_flops * PREFILL_FLOPS_RATIO * tensor_parallel
    pair_flops = 4 * model.layers * model.heads * model.head_dim
    return RateCurve(
        fixed_s=CPU_S + model.layers * ATTENTION_FLOOR_S,
        linear_tokens=tokens,
        linear_s=tuple(non_decreasing(linear_s)),
        sequence_s=SEQUENCE_S,
        kv_token_s=_kv_bytes_per_token(model, tensor_parallel)
        / (gpu.hbm_bandwidth_bytes_per_s * KV_BANDWIDTH_RATIO),
        prefill_pair_s=pair_flops / flops,
    )


def _check_split(model: ModelCard, tensor_parallel: int) -> None:
    widths = {"heads": model.heads, "MLP columns": model.intermediate}
    for what, count in widths.items():
        if tensor_parallel < 1 or count % tensor_parallel:
            problem = f"{model.name} has {count} {what}, not divisible by {tensor_parallel}"
            raise InputError("", "tensor_parallel", problem, "choose a divisor of both")


def _kv_bytes_per_token(model: ModelCard, tensor_parallel: int) -> float:
    """Bytes on one GPU: past one KV head each, GPUs hold copies."""
    return model.kv_bytes_per_token / min(tensor_parallel, model.kv_heads)


def kv_capacity_tokens(
    model: ModelCard,
    gpu: Gpu,
    tensor_parallel: int,
    memory_ratio: float = 0.9,
    reserve_bytes: int = RESERVE_BYTES,
) -> int:
    """How many tokens of KV cache fit beside the weights.

    Args:
        model: Whose weights and KV entries.
        gpu: Whose memory.
        tensor_parallel: GPUs that share weights and cache.
        memory_ratio: Share of each GPU's memory that the engine may use.
        reserve_bytes: Kept on each GPU for activations and the runtime.

    Raises:
        InputError: The weights do not fit.

    >>> from concertmaster.physics.hardware import GPUS
    >>> from concertmaster.physics.models import MODELS
    >>> kv_capacity_tokens(MODELS["llama-3.1-8b-instruct"], GPUS["a100-80g"], 1)
    442715
    """
    available = gpu.hbm_bytes * memory_ratio
    needed = model.weights_bytes / tensor_parallel + reserve_bytes
    if needed >= available:
        problem = (
            f"{model.name} on {tensor_parallel} x {gpu.name} needs {needed / _GIB:.1f} GiB on each "
            f"GPU for weights and activations, {available / _GIB:.1f} GiB are available"
        )
        hint = "raise tensor_parallel or choose a larger GPU"
        raise InputError("", "tensor_parallel", problem, hint)
    return int((available - needed) / _kv_bytes_per_token(model, tensor_parallel))
