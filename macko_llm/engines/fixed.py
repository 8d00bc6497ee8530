"""The engine of GPUs: tensors that stay where they are, so that a decode step can be captured once and replayed."""

import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from macko_llm.defaults import CACHE_BUCKET
from macko_llm.engines.eager import EagerEngine
from macko_llm.errors import MackoWarning
from macko_llm.sampling import Sampling


class NotSuitedError(Exception):
    """A kind of step cannot decode a model, or could differ from the model's own forward; says why."""


class FixedStep(Protocol):
    """One decode step over a cache of fixed length, behind the slots that `eager.length` counts."""

    capacity: int

    def __call__(self, token: Tensor) -> Tensor:
        """Feed [batch] tokens; the next ones, [batch], in a tensor of their own."""

    def growing_cache(self) -> DynamicCache:
        """What the cache holds, as the eager engine wants it."""

    def parts(self) -> dict[str, float] | None:
        """Milliseconds that the "linears" and the "attention" of a step take by themselves, None if nothing tells."""


class StepKind(Protocol):
    """Makes steps: with the class of one."""

    def __call__(self, eager: EagerEngine, capacity: int, token: Tensor, old: FixedStep | None) -> FixedStep:
        """A step over `capacity` slots that goes on where `old`, or else the eager engine, is.

        Args:
            eager: the model, its lengths and paddings.
            capacity: slots, more than are filled.
            token: [batch] int64, any token that may be fed.
            old: a step of the same kind with fewer slots.

        Raises:
            NotSuitedError: this kind of step cannot run the model.
        """


class FixedEngine:
    """A cache of fixed length, and a decode step over it that is made once and replayed.

    The prompts go through the eager engine. When the cache is full, one of twice the length takes its place and the step is
    made again. The first kind of step that suits the model decodes; where none does, the eager engine goes on, with one
    warning that says why.

    Args:
        model: on one device.
        max_tokens: as in `engine.make_engine`.
        sampling: as in `engine.make_engine`.
        kinds: of steps, the fastest first.
        bucket: slots of the smallest cache.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_tokens: int,
        sampling: Sampling,
        kinds: Sequence[StepKind],
        bucket: int = CACHE_BUCKET,
    ) -> None:
        self.eager = EagerEngine(model, max_tokens=max_tokens, sampling=sampling)
        self.device = model.device
        self._bucket = bucket
        self._kinds = list(kinds)
        self._step: FixedStep | None = None

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """As `EagerEngine.prefill`; makes the step, while a GPU may still be reading a long prompt."""
        self._step = None
        token = self.eager.prefill(prompts)
        if self.eager.length + 1 < self.eager.max_tokens:
            self._make_step(token)
        return token

    @torch.inference_mode()
    def decode(self, token: Tensor) -> Tensor:
        """As `Engine.decode`; waits for the device when the cache grows."""
        if self._step is not None and self.eager.length == self._step.capacity:
            self._make_step(token)
        if self._step is None:
            return self.eager.decode(token)
        self.eager.length += 1
        self.eager.step += 1
        return self._step(token)

    def parts(self) -> dict[str, float] | None:
        """Milliseconds of the parts of a token, as `FixedStep.parts` tells them after some have been decoded."""
        return None if self._step is None else self._step.parts()

    def _make_step(self, token: Tensor) -> None:
        """Move to a cache that has room for more, or back to the eager engine."""
        capacity = self._bucket
        while capacity <= self.eager.length:
            capacity *= 2
        while self._kinds:
            try:
                self._step = self._kinds[0](self.eager, min(capacity, self.eager.max_tokens), token, self._step)
            except Exception as error:  # a model's own forward and the capture may raise anything
                if self._step is not None:
                    self.eager.cache = self._step.growing_cache()
                    self._step = None
                self._kinds.pop(0)
                if not self._kinds or not isinstance(error, NotSuitedError):
                    self._warn(error)
            else:
                self.eager.cache = self.eager.empty_cache()  # gives the memory back
                return

    def _warn(self, error: Exception) -> None:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        name = type(self.eager.model).__name__
        warnings.warn(f"{name} generates more slowly than it could: {reason}.", MackoWarning, stacklevel=2)


def take_states(layer: Any, capacity: int, length: int) -> tuple[Tensor, Tensor]:
    """Move what the layer of a cache holds of its first `length` slots to keys and values with `capacity` slots.

    The layer goes on with views of them, so that memory never holds both. It has the states of all those slots, perhaps
    with free ones behind, or of the last of them, as a sliding window keeps them.

    Returns:
        Keys and values, [batch, heads, capacity, head size] each; zero where nothing is known.
    """
    layer.keys, keys = _moved(layer.keys, capacity, length)
    layer.values, values = _moved(layer.values, capacity, length)
    return keys, values


def _moved(states: Tensor, capacity: int, length: int) -> tuple[Tensor, Tensor]:
    known = states[:, :, :length]
    fixed = states.new_zeros(*states.shape[:2], capacity, states.shape[3])
    view = fixed[:, :, length - known.shape[2] : length]
    view.copy_(known)
    return view, fixed
