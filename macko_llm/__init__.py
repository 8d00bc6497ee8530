"""macko: unstructured pruning of LLMs that pays.

`macko_llm.load(path)` gives a working transformers model, dense or packed, and importing this package is enough for
`AutoModelForCausalLM.from_pretrained` to read packed checkpoints. The import compiles nothing, downloads nothing and
touches no GPU.
"""

from __future__ import annotations

from macko_llm.import_hook import register_with_transformers
from macko_llm.version import __version__

TYPE_CHECKING = False  # see import_hook.py
if TYPE_CHECKING:
    from typing import Any

    from transformers import PreTrainedModel

__all__ = ["__version__", "load"]

register_with_transformers()


def load(path: str, **options: Any) -> PreTrainedModel:
    """Load a causal language model, dense or packed, ready for inference.

    Args:
        path: a folder or a hub id, with @ and a revision behind it where it is not the newest that is wanted.
        options: dtype, device, trust_remote_code, layout and tokens of `macko_llm.loading.load`.

    Raises:
        MackoError: one sentence that says what is wrong and how to mend it.
    """
    from macko_llm.loading import load

    return load(path, **options)
