"""How a model's sparsity is spread over its layers: by OWL (Yin et al., 2024, arXiv 2310.05175), or as a recipe says."""

import math
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from macko_llm.pruning.methods.base import WEIGHTS_AT_ONCE, Amount
from macko_llm.pruning.scores import removed_per_row, wanda_scores
from macko_llm.pruning.selection import Head, fits, fitting
from macko_llm.recipe import PruneRecipe

_OUTLIER = 5.0  # M: how many times the mean score of its block makes a weight an outlier
_SPREAD = 0.08  # lambda: half of what lies between the least and the most sparsity of a block


def outlier_ratio(weights: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The share of a block's Wanda scores that are above 5 times their mean.

    Args:
        weights: of each layer of the block, its weight [rows, cols] and the statistic of its inputs, fp32 [cols].
    """
    count = sum(weight.numel() for weight, _ in weights)
    mean = sum(scores.double().sum().item() for scores in _scores(weights)) / count
    return sum(int((scores > _OUTLIER * mean).sum()) for scores in _scores(weights)) / count


def _scores(weights: Iterable[tuple[Tensor, Tensor]]) -> Iterable[Tensor]:
    for weight, statistic in weights:
        for rows in weight.split(max(1, WEIGHTS_AT_ONCE // weight.shape[1])):
            yield wanda_scores(rows, statistic)


def block_sparsities(ratios: Sequence[float], sizes: Sequence[int], sparsity: float) -> list[float]:
    """The sparsity of each block: the more outliers, the less.

    They span 2 * 0.08, and their mean, weighted by size, is the target. Where that would leave [0, 1], they span less.

    Args:
        ratios: `outlier_ratio` of each block.
        sizes: weights in each.
        sparsity: the target, in [0, 1).
    """
    low, high = min(ratios), max(ratios)
    if low == high:
        return [sparsity] * len(ratios)
    kept = [2 * _SPREAD * ((ratio - low) / (high - low)) for ratio in ratios]
    mean = sum(size * more for size, more in zip(sizes, kept, strict=True)) / sum(sizes)
    offsets = [mean - more for more in kept]  # of the sparsity
    fit = min(1.0, sparsity / -min(offsets), (1 - sparsity) / max(offsets))
    return [min(1.0, max(0.0, sparsity + fit * offset)) for offset in offsets]


def layer_sparsities(
    shapes: Mapping[str, tuple[int, int]], wanted: Mapping[str, float], sparsity: float
) -> dict[str, float]:
    """The sparsity of each layer, near the one wanted, with which as many weights go as if all had the target.

    Rows lose whole numbers of weights, so layers are rounded, up where the most would be lost; what no layer can make up for
    is less than one weight in each row of the smallest.

    Args:
        shapes: of each layer, (rows, cols).
        wanted: the sparsity of each, in [0, 1].
        sparsity: the target, in [0, 1).
    """
    left = sum(rows * removed_per_row(cols, sparsity, None) for rows, cols in shapes.values())
    exact = {name: shapes[name][1] * share for name, share in wanted.items()}
    counts = {name: min(math.floor(columns), shapes[name][1] - 1) for name, columns in exact.items()}
    left -= sum(shapes[name][0] * count for name, count in counts.items())
    least = min(rows for rows, _ in shapes.values())
    while abs(left) >= least:
        step = 1 if left > 0 else -1
        able = [name for name, (rows, cols) in shapes.items() if rows <= abs(left) and 0 <= counts[name] + step < cols]
        if not able:
            break
        name = max(able, key=lambda name: step * (exact[name] - counts[name]))  # the first of equals
        counts[name] += step
        left -= step * shapes[name][0]
    return {name: _share(counts[name], shapes[name][1]) for name in shapes}


def overrides(names: Iterable[str], recipe: PruneRecipe, head: Head | None = None) -> dict[str, Amount]:
    """What the recipe's `layers` say of some of these layers; the others are not in it.

    Args:
        names: of all layers that are pruned.
        recipe: the settings.
        head: the lm_head, where it is one of them; of it only the patterns count that ask for it.

    Raises:
        UsageError: a pattern that fits none of the layers.
    """
    known = list(names)
    fitting([pattern for pattern, _ in recipe.layers], known, "layers")
    return {
        name: Amount(share)
        for pattern, share in recipe.layers
        for name in known
        if fits(pattern, name) and (head is None or name != head.name or pattern in head.patterns)
    }


def _share(count: int, cols: int) -> float:
    """The sparsity that takes this many of the columns, whatever the division rounds."""
    share = count / cols
    return share if int(cols * share) == count else math.nextafter(share, 1.0)
