"""SparseGPT (Frantar and Alistarh, 2023, arXiv 2301.00774): kept weights make up for the removed ones to their left."""

from typing import ClassVar

import torch
from torch import Tensor

from macko_llm.errors import CalibrationError
from macko_llm.pruning.methods.base import Amount, rounded
from macko_llm.pruning.methods.gram import InputGram
from macko_llm.pruning.scores import lowest, removed_per_row

_BLOCK = 128  # columns whose weights are chosen together, and whose errors the columns after them make up for at once
_DAMPING = 0.01  # of the mean of the Hessian's diagonal
_ATTEMPTS = 4  # to factorise it, each with ten times the damping


class SparseGPT(InputGram):
    """Goes through the columns; the error of each that loses weights is spread over those to its right.

    Unstructured, as many weights go as if every row lost `removed_per_row`: every 128 columns lose their share of them,
    wherever in these columns they lie, so that rows differ.
    Holds the weight in fp32, and a few [cols, cols] matrices.
    """

    needs_calibration: ClassVar[bool] = True

    def __init__(self, cols: int, device: torch.device) -> None:
        super().__init__(cols, device)
        self._prepared: tuple[Tensor, Tensor] | None = None

    def prune(self, name: str, weight: Tensor, amount: Amount) -> Tensor:
        """See `Method`."""
        rows, cols = weight.shape
        total = rows * removed_per_row(cols, amount.sparsity, amount.group)
        if total == 0:
            return weight
        factor, dead = self._factor(name)
        values = weight.to(torch.float32, copy=True)
        gone = torch.zeros_like(values, dtype=torch.bool)
        m = 1 if amount.group is None else amount.group[1]
        size = m * max(1, _BLOCK // m)
        for start in range(0, cols, size):
            here = slice(start, min(start + size, cols))
            count = total * here.stop // cols - total * start // cols
            errors = _prune_columns(values[:, here], gone[:, here], factor[here, here], dead[here], count, amount.group)
            values[:, here.stop :].addmm_(errors, factor[here, here.stop :], alpha=-1)
        return rounded(name, values, gone, weight.dtype)

    def _factor(self, name: str) -> tuple[Tensor, Tensor]:
        """The factor of the inverse Hessian, and which columns no input reaches; the same for all weights."""
        if self._prepared is None:
            hessian = self.take_gram(name)
            dead = hessian.diagonal() == 0
            damping = _DAMPING * hessian.diagonal().mean()
            hessian.diagonal()[dead] = 1
            self._prepared = _inverse_factor(name, hessian, damping), dead
        return self._prepared


def _inverse_factor(name: str, hessian: Tensor, damping: Tensor) -> Tensor:
    """Upper triangular U [cols, cols], where U^T U is the inverse of the damped Hessian.

    Row j of U over its diagonal entry says how the columns after j make up for column j once those before it are settled.
    """
    for attempt in range(_ATTEMPTS):
        damped = hessian.clone()
        damped.diagonal().add_(damping * 10**attempt)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and upper.isfinite().all():
                return upper
    raise CalibrationError(
        f"The inputs of {name} are too much alike to tell what makes up for what; calibrate with more text, or use wanda."
    )


def _prune_columns(
    values: Tensor, gone: Tensor, factor: Tensor, dead: Tensor, count: int, group: tuple[int, int] | None
) -> Tensor:
    """Prune and settle some columns in place, and mark what went.

    Args:
        values: fp32 [rows, some].
        gone: bool [rows, some], all false.
        factor: their part of `_inverse_factor`.
        dead: bool [some]; such columns go first, and nothing has to make up for them.
        count: how many weights go; not used with a group.
        group: (n, m), n of every m columns of each row go.

    Returns:
        fp32 [rows, some], the errors that the columns after these have to make up for.
    """
    scale = factor.diagonal()
    if group is None:
        scores = (values / scale).square().masked_fill(dead, 0.0)
        gone.copy_(lowest(scores.reshape(1, -1), count).reshape(scores.shape))
    errors = torch.zeros_like(values)
    for column in range(values.shape[1]):
        if group is not None and column % group[1] == 0:  # as late as possible: what came before changed these weights
            here = slice(column, column + group[1])
            scores = (values[:, here] / scale[here]).square().masked_fill(dead[here], 0.0)
            gone[:, here] = lowest(scores, group[0])
        errors[:, column] = (values[:, column] / scale[column]).masked_fill(~gone[:, column], 0.0)
        values[:, column:].addr_(errors[:, column], factor[column, column:], alpha=-1)
    return errors
