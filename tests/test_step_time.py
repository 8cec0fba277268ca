from collections import defaultdict
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import pytest

from concertmaster.core.errors import InputError
from concertmaster.physics import kernels
from concertmaster.physics.hardware import GPUS
from concertmaster.physics.kernels import MEASURED, all_reduce_fit, shipped_fit
from concertmaster.physics.models import MODELS, ModelCard
from concertmaster.physics.step_time import (
    TAIL_TOKENS,
    all_reduce_s,
    kv_capacity_tokens,
    layer_linear_s,
    operators_s,
    rate_curve,
    touched_experts,
)

DATA = Path(__file__).parents[1].parent / "shared" / "data" / "gpu_profiles"

LAYER_COLUMNS = [
    "input_layernorm_ms",
    "attn_pre_proj_ms",
    "attn_rope_ms",
    "attn_post_proj_ms",
    "post_attention_layernorm_ms",
    "mlp_up_proj_ms",
    "mlp_act_ms",
    "mlp_down_proj_ms",
    "add_ms",
]

LLAMA_8B = MODELS["llama-3.1-8b-instruct"]
LLAMA_70B = MODELS["llama-3.1-70b-instruct"]
MIXTRAL = MODELS["mixtral-8x7b-instruct"]
A100 = GPUS["a100-80g"]
H100 = GPUS["h100"]


def measured_card(record: dict[str, Any]) -> ModelCard:
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
        source="measured",
        parallel_block=record["post_attention_layernorm_ms"] is None,
    )


@pytest.mark.skipif(not DATA.exists(), reason=f"measured kernels are not at {DATA}")
def test_layer_times_agree_with_the_measured_kernels() -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    for record in parquet.read_table(DATA / "linear_ops.parquet").to_pylist()[::7]:
        measured_s = sum(record[column] or 0.0 for column in LAYER_COLUMNS) / 1e3
        gpu = GPUS[MEASURED[record["gpu"]]]
        tensor_parallel, tokens = record["num_tensor_parallel_workers"], record["num_tokens"]
        predicted_s = layer_linear_s(measured_card(record), gpu, tensor_parallel, tokens)
        errors[record["gpu"], record["model"]].append(abs(predicted_s / measured_s - 1))
    assert len(errors) >= 18
    for pair, found in errors.items():
        assert median(found) <= 0.05, pair
        assert quantiles(found, n=20)[-1] <= 0.15, pair


@pytest.mark.parametrize(
    ("gpu", "model", "tensor_parallel", "tokens", "measured_ms"),
    [
        ("a100-80g", "llama-2-7b", 1, 1, 0.29),
        ("a100-80g", "llama-2-70b", 4, 64, 0.3355),
        ("a100-80g", "qwen1.5-72b-chat", 2, 512, 2.235),
        ("a100-80g", "codellama-34b-instruct", 1, 4096, 24.84),
        ("a40", "llama-2-7b", 1, 8, 0.755),
        ("a40", "llama-2-70b", 8, 256, 0.726),
        ("a40", "codellama-34b-instruct", 2, 2048, 13.69),
        ("h100", "llama-2-7b", 1, 32, 0.181),
        ("h100", "qwen1.5-72b-chat", 8, 1024, 0.439),
        ("h100", "codellama-34b-instruct", 4, 3072, 1.714),
    ],
)
def test_layer_times_agree_with_a_few_measured_rows(
    gpu: str, model: str, tensor_parallel: int, tokens: int, measured_ms: float
) -> None:
    predicted_s = layer_linear_s(MODELS[model], GPUS[gpu], tensor_parallel, tokens)
    assert 1e3 * predicted_s == pytest.approx(measured_ms, rel=0.1)


def test_decoding_8b_on_an_a100_takes_11_to_14_ms() -> None:
    assert 0.011 < rate_curve(LLAMA_8B, A100).step_s(1, 1000) < 0.014


def test_decoding_70b_on_four_h100_takes_20_to_30_ms() -> None:
    assert 0.020 < rate_curve(LLAMA_70B, H100, 4).step_s(1, 1000) < 0.030


@pytest.mark.parametrize("gpu", GPUS)
def test_more_tokens_never_take_less_time(gpu: str) -> None:
    curve = rate_curve(MODELS["qwen2.5-7b-instruct"], GPUS[gpu])
    assert list(curve.linear_s) == sorted(curve.linear_s)
    assert curve.linear_tokens[0] == 1
    assert curve.linear_tokens[-1] == TAIL_TOKENS[-1] == 32768


