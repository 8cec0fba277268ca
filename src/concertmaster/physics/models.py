"""The open models that the step-time model knows, by the shapes in their public configs."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from concertmaster.core.errors import unknown_name

BF16_BYTES = 2
"""Bytes of one weight or one KV entry."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """The shapes of one decoder-only model, dense or with experts.

    Attributes:
        name: Lower-case name, the key in ``MODELS``.
        heads: Query heads of one layer.
        kv_heads: Key-value heads of one layer.
        intermediate: Width of the MLP, of one expert where there are several.
        gated_mlp: Whether the MLP multiplies its activation with a second projection.
        tied_embeddings: Whether the language-model head reuses the token embedding.
        context_tokens: Longest sequence it was trained for.
        experts: MLPs of one layer; 1 in a dense model.
        active_experts: MLPs that one token passes through.
        source: Where the shapes come from.
        parallel_block: Whether attention and MLP share one norm and one residual, as in phi-2.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    gated_mlp: bool
    tied_embeddings: bool
    context_tokens: int
    experts: int = 1
    active_experts: int = 1
    source: str
    parallel_block: bool = False

    @property
    def parameters(self) -> int:
        """All weights, biases aside (below 0.1 % in the models that have them)."""
        return self._parameters(self.experts)

    @property
    def active_parameters(self) -> int:
        """Weights that one token passes through; all of them in a dense model."""
        return self._parameters(self.active_experts)

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights in bf16."""
        return self.parameters * BF16_BYTES

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token leaves in the cache, over all GPUs."""
        return 2 * self.layers * self.kv_heads * self.head_dim * BF16_BYTES

    def _parameters(self, experts: int) -> int:
        projections = 2 * self.heads + 2 * self.kv_heads
        attention = self.hidden * self.head_dim * projections
        mlp = (3 if self.gated_mlp else 2) * self.hidden * self.intermediate
        router = self.hidden * self.experts if self.experts > 1 else 0
        norms = self.hidden * (1 if self.parallel_block else 2)
        embeddings = self.vocab * self.hidden * (1 if self.tied_embeddings else 2)
        layer = attention + mlp * experts + router + norms
        return self.layers * layer + embeddings + self.hidden


def _card(
    name: str,
    repository: str,
    shapes: tuple[int, int, int, int, int, int, int],
    *,
    tied: bool = False,
    head_dim: int | None = None,
    experts: int = 1,
    active_experts: int = 1,
) -> ModelCard:
    """Build one entry; every model here has a gated MLP.

    Args:
        name: Key in ``MODELS``.
        repository: Where its config lies on huggingface.co.
        shapes: Layers, hidden, heads, KV heads, intermediate, vocabulary, context.
        tied: Whether the head reuses the embedding.
        head_dim: Width of a head; ``None`` shares ``hidden`` between the heads.
        experts: MLPs of one layer.
        active_experts: MLPs that one token passes through.
    """
    layers, hidden, heads, kv_heads, intermediate, vocab, context_tokens = shapes
    return ModelCard(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim or hidden // heads,
        intermediate=intermediate,
        vocab=vocab,
        gated_mlp=True,
        tied_embeddings=tied,
        context_tokens=context_tokens,
        experts=experts,
        active_experts=active_experts,
        source=f"huggingface.co/{repository} config.json",
    )


def _qwen25(
    size: str, shapes: tuple[int, int, int, int, int, int], *, tied: bool = False
) -> ModelCard:
    name, repository = f"qwen2.5-{size}-instruct", f"Qwen/Qwen2.5-{size.upper()}-Instruct"
    return _card(name, repository, (*shapes, 32768), tied=tied)


def _qwen3(
    size: str,
    shapes: tuple[int, int, int, int, int],
    *,
    tied: bool = False,
    context_tokens: int = 40960,
    experts: int = 1,
    active_experts: int = 1,
) -> ModelCard:
    return _card(
        f"qwen3-{size.lower()}",
        f"Qwen/Qwen3-{size}",
        (*shapes, 151936, context_tokens),
        tied=tied,
        head_dim=128,
        experts=experts,
        active_experts=active_experts,
    )


def _llama3(name: str, repository: str, context_tokens: int) -> ModelCard:
    layers, hidden, heads, inner = (80, 8192, 64, 28672) if "70b" in name else (32, 4096, 32, 14336)
    shapes = (layers, hidden, heads, 8, inner, 128256, context_tokens)
    return _card(name, f"meta-llama/{repository}", shapes)


