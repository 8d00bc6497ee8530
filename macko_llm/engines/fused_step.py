"""A decode step of this package's own kernels, in a CUDA graph; the sampling is part of it."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from macko_llm.engines.capture import captured
from macko_llm.engines.decoder import Decoder, Launch, Part, why_not
from macko_llm.engines.eager import EagerEngine
from macko_llm.engines.fixed import FixedStep, NotSuitedError, take_states
from macko_llm.sampling import choose

_TIMED_REPLAYS = 20


class FusedStep:
    """See `FixedStep`: the kernels of `decoder`, captured."""

    def __init__(self, eager: EagerEngine, capacity: int, token: Tensor, old: FixedStep | None) -> None:
        reason = why_not(eager.model)
        if reason is not None:
            raise NotSuitedError(reason)
        self._eager = eager
        self.capacity = capacity
        source: list[Any] = old._layers if isinstance(old, FusedStep) else eager.cache.layers
        self._layers: list[_FixedLayer] = [_FixedLayer(*take_states(layer, capacity, eager.length)) for layer in source]
        keys, values = [layer.keys for layer in self._layers], [layer.values for layer in self._layers]
        self._decoder = decoder = Decoder(eager.model, keys, values)
        decoder.token.copy_(token)
        decoder.slot.fill_(eager.length - 1)
        decoder.first.copy_(eager.padding)
        self._draw_index = torch.tensor([eager.step], device=eager.device)
        self._launches = [*decoder.launches, _choice(decoder, eager, self._draw_index)]
        self._latest: Tensor | None = None
        with torch.cuda.device(eager.device):
            self._graph = captured(partial(_queue, self._launches), rehearse=self._rehearse)

    def __call__(self, token: Tensor) -> Tensor:
        """See `FixedStep`."""
        if token is not self._latest:
            self._decoder.token.copy_(token)
        self._graph.replay()
        self._latest = self._decoder.token.clone()
        return self._latest

    def growing_cache(self) -> DynamicCache:
        """See `FixedStep`."""
        cache = self._eager.empty_cache()
        for index, layer in enumerate(self._layers):
            keys, values = layer.keys[:, :, : self._eager.length], layer.values[:, :, : self._eager.length]
            cache.update(keys, values, index)
        return cache

    def parts(self) -> dict[str, float]:
        """See `FixedStep`: each part's kernels in a graph of their own. What they compute is nonsense, not the next step's."""
        with torch.cuda.device(self._eager.device):
            return {"linears": self._milliseconds("linears"), "attention": self._milliseconds("attention")}

    def _rehearse(self) -> None:
        """Run once and undo it."""
        changed = (self._decoder.token, self._decoder.slot, self._draw_index, self._eager.seen)
        before = [(tensor, tensor.clone()) for tensor in changed if tensor is not None]
        _queue(self._launches)
        for tensor, value in before:
            tensor.copy_(value)

    @torch.inference_mode()
    def _milliseconds(self, part: Part) -> float:
        graph = captured(partial(_queue, [launch for launch in self._launches if launch.part == part]))
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        begin.record()
        for _ in range(_TIMED_REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / _TIMED_REPLAYS


def _queue(launches: list[Launch]) -> None:
    for launch in launches:
        launch.run()


# A function that knows no step: a step that were part of its own launches would stay in memory until Python looks for cycles.
def _choice(decoder: Decoder, eager: EagerEngine, draw_index: Tensor) -> Launch:
    """Replaces the fed tokens by the next ones."""
    draws, seen, sampling = eager.draws, eager.seen, eager.sampling
    if draws is None and seen is None:
        return Launch("rest", decoder.greedy)

    def choice() -> None:
        uniform = None if draws is None else draws.index_select(0, draw_index)[0]
        decoder.token.copy_(choose(decoder.logits, sampling, uniform, seen))
        draw_index.add_(1)

    return Launch("rest", choice)


@dataclass
class _FixedLayer:
    """Keys and values of one block, [texts, kv_heads, capacity, head_dim] each."""

    keys: Tensor
    values: Tensor
