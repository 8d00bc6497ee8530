"""The operations on packed matrices as torch ops (`torch.ops.macko.*`): schemas, fake kernels, implementations.

The CPU runs the native library. Other devices run `format.py`'s plain torch, which is right everywhere and fast nowhere.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from macko_llm import format as spec
from macko_llm import native
from macko_llm.errors import FormatError
from macko_llm.format import MackoMatrix

SPMV_MAX_TOKENS = 2
"""Up to this many tokens SpMV reads the packed matrix once a token; beyond, unpacking for a dense product is faster
(measured, docs/design.md)."""

_library = torch.library.Library("macko", "DEF")
_library.define("pack(Tensor weight) -> (Tensor values, Tensor deltas, Tensor row_offsets)")
_library.define("unpack(Tensor values, Tensor deltas, Tensor row_offsets, SymInt cols) -> Tensor")
_library.define("spmv(Tensor x, Tensor values, Tensor deltas, Tensor row_offsets, Tensor? bias) -> Tensor")


def pack(weight: Tensor) -> MackoMatrix:
    """`format.pack` at the speed of the device: a [rows, cols] float16 or bfloat16 matrix without its zeros."""
    spec.check_packable(weight)
    values, deltas, row_offsets = torch.ops.macko.pack(weight)
    return MackoMatrix(values, deltas, row_offsets, (weight.shape[0], weight.shape[1]))


def unpack(matrix: MackoMatrix) -> Tensor:
    """`format.unpack` at the speed of the device: the dense [rows, cols] matrix."""
    return torch.ops.macko.unpack(matrix.values, matrix.deltas, matrix.row_offsets, matrix.shape[1])


def validate(matrix: MackoMatrix, name: str) -> None:
    """`format.validate` at the speed of the device; raises FormatError."""
    on_cpu = matrix.values.device.type == "cpu"
    spec.validate(matrix, name, native.cpu_row_spans if on_cpu else spec.row_spans)


def linear(x: Tensor, matrix: MackoMatrix, bias: Tensor | None) -> Tensor:
    """Y = x Wᵀ + bias for a packed W, accumulated in float32.

    Args:
        x: [..., cols], of the matrix's value dtype or float32, on its device.
        matrix: a valid [rows, cols] matrix.
        bias: [rows] of x's dtype, or None.

    Returns:
        [..., rows] of x's dtype.

    Raises:
        FormatError: x has another width or dtype.
    """
    rows, cols = matrix.shape
    if x.shape[-1] != cols:
        raise FormatError(f"The input has {x.shape[-1]} features and the matrix {cols} columns; give it [..., {cols}].")
    if x.dtype not in (matrix.values.dtype, torch.float32):
        raise FormatError(
            f"The input is {x.dtype} and the packed values are {matrix.values.dtype}; "
            f"convert the input, or pack the model with the other --dtype."
        )
    tokens = x.numel() // cols
    if tokens <= SPMV_MAX_TOKENS and not (torch.is_grad_enabled() and x.requires_grad):
        y = torch.ops.macko.spmv(x.reshape(tokens, cols), matrix.values, matrix.deltas, matrix.row_offsets, bias)
        return y.view(*x.shape[:-1], rows)
    return F.linear(x, unpack(matrix).to(x.dtype), bias)


@torch.library.impl(_library, "pack", "CompositeExplicitAutograd")
def _pack_any(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    matrix = spec.pack(weight)
    return matrix.values, matrix.deltas, matrix.row_offsets


@torch.library.impl(_library, "unpack", "CompositeExplicitAutograd")
def _unpack_any(values: Tensor, deltas: Tensor, row_offsets: Tensor, cols: int) -> Tensor:
    return spec.unpack(MackoMatrix(values, deltas, row_offsets, (len(row_offsets) - 1, cols)))


@torch.library.impl(_library, "spmv", "CompositeExplicitAutograd")
def _spmv_any(x: Tensor, values: Tensor, deltas: Tensor, row_offsets: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, _unpack_any(values, deltas, row_offsets, x.shape[1]).to(x.dtype), bias)


@torch.library.impl(_library, "pack", "CPU")
def _pack_cpu(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    matrix = native.cpu_pack(weight.contiguous())
    return matrix.values, matrix.deltas, matrix.row_offsets


@torch.library.impl(_library, "unpack", "CPU")
def _unpack_cpu(values: Tensor, deltas: Tensor, row_offsets: Tensor, cols: int) -> Tensor:
    return native.cpu_unpack(MackoMatrix(values, deltas, row_offsets, (len(row_offsets) - 1, cols)))


@torch.library.impl(_library, "spmv", "CPU")
def _spmv_cpu(x: Tensor, values: Tensor, deltas: Tensor, row_offsets: Tensor, bias: Tensor | None) -> Tensor:
    matrix = MackoMatrix(values, deltas, row_offsets, (len(row_offsets) - 1, x.shape[1]))
    return native.cpu_spmv(matrix, x.contiguous(), None if bias is None else bias.contiguous())


@torch.library.register_fake("macko::pack")
def _pack_fake(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = torch.library.get_ctx().new_dynamic_size()
    entries = groups * spec.ENTRY_ALIGNMENT
    return (
        weight.new_empty(entries),
        weight.new_empty(entries // 2, dtype=torch.uint8),
        weight.new_empty(weight.shape[0] + 1, dtype=torch.int32),
    )


@torch.library.register_fake("macko::unpack")
def _unpack_fake(values: Tensor, deltas: Tensor, row_offsets: Tensor, cols: int) -> Tensor:
    del deltas
    return values.new_empty(row_offsets.shape[0] - 1, cols)


@torch.library.register_fake("macko::spmv")
def _spmv_fake(x: Tensor, values: Tensor, deltas: Tensor, row_offsets: Tensor, bias: Tensor | None) -> Tensor:
    del values, deltas, bias
    return x.new_empty(x.shape[0], row_offsets.shape[0] - 1)