_LLAMA_32 = "meta-llama/Llama-3.2"
_LONG = 131072

MODELS: Mapping[str, ModelCard] = MappingProxyType(
    {
        card.name: card
        for card in (
            _qwen25("0.5b", (24, 896, 14, 2, 4864, 151936), tied=True),
            _qwen25("1.5b", (28, 1536, 12, 2, 8960, 151936), tied=True),
            _qwen25("3b", (36, 2048, 16, 2, 11008, 151936), tied=True),
            _qwen25("7b", (28, 3584, 28, 4, 18944, 152064)),
            _qwen25("14b", (48, 5120, 40, 8, 13824, 152064)),
            _qwen25("32b", (64, 5120, 40, 8, 27648, 152064)),
            _qwen25("72b", (80, 8192, 64, 8, 29568, 152064)),
            _card(
                "llama-3.2-1b-instruct",
                f"{_LLAMA_32}-1B-Instruct",
                (16, 2048, 32, 8, 8192, 128256, _LONG),
                tied=True,
            ),
            _card(
                "llama-3.2-3b-instruct",
                f"{_LLAMA_32}-3B-Instruct",
                (28, 3072, 24, 8, 8192, 128256, _LONG),
                tied=True,
            ),
            _llama3("llama-3-8b-instruct", "Meta-Llama-3-8B-Instruct", 8192),
            _llama3("llama-3-70b-instruct", "Meta-Llama-3-70B-Instruct", 8192),
            _llama3("llama-3.1-8b-instruct", "Llama-3.1-8B-Instruct", _LONG),
            _llama3("llama-3.1-70b-instruct", "Llama-3.1-70B-Instruct", _LONG),
            _card(
                "mistral-7b-instruct",
                "mistralai/Mistral-7B-Instruct-v0.2",
                (32, 4096, 32, 8, 14336, 32000, 32768),
            ),
            _card(
                "mixtral-8x7b-instruct",
                "mistralai/Mixtral-8x7B-Instruct-v0.1",
                (32, 4096, 32, 8, 14336, 32000, 32768),
                experts=8,
                active_experts=2,
            ),
            _card(
                "llama-2-7b",
                "meta-llama/Llama-2-7b-hf",
                (32, 4096, 32, 32, 11008, 32000, 4096),
            ),
            _card(
                "llama-2-13b",
                "meta-llama/Llama-2-13b-hf",
                (40, 5120, 40, 40, 13824, 32000, 4096),
            ),
            _card(
                "llama-2-70b",
                "meta-llama/Llama-2-70b-hf",
                (80, 8192, 64, 8, 28672, 32000, 4096),
            ),
            _card(
                "codellama-34b-instruct",
                "codellama/CodeLlama-34b-Instruct-hf",
                (48, 8192, 64, 8, 22016, 32000, 16384),
            ),
            _card(
                "phi-3-mini-4k-instruct",
                "microsoft/Phi-3-mini-4k-instruct",
                (32, 3072, 32, 32, 8192, 32064, 4096),
            ),
            _card(
                "qwen1.5-7b-chat",
                "Qwen/Qwen1.5-7B-Chat",
                (32, 4096, 32, 32, 11008, 151936, 32768),
            ),
            _card(
                "qwen1.5-72b-chat",
                "Qwen/Qwen1.5-72B-Chat",
                (80, 8192, 64, 64, 24576, 152064, 32768),
            ),
            _qwen3("8B", (36, 4096, 32, 8, 12288)),
            _qwen3("32B", (64, 5120, 64, 8, 25600)),
            _qwen3(
                "4B-Instruct-2507", (36, 2560, 32, 8, 9728), tied=True, context_tokens=2 * _LONG
            ),
            _qwen3(
                "30B-A3B-Instruct-2507",
                (48, 2048, 32, 4, 768),
                context_tokens=2 * _LONG,
                experts=128,
                active_experts=8,
            ),
            _card("yi-6b", "01-ai/Yi-6B", (32, 4096, 32, 4, 11008, 64000, 4096)),
            _card("yi-34b", "01-ai/Yi-34B", (60, 7168, 56, 8, 20480, 64000, 4096)),
        )
    }
)
"""The models that are known, by lower-case name."""


def model_card(name: str) -> ModelCard:
    """Look a model up by name, whatever the case.

    >>> model_card("llama-3.1-8b-instruct").layers
    32
    """
    known = MODELS.get(name.lower())
    if known is None:
        raise unknown_name("", "", "model", name, MODELS)
    return known
