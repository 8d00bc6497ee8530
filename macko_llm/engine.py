"""What runs the model: prompts in, tokens out, which stay on the device so that the next step need not wait for the host."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from macko_llm.engines.eager import EagerEngine
from macko_llm.engines.fixed import FixedEngine
from macko_llm.engines.fused_step import FusedStep
from macko_llm.engines.parallel import ParallelEngine
from macko_llm.engines.transformers_step import TransformersStep
from macko_llm.ranks import is_sliced
from macko_llm.sampling import Sampling


class Engine(Protocol):
    """Runs one batch of texts.

    Prompts of different lengths are padded on the left: text b fills the slots [padding_b, length), its positions count from
    its first slot, and the slots before are masked.
    """

    device: torch.device

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts, at least one token each; the first new token of each, [batch] int64 on the device.

        Begins new texts, whatever was there before.
        """

    def decode(self, token: Tensor) -> Tensor:
        """Feed one token a text, [batch] int64 on the device, as the last call returned it; the next ones, [batch].

        Never waits for the device, and never overwrites what it returned. NOT_FINITE is read as token 0.
        """

    def parts(self) -> dict[str, float] | None:
        """Milliseconds that the "linears" and the "attention" of a decoded token take, measured apart; None if it cannot.

        The texts cannot be continued afterwards.
        """


def make_engine(model: PreTrainedModel, *, max_tokens: int, sampling: Sampling) -> Engine:
    """The fastest engine that can run the model where it lies.

    Args:
        model: any transformers causal language model, in eval mode.
        max_tokens: most positions that will be asked for, the longest prompt and its new tokens.
        sampling: how each token is chosen, from fp32 logits.
    """
    if is_sliced(model):
        return ParallelEngine(model, max_tokens=max_tokens, sampling=sampling)
    if model.device.type == "cuda":
        return FixedEngine(model, max_tokens=max_tokens, sampling=sampling, kinds=(FusedStep, TransformersStep))
    return EagerEngine(model, max_tokens=max_tokens, sampling=sampling)
