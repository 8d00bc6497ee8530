"""Re-fitting what a method keeps, after Boža, 2024, "Fast and Effective Weight Update for Pruned LLMs" (arXiv 2401.02938)."""

from typing import ClassVar

import torch
from torch import Tensor

from macko_llm.pruning.methods.base import WEIGHTS_AT_ONCE, Amount, Method, rounded
from macko_llm.pruning.methods.gram import InputGram

_DAMPING = 0.01  # pulls towards the dense weights where inputs say nothing; of the norms' squares
_PENALTY = 1.0  # rho, as in the paper: with the inputs scaled to norm 1 it needs no tuning
_STEPS = 20


class Admm(InputGram):
    """Lets another method choose, and gives the kept weights the values with which the layer's output changes least.

    With X the inputs and W the dense weights, ADMM minimises |X W^T - X What^T| over all What with the other method's zeros.
    """

    needs_calibration: ClassVar[bool] = True

    def __init__(self, inner: type[Method], cols: int, device: torch.device) -> None:
        super().__init__(cols, device)
        self._inner = inner(cols, device)
        self._prepared: tuple[Tensor, Tensor, Tensor] | None = None

    def observe(self, inputs: Tensor, sequences: int) -> None:
        """See `Observer`."""
        super().observe(inputs, sequences)
        self._inner.observe(inputs, sequences)

    def prune(self, name: str, weight: Tensor, amount: Amount) -> Tensor:
        """See `Method`."""
        start = self._inner.prune(name, weight, amount)
        if torch.equal(start, weight):  # nothing went, so there is nothing to make up for
            return start
        at_once = max(1, WEIGHTS_AT_ONCE // weight.shape[1])
        pieces = [
            rounded(name, self._fit(name, dense.float(), pruned.float()), pruned == 0, weight.dtype)
            for dense, pruned in zip(weight.split(at_once), start.split(at_once), strict=True)
        ]
        return torch.cat(pieces)

    def _fit(self, name: str, dense: Tensor, start: Tensor) -> Tensor:
        """Fp32 [some rows, cols] with the zeros of `start`, from which it sets out."""
        norms, gram, inverse = self._matrices(name)
        target = (dense * norms) @ gram
        kept = start * norms
        gone = start == 0
        dual = torch.zeros_like(kept)
        for _ in range(_STEPS):
            free = (target + _PENALTY * (kept - dual)) @ inverse
            dual += free
            kept = dual.masked_fill(gone, 0.0)
            dual -= kept
        return kept / norms

    def _matrices(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """The inputs' norms [cols], their damped Gram matrix at norm 1, and its inverse with the penalty, [cols, cols]."""
        if self._prepared is None:
            gram = self.take_gram(name)
            norms = gram.diagonal().sqrt()
            norms = torch.where(norms > 0, norms, 1.0)
            gram.div_(norms).div_(norms[:, None])
            gram.diagonal().add_(_DAMPING)
            penalised = gram.clone()
            penalised.diagonal().add_(_PENALTY)
            self._prepared = norms, gram, torch.cholesky_inverse(torch.linalg.cholesky(penalised))
        return self._prepared
