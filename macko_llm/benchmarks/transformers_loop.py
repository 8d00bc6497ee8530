"""What transformers can do at most, to compare with."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from macko_llm import models


class TransformersLoop:
    """Greedy decoding with transformers at its best: its forward and the choice compiled as one CUDA graph, which a bare loop
    replays. The loop of `generate` needs more of the host for a token than the GPU does.

    Args:
        model: dense, with a static cache.
        positions: most tokens of a text, its prompt included.
    """

    def __init__(self, model: PreTrainedModel, positions: int) -> None:
        self.model = model
        self.cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=positions)
        self._cache = {models.cache_argument(model): self.cache, "use_cache": True}
        self._step: Callable[[Tensor, Tensor], Tensor] = self._next_token
        if model.device.type == "cuda":
            self._step = torch.compile(self._next_token, mode="reduce-overhead", fullgraph=True)

    @torch.no_grad()
    def prefill(self, prompts: Tensor) -> Tensor:
        """Begin anew; the first new tokens, [batch]."""
        self.cache.reset()
        self.position = torch.full((len(prompts),), prompts.shape[1], device=prompts.device)
        logits = self.model(input_ids=prompts, logits_to_keep=1, **self._cache).logits
        return logits[:, -1].argmax(dim=-1)

    @torch.no_grad()
    def decode(self, token: Tensor) -> Tensor:
        """Feed [batch] tokens; the next ones."""
        torch.compiler.cudagraph_mark_step_begin()
        token = self._step(token, self.position).clone()  # the next replay overwrites it
        self.position.add_(1)
        return token

    def parts(self) -> None:
        """As `Engine.parts`."""

    def _next_token(self, token: Tensor, position: Tensor) -> Tensor:
        logits = self.model(input_ids=token[:, None], position_ids=position[:, None], **self._cache).logits
        return logits[:, -1].argmax(dim=-1)
