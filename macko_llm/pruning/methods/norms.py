"""The norms of the inputs."""

import torch
from torch import Tensor

from macko_llm.pruning.methods.base import check_inputs
from macko_llm.pruning.scores import squared_norms


class InputNorms:
    """Observes the squared L2 norm of every input column."""

    def __init__(self, cols: int, device: torch.device) -> None:
        self._total = torch.zeros(cols, dtype=torch.float32, device=device)
        self._sequences = 0

    def observe(self, inputs: Tensor, sequences: int) -> None:
        """See `Observer`."""
        self._total += squared_norms(inputs)
        self._sequences += sequences

    def statistic(self, name: str) -> Tensor:
        """The mean over the sequences, fp32 [cols].

        Raises:
            NonFiniteError: NaN or infinity in the inputs; `name` is the layer's.
        """
        check_inputs(name, self._total)
        return self._total / max(1, self._sequences)
