from dataclasses import fields

import pytest

from concertmaster.core.errors import InputError
from concertmaster.physics.hardware import GPUS, READINESS, Gpu, gpu, ready_s
from concertmaster.physics.models import MODELS, ModelCard, model_card

PUBLISHED_PARAMETERS = {
    "qwen2.5-0.5b-instruct": 494_032_768,
    "qwen2.5-1.5b-instruct": 1_543_714_304,
    "qwen2.5-3b-instruct": 3_085_938_688,
    "qwen2.5-7b-instruct": 7_615_616_512,
    "qwen2.5-14b-instruct": 14_770_033_664,
    "qwen2.5-32b-instruct": 32_763_876_352,
    "qwen2.5-72b-instruct": 72_706_203_648,
    "llama-3.2-1b-instruct": 1_235_814_400,
    "llama-3.2-3b-instruct": 3_212_749_824,
    "llama-3-8b-instruct": 8_030_261_248,
    "llama-3-70b-instruct": 70_553_706_496,
    "llama-3.1-8b-instruct": 8_030_261_248,
    "llama-3.1-70b-instruct": 70_553_706_496,
    "mistral-7b-instruct": 7_241_732_096,
    "mixtral-8x7b-instruct": 46_702_792_704,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "codellama-34b-instruct": 33_743_970_304,
    "phi-3-mini-4k-instruct": 3_821_079_552,
    "qwen1.5-7b-chat": 7_721_324_544,
    "qwen1.5-72b-chat": 72_287_920_128,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "qwen3-4b-instruct-2507": 4_022_468_096,
    "qwen3-30b-a3b-instruct-2507": 30_532_122_624,
    "yi-6b": 6_061_035_520,
    "yi-34b": 34_388_917_248,
}


@pytest.mark.parametrize("card", MODELS.values(), ids=MODELS)
def test_parameters_agree_with_the_published_counts(card: ModelCard) -> None:
    assert card.parameters == pytest.approx(PUBLISHED_PARAMETERS[card.name], rel=0.02)
    assert card.weights_bytes == 2 * card.parameters


def test_a_token_passes_through_two_of_eight_experts() -> None:
    mixtral = MODELS["mixtral-8x7b-instruct"]
    assert mixtral.active_parameters == pytest.approx(12.9e9, rel=0.02)
    assert MODELS["llama-2-7b"].active_parameters == MODELS["llama-2-7b"].parameters


def test_grouped_heads_keep_less_in_the_cache() -> None:
    assert MODELS["llama-3.1-8b-instruct"].kv_bytes_per_token == 128 * 1024
    assert MODELS["llama-2-7b"].kv_bytes_per_token == 512 * 1024


@pytest.mark.parametrize("entry", GPUS.values(), ids=GPUS)
def test_every_constant_of_a_gpu_has_a_source(entry: Gpu) -> None:
    constants = {f.name for f in fields(Gpu)} - {"name", "measured_as", "sources"}
    assert set(entry.sources) == constants
    assert all(entry.sources.values())
    assert entry.name == entry.name.lower()


def test_names_are_found_whatever_the_case() -> None:
    assert gpu("A100-80G") is GPUS["a100-80g"]
    assert model_card("Qwen2.5-7B-Instruct") is MODELS["qwen2.5-7b-instruct"]


def test_an_unknown_gpu_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(InputError, match=r'unknown gpu "a100-80gb" \(did you mean "a100-80g"\?'):
        gpu("a100-80gb")


def test_an_unknown_model_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(InputError, match=r'did you mean "llama-3.1-8b-instruct"\?'):
        model_card("llama-3.1-8b-instrct")


def test_an_unknown_readiness_is_refused() -> None:
    with pytest.raises(InputError, match='unknown readiness "asleep"'):
        ready_s("asleep", 16e9, GPUS["h100"])


@pytest.mark.parametrize("entry", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("weights_bytes", [1e9, 140e9])
def test_farther_weights_take_longer(entry: Gpu, weights_bytes: float) -> None:
    waits_s = [ready_s(readiness, weights_bytes, entry) for readiness in READINESS]
    assert waits_s[0] == 0.0
    assert waits_s == sorted(waits_s)


def test_a_sleeping_engine_wakes_at_the_rate_of_its_host_link() -> None:
    slow, fast = (ready_s("sleeping", 16e9, GPUS[name]) for name in ("a100-80g", "h100"))
    assert slow == pytest.approx(0.3 + 16 / (31.5 * 0.8))
    assert fast == pytest.approx(0.3 + 16 / (63.0 * 0.8))
