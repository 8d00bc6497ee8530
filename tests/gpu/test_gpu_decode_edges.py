"""The kernels of a decoded token at their edges: exact sums, every compiled shape, what must not be read, refusals."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from decode_helpers import (
    EPSILON,
    HALVES,
    TRANSFORMS,
    assert_close_units,
    assert_product,
    like,
    make_input,
    normal,
    transformed,
    x_for,
    zeros,
)
from sliced_helpers import certainly_cut, large_matrix, layouts
from torch import Tensor

from macko_llm import native_decode
from macko_llm.errors import NativeError
from macko_llm.layouts.sliced import SlicedMatrix
from macko_llm.layouts.sliced_plan import Shape
from macko_llm.native_decode import Dense, Input

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture
def random(cuda: torch.device) -> torch.Generator:
    return torch.Generator(cuda).manual_seed(0)


def signs(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    """-1, 0 and 1: sums of their products are exact in float32."""
    small = torch.randint(-1, 2, shape, device=generator.device, generator=generator, dtype=torch.int8)
    return small.to(dtype)


def even_matrix(generator: torch.Generator, rows: int, cols: int, bits: int, dtype: torch.dtype) -> Tensor:
    """As sparse as deltas of this width are for, every row alike, so that any shape can cut it."""
    weight = normal(generator, rows, cols, dtype=dtype, scale=0.1)
    scores = torch.rand(rows, cols, device=weight.device, generator=generator)
    return weight.scatter(1, scores.topk(int(cols * (0.5 if bits == 2 else 0.8))).indices, 0)


def exact_product(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Of whole numbers: rounded once, and once more with the residual."""
    product = x.double() @ weight.double().t()
    if bias is not None:
        product += bias.double()
    rounded = product.to(x.dtype)
    return rounded if residual is None else (rounded.double() + residual.double()).to(x.dtype)


# Dense products


def needs_shared_memory(device: torch.device, nbytes: int) -> None:
    if torch.cuda.get_device_properties(device).shared_memory_per_block_optin < nbytes:
        pytest.skip(f"needs a GPU whose blocks may have {nbytes} bytes of shared memory")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("cols", [8, 1024, 1032, 8192, 8200, 16384, 16392, 32768])
def test_dense_products_of_whole_numbers_are_exact(random: torch.Generator, dtype: torch.dtype, cols: int) -> None:
    """On both sides of every change of how a row is shared out; no bias, one in the middle, all."""
    needs_shared_memory(random.device, 2 * cols + 40_000)
    rows = (1, 33, 7)
    weights = [signs(random, count, cols, dtype=dtype) for count in rows]
    x, residual = signs(random, 1, cols, dtype=dtype), signs(random, 1, sum(rows), dtype=dtype)
    biases = [9 * signs(random, count, dtype=dtype) for count in rows]
    for there in ((), (1,), (0, 1, 2)):
        used = [bias if index in there else None for index, bias in enumerate(biases)]
        bias = torch.cat([bias if index in there else 0 * bias for index, bias in enumerate(biases)])
        for added in (None, residual):
            y = torch.full_like(residual, torch.nan)
            native_decode.dense_gemv(Dense.of(weights, used), x, Input.plain(), added, y)
            assert torch.equal(y, exact_product(x, torch.cat(weights), bias, added))


@pytest.mark.parametrize("transform", TRANSFORMS[1:])
def test_the_widest_dense_products_transform_too(random: torch.Generator, transform: str) -> None:
    cols = native_decode.DENSE_MAX_COLS
    needs_shared_memory(random.device, 4 * cols + 40_000)
    weight = normal(random, 19, cols, dtype=torch.float16, scale=0.1)
    norm, x = normal(random, cols, dtype=torch.float16), x_for(transform, random, 1, cols, torch.float16)
    how = make_input(transform, norm)
    clean, y = torch.empty(1, cols, **like(x)), torch.empty(1, 19, **like(x))
    native_decode.apply_transform(how, x, clean)
    assert_close_units(clean, transformed(transform, x, norm), 2)
    native_decode.dense_gemv(Dense.of([weight], [None]), x, how, None, y)
    assert_product(y, clean, weight, None, None)


def test_more_rows_than_the_blocks_of_a_gpu_have_room_for(random: torch.Generator) -> None:
    rows = 3_000_001
    weights = [signs(random, count, 8, dtype=torch.float16) for count in (rows - 5, 5)]
    x, y = signs(random, 1, 8, dtype=torch.float16), signs(random, 1, rows, dtype=torch.float16)
    expected = exact_product(x, torch.cat(weights), None, y)
    native_decode.dense_gemv(Dense.of(weights, [None, None]), x, Input.plain(), y, y)
    assert torch.equal(y, expected)


