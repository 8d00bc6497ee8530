"""Magnitude: the smallest weights go, whatever they are multiplied by."""

from typing import ClassVar

import torch
from torch import Tensor

from macko_llm.pruning.methods.base import Amount, remove_lowest
from macko_llm.pruning.scores import magnitude_scores


class Magnitude:
    """|W|."""

    needs_calibration: ClassVar[bool] = False

    def __init__(self, cols: int, device: torch.device) -> None:
        pass

    def observe(self, inputs: Tensor, sequences: int) -> None:
        """Nothing of it matters."""

    def prune(self, name: str, weight: Tensor, amount: Amount) -> Tensor:  # noqa: ARG002 - a Method
        """See `Method`."""
        return remove_lowest(weight, amount, magnitude_scores)
