"""The operations on packed matrices as torch ops (`torch.ops.macko.*`): schemas, fake kernels, implementations.

The CPU runs the native library, and so do NVIDIA GPUs if it was built with CUDA. Other devices run `format.py`'s plain torch,
which is right everywhere and fast nowhere.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from macko_llm import format as spec
from macko_llm import native
from macko_llm.errors import FormatError
from macko_llm.format import MackoMatrix
from macko_llm.sliced import SlicedMatrix

SPMV_MAX_TOKENS = 2
"""Up to this many tokens SpMV reads the canonical arrays; beyond, unpacking for a dense product is faster (measured on a
CPU, docs/design.md)."""
SLICED_SPMV_MAX_TOKENS = 12
"""The same for the sliced layout, on an H200."""

_library = torch.library.Library("macko", "DEF")
_library.define("pack(Tensor weight) -> (Tensor values, Tensor deltas, Tensor row_offsets)")
_library.define("unpack(Tensor values, Tensor deltas, Tensor row_offsets, SymInt cols) -> Tensor")
# `numbers` are SlicedMatrix.numbers.
_library.define("sliced_unpack(Tensor data, ScalarType dtype, int[] numbers) -> Tensor")
_library.define("sliced_spmv(Tensor x, Tensor data, Tensor? bias, int[] numbers) -> Tensor")
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
    row_spans = spec.row_spans
    if matrix.values.device.type == "cpu":
        row_spans = native.cpu_row_spans
    elif matrix.values.is_cuda and native.has_cuda():
        row_spans = native.cuda_row_spans
    spec.validate(matrix, name, row_spans)


def arrange(matrix: MackoMatrix) -> SlicedMatrix | None:
    """The layout in which this matrix's GPU multiplies it fastest.

    Returns:
        None where the canonical arrays are the better layout: on a CPU, without CUDA kernels, for rows of very different
        lengths, for very many columns (`native.cuda_sliced`).
    """
    members = arrange_group([matrix])
    return members[0] if members else None


def arrange_group(matrices: Sequence[MackoMatrix]) -> list[SlicedMatrix] | None:
    """One layout of matrices that multiply the same input, so that one kernel can multiply them all.

    Args:
        matrices: valid, at least one.

    Returns:
        Each matrix as a member of the group, or None where the layout does not suit them together (see `arrange`): also if
        their columns, dtypes or devices differ.
    """
    kinds = {(matrix.shape[1], matrix.values.dtype, matrix.values.device) for matrix in matrices}
    _, dtype, device = next(iter(kinds))
    if len(kinds) > 1 or device.type != "cuda" or dtype not in spec.VALUE_DTYPES.values() or not native.has_cuda():
        return None
    group = native.cuda_sliced(matrices)
    if group is None:
        return None
    # A later SpMV may fetch weights before the kernels queued ahead of it are done (csrc/macko.h).
    torch.cuda.current_stream(device).synchronize()
    return group.members


def restore(matrix: SlicedMatrix) -> MackoMatrix:
    """The canonical arrays that `arrange` was given, bit for bit if they came from `pack`."""
    return pack(native.cuda_sliced_unpack(matrix))


def linear(x: Tensor, matrix: MackoMatrix | SlicedMatrix, bias: Tensor | None) -> Tensor:
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
    if isinstance(matrix, SlicedMatrix):
        if _is_plain(x, matrix, bias):
            y = x.new_empty((*x.shape[:-1], matrix.rows))
            native.cuda_sliced_spmv(matrix, x, bias, y)
            return y
        return _sliced_linear(x, matrix, bias)
    rows, cols = matrix.shape
    _check_input(x, cols, matrix.values.dtype)
    tokens = x.numel() // cols
    if tokens <= SPMV_MAX_TOKENS and not _wants_gradient(x):
        y = torch.ops.macko.spmv(x.reshape(tokens, cols), matrix.values, matrix.deltas, matrix.row_offsets, bias)
        return y.view(*x.shape[:-1], rows)
    return F.linear(x, unpack(matrix).to(x.dtype), bias)


def _is_plain(x: Tensor, matrix: SlicedMatrix, bias: Tensor | None) -> bool:
    """Whether the library can be called at once, past torch's dispatch of an op, which takes longer than all else here."""
    plan, data = matrix.plan, matrix.data
    return (
        type(x) is Tensor
        and type(data) is Tensor
        and not torch.compiler.is_compiling()
        and x.dtype is plan.dtype
        and x.shape[-1] == plan.cols
        and 0 < x.numel() <= SLICED_SPMV_MAX_TOKENS * plan.cols
        and x.get_device() == data.get_device()
        and x.is_contiguous()
        and (bias is None or _is_plain_bias(bias, matrix))
        and not _wants_gradient(x)
        and not _python_modes()
    )


