"""The canonical layout: the arrays of docs/format.md, as they are stored.

The CPU runs the native library, and so do NVIDIA GPUs that its CUDA kernels run on. Other devices run `format.py`'s plain
torch, which is right everywhere and fast nowhere.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from macko_llm import format as spec
from macko_llm import native
from macko_llm.format import MackoMatrix
from macko_llm.layouts.layout import Layout

SPMV_MAX_TOKENS = 2
"""Up to this many tokens SpMV reads the canonical arrays; beyond, unpacking for a dense product is faster (measured on a
CPU, docs/design.md)."""


@dataclass(frozen=True)
class Canonical(MackoMatrix, Layout):
    """Canonical arrays, as a layout that is multiplied."""

    @classmethod
    def of(cls, matrix: MackoMatrix) -> "Canonical":
        """The layout that shares a valid matrix's arrays."""
        return cls(matrix.values, matrix.deltas, matrix.row_offsets, matrix.shape)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]  # it is not assigned to
        """Of the values."""
        return self.values.dtype

    @property
    def buffer(self) -> None:  # type: ignore[override]
        """None: a layer has these arrays as they are."""
        return

    @property
    def summary(self) -> str:  # type: ignore[override]
        """See Layout."""
        return f"entries={self.values.numel()}"

    def canonical(self) -> MackoMatrix:
        """See Layout."""
        return self

    def dense(self) -> Tensor:
        """See Layout."""
        return unpack(self)

    def few_tokens(self, dtype: torch.dtype) -> int:
        """See Layout."""
        return SPMV_MAX_TOKENS if dtype in (self.dtype, torch.float32) else 0

    def _spmv(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = torch.ops.macko.spmv(x, self.values, self.deltas, self.row_offsets, bias)
        return y

    def _differentiable(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = torch.ops.macko.linear(x, self.values, self.deltas, self.row_offsets, bias)
        return y


def pack(weight: Tensor) -> Canonical:
    """`format.pack` at the speed of the device: a [rows, cols] float16 or bfloat16 matrix without its zeros."""
    spec.check_shape(weight)
    if weight.device.type != "cpu":  # where the library sees while it counts what is not finite
        spec.check_finite(spec.all_finite(weight))
    return pack_finite(weight)


def pack_finite(weight: Tensor) -> Canonical:
    """`pack` of a matrix in which no NaN or infinity is left to be found; raises FormatError like `pack`."""
    spec.check_shape(weight)
    values, deltas, row_offsets = torch.ops.macko.pack(weight)
    return Canonical(values, deltas, row_offsets, (weight.shape[0], weight.shape[1]))


def unpack(matrix: MackoMatrix) -> Tensor:
    """`format.unpack` at the speed of the device: the dense [rows, cols] matrix."""
    weight: Tensor = torch.ops.macko.unpack(matrix.values, matrix.deltas, matrix.row_offsets, matrix.shape[1])
    return weight


def count_nonzeros(matrix: MackoMatrix) -> int:
    """How many values of a valid matrix are not zero."""
    if matrix.values.device.type == "cpu":  # where torch counts at a tenth of the speed
        return int(native.cpu_bitmap_starts(matrix)[-1])
    return int(torch.count_nonzero(matrix.values))


def validate(matrix: MackoMatrix, name: str) -> Canonical:
    """`format.validate` at the speed of the device.

    Returns:
        The matrix as a layout that may be multiplied.

    Raises:
        FormatError: it breaks an invariant of the format.
    """
    row_spans = spec.row_spans
    if matrix.values.device.type == "cpu":
        row_spans = native.cpu_row_spans
    elif native.runs_on(matrix.values.device):
        row_spans = native.cuda_row_spans
    spec.validate(matrix, name, row_spans)
    return Canonical.of(matrix)


_library = torch.library.Library("macko", "FRAGMENT")
_library.define("pack(Tensor weight) -> (Tensor values, Tensor deltas, Tensor row_offsets)")
_library.define("unpack(Tensor values, Tensor deltas, Tensor row_offsets, SymInt cols) -> Tensor")
_library.define("spmv(Tensor x, Tensor values, Tensor deltas, Tensor row_offsets, Tensor? bias) -> Tensor")
# The dense product whose gradient unpacks again.
_library.define("linear(Tensor x, Tensor values, Tensor deltas, Tensor row_offsets, Tensor? bias) -> Tensor")


def _matrix(values: Tensor, deltas: Tensor, row_offsets: Tensor, cols: int) -> MackoMatrix:
    return MackoMatrix(values, deltas, row_offsets, (row_offsets.shape[0] - 1, cols))


@torch.library.impl(_library, "pack", "CompositeExplicitAutograd")
def _pack_any(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    matrix = spec.pack(weight)
    return matrix.values, matrix.deltas, matrix.row_offsets


@torch.library.impl(_library, "unpack", "CompositeExplicitAutograd")
def _unpack_any(values: Tensor, deltas: Tensor, row_offsets: Tensor, cols: int) -> Tensor:
    return spec.unpack(_matrix(values, deltas, row_offsets, cols))


@torch.library.impl(_library, "spmv", "CompositeExplicitAutograd")
def _spmv_any(x: Tensor, values: Tensor, deltas: Tensor, row_offsets: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, _unpack_any(values, deltas, row_offsets, x.shape[1]).to(x.dtype), bias)


@torch.library.impl(_library, "linear", "CompositeExplicitAutograd")
def _linear_any(x: Tensor, values: Tensor, deltas: Tensor, row_offsets: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, torch.ops.macko.unpack(values, deltas, row_offsets, x.shape[-1]).to(x.dtype), bias)


@torch.library.impl(_library, "pack", "CPU")
def _pack_cpu(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    matrix = native.cpu_pack(weight.contiguous())
    return matrix.values, matrix.deltas, matrix.row_offsets


@torch.library.impl(_library, "unpack", "CPU")
def _unpack_cpu(values: Tensor, deltas: Tensor, row_offsets: Tensor, cols: int) -> Tensor:
    return native.cpu_unpack(_matrix(values, deltas, row_offsets, cols))


@torch.library.impl(_library, "spmv", "CPU")
def _spmv_cpu(x: Tensor, values: Tensor, deltas: Tensor, row_offsets: Tensor, bias: Tensor | None) -> Tensor:
    matrix = _matrix(values, deltas, row_offsets, x.shape[1])
    return native.cpu_spmv(matrix, x.contiguous(), None if bias is None else bias.contiguous())


@torch.library.impl(_library, "pack", "CUDA")
def _pack_cuda(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not native.runs_on(weight.device):
        return _pack_any(weight)
    matrix = native.cuda_pack(weight.contiguous())
    return matrix.values, matrix.deltas, matrix.row_offsets


@torch.library.impl(_library, "unpack", "CUDA")
def _unpack_cuda(values: Tensor, deltas: Tensor, row_offsets: Tensor, cols: int) -> Tensor:
    if not native.runs_on(values.device):
        return _unpack_any(values, deltas, row_offsets, cols)
    return native.cuda_unpack(_matrix(values, deltas, row_offsets, cols))


@torch.library.impl(_library, "spmv", "CUDA")
def _spmv_cuda(x: Tensor, values: Tensor, deltas: Tensor, row_offsets: Tensor, bias: Tensor | None) -> Tensor:
    if not native.runs_on(x.device):
        return _spmv_any(x, values, deltas, row_offsets, bias)
    matrix = _matrix(values, deltas, row_offsets, x.shape[1])
    y = native.cuda_spmv_rows(matrix, x.contiguous(), None if bias is None else bias.contiguous())
    # The kernel reads x where a row has entries; 0 x infinity elsewhere is NaN as well.
    return y.add_((x * 0).sum(dim=1, keepdim=True))


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
    return x.new_empty(*x.shape[:-1], row_offsets.shape[0] - 1)


torch.library.register_fake("macko::linear")(_spmv_fake)


def _keep_packed(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    del output
    x, values, deltas, row_offsets, _ = inputs
    ctx.save_for_backward(values, deltas, row_offsets)
    ctx.cols = x.shape[-1]


def _linear_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, None, None, Tensor | None]:
    wants_x, *_, wants_bias = ctx.needs_input_grad
    x = upstream @ torch.ops.macko.unpack(*ctx.saved_tensors, ctx.cols).to(upstream.dtype) if wants_x else None
    return x, None, None, None, upstream.sum_to_size(upstream.shape[-1]) if wants_bias else None


torch.library.register_autograd("macko::linear", _linear_backward, setup_context=_keep_packed, lib=_library)
