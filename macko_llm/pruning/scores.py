"""The maths of pruning: how much each weight matters, and which ones go. Pure functions of tensors."""

import torch

_LONG = 1 << 17
"""Scores in a row, from which on a GPU sorts all of them faster than it finds one, as few of its cores work on a row then."""


def squared_norms(inputs: torch.Tensor) -> torch.Tensor:
    """Squared L2 norm of every input column over all tokens.

    Args:
        inputs: [..., cols], floating point, with any leading shape.

    Returns:
        fp32 [cols].
    """
    return inputs.reshape(-1, inputs.shape[-1]).float().square().sum(dim=0)


def wanda_scores(weight: torch.Tensor, statistic: torch.Tensor) -> torch.Tensor:
    """|W| * sqrt(statistic): Wanda (Sun et al., 2024, arXiv 2306.11695, equation 1).

    Args:
        weight: [rows, cols], floating point.
        statistic: fp32 [cols], mean over the calibration sequences of `squared_norms`.

    Returns:
        fp32 [rows, cols], never negative.
    """
    return weight.float().abs() * statistic.sqrt()


def magnitude_scores(weight: torch.Tensor) -> torch.Tensor:
    """|W| as fp32 [rows, cols]."""
    return weight.float().abs()


def column_sums(weight: torch.Tensor) -> torch.Tensor:
    """Sums of |W| [rows, cols] over the rows, fp32 [cols]."""
    return weight.abs().sum(dim=0, dtype=torch.float32)


def ria_scores(weight: torch.Tensor, columns: torch.Tensor, statistic: torch.Tensor) -> torch.Tensor:
    """(|W| / column sum + |W| / row sum) * norm^0.5: RIA with alpha = 0.5 (Zhang et al., ICLR 2024).

    Args:
        weight: [rows, cols], floating point; any rows of a matrix.
        columns: fp32 [cols], `column_sums` of the whole matrix.
        statistic: fp32 [cols], mean over the calibration sequences of `squared_norms`.

    Returns:
        fp32 [rows, cols], never negative; 0 where a weight is, even if nothing else in its row or column is not.
    """
    magnitudes = weight.float().abs()
    rows = magnitudes.sum(dim=1, keepdim=True)
    tiny = torch.finfo(torch.float32).tiny
    relative = magnitudes / columns.clamp_min(tiny) + magnitudes / rows.clamp_min(tiny)
    return relative * statistic.sqrt().sqrt()


def removed_per_row(cols: int, sparsity: float, group: tuple[int, int] | None) -> int:
    """How many columns of each output row go: `int(cols * sparsity)`, or n of every m for a group (n, m) that divides cols."""
    if group is None:
        return int(cols * sparsity)
    n, m = group
    return cols // m * n


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Marks the `count` lowest scores along the last dimension; of equal scores those at lower indices.

    Args:
        scores: [..., size] without NaN.
        count: in [0, size].

    Returns:
        bool, the shape of `scores`, with exactly `count` true in every row.
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # The k-th smallest value as a threshold: the result of a stable sort, at a third of its time and memory.
    if scores.is_cuda and scores.shape[-1] > _LONG:
        threshold = scores.sort(dim=-1).values[..., count - 1 : count]
    else:
        threshold = scores.kthvalue(count, dim=-1, keepdim=True).values
    below = scores < threshold
    ties = scores == threshold
    room = count - below.sum(dim=-1, keepdim=True)
    return below | (ties & (ties.cumsum(dim=-1, dtype=torch.int32) <= room))


def select(scores: torch.Tensor, sparsity: float, group: tuple[int, int] | None) -> torch.Tensor:
    """The weights to remove.

    Args:
        scores: [rows, cols] without NaN.
        sparsity: share to remove of every row, in [0, 1); not used with a group.
        group: (n, m) removes the n lowest of every m consecutive columns; m must divide cols.

    Returns:
        bool [rows, cols].
    """
    rows, cols = scores.shape
    if group is None:
        return lowest(scores, removed_per_row(cols, sparsity, None))
    n, m = group
    return lowest(scores.reshape(rows, cols // m, m), n).reshape(rows, cols)