def shifted(device: torch.device, *shape: int) -> Tensor:
    """Contiguous, but two bytes behind a multiple of 16."""
    return zeros(device, math.prod(shape) + 1)[1:].view(shape)


def wide(device: torch.device) -> None:
    cols = native_decode.DENSE_MAX_COLS + 8
    x, y = zeros(device, 1, cols), zeros(device, 1, 4)
    native_decode.dense_gemv(Dense.of([zeros(device, 4, cols)], [None]), x, Input.plain(), None, y)


def shifted_weight(device: torch.device) -> None:
    x, y = zeros(device, 1, 16), zeros(device, 1, 4)
    native_decode.dense_gemv(Dense.of([shifted(device, 4, 16)], [None]), x, Input.plain(), None, y)


def shifted_norm(device: torch.device) -> None:
    how = Input.rms_norm(shifted(device, 16), EPSILON)
    native_decode.dense_gemv(
        Dense.of([zeros(device, 4, 16)], [None]), zeros(device, 1, 16), how, None, zeros(device, 4)
    )


def single_precision(device: torch.device) -> None:
    weight, x, y = (torch.zeros(shape, device=device) for shape in ((4, 16), (1, 16), (1, 4)))
    native_decode.dense_gemv(Dense.of([weight], [None]), x, Input.plain(), None, y)


def odd_transform(device: torch.device) -> None:
    native_decode.apply_transform(Input.silu_gate(), zeros(device, 1, 24), zeros(device, 1, 12))


def shifted_transform(device: torch.device) -> None:
    native_decode.apply_transform(Input.silu_gate(), zeros(device, 1, 32), shifted(device, 1, 16))


def packed(device: torch.device, cols: int) -> SlicedMatrix:
    return certainly_cut(large_matrix(64, cols, 0.5, torch.float16), device=device)


def odd_packed_transform(device: torch.device) -> None:
    x, y = zeros(device, 1, 2 * 1031), zeros(device, 1, 64)
    native_decode.sliced_spmv(packed(device, 1031), x, Input.silu_gate(), None, None, y)


def shifted_packed_transform(device: torch.device) -> None:
    x, y = shifted(device, 1, 2 * 1024), zeros(device, 1, 64)
    native_decode.sliced_spmv(packed(device, 1024), x, Input.silu_gate(), None, None, y)


@pytest.mark.parametrize(
    "call",
    [
        wide,
        shifted_weight,
        shifted_norm,
        single_precision,
        odd_transform,
        shifted_transform,
        odd_packed_transform,
        shifted_packed_transform,
    ],
)
def test_what_kernels_cannot_read_is_refused(cuda: torch.device, call: Callable[[torch.device], None]) -> None:
    with pytest.raises(NativeError):
        call(cuda)
    torch.cuda.synchronize(cuda)  # and nothing ran that could have failed


# Packed products


@layouts
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("cols", [520, 16392])
def test_packed_products_of_every_shape_transform(
    random: torch.Generator, shape: Shape, bits: int, transform: str, cols: int
) -> None:
    """Blocks whose warps are no power of 2, more threads than vectors, several vectors a thread; groups and their members."""
    members = [67, 30]
    for dtype in HALVES:
        weight = even_matrix(random, sum(members), cols, bits, dtype)
        matrix = certainly_cut(weight, shape, bits, member_rows=members)
        norm, bias = normal(random, cols, dtype=dtype), normal(random, sum(members), dtype=dtype)
        x, residual = x_for(transform, random, 1, cols, dtype), normal(random, 1, sum(members), dtype=dtype)
        how = make_input(transform, norm)
        clean = x
        if transform != "plain":
            clean = torch.empty(1, cols, **like(x))
            native_decode.apply_transform(how, x, clean)
        y = residual.clone()
        native_decode.sliced_spmv(matrix, x, how, bias, y, y)
        assert_product(y, clean, weight, bias, residual)
        for member, place in zip(matrix.members, (slice(0, 67), slice(67, None)), strict=True):
            own, added = bias[place].clone(), residual[:, place].clone()
            part = torch.full_like(added, torch.nan)
            native_decode.sliced_spmv(member, x, how, own, added, part)
            assert torch.equal(part, y[:, place])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("cols", [1024, 1031])
