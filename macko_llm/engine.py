"""What runs the model: prompts in, tokens out, which stay on the device so that the next step need not wait for the host."""

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from macko_llm.errors import UsageError
from macko_llm.sampling import Sampling, choose, uniforms


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


def make_engine(model: PreTrainedModel, *, max_tokens: int, batch: int, sampling: Sampling) -> Engine:  # noqa: ARG001
    """The fastest engine that can run the model where it lies.

    Args:
        model: any transformers causal language model, in eval mode.
        max_tokens: most positions that will be asked for, the longest prompt and its new tokens.
        batch: texts at once.
        sampling: how each token is chosen, from fp32 logits.
    """
    # The engines for GPUs go here.
    return EagerEngine(model, max_tokens=max_tokens, sampling=sampling)


class EagerEngine:
    """The model's own forward with a cache that grows: any family, any device."""

    def __init__(self, model: PreTrainedModel, *, max_tokens: int, sampling: Sampling) -> None:
        self.model = model
        self.device = model.device
        self.max_tokens = max_tokens
        self.sampling = sampling
        parameters = inspect.signature(model.forward).parameters
        self._takes = frozenset(parameters)
        self._only_last = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"  # renamed in transformers 5.24

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """As `Engine.prefill`.

        Raises:
            UsageError: prompts of different lengths for a model whose forward takes no attention mask.
        """
        ids, padding = pad_left(prompts)
        ragged = bool(padding.any())
        if ragged and "attention_mask" not in self._takes:
            raise UsageError(
                f"{type(self.model).__name__} cannot read prompts of different lengths at once; give them one at a time."
            )
        length = ids.shape[1]
        self.length = 0
        self.step = 0
        self.cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        self.padding = padding.to(self.device) if ragged else None
        draws = uniforms(self.sampling, self.max_tokens - length, len(prompts))
        self._draws = None if draws is None else draws.to(self.device)
        return self._next(ids.to(self.device))

    @torch.inference_mode()
    def decode(self, token: Tensor) -> Tensor:
        """As `Engine.decode`."""
        return self._next(token.clamp(min=0)[:, None])

    def _next(self, ids: Tensor) -> Tensor:
        """Feed [batch, n] tokens behind those in the cache; the token that follows the last, [batch]."""
        slots = torch.arange(self.length + ids.shape[1], device=self.device)
        logits = self.forward(ids, self.cache, **self._where(slots, ids.shape[1]))
        draw = None if self._draws is None else self._draws[self.step].to(logits.device)
        self.length += ids.shape[1]
        self.step += 1
        return choose(logits, self.sampling, draw).to(self.device)

    def forward(self, ids: Tensor, cache: Any, **arguments: Any) -> Tensor:
        """The model on [batch, n] tokens behind those in a cache; [batch, vocabulary] fp32 logits after the last."""
        arguments = {self._cache_name: cache, "use_cache": True, **self._only_last, **arguments}
        return self.model(input_ids=ids, **arguments).logits[:, -1].float()

    def _where(self, slots: Tensor, new: int) -> dict[str, Tensor]:
        """What says which slots hold a text and where in it the last `new` are; nothing where all begin in slot 0."""
        if self.padding is None:
            return {}
        positions = slots - self.padding[:, None]
        arguments = {"attention_mask": (positions >= 0).long()}
        if "position_ids" in self._takes:
            arguments["position_ids"] = positions[:, -new:].clamp(min=0)
        return arguments


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Prompts as one matrix; token ids [batch, longest] and the paddings before them [batch], int64 on the CPU."""
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    rows = [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
    return torch.tensor(rows), torch.tensor(padding)
