"""How the next token is chosen: the settings, the probabilities, and the draw.

The one state on the device is which tokens a text holds, and only a repetition penalty needs it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from macko_llm.defaults import TEMPERATURE
from macko_llm.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

NOT_FINITE = -1
"""Token id that stands for logits from which no token can be chosen."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most probable token (greedy); above 0, logits are divided by it and one token is drawn.
        top_k: draw only among this many most probable tokens.
        top_p: of those, draw only among the fewest that together hold at least this probability, in (0, 1].
        min_p: of those, draw only among the ones that are at least this many times as probable as the most probable, in
            [0, 1] (Nguyen et al. 2024, arXiv 2407.01082).
        seed: makes the draw reproducible, in [0, 2**64); None draws differently each time.
        repetition_penalty: above 0; before all else, logits of the tokens that the prompt or the new text holds are divided
            by it where they are positive and multiplied where they are negative (CTRL, Keskar et al. 2019, arXiv
            1909.05858). 1 changes nothing, and more makes repetitions rarer, for greedy too.

    Raises:
        UsageError: a value outside its range, or top_k, top_p or min_p at temperature 0, where nothing is drawn.
    """

    temperature: float = TEMPERATURE
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float = 1.0

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
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UsageError(f"min-p {self.min_p} is not a share of a probability; use 0 to 1.")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise UsageError(f"The seed {self.seed} is not possible; use a whole number from 0 to 2**64 - 1.")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UsageError(
                f"The repetition penalty {self.repetition_penalty} is not possible; use 1 for none, or more, such as 1.1."
            )
        if self.temperature == 0 and (self.top_k, self.top_p, self.min_p) != (None, None, None):
            raise UsageError(
                "top-k, top-p and min-p do nothing at temperature 0, which is greedy; add --temperature 0.8, or drop them."
            )


GREEDY = Sampling()


def token_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The probabilities from which a token is drawn at a temperature above 0.

    Temperature, then top-k, then top-p, then min-p, each as in transformers: tokens tied with the k-th are kept, and so is
    the token that crosses top_p. (llama.cpp has the same order, but by default the temperature comes last.)

    Args:
        logits: [batch, vocabulary], floating point; -inf forbids a token, one at least is finite.
        sampling: temperature, top_k, top_p and min_p are used.

    Returns:
        [batch, vocabulary] fp32, rows sum to 1.
    """
    import torch  # here, because the settings above are checked before it is imported

    logits = logits.float()
    # Relative to the largest, so that a tiny temperature gives 0 for it and -inf for the others, never inf - inf.
    fp32 = torch.finfo(torch.float32)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / min(max(sampling.temperature, fp32.tiny), fp32.max)
    if sampling.top_k is not None:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ranked, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        # In fp64, since GPUs add in an order that changes from run to run, and a rounding must not change who is in.
        mass_before = ranked.double().cumsum(dim=-1) - ranked
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, mass_before >= sampling.top_p)
        logits = logits.masked_fill(drop, -math.inf)
    if sampling.min_p:
        # The largest logit is still 0, so these are the logarithms of shares of its probability.
        logits = logits.masked_fill(logits < math.log(sampling.min_p), -math.inf)
    return logits.softmax(dim=-1)


def uniforms(sampling: Sampling, steps: int, batch: int) -> Tensor | None:
    """One uniform number for each token to come, [steps, batch] float64 on the CPU; None for greedy, which needs none.

    They are drawn up front and on the CPU, so that a draw needs no random state on the device, is the same on all of
    them, and does not change with `steps`: step i of `batch` texts always gets the same row of the same seed.
    """
    if sampling.temperature == 0:
        return None
    import torch

    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return torch.rand(steps, batch, dtype=torch.float64, generator=generator)


def tokens_of_prompts(ids: Tensor, padding: Tensor, vocabulary: int) -> Tensor:
    """Which tokens each prompt holds, [batch, vocabulary] bool; never waits for the device.

    Args:
        ids: [batch, longest] int64, padded on the left.
        padding: [batch] int64, how many of each row's ids are padding, which holds nothing.
        vocabulary: how many tokens there are.
    """
    import torch

    real = torch.arange(ids.shape[1], device=ids.device) >= padding[:, None]
    seen = torch.zeros(ids.shape[0], vocabulary, dtype=torch.bool, device=ids.device)
    return seen.scatter_(1, torch.where(real, ids, ids[:, -1:]), True)


def penalized(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits after a repetition penalty, as in transformers.

    Args:
        logits: [batch, vocabulary], floating point.
        seen: [batch, vocabulary] bool, the tokens to which the penalty applies.
        penalty: above 0.

    Returns:
        [batch, vocabulary] fp32.
    """
    import torch

    logits = logits.float()
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def choose(logits: Tensor, sampling: Sampling, uniform: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
    """Choose one token a text; never waits for the device, so that a CUDA graph can capture it.

    Args:
        logits: [batch, vocabulary], floating point.
        sampling: how to choose.
        uniform: [batch] float64 in [0, 1) on the device of the logits, a row of `uniforms`; None for greedy.
        seen: [batch, vocabulary] bool on that device, the tokens of each text, to which the chosen ones are added; None
            where there is no repetition penalty.

    Returns:
        [batch] int64, NOT_FINITE where the logits are NaN or infinite.
    """
    if seen is not None:
        logits = penalized(logits, seen, sampling.repetition_penalty)
    largest, token = logits.max(dim=-1)
    unusable = ~largest.isfinite()  # max hands NaN on, so it alone tells
    if uniform is not None:
        probabilities = token_probabilities(logits.masked_fill(unusable[:, None], 0), sampling)
        token = _draw(probabilities, uniform)
    if seen is not None:
        seen.scatter_(1, token[:, None], True)
    return token.masked_fill(unusable, NOT_FINITE)


def _draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The first token whose cumulative probability passes `uniform`, among those of a probability above 0; [batch]."""
    import torch

    cumulative = probabilities.double().cumsum(dim=-1)
    target = uniform[:, None] * cumulative[:, -1:]
    count = probabilities.shape[-1]
    tokens = torch.arange(count, device=probabilities.device)
    impossible = probabilities <= 0
    first = tokens.masked_fill(impossible | (cumulative <= target), count).amin(dim=-1)
    # Rounding can leave none that passes (uniform next to 1); then it is the last possible one.
    return torch.minimum(first, tokens.masked_fill(impossible, -1).amax(dim=-1))