@pytest.mark.parametrize("make_x", [zeros, shifted], ids=["aligned", "shifted"])
def test_packed_products_of_whole_numbers_with_a_residual_are_exact(
    random: torch.Generator, dtype: torch.dtype, bits: int, cols: int, make_x: Callable[..., Tensor]
) -> None:
    """For any number of tokens; vectors of x where it has them, element by element where not."""
    weight = even_matrix(random, 97, cols, bits, dtype).sign()
    matrix = certainly_cut(weight, bits=bits, member_rows=[67, 30])
    bias = 9 * signs(random, 97, dtype=dtype)
    for tokens in (1, 2, 3, 4, 7, 12):
        x = make_x(random.device, tokens, cols).view(dtype).copy_(signs(random, tokens, cols, dtype=dtype))
        residual = signs(random, tokens, 97, dtype=dtype)
        for own in (None, bias):
            y = residual.clone()
            native_decode.sliced_spmv(matrix, x, Input.plain(), own, y, y)
            assert torch.equal(y, exact_product(x, weight, own, residual))
        y = torch.full_like(residual, torch.nan)
        native_decode.sliced_spmv(matrix, x, Input.plain(), bias, None, y)
        assert torch.equal(y, exact_product(x, weight, bias, None))


# Transforms


@pytest.mark.parametrize("dtype", HALVES)
def test_silu_of_what_is_large_small_or_no_number(cuda: torch.device, dtype: torch.dtype) -> None:
    gate = torch.tensor(
        [60000, -60000, 90, -90, 17, -17, 6e-5, 0, -0.0, 1, -1, 0.3, -0.3, 5, math.nan, 2], **single(cuda)
    )
    up = torch.tensor([1, 1, -2, 2, 0.5, 1, 3, 1, 1, -1, 1, 0, 2, 1.5, 1, math.nan], **single(cuda))
    x = torch.cat((gate, up))[None].to(dtype)
    y = torch.empty(1, 16, dtype=dtype, device=cuda)
    native_decode.apply_transform(Input.silu_gate(), x, y)
    expected = transformed("silu_gate", x, gate)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(y, expected, rtol=2 * unit, atol=2e-7, equal_nan=True)
    assert y.isnan()[0].nonzero()[:, 0].tolist() == [14, 15]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("tokens", "cols"), [(1, 8), (3, 2048), (7, 2056), (64, 11008), (70_000, 8)])
def test_silu_of_any_number_of_tokens(random: torch.Generator, dtype: torch.dtype, tokens: int, cols: int) -> None:
    x = normal(random, tokens, 2 * cols, dtype=dtype)
    y = torch.full((tokens + 1, cols), 7, dtype=dtype, device=random.device)
    native_decode.apply_transform(Input.silu_gate(), x, y[:tokens])
    assert_close_units(y[:tokens], transformed("silu_gate", x, x), 2)
    assert (y[tokens] == 7).all()


def single(device: torch.device) -> dict[str, Any]:
    return {"dtype": torch.float32, "device": device}


@pytest.mark.parametrize("dtype", HALVES)
def test_norms_of_what_is_zero_large_small_or_no_number(random: torch.Generator, dtype: torch.dtype) -> None:
    norm, x = normal(random, 520, dtype=dtype), normal(random, 5, 520, dtype=dtype)
    x[0] = 0
    x[1] = x[1].sign() * 60000
    x[2] *= 1e-4
    x[3, 7] = math.nan
    y = torch.empty_like(x)
    native_decode.apply_transform(Input.rms_norm(norm, EPSILON), x, y)
    expected = transformed("rms_norm", x, norm)
    torch.testing.assert_close(y, expected, rtol=2 * torch.finfo(dtype).eps, atol=2e-7, equal_nan=True)
    assert y.isnan().any(dim=1).tolist() == [False, False, False, True, False]


# The most probable token


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("texts", "vocabulary"), [(1500, 1500), (500, 40_000)])
def test_every_place_can_be_the_most_probable(
    cuda: torch.device, dtype: torch.dtype, texts: int, vocabulary: int
) -> None:
    places = torch.arange(texts, device=cuda) * (vocabulary // texts)
    logits = torch.full((texts, vocabulary), -3.0, dtype=dtype, device=cuda)
    logits.scatter_(1, places[:, None], -2.0)
    tokens, scratch = (torch.zeros(count, dtype=torch.int64, device=cuda) for count in (texts, 2 * texts))
    native_decode.argmax(logits, tokens, scratch)
    assert torch.equal(tokens, places)
    assert not scratch.any()


@pytest.mark.parametrize("dtype", HALVES)
def test_the_least_of_all_logits_is_still_a_logit(cuda: torch.device, dtype: torch.dtype) -> None:
    logits = torch.full((4, 700), torch.finfo(dtype).min, dtype=dtype, device=cuda)
    logits[1] = -math.inf
    logits[1, 600] = torch.finfo(dtype).min
    logits[2, 3], logits[2, 690] = -math.nan, math.inf
    logits[3, 5] = -torch.finfo(dtype).smallest_normal
    tokens, scratch = (torch.zeros(count, dtype=torch.int64, device=cuda) for count in (4, 8))
    native_decode.argmax(logits, tokens, scratch)
    assert tokens.tolist() == [0, 600, -1, 5]
