"""Every test in this folder needs vLLM (`make test-vllm`) and is skipped, saying so, where it is missing.

Without a GPU vLLM's own layers run on the CPU, also those of its CUDA build. A test that generates needs a GPU, or vLLM's CPU
build.
"""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The bundled model pruned to a half, dense and packed. One k_proj and one down_proj are left as they were."""
    from macko_llm.demo.run import MODEL_FOLDER
    from macko_llm.packing import pack_checkpoint
    from macko_llm.pruning import prune_checkpoint
    from macko_llm.recipe import PruneRecipe

    folder = tmp_path_factory.mktemp("vllm")
    untouched = {"layers.1.self_attn.k_proj": 0.0, "layers.2.mlp.down_proj": 0.0}
    recipe = PruneRecipe(method="magnitude", layers={f"*{name}": sparsity for name, sparsity in untouched.items()})
    prune_checkpoint(MODEL_FOLDER, folder / "pruned", recipe, device="cpu")
    pack_checkpoint(folder / "pruned", folder / "packed", device="cpu")
    return folder / "pruned", folder / "packed"
