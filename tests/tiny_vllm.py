"""A model that vLLM serves without weights: its shape, and a tokenizer of bytes."""

import json
from pathlib import Path

from tiny_gguf import CONTROLS, TEMPLATE, byte_tokens

CONTEXT_TOKENS = 512


def write_tiny_model(folder: Path, *, layers: int) -> Path:
    """Write what ``--load-format dummy`` needs; more layers make a slower model."""
    folder.mkdir(parents=True)
    tokens = [*CONTROLS, *byte_tokens()]
    _write(folder / "config.json", _shape(len(tokens), layers))
    _write(folder / "tokenizer.json", _tokenizer(tokens))
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "chat_template": TEMPLATE,
            "model_max_length": CONTEXT_TOKENS,
        },
    )
    return folder


def _write(path: Path, facts: object) -> None:
    path.write_text(json.dumps(facts))


def _shape(vocabulary: int, layers: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": vocabulary,
        "max_position_embeddings": CONTEXT_TOKENS,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }


def _tokenizer(tokens: list[str]) -> dict[str, object]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": at, "content": name, "special": True, **flags}
            for at, name in enumerate(CONTROLS)
        ],
        "normalizer": None,
        "pre_tokenizer": {**bytewise, "use_regex": True},
        "post_processor": None,
        "decoder": {**bytewise, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {name: at for at, name in enumerate(tokens)},
            "merges": [],
        },
    }