def test_a_curve_is_built_once() -> None:
    assert rate_curve(LLAMA_8B, A100) is rate_curve(LLAMA_8B, A100)


def test_decoding_gains_from_bandwidth_and_prefill_does_not() -> None:
    h100, h200 = rate_curve(LLAMA_8B, H100), rate_curve(LLAMA_8B, GPUS["h200"])
    assert h100.linear_at_s(1) / h200.linear_at_s(1) > 1.2
    assert h100.linear_at_s(8192) / h200.linear_at_s(8192) < 1.1
    assert h100.kv_token_s / h200.kv_token_s == pytest.approx(4800 / 3352)
    assert h100.prefill_pair_s == h200.prefill_pair_s


def test_gpus_share_the_work_of_a_layer_and_pay_for_the_sums() -> None:
    alone, shared = (layer_linear_s(LLAMA_70B, H100, n, 2048) for n in (1, 4))
    assert 3.0 < alone / shared < 4.0
    assert all_reduce_s(LLAMA_70B, H100, 1, 2048) == 0.0
    assert 1e-4 < all_reduce_s(LLAMA_70B, H100, 4, 2048) < 4e-4


def test_sums_over_pcie_cost_more_than_over_nvlink() -> None:
    message_bytes = 32 * 1024**2
    nvlink, pcie = (all_reduce_fit(GPUS[name], 4) for name in ("a100-80g", "a40"))
    assert pcie.seconds(message_bytes, 4) > 5 * nvlink.seconds(message_bytes, 4)


def test_gpus_beyond_the_kv_heads_hold_copies() -> None:
    two, eight, many = (rate_curve(LLAMA_70B, H100, n).kv_token_s for n in (2, 8, 16))
    assert two / eight == pytest.approx(4.0)
    assert many == eight


def test_a_batch_touches_more_experts_than_a_token() -> None:
    assert touched_experts(MIXTRAL, 1) == pytest.approx(2.0)
    assert 7.9 < touched_experts(MIXTRAL, 64) <= 8.0
    one, many = (rate_curve(MIXTRAL, H100, 2).linear_at_s(n) for n in (1, 64))
    assert 2.0 < many / one < 4.0
    assert "router" in operators_s(MIXTRAL, H100, 2, 1)


def test_a_parallel_block_has_one_norm() -> None:
    card = measured_card(
        {
            **dict.fromkeys(("n_head", "n_kv_head"), 32),
            "model": "phi-2",
            "n_embd": 2560,
            "n_expanded_embd": 10240,
            "vocab_size": 51200,
            "use_gated_mlp": False,
            "post_attention_layernorm_ms": None,
        }
    )
    assert operators_s(card, A100, 1, 64)["post_attention_norm"] == 0.0


def test_memory_left_by_the_weights_is_cache() -> None:
    one, two = (kv_capacity_tokens(LLAMA_8B, A100, n) for n in (1, 2))
    assert 430_000 < one < 450_000
    assert two > 2 * one


def test_weights_that_do_not_fit_are_refused_with_both_sizes() -> None:
    message = (
        "tensor_parallel: llama-3.1-70b-instruct on 1 x a100-80g needs 134.4 GiB on each GPU "
        "for weights and activations, 72.0 GiB are available "
        "(raise tensor_parallel or choose a larger GPU)"
    )
    with pytest.raises(InputError) as caught:
        kv_capacity_tokens(LLAMA_70B, A100, 1)
    assert str(caught.value) == message


@pytest.mark.parametrize("tensor_parallel", [0, 4])
def test_heads_that_cannot_be_shared_are_refused(tensor_parallel: int) -> None:
    with pytest.raises(InputError, match="14 heads, not divisible by"):
        rate_curve(MODELS["qwen2.5-0.5b-instruct"], H100, tensor_parallel)


def test_the_shipped_coefficients_are_small_and_whole() -> None:
    path = Path(kernels.__file__).with_name("kernels.json")
    assert path.stat().st_size < 200_000
    for name, gpu in MEASURED.items():
        fit = shipped_fit(name)
        assert fit.measured_on is GPUS[gpu]
        assert len(fit.weights) == len(fit.knots_tokens)
        assert all(len(row) == len(fit.shapes) for row in fit.weights)


def test_gpus_with_other_multiprocessors_take_no_correction() -> None:
    fit = shipped_fit("h100")
    plain_s = fit.gemm.seconds(128, 4096, 4096, GPUS["h20"])
    assert fit.gemm_s(128, 4096, 4096, GPUS["h20"]) == plain_s
    assert fit.gemm_s(128, 4096, 4096, H100) != fit.gemm.seconds(128, 4096, 4096, H100)
