"""The CUDA kernels of a decoded token: dense products, attention, and what lies between; part of what `native.py` knows."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from macko_llm.dtypes import CODES
from macko_llm.native import OnGpu, call_cuda, sliced_max_cols

_INT32, _INT64, _FLOAT, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_PLAIN, _RMS_NORM, _SILU_GATE = 0, 1, 2
DENSE_PARTS = 3
"""Dense matrices that one product takes at most."""
DENSE_MAX_COLS = 32768
HEAD_DIMS = (16, 32, 64, 128, 256)
"""Head dimensions that the attention is compiled for."""
MAX_SPLITS = 64


class Input(ctypes.Structure):
    """`macko_input` of csrc/macko.h: what becomes of x before a product."""

    _fields_ = (("norm_weight", _POINTER), ("norm_epsilon", _FLOAT), ("transform", _INT32))

    @classmethod
    def plain(cls) -> "Input":
        """No transform."""
        return cls(None, 0.0, _PLAIN)

    @property
    def is_plain(self) -> bool:
        """Whether there is no transform."""
        return bool(self.transform == _PLAIN)

    @classmethod
    def rms_norm(cls, weight: Tensor, epsilon: float) -> "Input":
        """RMSNorm with a weight [cols], which must outlive this."""
        return cls(weight.data_ptr(), epsilon, _RMS_NORM)

    @classmethod
    def silu_gate(cls) -> "Input":
        """silu(gate) * up of x = [gate, up]."""
        return cls(None, 0.0, _SILU_GATE)


class Dense(ctypes.Structure):
    """`macko_dense`: up to DENSE_PARTS dense matrices with one input, whose outputs lie one behind the other."""

    _fields_ = (
        ("weights", _POINTER * DENSE_PARTS),
        ("biases", _POINTER * DENSE_PARTS),
        ("rows", _INT32 * DENSE_PARTS),
        ("cols", _INT32),
        ("value_dtype", _INT32),
    )

    @classmethod
    def of(cls, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> "Dense":
        """Contiguous weights [rows, cols] and biases [rows] of one dtype on one GPU, which must outlive this."""
        parts = DENSE_PARTS - len(weights)
        return cls(
            (_POINTER * DENSE_PARTS)(*(weight.data_ptr() for weight in weights), *[None] * parts),
            (_POINTER * DENSE_PARTS)(*(None if bias is None else bias.data_ptr() for bias in biases), *[None] * parts),
            (_INT32 * DENSE_PARTS)(*(weight.shape[0] for weight in weights), *[0] * parts),
            weights[0].shape[1],
            CODES[weights[0].dtype],
        )


class Attention(ctypes.Structure):
    """`macko_attention`: the attention of one new token a text; the fields are described in csrc/macko.h."""

    _fields_ = (
        *(
            (name, _POINTER)
            for name in (
                *("qkv", "keys", "values", "cosines", "sines", "query_norm", "key_norm"),
                *("slot", "first", "y", "partial", "tickets"),
            )
        ),
        ("scale", _FLOAT),
        ("norm_epsilon", _FLOAT),
        *(
            (name, _INT32)
            for name in ("texts", "heads", "kv_heads", "head_dim", "capacity", "window", "splits", "dtype")
        ),
    )


def sliced_spmv(
    matrix: OnGpu, x: Tensor, transform: Input, bias: Tensor | None, residual: Tensor | None, y: Tensor
) -> None:
    """Y = transform(x) Wᵀ + bias + residual for a few tokens, or for one where there is a transform.

    Args:
        matrix: [rows, cols].
        x: [tokens, cols], or what the transform reads, contiguous, of the values' dtype.
        transform: what becomes of x.
        bias: [rows] of that dtype, or None.
        residual: [tokens, rows] of that dtype, or None.
        y: [tokens, rows] of that dtype; filled; may be the residual.
    """
    pointers = x.data_ptr(), _pointer(bias), _pointer(residual), y.data_ptr()
    tokens = y.numel() // matrix.shape[0]
    call_cuda(
        "macko_cuda_sliced_spmv",
        (matrix.data, x, y),
        *(matrix.address, ctypes.addressof(transform), *pointers, CODES[x.dtype], tokens),
    )


def dense_gemv(matrix: Dense, x: Tensor, transform: Input, residual: Tensor | None, y: Tensor) -> None:
    """Y = transform(x) Wᵀ + bias + residual for one token, all of one dtype on one GPU; y may be the residual."""
    addresses = ctypes.addressof(matrix), ctypes.addressof(transform)
    call_cuda("macko_cuda_dense_gemv", (x, y), *addresses, x.data_ptr(), _pointer(residual), y.data_ptr())


def apply_transform(transform: Input, x: Tensor, y: Tensor) -> None:
    """[tokens, cols], or what the transform reads, -> y [tokens, cols], both contiguous and of one dtype."""
    tokens, cols = y.shape
    call_cuda(
        "macko_cuda_transform",
        (x, y),
        *(ctypes.addressof(transform), x.data_ptr(), y.data_ptr(), tokens, cols, CODES[x.dtype]),
    )


def begin_token(tokens: Tensor, embeddings: Tensor, x: Tensor, slot: Tensor) -> None:
    """Look up [texts] int64 tokens in embeddings [vocabulary, hidden], x [texts, hidden], and move `slot` [1] int32 on."""
    vocabulary, hidden = embeddings.shape
    pointers = (tensor.data_ptr() for tensor in (tokens, embeddings, x, slot))
    call_cuda("macko_cuda_begin_token", (tokens, embeddings, x, slot), *pointers, len(tokens), hidden, vocabulary)


def decode_attention(attention: Attention, y: Tensor) -> None:
    """Run an attention, whose arrays lie on the GPU of its output y."""
    call_cuda("macko_cuda_decode_attention", (y,), ctypes.addressof(attention))


def argmax(logits: Tensor, tokens: Tensor, scratch: Tensor) -> None:
    """The first of the largest of logits [texts, vocabulary] -> tokens [texts] int64, -1 if it is not finite.

    Args:
        logits: of a 16-bit dtype.
        tokens: filled.
        scratch: [2 * texts] int64 of zeros, which it is again afterwards.
    """
    texts, vocabulary = logits.shape
    pointers = logits.data_ptr(), tokens.data_ptr(), scratch.data_ptr()
    call_cuda("macko_cuda_argmax", (logits, tokens, scratch), *pointers, texts, vocabulary, CODES[logits.dtype])


def transformed_max_cols(device: torch.device) -> int:
    """Columns for which a product with a transform finds room in the shared memory of a GPU."""
    return sliced_max_cols(device) // 2


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
