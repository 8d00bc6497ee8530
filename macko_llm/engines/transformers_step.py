"""A decode step of fixed tensors through the model's own forward, of any family that transformers can compile."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from macko_llm.engines.capture import captured
from macko_llm.engines.eager import EagerEngine, text_config
from macko_llm.engines.fixed import FixedStep, NotSuitedError, take_states
from macko_llm.sampling import choose


class TransformersStep:
    """One decode step on tensors that stay where they are, captured where there is a GPU."""

    def __init__(self, eager: EagerEngine, capacity: int, token: Tensor, old: FixedStep | None) -> None:
        _require_static(eager)
        self.eager = eager
        self.capacity = capacity
        self.token = token.clone()
        self.slot = torch.tensor([eager.length], device=eager.device)
        """Where the fed token goes, [1]."""
        self.step = torch.tensor([eager.step], device=eager.device)
        """Which row of the uniform numbers chooses the next one, [1]."""
        source: list[Any] = old.layers if isinstance(old, TransformersStep) else eager.cache.layers
        # An empty growing cache knows the windows as well as a filled one.
        self.windows: list[int | None] = [getattr(layer, "sliding_window", None) for layer in eager.cache.layers]
        self.layers: list[_FixedLayer] = [_FixedLayer(layer, capacity, eager.length, self.slot) for layer in source]
        self.cache = Cache(layers=list(self.layers))
        self._graph: torch.cuda.CUDAGraph | None = None
        if eager.device.type == "cuda":
            with torch.cuda.device(eager.device):
                self._graph = captured(self._run, rehearse=self._rehearse)
        else:
            self._rehearse()

    def __call__(self, token: Tensor) -> Tensor:
        """Feed [batch] tokens; the next ones, [batch], in a tensor of their own."""
        self.token.copy_(token)
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()
        return self.token.clone()

    def growing_cache(self) -> DynamicCache:
        """What the cache holds, as the eager engine wants it."""
        cache = self.eager.empty_cache()
        for index, layer in enumerate(self.layers):
            cache.update(layer.keys[:, :, : self.eager.length], layer.values[:, :, : self.eager.length], index)
        return cache

    def parts(self) -> None:
        """See `FixedStep`."""

    def _run(self) -> None:
        """The step: reads and replaces `token`, and moves on by a slot. No wait, no copy to or from the host."""
        eager = self.eager
        ids = self.token.clamp(min=0)[:, None]
        positions = (self.slot - eager.padding)[:, None]
        logits = eager.forward(ids, self.cache, attention_mask=self._mask(), position_ids=positions)
        draw = None if eager.draws is None else eager.draws.index_select(0, self.step)[0]
        self.token.copy_(choose(logits, eager.sampling, draw, eager.seen))
        self.slot.add_(1)
        self.step.add_(1)

    def _mask(self) -> Tensor | dict[str, Tensor]:
        """Which slots the fed token sees, [batch, 1, 1, capacity]; by kind of layer where there are several kinds.

        transformers would leave the mask away for a single token, and show it the slots that are not filled yet.
        """
        slots = torch.arange(self.capacity, device=self.slot.device)
        seen = (slots <= self.slot) & (slots >= self.eager.padding[:, None])
        masks = {window: self._as_attention_takes_it(seen, slots, window) for window in set(self.windows)}
        if len(masks) == 1:
            return masks[self.windows[0]]
        kinds = text_config(self.eager.model).layer_types
        return {kind: masks[window] for kind, window in zip(kinds, self.windows, strict=True)}

    def _as_attention_takes_it(self, seen: Tensor, slots: Tensor, window: int | None) -> Tensor:
        if window is not None:
            seen = seen & (slots > self.slot - window)
        seen = seen[:, None, None, :]
        if text_config(self.eager.model)._attn_implementation == "sdpa":
            return seen
        dtype = self.eager.model.dtype
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)

    def _rehearse(self) -> None:
        """Run once, so that errors show and libraries allocate what they need, and undo it."""
        changed = (self.token, self.slot, self.step, self.eager.seen)
        before = [(tensor, tensor.clone()) for tensor in changed if tensor is not None]
        self._run()
        for tensor, value in before:
            tensor.copy_(value)


class _FixedLayer(CacheLayerMixin):
    """Keys and values of one layer, [batch, heads, capacity, head size]; a new token's go to the slot that a tensor names.

    Layers with a sliding window keep all slots: the mask hides those outside it, and nothing moves.
    """

    is_compileable = True
    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, source: Any, capacity: int, length: int, slot: Tensor) -> None:
        super().__init__()
        self.slot = slot
        self.keys, self.values = take_states(source, capacity, length)
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to do."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write one token's; all slots."""
        self.keys.index_copy_(2, self.slot, key_states)
        self.values.index_copy_(2, self.slot, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002
        """Slots that the mask is about, and the first of them."""
        return self.keys.shape[2], 0

    def get_seq_length(self) -> Any:
        """Filled slots, a number on the device."""
        return self.slot[0]

    def get_max_length(self) -> int:
        """Slots."""
        return self.keys.shape[2]


def _require_static(eager: EagerEngine) -> None:
    """Raise where a fixed decode step could differ from the model's own."""
    model, config = eager.model, text_config(eager.model)
    kinds = getattr(config, "layer_types", None) or []
    refusals = {
        "transformers knows no fixed cache for it": not getattr(model, "_can_compile_fullgraph", False),
        "it takes no attention mask or no positions": not {"attention_mask", "position_ids"} <= eager.takes,
        "it makes masks of its own": hasattr(model, "create_masks_for_generate"),
        "its attention is neither sdpa nor eager": config._attn_implementation not in ("sdpa", "eager"),
        "its layers are of kinds that are not supported": not set(kinds) <= {"full_attention", "sliding_attention"}
        or getattr(config, "attention_chunk_size", None) is not None
        or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in eager.cache.layers),
        "it lies on several devices": {parameter.device for parameter in model.parameters()} != {eager.device},
    }
    for reason, holds in refusals.items():
        if holds:
            raise NotSuitedError(reason)
