"""Tiled matrices for the tests on a GPU, and the layouts of GPUs side by side."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from sliced_helpers import arranged, certainly_cut, poison, spmv
from sliced_reference import patterns
from test_gpu_canonical import GPU
from tiled_reference import decode
from torch import Tensor

from macko_llm import native
from macko_llm.format import MackoMatrix
from macko_llm.layouts import canonical, sliced, tiled
from macko_llm.layouts.choice import TILED_CAPABILITY
from macko_llm.layouts.sliced_plan import RESIDENT_BLOCKS, choose_shapes
from macko_llm.layouts.tiled import TiledMatrix
from macko_llm.layouts.tiled_plan import choose_strips

MULTIPROCESSORS = 132
"""Of the GPU that the tests' matrices are cut for, whatever the one is that multiplies them."""


def skip_without_tensor_cores() -> None:
    if torch.cuda.get_device_capability(GPU) < TILED_CAPABILITY:
        pytest.skip("needs a GPU of sm_80 or newer")


def tile(weight: Tensor, strips: int | None = None, device: torch.device = GPU) -> TiledMatrix:
    """A matrix in this very layout, whatever memory it takes."""
    skip_without_tensor_cores()
    there = weight.to(device)
    matrix = tiled.fill_records(
        there, *tiled.plan_records(there, strips or choose_strips([len(weight)], MULTIPROCESSORS)[0])
    )
    torch.cuda.synchronize(device)
    return matrix


def tiled_matrix(weight: Tensor) -> TiledMatrix:
    skip_without_tensor_cores()
    matrix = tiled.arrange(canonical.pack(weight.to(GPU)))
    assert matrix is not None
    return matrix


def spmm(x: Tensor, matrix: TiledMatrix, bias: Tensor | None) -> Tensor:
    """The op, whatever `Layout.linear` would choose."""
    return torch.ops.macko.tiled_spmm(x, matrix.data, bias, matrix.dtype, matrix.numbers)


def assert_tiles(matrix: TiledMatrix, weight: Tensor) -> None:
    """The naive decoder, unpacking and the canonical arrays all give the dense matrix back."""
    plan = matrix.plan
    assert (plan.rows, plan.cols, plan.dtype) == (*weight.shape, weight.dtype)
    assert plan.nbytes == len(matrix.data)
    expected = patterns(weight + 0.0)  # negative zeros count as zeros
    assert np.array_equal(decode(matrix.data.cpu().numpy(), plan), expected)
    poison(weight.nbytes)
    unpacked = native.cuda_tiled_unpack(matrix)
    assert (unpacked.shape, unpacked.dtype, unpacked.device) == (weight.shape, weight.dtype, matrix.data.device)
    assert np.array_equal(patterns(unpacked), expected)
    assert torch.equal(matrix.dense(), unpacked)
    assert_same_arrays(matrix.canonical(), canonical.pack(weight.to(matrix.data.device)))


def assert_same_arrays(matrix: MackoMatrix, expected: MackoMatrix) -> None:
    assert matrix.shape == expected.shape
    for name in ("values", "deltas", "row_offsets"):
        array, other = getattr(matrix, name), getattr(expected, name)
        assert array.dtype == other.dtype
        assert torch.equal(array.view(torch.uint8), other.view(torch.uint8))


@dataclass(frozen=True)
class Kind:
    """A layout of GPUs.

    Attributes:
        name: in `defaults.LAYOUTS`.
        make: a matrix, whether or not it suits.
        spread: the same, cut as one that suits is.
        arranged: one that suits.
        arrange: canonical arrays, None if they do not suit.
        product: its op, whatever `Layout.linear` would choose.
        unpack: to dense.
    """

    name: str
    make: Callable
    spread: Callable
    arranged: Callable
    arrange: Callable
    product: Callable
    unpack: Callable


def _spread_slices(weight: Tensor) -> sliced.SlicedMatrix:
    return certainly_cut(weight, choose_shapes([len(weight)], MULTIPROCESSORS, RESIDENT_BLOCKS)[0], 2)


def _arrange_tiles(matrix: MackoMatrix) -> TiledMatrix | None:
    skip_without_tensor_cores()
    return tiled.arrange(matrix)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("sliced", certainly_cut, _spread_slices, arranged, sliced.arrange, spmv, native.cuda_sliced_unpack),
        Kind("tiled", tile, tile, tiled_matrix, _arrange_tiles, spmm, native.cuda_tiled_unpack),
    )
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
