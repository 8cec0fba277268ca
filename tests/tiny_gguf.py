"""A llama of 0.1 M random weights over bytes, written as a GGUF file in a tenth of a second."""

from pathlib import Path

import gguf
import numpy as np

HIDDEN, LAYERS, HEADS, INNER = 64, 2, 1, 128
CONTEXT_TOKENS = 2048
CONTROLS = ("<s>", "</s>", "<pad>")
PRINTABLE = slice(len(CONTROLS), len(CONTROLS) + 94)
"""Rows of the output that may win: an answer is printable ASCII and never ends by itself."""
TEMPLATE = (
    "{% for m in messages %}<s>{{m['role']}}\n{{m['content']}}</s>\n{% endfor %}<s>assistant\n"
)


def byte_tokens() -> list[str]:
    """Every byte as the character that GPT-2's vocabulary writes it as, printable ASCII first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + at) for at in range(256 - len(printable))]


def write_tiny_gguf(path: Path, *, seed: int) -> Path:
    """Write a model; the seed gives its weights."""
    tokens = [*CONTROLS, *byte_tokens(), "th", "he"]
    out = gguf.GGUFWriter(path, "llama")
    out.add_name("tiny")
    out.add_context_length(CONTEXT_TOKENS)
    out.add_embedding_length(HIDDEN)
    out.add_block_count(LAYERS)
    out.add_feed_forward_length(INNER)
    out.add_head_count(HEADS)
    out.add_head_count_kv(HEADS)
    out.add_key_length(HIDDEN)
    out.add_value_length(HIDDEN)
    out.add_rope_dimension_count(HIDDEN)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_vocab_size(len(tokens))
    out.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    _add_tokenizer(out, tokens)
    _add_weights(out, len(tokens), seed)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def _add_tokenizer(out: gguf.GGUFWriter, tokens: list[str]) -> None:
    kinds = [gguf.TokenType.CONTROL if one in CONTROLS else gguf.TokenType.NORMAL for one in tokens]
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list(tokens)
    out.add_token_types(kinds)
    out.add_token_merges(["t h", "h e"])
    out.add_bos_token_id(0)
    out.add_eos_token_id(1)
    out.add_pad_token_id(2)
    out.add_add_bos_token(value=False)
    out.add_chat_template(TEMPLATE)


def _add_weights(out: gguf.GGUFWriter, vocabulary: int, seed: int) -> None:
    rng = np.random.default_rng(seed)

    def add(name: str, *shape: int) -> None:
        out.add_tensor(f"{name}.weight", (rng.standard_normal(shape) * 0.02).astype(np.float16))

    def add_norm(name: str) -> None:
        out.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))

    add("token_embd", vocabulary, HIDDEN)
    add_norm("output_norm")
    scores = np.zeros((vocabulary, HIDDEN), np.float16)
    scores[PRINTABLE] = rng.standard_normal((94, HIDDEN)) * 0.02
    out.add_tensor("output.weight", scores)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        add_norm(f"{block}.attn_norm")
        add_norm(f"{block}.ffn_norm")
        for part in ("q", "k", "v", "output"):
            add(f"{block}.attn_{part}", HIDDEN, HIDDEN)
        add(f"{block}.ffn_gate", INNER, HIDDEN)
        add(f"{block}.ffn_up", INNER, HIDDEN)
        add(f"{block}.ffn_down", HIDDEN, INNER)
