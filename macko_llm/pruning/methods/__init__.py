"""Pruning methods: a file each, behind one protocol (`base.Method`)."""

from collections.abc import Callable
from functools import partial

import torch

from macko_llm.pruning.methods.admm import Admm
from macko_llm.pruning.methods.base import Amount, Method, Observer
from macko_llm.pruning.methods.magnitude import Magnitude
from macko_llm.pruning.methods.ria import Ria
from macko_llm.pruning.methods.sparsegpt import SparseGPT
from macko_llm.pruning.methods.wanda import Wanda
from macko_llm.recipe import NO_UPDATE

METHODS: dict[str, type[Method]] = {"wanda": Wanda, "magnitude": Magnitude, "ria": Ria, "sparsegpt": SparseGPT}
"""By the names of `recipe.METHODS`."""
UPDATES = {"admm": Admm}
"""What re-fits the weights that a method keeps, by the names of `recipe.UPDATES`."""

__all__ = ["METHODS", "UPDATES", "Amount", "Method", "Observer", "method_maker"]


def method_maker(method: str, update: str) -> Callable[[int, torch.device], Method]:
    """(cols, device) -> a method of this name, with this update of what it keeps."""
    return METHODS[method] if update == NO_UPDATE else partial(UPDATES[update], METHODS[method])
