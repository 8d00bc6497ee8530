"""The Gram matrix of the inputs."""

import torch
from torch import Tensor

from macko_llm.pruning.methods.base import check_inputs


class InputGram:
    """Observes the sum of x x^T over all tokens, in fp32 [cols, cols] on the device."""

    def __init__(self, cols: int, device: torch.device) -> None:
        self._total = torch.zeros(cols, cols, dtype=torch.float32, device=device)

    def observe(self, inputs: Tensor, sequences: int) -> None:  # noqa: ARG002 - an Observer
        """See `Observer`."""
        tokens = inputs.reshape(-1, inputs.shape[-1]).float()
        self._total.addmm_(tokens.T, tokens)

    def take_gram(self, name: str) -> Tensor:
        """The sum divided by the mean of its diagonal, as its scale changes no result; the observer has none afterwards.

        Returns:
            fp32 [cols, cols].

        Raises:
            NonFiniteError: NaN or infinity in the inputs; `name` is the layer's.
        """
        gram = self._total
        mean = gram.diagonal().mean()
        check_inputs(name, mean)  # what is not finite in an input is so in its square
        del self._total
        return gram.div_(torch.where(mean > 0, mean, 1.0))
