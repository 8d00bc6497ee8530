"""The layout in which a GPU's tensor cores multiply several tokens: tiles, whose values are expanded into registers.

A bit says of each position of a tile whether there is a value (`tiled_plan.py`, csrc/cuda/tiled.cuh). Of the canonical
arrays it lacks the zeros that bridge long gaps, which the format's rule determines; so packing what it unpacks to gives
the same canonical bytes.

Matrices that multiply the same input (q, k and v of a layer) are cut together, so that one kernel can multiply them all;
each stays a matrix of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from macko_llm import native
from macko_llm.dtypes import CODES, VALUE_DTYPES
from macko_llm.errors import NativeError
from macko_llm.format import MackoMatrix
from macko_llm.layouts.canonical import pack_finite
from macko_llm.layouts.choice import TILED_CAPABILITY
from macko_llm.layouts.gpu_layout import GpuLayout
from macko_llm.layouts.tiled_plan import MAX_COLS, TiledPlan, choose_strips, count_records
from macko_llm.native import TiledStruct, TiledStructs

TILED_SPMM_MAX_TOKENS = 64
"""Up to this many tokens SpMM, 32 at a time, is faster than unpacking for a dense product."""
WARPGROUP_SPMM_MAX_TOKENS = 1024
"""The same on Hopper, where they are multiplied at once; measured on an H200."""


@dataclass(frozen=True)
class TiledMatrix(GpuLayout):
    """A matrix on a GPU of `TILED_CAPABILITY`.

    Attributes:
        data: [plan.nbytes] uint8.
        plan: what its bytes mean.
    """

    data: Tensor
    plan: TiledPlan

    @property
    def rows(self) -> int:
        """See GpuLayout."""
        return self.plan.rows

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """See Layout."""
        return self.plan.rows, self.plan.cols

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """See Layout."""
        return self.plan.dtype

    @property
    def buffer(self) -> Tensor:  # type: ignore[override]
        """See Layout."""
        return self.data

    @property
    def summary(self) -> str:  # type: ignore[override]
        """See Layout."""
        return f"strips={self.plan.strips}"

    @property
    def numbers(self) -> list[int]:
        """All but the data and its dtype in whole numbers, which the schema of a torch op can carry."""
        plan = self.plan
        return [plan.rows, plan.cols, plan.strips, plan.units, plan.record_bytes]

    @classmethod
    def from_numbers(cls, data: Tensor, dtype: torch.dtype, numbers: Sequence[int]) -> "TiledMatrix":
        """The matrix that has these `numbers`."""
        rows, cols, strips, units, record_bytes = numbers
        return cls(data, TiledPlan(rows, cols, dtype, strips, units, record_bytes))

    @cached_property
    def struct(self) -> TiledStruct:
        """What the library is given; lives as long as the matrix."""
        plan, address = self.plan, self.data.data_ptr()
        return TiledStruct(
            *(address, address + plan.starts_offset),
            *(plan.rows, plan.cols, plan.strips, plan.record_bytes, CODES[plan.dtype]),
        )

    @cached_property
    def address(self) -> int:
        """Of the struct."""
        return native.address_of(self.struct)

    def __getstate__(self) -> dict[str, object]:
        """What a copy takes along: not the struct, whose addresses are this matrix's."""
        return {"data": self.data, "plan": self.plan}

    def canonical(self) -> MackoMatrix:
        """See Layout."""
        return pack_finite(native.cuda_tiled_unpack(self))

    def dense(self) -> Tensor:
        """See Layout."""
        weight: Tensor = torch.ops.macko.tiled_unpack(self.data, self.dtype, self.numbers)
        return weight

    def few_tokens(self, dtype: torch.dtype) -> int:
        """See Layout. Tensor cores would round float32, so that takes the dense product."""
        return self._most_tokens if dtype is self.plan.dtype else 0

    @cached_property
    def _most_tokens(self) -> int:
        hopper = self.data.is_cuda and torch.cuda.get_device_capability(self.data.device)[0] == 9
        return WARPGROUP_SPMM_MAX_TOKENS if hopper else TILED_SPMM_MAX_TOKENS

    def _fill(self, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
        native.cuda_tiled_spmm(self.address, 1, x, bias, None, y)

    def _spmv(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = torch.ops.macko.tiled_spmm(x, self.data, bias, self.dtype, self.numbers)
        return y

    def _differentiable(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = torch.ops.macko.tiled_linear(x, self.data, bias, self.dtype, self.numbers)
        return y


@dataclass(frozen=True)
class TiledGroup:
    """Tiled matrices that multiply the same input, one below the other as one matrix.

    Attributes:
        members: 1 to `native.TILED_MEMBERS`, of one dtype, with as many columns and on one GPU.
    """

    members: tuple[TiledMatrix, ...]

    @classmethod
    def of(cls, matrices: Sequence[TiledMatrix]) -> "TiledGroup | None":
        """The group of these matrices, at least one; None where no kernel multiplies them together."""
        kinds = {(matrix.plan.cols, matrix.plan.dtype, matrix.data.device) for matrix in matrices}
        return cls(tuple(matrices)) if len(kinds) == 1 and len(matrices) <= native.TILED_MEMBERS else None

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.members[0].dtype

    @property
    def is_cut_together(self) -> bool:
        """Whether the members' strips are those that `arrange_group` gives them, not what each would have alone."""
        rows = [member.rows for member in self.members]
        gpu = torch.cuda.get_device_properties(self.members[0].data.device)
        return [member.plan.strips for member in self.members] == choose_strips(rows, gpu.multi_processor_count)

    @cached_property
    def structs(self) -> TiledStructs:
        """What the library is given; lives as long as the group."""
        return native.tiled_structs([member.struct for member in self.members])

    def __getstate__(self) -> dict[str, object]:
        """What a copy takes along: not the structs, whose addresses are these members'."""
        return {"members": self.members}

    def few_tokens(self, dtype: torch.dtype) -> int:
        """Up to this many tokens of a dtype `multiply` is faster than a dense product, 0 if it takes none; see Layout."""
        return self.members[0].few_tokens(dtype)

    def multiply(self, x: Tensor, bias: Tensor | None, residual: Tensor | None, y: Tensor) -> None:
        """Y = x Wᵀ + bias + residual for a few tokens, by one kernel; all contiguous, of the group's dtype and on its GPU.

        Args:
            x: [tokens, cols].
            bias: [rows of all members].
            residual: [tokens, rows of all members].
            y: [tokens, rows of all members]; filled; may be the residual.
        """
        native.cuda_tiled_spmm(native.address_of(self.structs), len(self.members), x, bias, residual, y)


def arrange(matrix: MackoMatrix) -> TiledMatrix | None:
    """The tiled layout of a valid matrix; None where it does not suit, see `arrange_group`."""
    members = arrange_group([matrix])
    return members[0] if members else None


def arrange_group(matrices: Sequence[MackoMatrix]) -> list[TiledMatrix] | None:
    """The tiled layouts of matrices that multiply the same input, cut so that one kernel multiplies them fast.

    Dense is the way there, one matrix at a time.

    Args:
        matrices: valid, at least one.

    Returns:
        A matrix for each, or None where the layout does not suit them together: on a CPU, without CUDA kernels, on a GPU
        older than `TILED_CAPABILITY`; for a matrix without rows, or that would take more memory than the dense one; for more
        than `MAX_COLS` columns; for more than `native.TILED_MEMBERS` matrices; and where their columns, dtypes or devices
        differ.
    """
    kinds = {(matrix.shape[1], matrix.values.dtype, matrix.values.device) for matrix in matrices}
    cols, dtype, device = next(iter(kinds))
    member_rows = [matrix.shape[0] for matrix in matrices]
    if len(kinds) > 1 or len(matrices) > native.TILED_MEMBERS or 0 in member_rows or cols > MAX_COLS:
        return None
    if dtype not in VALUE_DTYPES.values() or not native.runs_on(device):
        return None
    gpu = torch.cuda.get_device_properties(device)
    if (gpu.major, gpu.minor) < TILED_CAPABILITY:
        return None
    members = []
    for matrix, strips in zip(matrices, choose_strips(member_rows, gpu.multi_processor_count), strict=True):
        weight = native.cuda_unpack(matrix)
        plan, starts = plan_records(weight, strips)
        if plan.nbytes > weight.nbytes:
            return None
        members.append(fill_records(weight, plan, starts))
    # A later SpMM may fetch weights before the kernels queued ahead of it are done (csrc/macko.h).
    torch.cuda.current_stream(device).synchronize()
    return members


def plan_records(weight: Tensor, strips: int) -> tuple[TiledPlan, Tensor]:
    """Plan for a dense [rows, cols] matrix on a GPU, with at least a row, and [records + 1] int32 starts of its records."""
    records = count_records(weight.shape[1], strips)
    units = torch.empty(records, dtype=torch.int32, device=weight.device)
    native.cuda_tiled_count(weight, strips, units)
    starts = torch.zeros(records + 1, dtype=torch.int64, device=weight.device)
    torch.cumsum(units, dim=0, out=starts[1:])
    total, most = torch.stack([starts[-1], units.max().to(torch.int64)]).tolist()
    return TiledPlan.of((weight.shape[0], weight.shape[1]), weight.dtype, strips, total, most), starts.to(torch.int32)


def fill_records(weight: Tensor, plan: TiledPlan, starts: Tensor) -> TiledMatrix:
    """The matrix that a dense one becomes by what `plan_records` said of it."""
    tiled = TiledMatrix(torch.zeros(plan.nbytes, dtype=torch.uint8, device=weight.device), plan)
    tiled.data[plan.starts_offset :] = starts.view(torch.uint8)
    native.cuda_tiled_pack(weight, tiled)
    return tiled


_library = torch.library.Library("macko", "FRAGMENT")
# `numbers` are TiledMatrix.numbers.
_library.define("tiled_unpack(Tensor data, ScalarType dtype, int[] numbers) -> Tensor")
_library.define("tiled_spmm(Tensor x, Tensor data, Tensor? bias, ScalarType dtype, int[] numbers) -> Tensor")
# The dense product whose gradient unpacks again.
_library.define("tiled_linear(Tensor x, Tensor data, Tensor? bias, ScalarType dtype, int[] numbers) -> Tensor")


@torch.library.impl(_library, "tiled_unpack", "CUDA")
def _unpack_cuda(data: Tensor, dtype: torch.dtype, numbers: list[int]) -> Tensor:
    return native.cuda_tiled_unpack(TiledMatrix.from_numbers(data, dtype, numbers))


@torch.library.impl(_library, "tiled_spmm", "CUDA")
def _spmm_cuda(x: Tensor, data: Tensor, bias: Tensor | None, dtype: torch.dtype, numbers: list[int]) -> Tensor:
    matrix = TiledMatrix.from_numbers(data, dtype, numbers)
    native.check_spmv(x, data, bias, matrix.rows)
    y = x.new_empty(x.shape[0], matrix.rows)
    if len(x) == 0:
        return y
    if x.dtype != dtype:
        raise NativeError(f"The input is {x.dtype} and the tiles are {dtype}; convert the input to their dtype.")
    matrix._fill(x.contiguous(), None if bias is None else bias.contiguous(), y)
    return y


@torch.library.impl(_library, "tiled_linear", "CompositeExplicitAutograd")
def _linear_any(x: Tensor, data: Tensor, bias: Tensor | None, dtype: torch.dtype, numbers: list[int]) -> Tensor:
    return F.linear(x, torch.ops.macko.tiled_unpack(data, dtype, numbers).to(x.dtype), bias)


@torch.library.register_fake("macko::tiled_unpack")
def _unpack_fake(data: Tensor, dtype: torch.dtype, numbers: list[int]) -> Tensor:
    return data.new_empty(numbers[:2], dtype=dtype)


@torch.library.register_fake("macko::tiled_spmm")
def _spmm_fake(x: Tensor, data: Tensor, bias: Tensor | None, dtype: torch.dtype, numbers: list[int]) -> Tensor:
    del data, bias, dtype
    return x.new_empty(*x.shape[:-1], numbers[0])


torch.library.register_fake("macko::tiled_linear")(_spmm_fake)


def _keep_packed(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, torch.dtype, list[int]], output: Tensor
) -> None:
    del output
    _, data, _, ctx.dtype, ctx.numbers = inputs
    ctx.save_for_backward(data)


def _linear_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
    wants_x, _, wants_bias, *_ = ctx.needs_input_grad
    (data,) = ctx.saved_tensors
    x = None
    if wants_x:
        x = upstream @ torch.ops.macko.tiled_unpack(data, ctx.dtype, ctx.numbers).to(upstream.dtype)
    return x, None, upstream.reshape(-1, upstream.shape[-1]).sum(0) if wants_bias else None, None, None


torch.library.register_autograd("macko::tiled_linear", _linear_backward, setup_context=_keep_packed, lib=_library)
