"""What runs the model: prompts in, tokens out, which stay on the device so that the next step need not wait for the host."""

import inspect
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from macko_llm.defaults import CACHE_BUCKET
from macko_llm.errors import MackoWarning, UsageError
from macko_llm.models import cache_argument
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
        self.cache = self.empty_cache()
        return self._next(ids.to(self.device))

    @torch.inference_mode()
    def decode(self, token: Tensor) -> Tensor:
        """As `Engine.decode`."""
        return self._next(token.clamp(min=0)[:, None])

    def forward(self, ids: Tensor, cache: Cache, **arguments: Any) -> Tensor:
        """The model on [batch, n] tokens behind those in a cache; [batch, vocabulary] fp32 logits after the last."""
        arguments = {self._cache_name: cache, "use_cache": True, **self._only_last, **arguments}
        return self.model(input_ids=ids, **arguments).logits[:, -1].float()

    def empty_cache(self) -> DynamicCache:
        """A cache that grows."""
        return DynamicCache(config=_text_config(self.model))

    def _next(self, ids: Tensor) -> Tensor:
        """Feed [batch, n] tokens behind those in the cache; the token that follows the last, [batch]."""
        self.length += ids.shape[1]
        logits = self.forward(ids, self.cache, **self._where(ids.shape[1]))
        draw = None if self.draws is None else self.draws[self.step].to(logits.device)
        self.step += 1
        return choose(logits, self.sampling, draw).to(self.device)

    def _where(self, new: int) -> dict[str, Tensor]:
        """What says which slots hold a text and where in it the last `new` are; nothing where all begin in slot 0."""
        if not self.ragged:
            return {}
        positions = torch.arange(self.length, device=self.device) - self.padding[:, None]
        arguments = {"attention_mask": (positions >= 0).long()}
        if "position_ids" in self.takes:
            arguments["position_ids"] = positions[:, -new:].clamp(min=0)
        return arguments


class StaticEngine:
    """A cache of fixed length and a decode step of fixed tensors, which a GPU replays as a CUDA graph.

    The prompts go through the eager engine. When the cache is full, one of twice the length takes its place and the step is
    captured again. What cannot run so goes on in the eager engine, with one warning that says why.
    """

    def __init__(
        self, model: PreTrainedModel, *, max_tokens: int, sampling: Sampling, bucket: int = CACHE_BUCKET
    ) -> None:
        self.eager = EagerEngine(model, max_tokens=max_tokens, sampling=sampling)
        self.device = model.device
        self.bucket = bucket
        self._step: _StaticStep | None = None

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """As `EagerEngine.prefill`; the decode step is made ready, too."""
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

    def _make_step(self, token: Tensor) -> None:
        """Move to a cache that has room for more, or back to the eager engine."""
        capacity = self.bucket
        while capacity <= self.eager.length:
            capacity *= 2
        old = self._step
        try:
            _require_static(self.eager)
            self._step = _StaticStep(self.eager, min(capacity, self.eager.max_tokens), token, old)
        except Exception as error:  # a model's own forward and the capture may raise anything
            if old is not None:
                self.eager.cache = old.growing_cache()
            self._step = None
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            warnings.warn(
                f"{type(self.eager.model).__name__} generates slowly, without a fixed decode step: {reason}.",
                MackoWarning,
                stacklevel=2,
            )
        else:
            self.eager.cache = self.eager.empty_cache()  # gives the memory back


class _StaticStep:
    """One decode step on tensors that stay where they are, captured where there is a GPU."""

    def __init__(self, eager: EagerEngine, capacity: int, token: Tensor, old: "_StaticStep | None") -> None:
        self.eager = eager
        self.capacity = capacity
        self.token = token.clone()
        self.slot = torch.tensor([eager.length], device=eager.device)
        """Where the fed token goes, [1]."""
        self.step = torch.tensor([eager.step], device=eager.device)
        """Which row of the uniform numbers chooses the next one, [1]."""
        source: list[Any] = eager.cache.layers if old is None else old.layers
        # An empty growing cache knows the windows as well as a filled one.
        self.windows: list[int | None] = [getattr(layer, "sliding_window", None) for layer in eager.cache.layers]
        self.layers: list[_FixedLayer] = [_FixedLayer(layer, capacity, eager.length, self.slot) for layer in source]
        self.cache = Cache(layers=list(self.layers))
        self._graph: torch.cuda.CUDAGraph | None = None
        if eager.device.type == "cuda":
            with torch.cuda.device(eager.device):
                self._graph = self._captured()
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

    def _run(self) -> None:
        """The step: reads and replaces `token`, and moves on by a slot. No wait, no copy to or from the host."""
        eager = self.eager
        ids = self.token.clamp(min=0)[:, None]
        positions = (self.slot - eager.padding)[:, None]
        logits = eager.forward(ids, self.cache, attention_mask=self._mask(), position_ids=positions)
        draw = None if eager.draws is None else eager.draws.index_select(0, self.step)[0]
        self.token.copy_(choose(logits, eager.sampling, draw))
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
        kinds = _text_config(self.eager.model).layer_types
        return {kind: masks[window] for kind, window in zip(kinds, self.windows, strict=True)}

    def _as_attention_takes_it(self, seen: Tensor, slots: Tensor, window: int | None) -> Tensor:
        if window is not None:
            seen = seen & (slots > self.slot - window)
        seen = seen[:, None, None, :]
        if _text_config(self.eager.model)._attn_implementation == "sdpa":
            return seen
        dtype = self.eager.model.dtype
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)

    def _rehearse(self) -> None:
        """Run once, so that errors show and libraries allocate what they need, and undo it."""
        before = [(tensor, tensor.clone()) for tensor in (self.token, self.slot, self.step)]
        self._run()
        for tensor, value in before:
            tensor.copy_(value)

    def _captured(self) -> torch.cuda.CUDAGraph:
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            self._rehearse()
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._run()
        return graph


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
        self.keys = _fixed(source.keys, capacity, length)
        self.values = _fixed(source.values, capacity, length)
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


def _fixed(states: Tensor, capacity: int, length: int) -> Tensor:
    """States with `capacity` slots; they come with the `length` first slots, some after them, or only the last before."""
    fixed = states.new_zeros(*states.shape[:2], capacity, states.shape[3])
    known = states[:, :, :length]
    fixed[:, :, length - known.shape[2] : length] = known
    return fixed


def _require_static(eager: EagerEngine) -> None:
    """Raise where a fixed decode step could differ from the model's own."""
    model, config = eager.model, _text_config(eager.model)
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
            raise NotImplementedError(reason)


def _text_config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config(decoder=True)


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Prompts as one matrix; token ids [batch, longest] and the paddings before them [batch], int64 on the CPU."""
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    rows = [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
    return torch.tensor(rows), torch.tensor(padding)
