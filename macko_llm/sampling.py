"""How the next token is chosen: the settings, the probabilities, and the draw on the model's device."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from macko_llm.defaults import TEMPERATURE
from macko_llm.errors import UsageError

NOT_FINITE = -1
"""Token id that stands for logits from which no token can be chosen."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most probable token (greedy); above 0, logits are divided by it and one token is drawn.
        top_k: draw only among this many most probable tokens.
        top_p: of those, draw only among the fewest that together hold at least this probability, in (0, 1].
        seed: makes the draw reproducible on the same kind of device, in [0, 2**64); None draws differently each time.

    Raises:
        UsageError: a value outside its range, or top_k or top_p at temperature 0, where nothing is drawn.
    """

    temperature: float = TEMPERATURE
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(
                f"The temperature {self.temperature} is not possible; use 0 for greedy, or more to sample."
            )
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top-k {self.top_k} leaves no token to choose; use at least 1.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top-p {self.top_p} is not a probability; use more than 0 and at most 1.")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise UsageError(f"The seed {self.seed} is not possible; use a whole number from 0 to 2**64 - 1.")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise UsageError(
                "top-k and top-p do nothing at temperature 0, which is greedy; add --temperature 0.8, or drop them."
            )


GREEDY = Sampling()


def token_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The probabilities from which a token is drawn at a temperature above 0.

    Temperature, then top-k, then top-p, each as in transformers: tokens tied with the k-th are kept, and so is the token
    that crosses top_p.

    Args:
        logits: [batch, vocabulary], floating point; -inf forbids a token, one at least is finite.
        sampling: temperature, top_k and top_p are used.

    Returns:
        [batch, vocabulary] fp32, rows sum to 1.
    """
    logits = logits.float()
    # Relative to the largest, so that a tiny temperature gives 0 for it and -inf for the others, never inf - inf.
    fp32 = torch.finfo(torch.float32)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / min(max(sampling.temperature, fp32.tiny), fp32.max)
    if sampling.top_k is not None:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ranked, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        mass_before = ranked.cumsum(dim=-1) - ranked
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, mass_before >= sampling.top_p)
        logits = logits.masked_fill(drop, -math.inf)
    return logits.softmax(dim=-1)


class Chooser:
    """Chooses tokens on the device that the logits are on; holds the random state of one text."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.generator: torch.Generator | None = None

    @torch.inference_mode()
    def __call__(self, logits: Tensor) -> Tensor:
        """[batch, vocabulary] logits -> [batch, 1] int64 token ids, NOT_FINITE where logits are NaN or infinite."""
        largest, token = logits.max(dim=-1, keepdim=True)
        # max hands NaN on, so it alone tells; it stays on the device: the caller's read of the token is the only wait.
        usable = largest.isfinite()
        if self.sampling.temperature > 0:
            if self.generator is None:
                self.generator = self._new_generator(logits.device)
            probabilities = token_probabilities(torch.where(usable, logits, 0), self.sampling)
            token = torch.multinomial(probabilities, 1, generator=self.generator)
        return torch.where(usable, token, NOT_FINITE)

    def _new_generator(self, device: torch.device) -> torch.Generator:
        generator = torch.Generator(device)
        if self.sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.sampling.seed)
        return generator
