"""A decode step of this package's own kernels, in a CUDA graph; the sampling is part of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from macko_llm.engines.decoder import Decoder, Launch, Part, why_not
from macko_llm.engines.eager import EagerEngine
from macko_llm.engines.fixed import FixedStep, NotSuitedError
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
        self._layers: list[_FixedLayer] = [_FixedLayer.take(layer, capacity, eager.length) for layer in source]
        keys, values = [layer.keys for layer in self._layers], [layer.values for layer in self._layers]
        self._decoder = decoder = Decoder(eager.model, keys, values)
        decoder.token.copy_(token)
        decoder.slot.fill_(eager.length - 1)
        decoder.first.copy_(eager.padding)
        self._draw_index = torch.tensor([eager.step], device=eager.device)
        self._launches = [*decoder.launches, Launch("rest", self._choose)]
        self._latest: Tensor | None = None
        with torch.cuda.device(eager.device), _aside() as stream:
            self._rehearse()
            self._graph = _captured(self._launches, stream)

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
        with torch.cuda.device(self._eager.device), _aside() as stream:
            return {
                "linears": self._milliseconds("linears", stream),
                "attention": self._milliseconds("attention", stream),
            }

    def _choose(self) -> None:
        """Replace the fed tokens by the next ones."""
        decoder, draws = self._decoder, self._eager.draws
        if draws is None:
            decoder.greedy()
            return
        draw = draws.index_select(0, self._draw_index)[0]
        decoder.token.copy_(choose(decoder.logits, self._eager.sampling, draw))
        self._draw_index.add_(1)

    def _rehearse(self) -> None:
        """Run once, launch by launch, and undo it: what a library does at its first call must not meet a capture."""
        changed = (self._decoder.token, self._decoder.slot, self._draw_index)
        before = [tensor.clone() for tensor in changed]
        for launch in self._launches:
            launch.run()
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)

    @torch.inference_mode()
    def _milliseconds(self, part: Part, stream: torch.cuda.Stream) -> float:
        graph = _captured([launch for launch in self._launches if launch.part == part], stream)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        begin.record()
        for _ in range(_TIMED_REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / _TIMED_REPLAYS


@dataclass
class _FixedLayer:
    """Keys and values of one block, [texts, kv_heads, capacity, head_dim] each."""

    keys: Tensor
    values: Tensor

    @classmethod
    def take(cls, source: Any, capacity: int, length: int) -> "_FixedLayer":
        """Move what another cache's layer holds of the first `length` slots; that layer goes on with views of it."""
        source.keys, keys = _moved(source.keys, capacity, length)
        source.values, values = _moved(source.values, capacity, length)
        return cls(keys, values)


def _moved(states: Tensor, capacity: int, length: int) -> tuple[Tensor, Tensor]:
    """A view of moved states, and the tensor with `capacity` slots that it shows.

    The states are those of the last slots before `length`, as a sliding window keeps them, or of all, with free ones behind.
    """
    known = states[:, :, :length]
    fixed = states.new_zeros(*states.shape[:2], capacity, states.shape[3])
    view = fixed[:, :, length - known.shape[2] : length]
    view.copy_(known)
    return view, fixed


@contextmanager
def _aside() -> Iterator[torch.cuda.Stream]:
    """A stream beside the current one, after and before its work: the default one cannot be captured.

    One for the rehearsal and the capture, because cuBLAS has a workspace for each stream, and may choose other kernels
    without one.
    """
    here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        yield aside
    here.wait_stream(aside)


def _captured(launches: list[Launch], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for launch in launches:
            launch.run()
    return graph
