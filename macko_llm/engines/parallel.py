"""The engine of a model whose rest is in other processes."""

from torch import Tensor

from macko_llm.engines.eager import EagerEngine
from macko_llm.ranks import take_from_first


class ParallelEngine(EagerEngine):
    """The model's own forward; the first process chooses the tokens of all, whatever the last bits of their logits."""

    def _next(self, ids: Tensor) -> Tensor:
        return take_from_first(super()._next(ids))
