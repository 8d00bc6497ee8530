"""Stub: what runs the model (the real module comes with the other half of this change)."""

import inspect
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from macko_llm.sampling import Chooser, Sampling


class Engine(Protocol):
    """Runs one batch of texts; its tokens stay on the device."""

    device: torch.device

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts; the first new token of each, [batch] int64 on the device."""

    def decode(self, token: Tensor) -> Tensor:
        """Feed one token a text, [batch] int64 on the device; the next ones, [batch]."""


class EagerEngine:
    """Prompts of one length, a growing cache."""

    def __init__(self, model: PreTrainedModel, sampling: Sampling) -> None:
        self.device = model.device
        self._model = model
        self._choose = Chooser(sampling)
        self._cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        parameters = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"

    @torch.inference_mode()
    def _next(self, ids: Tensor) -> Tensor:
        logits = self._model(input_ids=ids, use_cache=True, **{self._cache_name: self._cache}).logits
        return self._choose(logits[:, -1].float())[:, 0]

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """See Engine."""
        return self._next(torch.tensor([list(prompt) for prompt in prompts], device=self.device))

    def decode(self, token: Tensor) -> Tensor:
        """See Engine."""
        return self._next(token.clamp(min=0)[:, None])


def make_engine(model: PreTrainedModel, *, max_tokens: int, batch: int, sampling: Sampling) -> Engine:
    """The engine of a model."""
    del max_tokens, batch
    return EagerEngine(model, sampling)
