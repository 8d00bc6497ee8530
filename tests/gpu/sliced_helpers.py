"""Sliced matrices and layers for the tests on a GPU, and what each of them must do."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from sliced_reference import SHAPES, decode, encode, patterns, random_matrix
from test_gpu_canonical import GPU, whole_numbers
from torch import Tensor

from macko_llm import native
from macko_llm.format import MackoMatrix
from macko_llm.layouts import canonical, sliced
from macko_llm.layouts.canonical import SPMV_MAX_TOKENS
from macko_llm.layouts.layout import Layout
from macko_llm.layouts.sliced import SLICED_SPMV_MAX_TOKENS, SlicedMatrix
from macko_llm.layouts.sliced_plan import DELTA_BITS, Shape, plan_rows
from macko_llm.linear import MackoLinear

FORCED_SHAPES = list(dict.fromkeys([*SHAPES[:-1], Shape(24, 20), SHAPES[-1]]))
"""Each number of warps that SpMV is compiled for, with some height."""
LAYOUTS = [(shape, bits) for shape in FORCED_SHAPES for bits in DELTA_BITS]
layouts = pytest.mark.parametrize(
    ("shape", "bits"), LAYOUTS, ids=[f"{shape.height}x{shape.warps}-{bits}bit" for shape, bits in LAYOUTS]
)


def cut(
    weight: Tensor, shape: Shape, bits: int, device: torch.device = GPU, member_rows: Sequence[int] | None = None
) -> SlicedMatrix | None:
    """A matrix or a group in this very layout, whatever suits it; None if its rows are too uneven for any."""
    there, (rows, cols) = weight.to(device), weight.shape
    counts = torch.empty(rows, dtype=torch.int32, device=device)
    entries = (there.data_ptr(), rows, cols, bits, counts.data_ptr())
    native.call_cuda("macko_cuda_sliced_entries", (there,), *entries)
    planned = plan_rows({bits: counts}, member_rows or [rows], cols, weight.dtype, [shape], 1 << 40)
    if planned is None:
        return None
    matrix = SlicedMatrix(torch.zeros(planned.plan.nbytes, dtype=torch.uint8, device=device), planned.plan)
    for offset, array in zip(planned.plan.array_offsets[-2:], (planned.unit_offsets, planned.row_order), strict=True):
        matrix.data[offset : offset + array.nbytes] = array.view(torch.uint8)
    native.call_cuda("macko_cuda_sliced_pack", (there, matrix.data), there.data_ptr(), matrix.address)
    torch.cuda.synchronize(device)
    return matrix


def certainly_cut(
    weight: Tensor,
    shape: Shape = SHAPES[0],
    bits: int = 2,
    device: torch.device = GPU,
    member_rows: Sequence[int] | None = None,
) -> SlicedMatrix:
    matrix = cut(weight, shape, bits, device, member_rows)
    assert matrix is not None
    return matrix


def arranged(weight: Tensor) -> SlicedMatrix:
    matrix = sliced.arrange(canonical.pack(weight.to(GPU)))
    assert matrix is not None
    return matrix


def large_matrix(rows: int, cols: int, sparsity: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """`random_matrix`, but made on the GPU."""
    generator = torch.Generator(GPU).manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator, device=GPU)
    return weight.mul_(torch.rand(rows, cols, generator=generator, device=GPU) >= sparsity).to(dtype)


def linear(x: Tensor, matrix: Layout, bias: Tensor | None) -> Tensor:
    """What a layer does."""
    return matrix.linear(x, bias)


def spmv(x: Tensor, matrix: SlicedMatrix, bias: Tensor | None) -> Tensor:
    """The op, whatever `Layout.linear` would choose."""
    return torch.ops.macko.sliced_spmv(x, matrix.data, bias, matrix.dtype, matrix.numbers)


def poison(*sizes: int) -> None:
    """Let the allocator give out memory full of NaN for tensors of these many bytes."""
    blocks = [
        torch.full((max(size // 2, 1),), torch.nan, dtype=torch.float16, device=GPU) for size in sizes for _ in "123"
    ]
    torch.cuda.synchronize()
    del blocks


def assert_layout(matrix: SlicedMatrix, weight: Tensor) -> None:
    """A group's bytes are the naive encoder's; the naive decoder and unpacking give the dense matrix back."""
    plan = matrix.plan
    assert (plan.rows, plan.cols, plan.dtype) == (*weight.shape, weight.dtype)
    assert plan.nbytes == len(matrix.data)
    buffer = matrix.data.cpu().numpy()
    assert np.array_equal(buffer, encode(weight, plan.shape, plan.delta_bits, plan.member_rows))
    expected = patterns(weight + 0.0)  # negative zeros count as zeros
    decoded = decode(buffer, plan.member_rows, plan.cols, plan.shape, plan.delta_bits, plan.units)
    assert np.array_equal(decoded, expected)
    poison(weight.nbytes)
    unpacked = native.cuda_sliced_unpack(matrix)
    assert (unpacked.shape, unpacked.dtype, unpacked.device) == (weight.shape, weight.dtype, matrix.data.device)
    assert np.array_equal(patterns(unpacked), expected)


def assert_multiplies_whole_numbers(matrix: SlicedMatrix | MackoMatrix, weight: Tensor, tokens: int) -> None:
    """Every sum is exact in float32, so that y is the exact product rounded once."""
    rows, cols = weight.shape
    x, bias = whole_numbers(tokens, cols), whole_numbers(rows) * 9
    exact = x.to(GPU).double() @ weight.to(GPU).double().T
    poison(tokens * rows * 2)
    cases = [(None, exact), (bias.to(GPU, weight.dtype), exact + bias.to(GPU))]
    few = SLICED_SPMV_MAX_TOKENS if isinstance(matrix, SlicedMatrix) else SPMV_MAX_TOKENS
    if tokens > few and (exact.abs() > 240).any():
        cases = cases[:1]  # torch may add the bias to a product that it has rounded
    for given_bias, expected in cases:
        y = matrix.linear(x.to(GPU, weight.dtype), given_bias)
        assert (y.shape, y.dtype, y.device) == ((tokens, rows), weight.dtype, GPU)
        assert torch.equal(y, expected.to(weight.dtype))


ROWS, COLS = 256, 2048
"""Of the layers that `make_layer` makes."""


def make_layer(
    dtype: torch.dtype = torch.float16, *, bias: bool = True, layout: str = "auto"
) -> tuple[MackoLinear, Tensor, dict[str, Tensor]]:
    """An arranged layer of whole numbers, its dense weight on the CPU, and its canonical state."""
    weight = random_matrix(ROWS, COLS, 0.5, dtype).sign()
    layer = MackoLinear.from_matrix(canonical.pack(weight), whole_numbers(ROWS).to(dtype) if bias else None)
    layer.layout = layout
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.cuda()
    assert layer.is_arranged
    return layer, weight, state
