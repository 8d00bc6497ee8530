"""Tiny models that are pruned and packed, and how two checkpoints are compared, for the tests of packing."""

from pathlib import Path

import torch
from families import save_model
from torch import Tensor

import macko_llm
from macko_llm.packing import pack_checkpoint
from macko_llm.pruning import prune_checkpoint
from macko_llm.recipe import PruneRecipe

UP = "model.layers.0.mlp.up_proj"


def prune(source: Path, target: Path, sparsity: float = 0.5) -> Path:
    """A copy of a checkpoint with the smallest weights gone."""
    prune_checkpoint(source, target, PruneRecipe(method="magnitude", sparsity=sparsity), device="cpu")
    return target


def pruned_family(folder: Path, family: str, dtype: torch.dtype) -> Path:
    """A tiny model of a family, in `folder`/dense, and pruned in the folder that is returned."""
    return prune(save_model(folder / "dense", family, dtype), folder / "pruned")


def packed_llama(folder: Path) -> Path:
    """The folder, with a tiny Llama in float16 in it: dense, pruned and packed."""
    pack_checkpoint(pruned_family(folder, "llama", torch.float16), folder / "packed")
    return folder


@torch.no_grad()
def logits(folder: Path, tokens: Tensor, dtype: str = "auto") -> Tensor:
    """What a checkpoint makes of tokens, on the CPU."""
    return macko_llm.load(folder, dtype=dtype, device="cpu")(tokens).logits


def bits(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, bytes]]:
    """Tensors by name, as what can be compared bit for bit."""
    return {name: (tensor.dtype, tensor.view(torch.uint8).numpy().tobytes()) for name, tensor in tensors.items()}


def names(folder: Path) -> list[str]:
    """The names of what lies in a folder."""
    return sorted(path.name for path in folder.iterdir())


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """The files of a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
