"""The layout in which a GPU's tensor cores multiply several tokens: tiles, whose values are expanded into registers.

A bit says of each position of a tile whether there is a value (`tiled_plan.py`, csrc/cuda/tiled.cuh). Of the canonical
arrays it lacks the zeros that bridge long gaps, which the format's rule determines; so packing what it unpacks to gives
the same canonical bytes.
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
from macko_llm.native import TiledStruct

TILED_SPMM_MAX_TOKENS = 64
"""Up to this many tokens SpMM, 32 at a time, is faster than unpacking for a dense product."""
WARPGROUP_SPMM_MAX_TOKENS = 128
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
        native.cuda_tiled_spmm(self, x, bias, y)

    def _spmv(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = torch.ops.macko.tiled_spmm(x, self.data, bias, self.dtype, self.numbers)
        return y

    def _differentiable(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = torch.ops.macko.tiled_linear(x, self.data, bias, self.dtype, self.numbers)
        return y


def arrange(matrix: MackoMatrix) -> TiledMatrix | None:
    """The tiled layout of a valid matrix.

    Dense is the way there.

    Returns:
        None where it does not suit: on a CPU, without CUDA kernels, on a GPU older than `TILED_CAPABILITY`, without rows,
        for more than `MAX_COLS` columns, and where it would take more memory than the dense matrix.
    """
    (rows, cols), device = matrix.shape, matrix.values.device
    if rows == 0 or cols > MAX_COLS or matrix.values.dtype not in VALUE_DTYPES.values() or not native.runs_on(device):
        return None
    gpu = torch.cuda.get_device_properties(device)
    if (gpu.major, gpu.minor) < TILED_CAPABILITY:
        return None
    weight = native.cuda_unpack(matrix)
    plan, starts = plan_records(weight, choose_strips(rows, gpu.multi_processor_count))
    if plan.nbytes > weight.nbytes:
        return None
    tiled = fill_records(weight, plan, starts)
    # A later SpMM may fetch weights before the kernels queued ahead of it are done (csrc/macko.h).
    torch.cuda.current_stream(device).synchronize()
    return tiled


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
    native.cuda_tiled_spmm(matrix, x.contiguous(), None if bias is None else bias.contiguous(), y)
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
