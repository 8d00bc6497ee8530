"""The kernels of a decoded token at their edges: exact sums, every compiled shape, what must not be read, refusals."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sliced_helpers import certainly_cut, large_matrix, layouts
from test_gpu_decode_kernels import (
    EPSILON,
    HALVES,
    TRANSFORMS,
    assert_close_units,
    assert_product,
    make_input,
    normal,
    normalised,
    rotated,
    transformed,
    x_for,
)
from torch import Tensor

from macko_llm import native, native_decode
from macko_llm.errors import NativeError
from macko_llm.native_decode import MAX_SPLITS, Attention, Dense, Input
from macko_llm.sliced import Shape, SlicedMatrix

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
    clean, y = torch.empty(1, cols, **of(x)), torch.empty(1, 19, **of(x))
    native_decode.apply_transform(how, x, clean)
    assert_close_units(clean, transformed(transform, x, norm), 2)
    native_decode.dense_gemv(Dense.of([weight], [None]), x, how, None, y)
    assert_product(y, clean, weight, None, None)


def of(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": tensor.dtype, "device": tensor.device}


def test_more_rows_than_the_blocks_of_a_gpu_have_room_for(random: torch.Generator) -> None:
    rows = 3_000_001
    weights = [signs(random, count, 8, dtype=torch.float16) for count in (rows - 5, 5)]
    x, y = signs(random, 1, 8, dtype=torch.float16), signs(random, 1, rows, dtype=torch.float16)
    expected = exact_product(x, torch.cat(weights), None, y)
    native_decode.dense_gemv(Dense.of(weights, [None, None]), x, Input.plain(), y, y)
    assert torch.equal(y, expected)


def half(device: torch.device, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float16, device=device)


def shifted(device: torch.device, *shape: int) -> Tensor:
    """Contiguous, but two bytes behind a multiple of 16."""
    return half(device, math.prod(shape) + 1)[1:].view(shape)


def wide(device: torch.device) -> None:
    cols = native_decode.DENSE_MAX_COLS + 8
    x, y = half(device, 1, cols), half(device, 1, 4)
    native_decode.dense_gemv(Dense.of([half(device, 4, cols)], [None]), x, Input.plain(), None, y)


def shifted_weight(device: torch.device) -> None:
    x, y = half(device, 1, 16), half(device, 1, 4)
    native_decode.dense_gemv(Dense.of([shifted(device, 4, 16)], [None]), x, Input.plain(), None, y)


def shifted_norm(device: torch.device) -> None:
    how = Input.rms_norm(shifted(device, 16), EPSILON)
    native_decode.dense_gemv(Dense.of([half(device, 4, 16)], [None]), half(device, 1, 16), how, None, half(device, 4))


def single_precision(device: torch.device) -> None:
    weight, x, y = (torch.zeros(shape, device=device) for shape in ((4, 16), (1, 16), (1, 4)))
    native_decode.dense_gemv(Dense.of([weight], [None]), x, Input.plain(), None, y)


def odd_transform(device: torch.device) -> None:
    native_decode.apply_transform(Input.silu_gate(), half(device, 1, 24), half(device, 1, 12))


def shifted_transform(device: torch.device) -> None:
    native_decode.apply_transform(Input.silu_gate(), half(device, 1, 32), shifted(device, 1, 16))


def packed(device: torch.device, cols: int) -> SlicedMatrix:
    return certainly_cut(large_matrix(64, cols, 0.5, torch.float16), device=device)


def odd_packed_transform(device: torch.device) -> None:
    x, y = half(device, 1, 2 * 1031), half(device, 1, 64)
    native_decode.sliced_spmv(packed(device, 1031), x, Input.silu_gate(), None, None, y)


def shifted_packed_transform(device: torch.device) -> None:
    x, y = shifted(device, 1, 2 * 1024), half(device, 1, 64)
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
            clean = torch.empty(1, cols, **of(x))
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
@pytest.mark.parametrize("make_x", [half, shifted], ids=["aligned", "shifted"])
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
        [60000, -60000, 90, -90, 17, -17, 6e-5, 0, -0.0, 1, -1, 0.3, -0.3, 5, math.nan, 2], **kind(cuda)
    )
    up = torch.tensor([1, 1, -2, 2, 0.5, 1, 3, 1, 1, -1, 1, 0, 2, 1.5, 1, math.nan], **kind(cuda))
    x = torch.cat((gate, up))[None].to(dtype)
    y = torch.empty(1, 16, dtype=dtype, device=cuda)
    native_decode.apply_transform(Input.silu_gate(), x, y)
    expected = transformed("silu_gate", x, gate)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(y, expected, rtol=2 * unit, atol=2e-7, equal_nan=True)
    assert y.isnan()[0].nonzero()[:, 0].tolist() == [14, 15]


def kind(device: torch.device) -> dict[str, Any]:
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


# Attention


class Texts:
    """A cache of random keys and values of `texts` texts that end at one slot, and the new token."""

    def __init__(
        self, generator: torch.Generator, dtype: torch.dtype, *, earlier: int, heads: int, kv_heads: int, head_dim: int
    ) -> None:
        device = generator.device
        texts, self.earlier, self.heads, self.kv_heads = 2, earlier, heads, kv_heads
        capacity = earlier + 4
        self.qkv = normal(generator, texts, heads + 2 * kv_heads, head_dim, dtype=dtype)
        self.keys, self.values = (
            normal(generator, texts, kv_heads, capacity, head_dim, dtype=dtype) for _ in ("keys", "values")
        )
        angles = torch.rand(capacity, head_dim // 2, device=device, generator=generator) * 6
        self.cosines, self.sines = (torch.cat((f(angles), f(angles)), dim=-1).to(dtype) for f in (torch.cos, torch.sin))
        self.norm = normal(generator, head_dim, dtype=dtype)
        self.first = torch.tensor([0, earlier // 3], dtype=torch.int32, device=device)
        self.slot = torch.tensor([earlier], dtype=torch.int32, device=device)
        self.scale = head_dim**-0.5

    def attend(self, *, splits: int = 1, window: int = 0, normalise: bool = False) -> Tensor:
        """[texts, heads, head_dim] of the kernel, which leaves this cache alone."""
        texts, kv_heads, capacity, head_dim = self.keys.shape
        keys, values = self.keys.clone(), self.values.clone()
        y = torch.full((texts, self.heads, head_dim), torch.nan, **of(self.qkv))
        partial = torch.full((texts * self.heads * splits * (head_dim + 2),), torch.nan, device=y.device)
        tickets = torch.zeros(texts * self.heads, dtype=torch.int32, device=y.device)
        norms = (self.norm, self.norm) if normalise else (None, None)
        arrays = (self.qkv, keys, values, self.cosines, self.sines, *norms, self.slot, self.first, y, partial, tickets)
        attention = Attention(
            *(None if array is None else array.data_ptr() for array in arrays),
            *(self.scale, EPSILON, texts, self.heads, kv_heads, head_dim, capacity, window, splits),
            native.DTYPE_CODES[y.dtype],
        )
        native_decode.decode_attention(attention, y)
        torch.cuda.synchronize(y.device)  # the arrays go away
        assert not tickets.any()
        return y

    def rotated_queries(self, *, normalise: bool = False) -> Tensor:
        return self._rotated(self.qkv[:, : self.heads], normalise)

    def expected(self, *, window: int = 0, normalise: bool = False) -> tuple[Tensor, Tensor]:
        """What attention is, in float64, and the largest value of each head by dimension."""
        keys, values = self.keys[:, :, : self.earlier + 1].double(), self.values[:, :, : self.earlier + 1].double()
        new_keys, new_values = self.qkv[:, self.heads :].split(self.kv_heads, dim=1)
        keys[:, :, -1], values[:, :, -1] = self._rotated(new_keys, normalise).double(), new_values.double()
        keys, values = (states.repeat_interleave(self.heads // self.kv_heads, dim=1) for states in (keys, values))
        queries = self.rotated_queries(normalise=normalise).double()
        scores = torch.einsum("thd,thsd->ths", queries, keys) * self.scale
        slots = torch.arange(self.earlier + 1, device=scores.device)
        hidden = slots < self.first[:, None]
        if window:
            hidden |= slots <= self.earlier - window
        # What is hidden may be NaN.
        shares = scores.masked_fill(hidden[:, None], -math.inf).softmax(dim=-1)
        seen = values.masked_fill(hidden[:, None, :, None], 0)
        return torch.einsum("ths,thsd->thd", shares, seen), seen.abs().amax(dim=2)

    def _rotated(self, heads: Tensor, normalise: bool) -> Tensor:
        position = self.earlier - self.first.long()
        turn = [table[position][:, None] for table in (self.cosines, self.sines)]
        return rotated(normalised(heads, self.norm if normalise else None), *turn)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 128), (12, 2, 64), (6, 1, 256), (8, 2, 16)])
@pytest.mark.parametrize(("earlier", "window"), [(3, 0), (60, 0), (60, 20), (4000, 0), (4000, 700)])
def test_any_number_of_splits_attends_to_the_same(
    random: torch.Generator, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, earlier: int, window: int
) -> None:
    """Also more splits than there are slots."""
    texts = Texts(random, dtype, earlier=earlier, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    expected, largest = texts.expected(window=window)
    for splits in (1, 2, 5, 33, MAX_SPLITS):
        y = texts.attend(splits=splits, window=window)
        assert ((y.double() - expected).abs() <= 2 * torch.finfo(dtype).eps * largest).all()


@pytest.mark.parametrize("splits", [1, 3, 16])
@pytest.mark.parametrize("window", [0, 1, 50])
@pytest.mark.parametrize("normalise", [False, True])
def test_slots_that_are_not_seen_are_not_read(
    random: torch.Generator, splits: int, window: int, normalise: bool
) -> None:
    """NaN before a text, behind the new slot, in it, and outside the window: one that is multiplied by 0 would show."""
    texts = Texts(random, torch.float16, earlier=300, heads=8, kv_heads=2, head_dim=64)
    clean = texts.attend(splits=splits, window=window, normalise=normalise)
    for states in (texts.keys, texts.values):
        states[:, :, 300:] = torch.nan
        for text, first in enumerate(texts.first.tolist()):
            states[text, :, : max(first, 301 - window if window else 0)] = torch.nan
    y = texts.attend(splits=splits, window=window, normalise=normalise)
    assert torch.equal(y, clean)
    expected, largest = texts.expected(window=window, normalise=normalise)
    assert ((y.double() - expected).abs() <= 8 * torch.finfo(y.dtype).eps * largest).all()


@pytest.mark.parametrize("splits", [1, 4])
def test_windows_of_one_and_of_more_than_there_is(random: torch.Generator, splits: int) -> None:
    texts = Texts(random, torch.bfloat16, earlier=200, heads=8, kv_heads=2, head_dim=128)
    values = texts.qkv[:, 10:].repeat_interleave(4, dim=1)
    assert torch.equal(texts.attend(splits=splits, window=1), values)
    assert torch.equal(texts.attend(splits=splits, window=201), texts.attend(splits=splits))
    assert torch.equal(texts.attend(splits=splits, window=10_000), texts.attend(splits=splits))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("place", [100, 107, 255, 299, 300])
def test_one_score_far_above_all_others_takes_all(
    random: torch.Generator, dtype: torch.dtype, splits: int, place: int
) -> None:
    """Scores of about +500 and -500, of which a sum of exponentials would overflow; 300 is the new slot."""
    texts = Texts(random, dtype, earlier=300, heads=4, kv_heads=4, head_dim=128)
    texts.scale = 4.0
    queries = texts.rotated_queries()
    texts.keys[:] = -queries[:, :, None]
    texts.qkv[:, 4:8] = texts.qkv[:, :4] * (1 if place == 300 else -1)
    if place < 300:
        texts.keys[:, :, place] = queries
    values = texts.qkv[:, 8:] if place == 300 else texts.values[:, :, place]
    assert torch.equal(texts.attend(splits=splits), values)


@pytest.mark.parametrize(
    "change",
    [
        {"heads": 3},  # no multiple of the 2 heads of keys
        {"heads": 0},
        {"texts": 0},
        {"capacity": 0},
        {"window": -1},
        {"splits": 0},
        {"splits": MAX_SPLITS + 1},
        {"splits": 2, "partial": None},
        {"splits": 2, "tickets": None},
        {"dtype": 2},  # float32
        {"slot": None},
        {"qkv": 8},  # beside a multiple of 16
        {"keys": None},
    ],
    ids=str,
)
def test_attention_refuses_what_makes_no_sense(cuda: torch.device, change: dict[str, int | None]) -> None:
    memory = half(cuda, 4096)
    pointers = ["qkv", "keys", "values", "cosines", "sines", "slot", "first", "y", "partial", "tickets"]
    sizes = {"texts": 1, "heads": 2, "kv_heads": 2, "head_dim": 16, "capacity": 4, "splits": 1, "scale": 1.0}
    fields: dict[str, Any] = {**dict.fromkeys(pointers, memory.data_ptr()), **sizes}
    native_decode.decode_attention(Attention(**fields), memory)  # as it is, it is fine: slot 0 of zeros
    if change.get("qkv") is not None:
        change = {"qkv": memory.data_ptr() + 8}
    with pytest.raises(NativeError):
        native_decode.decode_attention(Attention(**{**fields, **change}), memory)
    torch.cuda.synchronize(cuda)