def _is_plain_bias(bias: Tensor, matrix: SlicedMatrix) -> bool:
    return (
        bias.dtype is matrix.plan.dtype
        and bias.shape == (matrix.rows,)
        and bias.get_device() == matrix.data.get_device()
        and bias.is_contiguous()
    )


def _python_modes() -> int:
    """Modes and transforms (vmap, jvp) that want to see the op."""
    transforms = torch._C._functorch.peek_interpreter_stack() is not None
    return torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack() + transforms


def _wants_gradient(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _sliced_linear(x: Tensor, matrix: SlicedMatrix, bias: Tensor | None) -> Tensor:
    plan = matrix.plan
    _check_input(x, plan.cols, plan.dtype)
    tokens = x.numel() // plan.cols
    if tokens <= SLICED_SPMV_MAX_TOKENS and x.dtype == plan.dtype and not _wants_gradient(x):
        y = torch.ops.macko.sliced_spmv(x.reshape(tokens, plan.cols), matrix.data, bias, matrix.numbers)
        return y.view(*x.shape[:-1], matrix.rows)
    weight = torch.ops.macko.sliced_unpack(matrix.data, plan.dtype, matrix.numbers)
    return F.linear(x, weight.to(x.dtype), bias)


def _check_input(x: Tensor, cols: int, dtype: torch.dtype) -> None:
    if x.shape[-1] != cols:
        raise FormatError(f"The input has {x.shape[-1]} features and the matrix {cols} columns; give it [..., {cols}].")
    if x.dtype not in (dtype, torch.float32):
        raise FormatError(
            f"The input is {x.dtype} and the packed values are {dtype}; "
            f"convert the input, or pack the model with the other --dtype."
        )


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


@torch.library.impl(_library, "pack", "CUDA")
def _pack_cuda(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not native.has_cuda():
        return _pack_any(weight)
    matrix = native.cuda_pack(weight.contiguous())
    return matrix.values, matrix.deltas, matrix.row_offsets


@torch.library.impl(_library, "unpack", "CUDA")
def _unpack_cuda(values: Tensor, deltas: Tensor, row_offsets: Tensor, cols: int) -> Tensor:
    if not native.has_cuda():
        return _unpack_any(values, deltas, row_offsets, cols)
    return native.cuda_unpack(MackoMatrix(values, deltas, row_offsets, (len(row_offsets) - 1, cols)))


@torch.library.impl(_library, "spmv", "CUDA")
def _spmv_cuda(x: Tensor, values: Tensor, deltas: Tensor, row_offsets: Tensor, bias: Tensor | None) -> Tensor:
    if not native.has_cuda():
        return _spmv_any(x, values, deltas, row_offsets, bias)
    matrix = MackoMatrix(values, deltas, row_offsets, (len(row_offsets) - 1, x.shape[1]))
    return native.cuda_spmv_rows(matrix, x.contiguous(), None if bias is None else bias.contiguous())


@torch.library.impl(_library, "sliced_unpack", "CUDA")
def _sliced_unpack_cuda(data: Tensor, dtype: torch.dtype, numbers: list[int]) -> Tensor:
    return native.cuda_sliced_unpack(SlicedMatrix.from_numbers(data, dtype, numbers))


@torch.library.impl(_library, "sliced_spmv", "CUDA")
def _sliced_spmv_cuda(x: Tensor, data: Tensor, bias: Tensor | None, numbers: list[int]) -> Tensor:
    matrix = SlicedMatrix.from_numbers(data, x.dtype, numbers)
    native.check_spmv(x, data, bias, matrix.rows)
    y = x.new_empty(x.shape[0], matrix.rows)
    native.cuda_sliced_spmv(matrix, x.contiguous(), None if bias is None else bias.contiguous(), y)
    return y


@torch.library.register_fake("macko::sliced_unpack")
def _sliced_unpack_fake(data: Tensor, dtype: torch.dtype, numbers: list[int]) -> Tensor:
    matrix = SlicedMatrix.from_numbers(data, dtype, numbers)
    return data.new_empty(matrix.rows, matrix.plan.cols, dtype=dtype)


@torch.library.register_fake("macko::sliced_spmv")
def _sliced_spmv_fake(x: Tensor, data: Tensor, bias: Tensor | None, numbers: list[int]) -> Tensor:
    del bias
    return x.new_empty(x.shape[0], SlicedMatrix.from_numbers(data, x.dtype, numbers).rows)


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
