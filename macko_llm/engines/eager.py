"""The engine for everything: the model's own forward, launch by launch."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from macko_llm.errors import UsageError
from macko_llm.models import cache_argument
from macko_llm.sampling import Sampling, choose, tokens_of_prompts, uniforms


class EagerEngine:
    """The model's own forward with a cache that grows: any family, any device."""

    def __init__(self, model: PreTrainedModel, *, max_tokens: int, sampling: Sampling) -> None:
        self.model = model
        self.device = model.device
        self.max_tokens = max_tokens
        self.sampling = sampling
        parameters = inspect.signature(model.forward).parameters
        self.takes = frozenset(parameters)
        self._cache_name = cache_argument(model)
        self._only_last = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """As `Engine.prefill`.

        Raises:
            UsageError: prompts of different lengths for a model whose forward takes no attention mask.
        """
        ids, padding = pad_left(prompts)
        self.ragged = bool(padding.any())
        if self.ragged and "attention_mask" not in self.takes:
            raise UsageError(
                f"{type(self.model).__name__} cannot read prompts of different lengths at once; give them one at a time."
            )
        self.length = 0
        """Slots that are filled."""
        self.step = 0
        """New tokens so far."""
        self.padding = padding.to(self.device)
        draws = uniforms(self.sampling, self.max_tokens - ids.shape[1], len(prompts))
        self.draws = None if draws is None else draws.to(self.device)
        self.seen: Tensor | None = None
        """The tokens of each text, [batch, vocabulary] bool, where a repetition penalty needs them."""
        self.cache = self.empty_cache()
        return self._next(ids.to(self.device))

    @torch.inference_mode()
    def decode(self, token: Tensor) -> Tensor:
        """As `Engine.decode`."""
        return self._next(token.clamp(min=0)[:, None])

    def parts(self) -> None:
        """As `Engine.parts`."""

    def forward(self, ids: Tensor, cache: Cache, **arguments: Any) -> Tensor:
        """The model on [batch, n] tokens behind those in a cache; [batch, vocabulary] fp32 logits after the last."""
        arguments = {self._cache_name: cache, "use_cache": True, **self._only_last, **arguments}
        return self.model(input_ids=ids, **arguments).logits[:, -1].float()

    def empty_cache(self) -> DynamicCache:
        """A cache that grows."""
        return DynamicCache(config=text_config(self.model))

    def _next(self, ids: Tensor) -> Tensor:
        """Feed [batch, n] tokens behind those in the cache; the token that follows the last, [batch]."""
        self.length += ids.shape[1]
        logits = self.forward(ids, self.cache, **self._where(ids.shape[1]))
        draw = None if self.draws is None else self.draws[self.step].to(logits.device)
        if self.step == 0 and self.sampling.repetition_penalty != 1:
            self.seen = tokens_of_prompts(ids, self.padding, logits.shape[-1]).to(logits.device)
        self.step += 1
        return choose(logits, self.sampling, draw, self.seen).to(self.device)

    def _where(self, new: int) -> dict[str, Tensor]:
        """What says which slots hold a text and where in it the last `new` are; nothing where all begin in slot 0."""
        if not self.ragged:
            return {}
        positions = torch.arange(self.length, device=self.device) - self.padding[:, None]
        arguments = {"attention_mask": (positions >= 0).long()}
        if "position_ids" in self.takes:
            arguments["position_ids"] = positions[:, -new:].clamp(min=0)
        return arguments


def text_config(model: PreTrainedModel) -> Any:
    """The part of a model's config that is about text."""
    return model.config.get_text_config(decoder=True)


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Prompts as one matrix; token ids [batch, longest] and the paddings before them [batch], int64 on the CPU."""
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    rows = [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
    return torch.tensor(rows), torch.tensor(padding)
