"""Wanda (Sun et al., 2024, arXiv 2306.11695)."""

from typing import ClassVar

from torch import Tensor

from macko_llm.pruning.methods.base import Amount, remove_lowest
from macko_llm.pruning.methods.norms import InputNorms
from macko_llm.pruning.scores import wanda_scores


class Wanda(InputNorms):
    """|W| times the norm of its input."""

    needs_calibration: ClassVar[bool] = True

    def prune(self, name: str, weight: Tensor, amount: Amount) -> Tensor:
        """See `Method`."""
        statistic = self.statistic(name)
        return remove_lowest(weight, amount, lambda rows: wanda_scores(rows, statistic))
