"""Packed checkpoints in vLLM (docs/serving.md).

`product.py` is a packed product as one op that a compiler does not look into; `parts.py` collects what one rank holds of a
layer; `quantization.py` is what vLLM knows of them, and the one module here that needs vLLM.
"""

from importlib import import_module


def register() -> None:
    """Teach vLLM the "macko" quantization method; vLLM calls it in each of its processes (an entry point in pyproject.toml)."""
    import_module("macko_llm.vllm_plugin.quantization")  # which registers as it is imported
