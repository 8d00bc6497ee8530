"""The layout in which a GPU multiplies: rows sorted by length, cut into slices, interleaved (`sliced_plan.py`).

The canonical format stays what is stored: a sliced matrix unpacks to the same dense matrix, and that packs to the same
canonical bytes.

Matrices that multiply the same input (q, k and v of a layer) share one layout, a group: its members' rows follow each
other, each member has slices of its own, and group and members all multiply and unpack by themselves.
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
from macko_llm.format import MackoMatrix
from macko_llm.layouts.canonical import pack
from macko_llm.layouts.gpu_layout import GpuLayout
from macko_llm.layouts.sliced_plan import (
    DELTA_BITS,
    MAX_PADDING,
    Shape,
    SlicedPlan,
    choose_shapes,
    count_slices,
    plan_rows,
    resident_blocks,
)
from macko_llm.native import SlicedStruct

SLICED_SPMV_MAX_TOKENS = 12
"""Up to this many tokens SpMV is faster than unpacking for a dense product, on an H200."""


@dataclass(frozen=True)
class SlicedMatrix(GpuLayout):
    """A group of sliced matrices as one matrix, whose rows are those of all members, or a view of one member.

    Attributes:
        data: [plan.nbytes] uint8 on a GPU, which a group and its members share.
        plan: what the group's bytes mean.
        member: which of the members this is, None for the group.
    """

    data: Tensor
    plan: SlicedPlan
    member: int | None = None

    @property
    def rows(self) -> int:
        """Of the dense matrix."""
        return self.plan.rows if self.member is None else self.plan.member_rows[self.member]

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """See Layout."""
        return self.rows, self.plan.cols

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
        return f"delta_bits={self.plan.delta_bits}"

    @property
    def members(self) -> "list[SlicedMatrix]":
        """Views of the group's members."""
        return [SlicedMatrix(self.data, self.plan, member) for member in range(len(self.plan.member_rows))]

    @property
    def numbers(self) -> list[int]:
        """All but the data and its dtype in whole numbers, which the schema of a torch op can carry."""
        plan = self.plan
        shape = plan.delta_bits, plan.shape.height, plan.shape.warps
        return [-1 if self.member is None else self.member, plan.cols, *shape, plan.units, *plan.member_rows]

    @classmethod
    def from_numbers(cls, data: Tensor, dtype: torch.dtype, numbers: Sequence[int]) -> "SlicedMatrix":
        """The matrix that has these `numbers`."""
        member, cols, delta_bits, height, warps, units, *member_rows = numbers
        plan = SlicedPlan(tuple(member_rows), cols, dtype, delta_bits, Shape(height, warps), units)
        return cls(data, plan, None if member < 0 else member)

    @cached_property
    def struct(self) -> SlicedStruct:
        """What the library is given; lives as long as the matrix."""
        plan, (height, warps) = self.plan, (self.plan.shape.height, self.plan.shape.warps)
        before = plan.member_rows[: self.member] if self.member is not None else ()
        own = plan.member_rows if self.member is None else (self.rows,)
        values, deltas, starts, unit_offsets, row_order = (self.data.data_ptr() + at for at in plan.array_offsets)
        first = count_slices(before, height)  # slice of a member; units are counted in the whole group
        return SlicedStruct(
            *(values, deltas, starts + first * warps * height * 2),
            *(unit_offsets + first * 4, row_order + first * height * 4),
            *(self.rows, plan.cols, count_slices(own, height), sum(before)),
            *(CODES[plan.dtype], plan.delta_bits, height, warps),
        )

    @cached_property
    def address(self) -> int:
        """Of the struct."""
        return native.address_of(self.struct)

    def __getstate__(self) -> dict[str, object]:
        """What a copy takes along: not the struct, whose addresses are this matrix's."""
        return {"data": self.data, "plan": self.plan, "member": self.member}

    def canonical(self) -> MackoMatrix:
        """See Layout."""
        return pack(native.cuda_sliced_unpack(self))

    def dense(self) -> Tensor:
        """See Layout."""
        weight: Tensor = torch.ops.macko.sliced_unpack(self.data, self.dtype, self.numbers)
        return weight

    def few_tokens(self, dtype: torch.dtype) -> int:
        """See Layout."""
        if dtype is self.plan.dtype:
            return SLICED_SPMV_MAX_TOKENS
        return self._few_floats if dtype is torch.float32 else 0

    @cached_property
    def _few_floats(self) -> int:
        """As `few_tokens`, of float32, which must fit into shared memory as well."""
        fit = 2 * self.plan.cols + MAX_PADDING <= native.sliced_max_cols(self.data.device)
        return SLICED_SPMV_MAX_TOKENS if fit else 0

    def _fill(self, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
        native.cuda_sliced_spmv(self, x, bias, y)

    def _spmv(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = torch.ops.macko.sliced_spmv(x, self.data, bias, self.dtype, self.numbers)
        return y

    def _differentiable(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = torch.ops.macko.sliced_linear(x, self.data, bias, self.dtype, self.numbers)
        return y


def arrange(matrix: MackoMatrix) -> SlicedMatrix | None:
    """The layout in which this matrix's GPU multiplies it fastest.

    Returns:
        None where the canonical arrays are the better layout: on a CPU, without CUDA kernels, for rows of very different
        lengths, for very many columns.
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
    if len(kinds) > 1 or dtype not in VALUE_DTYPES.values() or not native.runs_on(device):
        return None
    group = make_group(matrices)
    if group is None:
        return None
    # A later SpMV may fetch weights before the kernels queued ahead of it are done (csrc/macko.h).
    torch.cuda.current_stream(device).synchronize()
    return group.members


def make_group(matrices: Sequence[MackoMatrix]) -> SlicedMatrix | None:
    """The sliced layout of valid matrices on a GPU, of one dtype and with as many columns, as a group.

    Dense is the way there, one matrix at a time and twice each, so that it takes no more memory than the largest.

    Returns:
        None where the layout does not suit the matrices: no rows, too many columns for the GPU's shared memory, or rows of
        very different lengths (`sliced_plan.plan_rows`).
    """
    values, cols = matrices[0].values, matrices[0].shape[1]
    member_rows = [matrix.shape[0] for matrix in matrices]
    if sum(member_rows) == 0 or cols > native.sliced_max_cols(values.device):
        return None
    counts = {bits: torch.empty(sum(member_rows), dtype=torch.int32, device=values.device) for bits in DELTA_BITS}
    for matrix, *own in zip(matrices, *(of_rows.split(member_rows) for of_rows in counts.values()), strict=True):
        native.cuda_sliced_entries(native.cuda_unpack(matrix), dict(zip(counts, own, strict=True)))
    gpu = torch.cuda.get_device_properties(values.device)
    resident = resident_blocks(cols, (gpu.major, gpu.minor), gpu.shared_memory_per_multiprocessor)
    shapes = choose_shapes(member_rows, gpu.multi_processor_count, resident)
    nbytes = sum(matrix.nbytes for matrix in matrices)
    planned = plan_rows(counts, member_rows, cols, values.dtype, shapes, nbytes)
    if planned is None:
        return None
    group = SlicedMatrix(torch.zeros(planned.plan.nbytes, dtype=torch.uint8, device=values.device), planned.plan)
    for offset, array in zip(planned.plan.array_offsets[-2:], (planned.unit_offsets, planned.row_order), strict=True):
        group.data[offset : offset + array.nbytes] = array.view(torch.uint8)
    for matrix, member in zip(matrices, group.members, strict=True):
        native.cuda_sliced_pack(native.cuda_unpack(matrix), member)
    return group


_library = torch.library.Library("macko", "FRAGMENT")
# `numbers` are SlicedMatrix.numbers.
_library.define("sliced_unpack(Tensor data, ScalarType dtype, int[] numbers) -> Tensor")
_library.define("sliced_spmv(Tensor x, Tensor data, Tensor? bias, ScalarType dtype, int[] numbers) -> Tensor")
# The dense product whose gradient unpacks again.
_library.define("sliced_linear(Tensor x, Tensor data, Tensor? bias, ScalarType dtype, int[] numbers) -> Tensor")


@torch.library.impl(_library, "sliced_unpack", "CUDA")
def _unpack_cuda(data: Tensor, dtype: torch.dtype, numbers: list[int]) -> Tensor:
    return native.cuda_sliced_unpack(SlicedMatrix.from_numbers(data, dtype, numbers))


@torch.library.impl(_library, "sliced_spmv", "CUDA")
def _spmv_cuda(x: Tensor, data: Tensor, bias: Tensor | None, dtype: torch.dtype, numbers: list[int]) -> Tensor:
    matrix = SlicedMatrix.from_numbers(data, dtype, numbers)
    native.check_spmv(x, data, bias, matrix.rows)
    y = x.new_empty(x.shape[0], matrix.rows)
    native.cuda_sliced_spmv(matrix, x.contiguous(), None if bias is None else bias.contiguous(), y)
    return y


@torch.library.impl(_library, "sliced_linear", "CompositeExplicitAutograd")
def _linear_any(x: Tensor, data: Tensor, bias: Tensor | None, dtype: torch.dtype, numbers: list[int]) -> Tensor:
    return F.linear(x, torch.ops.macko.sliced_unpack(data, dtype, numbers).to(x.dtype), bias)


@torch.library.register_fake("macko::sliced_unpack")
def _unpack_fake(data: Tensor, dtype: torch.dtype, numbers: list[int]) -> Tensor:
    return data.new_empty(SlicedMatrix.from_numbers(data, dtype, numbers).shape, dtype=dtype)


@torch.library.register_fake("macko::sliced_spmv")
def _spmv_fake(x: Tensor, data: Tensor, bias: Tensor | None, dtype: torch.dtype, numbers: list[int]) -> Tensor:
    del bias
    return x.new_empty(x.shape[0], SlicedMatrix.from_numbers(data, dtype, numbers).rows)


@torch.library.register_fake("macko::sliced_linear")
def _linear_fake(x: Tensor, data: Tensor, bias: Tensor | None, dtype: torch.dtype, numbers: list[int]) -> Tensor:
    del bias
    return x.new_empty(*x.shape[:-1], SlicedMatrix.from_numbers(data, dtype, numbers).rows)


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
        x = upstream @ torch.ops.macko.sliced_unpack(data, ctx.dtype, ctx.numbers).to(upstream.dtype)
    return x, None, upstream.reshape(-1, upstream.shape[-1]).sum(0) if wants_bias else None, None, None


torch.library.register_autograd("macko::sliced_linear", _linear_backward, setup_context=_keep_packed, lib=_library)
