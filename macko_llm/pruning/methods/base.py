"""What a pruning method is, and what several of them do alike."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from macko_llm.errors import NonFiniteError
from macko_llm.pruning.scores import lowest, removed_per_row, select

# Scores are held for as many rows at once as have about this many weights (64 MiB of fp32).
WEIGHTS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Amount:
    """How much of a matrix goes.

    Attributes:
        sparsity: share of the weights, in [0, 1); not used with a group.
        group: (n, m) removes n of every m consecutive columns of each row; m must divide the columns.
    """

    sparsity: float
    group: tuple[int, int] | None = None


class Observer(Protocol):
    """Sees one of the distinct inputs of a block's linears: those that read the same tensors share an object."""

    def __init__(self, cols: int, device: torch.device) -> None: ...

    def observe(self, inputs: Tensor, sequences: int) -> None:
        """Take in calibration inputs.

        Args:
            inputs: [..., cols], floating point, with any leading shape.
            sequences: how many calibration sequences begin with these; 0 for more of one that was counted before.
        """


class Method(Observer, Protocol):
    """An observer that prunes, afterwards, the weights that are multiplied by what it saw."""

    needs_calibration: ClassVar[bool]

    def prune(self, name: str, weight: Tensor, amount: Amount) -> Tensor:
        """The weight without what matters least.

        Args:
            name: of the layer, for errors.
            weight: [rows, cols], floating point, finite.
            amount: how much goes.

        Returns:
            [rows, cols] of the same dtype; what was removed is +0.0, and so is every zero that was kept.

        Raises:
            NonFiniteError: NaN or infinity in the inputs, or a result that overflows the dtype.
            CalibrationError: the inputs are not enough for this method.
        """


def check_inputs(name: str, statistic: Tensor) -> None:
    """Raise NonFiniteError unless what was summed over the inputs of a layer is finite."""
    if not statistic.isfinite().all():
        raise NonFiniteError(
            f"The inputs of {name} hold NaN or infinity; use --dtype float32, or another checkpoint if that does not help."
        )


def remove_lowest(weight: Tensor, amount: Amount, scores: Callable[[Tensor], Tensor]) -> Tensor:
    """The weight [rows, cols] without the lowest scores of every row; ties go from the left.

    Args:
        weight: floating point.
        amount: how much goes.
        scores: some rows of the weight -> their scores, fp32 without NaN.
    """
    if removed_per_row(weight.shape[1], amount.sparsity, amount.group) == 0:
        return weight
    pieces = []
    for rows in weight.split(max(1, WEIGHTS_AT_ONCE // weight.shape[1])):
        # Weights of -0.0 that stay become +0.0: packing stores no zero, so only then does unpacking give the same bits.
        pieces.append(rows.masked_fill(select(scores(rows), amount.sparsity, amount.group) | (rows == 0), 0.0))
    return torch.cat(pieces)


def remove_lowest_overall(weight: Tensor, sparsity: float, scores: Callable[[Tensor], Tensor]) -> Tensor:
    """The weight [rows, cols] without its lowest scores, whatever the row; ties go from the first rows.

    As many go as if every row lost `removed_per_row`. Holds the scores of all weights at once.

    Args:
        weight: floating point.
        sparsity: share of the weights, in [0, 1).
        scores: some rows of the weight -> their scores, fp32 without NaN.
    """
    rows, cols = weight.shape
    count = rows * removed_per_row(cols, sparsity, None)
    if count == 0:
        return weight
    every = torch.cat([scores(piece) for piece in weight.split(max(1, WEIGHTS_AT_ONCE // cols))])
    return weight.masked_fill(lowest(every.reshape(1, -1), count).reshape(weight.shape) | (weight == 0), 0.0)


def rounded(name: str, values: Tensor, gone: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights that were computed anew, as they are stored.

    Args:
        name: of the layer, for errors.
        values: fp32 [rows, cols].
        gone: bool [rows, cols], what shall be zero.
        dtype: of the result.

    Raises:
        NonFiniteError: a weight overflows the dtype.
    """
    weight = values.to(dtype)
    if not weight.isfinite().all():
        raise NonFiniteError(
            f"The weights of {name} overflow {str(dtype).removeprefix('torch.')} when they make up for the removed ones; "
            "use --dtype bfloat16 or float32."
        )
    return weight.masked_fill_(gone | (weight == 0), 0.0)
