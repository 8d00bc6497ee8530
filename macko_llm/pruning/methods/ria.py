"""RIA, relative importance and activations (Zhang et al., ICLR 2024, "Plug-and-Play"), without its channel permutation."""

from typing import ClassVar

from torch import Tensor

from macko_llm.pruning.methods.base import Amount, remove_lowest, remove_lowest_overall
from macko_llm.pruning.methods.norms import InputNorms
from macko_llm.pruning.scores import column_sums, ria_scores


class Ria(InputNorms):
    """What |W| is of its row and of its column, times the root of the norm of its input.

    Such scores can be compared between rows: unstructured, the lowest of the whole matrix go.
    """

    needs_calibration: ClassVar[bool] = True

    def prune(self, name: str, weight: Tensor, amount: Amount) -> Tensor:
        """See `Method`."""
        statistic, columns = self.statistic(name), column_sums(weight)

        def scores(rows: Tensor) -> Tensor:
            return ria_scores(rows, columns, statistic)

        if amount.group is None:
            return remove_lowest_overall(weight, amount.sparsity, scores)
        return remove_lowest(weight, amount, scores)
