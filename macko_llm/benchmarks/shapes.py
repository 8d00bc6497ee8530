"""Models by name: their shapes without their weights."""

from typing import TYPE_CHECKING, Any

from macko_llm.errors import UsageError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SHAPES: dict[str, dict[str, Any]] = {
    "llama2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        # Llama 2 has 4096. Weights and speed do not depend on it, and a context of 4096 needs room for new tokens.
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
    },
    "llama2-70b": {
        "vocab_size": 32000,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "llama3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "tinyllama-1.1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
    },
    "tiny": {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    },
}
"""Arguments of LlamaConfig."""


def check_shape(name: str) -> None:
    """Raise UsageError unless there is a shape of that name."""
    if name not in SHAPES:
        raise UsageError(f"There is no shape {name!r}; use --config {', '.join(sorted(SHAPES))}, or a model's folder.")


def check_blocks(blocks: int | None, config: str | None) -> None:
    """Raise UsageError unless so many blocks of a shape tell what all of them would take."""
    if blocks is None:
        return
    if config is None:
        raise UsageError("Only a shape can do with fewer blocks; use --blocks with --config.")
    every = SHAPES[config]["num_hidden_layers"]
    if not 2 <= blocks <= every:  # a pruned block is run for the next one, so there must be two
        raise UsageError(f"{blocks} blocks do not tell what {every} would take; use --blocks from 2 to {every}.")


def shape_config(name: str) -> "PretrainedConfig":
    """The configuration of a named shape.

    Raises:
        UsageError: there is none of that name.
    """
    from transformers import LlamaConfig

    check_shape(name)
    return LlamaConfig(**SHAPES[name], tie_word_embeddings=False)
