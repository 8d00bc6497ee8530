"""Llama-like models on a GPU, a token at a time, by kernels made for it: five a block, all of them in one CUDA graph.

    begin token -> [ norm + q,k,v -> attention -> o + residual -> norm + gate,up -> silu + down + residual ] ... -> logits

Norms and the gate are part of the products that read them, so is the residual's sum of those that write it, and every
kernel starts while the one before still runs. Values are rounded where transformers rounds them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from macko_llm import native, native_decode
from macko_llm.dtypes import CODES
from macko_llm.engines.products import make_product
from macko_llm.native_decode import Attention, Input

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Classes of transformers whose forward the kernels compute."""
_CHANGING_ROPES = ("dynamic", "longrope")
"""Rotary embeddings that depend on the length of the text so far, of which no table can be made."""
_SLOTS_OF_SPLIT = 256
"""Blocks share the slots of a head where each gets about this many."""
_BLOCKS_OF_SM = 2
_HEADS_OF_BLOCK = 4
"""Query heads that read a key together, at most (csrc/cuda/decode_attention.cuh)."""

Part = Literal["linears", "attention", "rest"]


@dataclass(frozen=True)
class Launch:
    """One step of decoding a token: what it is part of, and the call that queues it."""

    part: Part
    run: Callable[[], None]


def why_not(model: PreTrainedModel) -> str | None:
    """Why the kernels cannot run a model where it lies, as the end of a sentence; None if they can."""
    config = model.config
    if type(model).__name__ not in FAMILIES or not type(model).__module__.startswith("transformers."):
        return f"{type(model).__name__} is none of {', '.join(FAMILIES)}"
    if type(model).__name__ == "LlamaForCausalLM" and getattr(config, "sliding_window", None) is not None:
        return "its config names a sliding window, to which transformers' cache keeps but not its Llama"
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1:
        return "the model lies on several devices"
    device = devices.pop()
    if device.type != "cuda" or not native.has_cuda():
        return "there is no GPU, or no kernels for it"
    dtype = _embeddings(model).dtype
    if dtype not in (torch.float16, torch.bfloat16):
        return f"its activations are {dtype}, not float16 or bfloat16"
    head_dim = _head_dim(model)
    if head_dim not in native_decode.HEAD_DIMS:
        return f"its heads have {head_dim} dimensions, not one of {', '.join(map(str, native_decode.HEAD_DIMS))}"
    widest = max(config.hidden_size, config.intermediate_size, config.num_attention_heads * head_dim)
    if any(width % 8 for width in (config.hidden_size, config.intermediate_size)):
        return "its hidden or intermediate size is no multiple of 8"
    if widest > min(native_decode.DENSE_MAX_COLS, native_decode.transformed_max_cols(device)):
        return f"a row of {widest} values does not fit the GPU's shared memory twice"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}, not silu"
    if model.model.rotary_emb.rope_type in _CHANGING_ROPES:
        return f"its rotary embedding is {model.model.rotary_emb.rope_type}, which changes with the length of the text"
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return "hooks want to see its modules run"
    if any("forward" in vars(module) for module in model.modules()):
        return "the forward of one of its modules was replaced"
    return None


