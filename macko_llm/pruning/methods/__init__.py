"""Pruning methods: a file each, behind one protocol (`base.Method`)."""

from macko_llm.pruning.methods.base import Amount, Method, Observer
from macko_llm.pruning.methods.magnitude import Magnitude
from macko_llm.pruning.methods.sparsegpt import SparseGPT
from macko_llm.pruning.methods.wanda import Wanda

METHODS: dict[str, type[Method]] = {"wanda": Wanda, "magnitude": Magnitude, "sparsegpt": SparseGPT}
"""By the names of `recipe.METHODS`."""

__all__ = ["METHODS", "Amount", "Method", "Observer"]
