"""Weights that learn while their zeros stay where they are."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


class KeptZeros:
    """The zeros of some weights, which no step of an optimizer brings back while this is in use as a context.

    Gradients are masked as they arrive, so that neither their norm nor an optimizer's moments know of weights that are gone;
    `restore`, after each step, makes sure of those, whatever the optimizer has done.

    Args:
        weights: parameters that require gradients, each once, any shape and dtype; what is zero in them now is kept.
    """

    def __init__(self, weights: Iterable[nn.Parameter]) -> None:
        self._weights = [(weight, weight.detach() == 0) for weight in weights]

    def __enter__(self) -> "KeptZeros":
        self._hooks = [weight.register_hook(_masked(zeros)) for weight, zeros in self._weights]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def restore(self) -> None:
        """Make every weight that is gone zero again, and not -0."""
        for weight, zeros in self._weights:
            weight.masked_fill_(zeros, 0)


def _masked(zeros: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient.masked_fill(zeros, 0)