class Decoder:
    """The kernels of one token of a batch of texts, over a cache of keys and values of a fixed capacity.

    Args:
        model: one that `why_not` has nothing against; its weights must stay where they are.
        keys: of each block, contiguous [texts, kv_heads, capacity, head_dim] of the model's dtype: the cache, which the
            kernels fill from `slot` on.
        values: the same.

    Attributes:
        token: [texts] int64, the tokens that `launches` feed; and the ones that `greedy` chooses.
        slot: [1] int32, the last slot that holds a token.
        first: [texts] int32, the first slot of each text.
        logits: [texts, vocabulary] of the token after the last.
    """

    def __init__(self, model: PreTrainedModel, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        config = model.config
        embeddings = _embeddings(model)
        self.device, dtype = embeddings.device, embeddings.dtype
        blocks = list(model.model.layers)[: config.num_hidden_layers]
        texts, kv_heads, capacity, head_dim = keys[0].shape
        heads = config.num_attention_heads
        new = _Allocator(self.device, dtype)
        self.token = torch.zeros(texts, dtype=torch.int64, device=self.device)
        self.slot = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.first = torch.zeros(texts, dtype=torch.int32, device=self.device)
        self.logits = new(texts, model.lm_head.out_features)
        self._argmax_scratch = torch.zeros(2 * texts, dtype=torch.int64, device=self.device)
        self._splits = _count_splits(self.device, capacity, texts, heads, kv_heads)
        self._partial = torch.empty(
            texts * heads * self._splits * (head_dim + 2), dtype=torch.float32, device=self.device
        )
        self._tickets = torch.zeros(texts * heads, dtype=torch.int32, device=self.device)
        self._cosines, self._sines = _rotations(model, capacity, dtype)

        x = new(texts, config.hidden_size)
        qkv = new(texts, (heads + 2 * kv_heads) * head_dim)
        attended = new(texts, heads * head_dim)
        gate_up = new(texts, 2 * config.intermediate_size)
        token, slot = self.token, self.slot  # not self: a decoder in its own launches would be a cycle
        self.launches = [Launch("rest", lambda: native_decode.begin_token(token, embeddings, x, slot))]

        def add(
            layers: Sequence[nn.Module], transform: Input, source: Tensor, to: Tensor, residual: Tensor | None
        ) -> None:
            multiply = make_product(layers, transform, texts, dtype)
            self.launches.append(Launch("linears", lambda: multiply(source, to, residual)))

        for index, block in enumerate(blocks):
            attention, mlp = block.self_attn, block.mlp
            norm = _norm_input(block.input_layernorm)
            add([attention.q_proj, attention.k_proj, attention.v_proj], norm, x, qkv, None)
            queries = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
            self.launches.append(
                self._attention(
                    *(qkv, keys[index], values[index], attended, queries),
                    *(heads, attention.scaling, _window(model, attention)),
                )
            )
            add([attention.o_proj], Input.plain(), attended, x, x)
            add([mlp.gate_proj, mlp.up_proj], _norm_input(block.post_attention_layernorm), x, gate_up, None)
            add([mlp.down_proj], Input.silu_gate(), gate_up, x, x)
        add([model.lm_head], _norm_input(model.model.norm), x, self.logits, None)

    def greedy(self) -> None:
        """Choose the most probable tokens."""
        native_decode.argmax(self.logits, self.token, self._argmax_scratch)

    def _attention(
        self,
        qkv: Tensor,
        keys: Tensor,
        values: Tensor,
        y: Tensor,
        norms: tuple[nn.Module | None, nn.Module | None],
        heads: int,
        scale: float,
        window: int,
    ) -> Launch:
        texts, kv_heads, capacity, head_dim = keys.shape
        query_norm, key_norm = ((None, 0.0) if norm is None else _norm(norm) for norm in norms)
        arrays = (
            *(qkv, keys, values, self._cosines, self._sines, query_norm[0], key_norm[0]),
            *(self.slot, self.first, y, self._partial, self._tickets),
        )
        attention = Attention(
            *(None if array is None else array.data_ptr() for array in arrays),
            *(scale, query_norm[1]),
            *(texts, heads, kv_heads, head_dim, capacity, window, self._splits, CODES[qkv.dtype]),
        )
        return Launch("attention", lambda: native_decode.decode_attention(attention, y))


@dataclass(frozen=True)
class _Allocator:
    device: torch.device
    dtype: torch.dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


def _embeddings(model: PreTrainedModel) -> Tensor:
    return model.get_input_embeddings().weight  # type: ignore[return-value]


def _head_dim(model: PreTrainedModel) -> int:
    return int(model.model.layers[0].self_attn.head_dim)


def _norm(norm: nn.Module) -> tuple[Tensor, float]:
    """The weight and epsilon of an RMSNorm of the families above."""
    return norm.weight, float(norm.variance_epsilon)  # type: ignore[return-value, arg-type]


def _norm_input(norm: nn.Module) -> Input:
    return Input.rms_norm(*_norm(norm))


def _window(model: PreTrainedModel, attention: nn.Module) -> int:
    """Most tokens that a token of this block sees, itself included; 0 for all."""
    # Mistral asks its config, Qwen each block; a Llama config may name a window that Llama does not have.
    owner = model.config if type(model).__name__ == "MistralForCausalLM" else attention
    return int(getattr(owner, "sliding_window", None) or 0)


@torch.inference_mode()
def _rotations(model: PreTrainedModel, positions: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the model's rotary embedding, [positions, head_dim] each."""
    ids = torch.arange(positions, device=model.device)[None]
    cosines, sines = model.model.rotary_emb(torch.empty(0, dtype=dtype, device=model.device), ids)
    return cosines[0].contiguous(), sines[0].contiguous()


def _count_splits(device: torch.device, capacity: int, texts: int, heads: int, kv_heads: int) -> int:
    """Blocks that share a head's slots: as many as fill the GPU, if there is enough for each to do."""
    blocks = texts * kv_heads * -(-heads // kv_heads // _HEADS_OF_BLOCK)
    room = _BLOCKS_OF_SM * torch.cuda.get_device_properties(device).multi_processor_count // blocks
    return max(1, min(room, capacity // _SLOTS_OF_SPLIT, native_decode.MAX_SPLITS))
