"""What pruning did."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from macko_llm.calibration import tokens_sha256
from macko_llm.recipe import PruneRecipe


@dataclass(frozen=True)
class PruneReport:
    """What pruning did.

    Attributes:
        method: the recipe's.
        pattern: "unstructured" or "n:m".
        sparsity: share of zeros over all pruned linears.
        layers: qualified name of each pruned linear -> its share of zeros.
        seconds: wall-clock time, from the first weight that is read to the last that is written; without loading and saving
            where the model is in memory as a whole.
        calibration_sha256: hash of the calibration tokens, None for a recipe that needs none.
        nsamples: calibration sequences, 0 for a recipe that needs none.
        seqlen: tokens in each of them.
    """

    method: str
    pattern: str
    sparsity: float
    layers: dict[str, float]
    seconds: float
    calibration_sha256: str | None
    nsamples: int
    seqlen: int


def make_report(
    recipe: PruneRecipe,
    tokens: torch.Tensor | None,
    shapes: Mapping[str, tuple[int, int]],
    zeros: Mapping[str, int],
    seconds: float,
) -> PruneReport:
    """The report on layers of these shapes, which have so many zeros now."""
    sizes = {name: rows * cols for name, (rows, cols) in shapes.items()}
    return PruneReport(
        method=recipe.method,
        pattern=recipe.pattern,
        sparsity=sum(zeros.values()) / sum(sizes.values()),
        layers={name: zeros[name] / size for name, size in sizes.items()},
        seconds=seconds,
        calibration_sha256=None if tokens is None else tokens_sha256(tokens),
        nsamples=0 if tokens is None else tokens.shape[0],
        seqlen=0 if tokens is None else tokens.shape[1],
    )
