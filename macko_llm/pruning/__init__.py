"""Pruning: which weights matter least (`scores`), and taking them out of a model (`pipeline`)."""

from macko_llm.pruning.pipeline import PrunePlan, plan, prune_checkpoint, prune_model
from macko_llm.pruning.report import PruneReport

__all__ = ["PrunePlan", "PruneReport", "plan", "prune_checkpoint", "prune_model"]
