"""The kernels of a decoded token, each against plain torch in float64 or with the roundings that it promises."""

import math

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
    normalised,
    rotated,
    transformed,
    x_for,
    zeros,
)
from torch import Tensor

from macko_llm import native_decode
from macko_llm.dtypes import CODES
from macko_llm.engines import products
from macko_llm.engines.products import make_product
from macko_llm.errors import NativeError
from macko_llm.layouts import canonical
from macko_llm.layouts.choice import TILED_CAPABILITY
from macko_llm.layouts.sliced import SlicedMatrix
from macko_llm.layouts.tiled import TiledGroup
from macko_llm.linear import MackoLinear, arrange_group, group_of
from macko_llm.native_decode import Attention, Dense, Input

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture
def generator(cuda: torch.device) -> torch.Generator:
    return torch.Generator(cuda).manual_seed(0)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    ("cols", "rows"),
    [
        (8, (1,)),
        (24, (7, 1)),
        (176, (33, 5, 9)),
        (512, (4097,)),
        (4096, (300, 60, 60)),
        (11008, (257,)),
        (16392, (40,)),
    ],
)
def test_dense_products(
    generator: torch.Generator, dtype: torch.dtype, transform: str, cols: int, rows: tuple[int, ...]
) -> None:
    weights = [normal(generator, count, cols, dtype=dtype, scale=0.1) for count in rows]
    biases = [normal(generator, count, dtype=dtype) if index != 1 else None for index, count in enumerate(rows)]
    norm = normal(generator, cols, dtype=dtype)
    x = x_for(transform, generator, 1, cols, dtype)
    residual = normal(generator, 1, sum(rows), dtype=dtype)
    whole = torch.cat(weights)
    bias = torch.cat([torch.zeros(len(w), **like(x)) if b is None else b for w, b in zip(weights, biases, strict=True)])
    clean = transformed(transform, x, norm)
    dense, how = Dense.of(weights, biases), make_input(transform, norm)
    for added in (None, residual):
        y = torch.full_like(residual, torch.nan)
        native_decode.dense_gemv(dense, x, how, added, y)
        # A transform may differ in the last place where float32 sums differ, so it is that of the kernel that multiplies.
        if transform != "plain":
            used = torch.empty_like(clean)
            native_decode.apply_transform(how, x, used)
            assert_close_units(used, clean, 2)
            clean = used
        assert_product(y, clean, whole, bias, added)
    y = residual.clone()
    native_decode.dense_gemv(dense, x, how, y, y)
    again = torch.empty_like(y)
    native_decode.dense_gemv(dense, x, how, residual, again)
    assert torch.equal(y, again)


def test_dense_products_refuse_what_they_cannot_read(cuda: torch.device) -> None:
    x, y = zeros(cuda, 1, 20), zeros(cuda, 1, 4)
    with pytest.raises(NativeError):
        native_decode.dense_gemv(Dense.of([zeros(cuda, 4, 20)], [None]), x, Input.plain(), None, y)
    x = zeros(cuda, 1, 17)[:, 1:]
    with pytest.raises(NativeError):
        native_decode.dense_gemv(Dense.of([zeros(cuda, 4, 16)], [None]), x, Input.plain(), None, y)


def pruned_weights(
    generator: torch.Generator, rows: tuple[int, ...], cols: int, dtype: torch.dtype, sparsity: float
) -> list[Tensor]:
    weights = []
    for count in rows:
        weight = normal(generator, count, cols, dtype=dtype, scale=0.1)
        scores = torch.rand(weight.shape, device=weight.device, generator=generator)
        weights.append(weight.scatter(1, scores.topk(int(cols * sparsity)).indices, 0))
    return weights


def packed_group(
    generator: torch.Generator, rows: tuple[int, ...], cols: int, dtype: torch.dtype, sparsity: float
) -> tuple[SlicedMatrix, Tensor]:
    """A sliced group and its dense weight."""
    weights = pruned_weights(generator, rows, cols, dtype, sparsity)
    layers = [MackoLinear.from_matrix(canonical.pack(weight)) for weight in weights]
    arrange_group(layers)
    group = group_of(layers)
    assert isinstance(group, SlicedMatrix)
    return group, torch.cat(weights)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    ("cols", "rows"), [(4096, (96,)), (4096, (512, 128, 128)), (4096, (4096,)), (11008, (300,)), (4096, (5500, 5500))]
)
def test_packed_products_with_transforms_and_residuals(
    generator: torch.Generator, dtype: torch.dtype, sparsity: float, transform: str, cols: int, rows: tuple[int, ...]
) -> None:
    matrix, weight = packed_group(generator, rows, cols, dtype, sparsity)
    bias = normal(generator, sum(rows), dtype=dtype)
    norm = normal(generator, cols, dtype=dtype)
    x = x_for(transform, generator, 1, cols, dtype)
    how = make_input(transform, norm)
    clean = x
    if transform != "plain":
        clean = torch.empty(1, cols, dtype=dtype, device=x.device)
        native_decode.apply_transform(how, x, clean)
        assert_close_units(clean, transformed(transform, x, norm), 2)
    residual = normal(generator, 1, sum(rows), dtype=dtype)
    for added in (None, residual):
        y = torch.full_like(residual, torch.nan)
        native_decode.sliced_spmv(matrix, x, how, bias, added, y)
        assert_product(y, clean, weight, bias, added)
    y = residual.clone()
    native_decode.sliced_spmv(matrix, x, how, None, y, y)
    assert_product(y, clean, weight, None, residual)


@pytest.mark.parametrize("tokens", [2, 3, 4, 7])
def test_packed_products_of_several_tokens_add_a_residual_but_transform_nothing(
    generator: torch.Generator, tokens: int
) -> None:
    matrix, weight = packed_group(generator, (512, 100), 1024, torch.float16, 0.5)
    x, residual = (normal(generator, tokens, width, dtype=torch.float16) for width in (1024, 612))
    y = residual.clone()
    native_decode.sliced_spmv(matrix, x, Input.plain(), None, y, y)
    assert_product(y, x, weight, None, residual)
    with pytest.raises(NativeError):
        native_decode.sliced_spmv(matrix, x, Input.rms_norm(x[0], EPSILON), None, None, y)


@pytest.mark.parametrize("texts", [1, 2, 8, 20, 64])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("cols", "rows"), [(1024, (512, 128, 128)), (1024, (700, 700)), (2048, (1024,))])
def test_tiled_layers_are_one_product(
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    cols: int,
    rows: tuple[int, ...],
    transform: str,
    dtype: torch.dtype,
    texts: int,
) -> None:
    if torch.cuda.get_device_capability(generator.device) < TILED_CAPABILITY:
        pytest.skip("this GPU multiplies no tiles")
    weights = pruned_weights(generator, rows, cols, dtype, 0.5)
    biases = [normal(generator, count, dtype=dtype) if index == 0 else None for index, count in enumerate(rows)]
    layers = [MackoLinear.from_matrix(canonical.pack(w), own) for w, own in zip(weights, biases, strict=True)]
    for layer in layers:
        layer.layout = "tiled"
    arrange_group(layers)
    assert isinstance(group_of(layers), TiledGroup)
    norm, x = normal(generator, cols, dtype=dtype), x_for(transform, generator, texts, cols, dtype)
    how, clean, residual = make_input(transform, norm), x, normal(generator, texts, sum(rows), dtype=dtype)
    if transform != "plain":
        clean = torch.empty(texts, cols, dtype=dtype, device=x.device)
        native_decode.apply_transform(how, x, clean)
    by_modules = torch.empty_like(residual)
    products._multiply_with_modules(layers, clean, by_modules, residual)

    def never(*_: object) -> None:
        raise AssertionError("layer by layer")

    monkeypatch.setattr(products, "_multiply_with_modules", never)
    multiply, bias = make_product(layers, how, texts, dtype), products._joined_bias(layers, dtype)
    for added in (None, residual):
        y = torch.full_like(residual, torch.nan)
        multiply(x, y, added)
        assert_product(y, clean, torch.cat(weights), bias, added)
    assert (y.double() - by_modules.double()).norm() <= torch.finfo(dtype).eps * by_modules.double().norm()
    in_place = residual.clone()
    multiply(x, in_place, in_place)
    assert torch.equal(in_place, y)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("transform", TRANSFORMS[1:])
@pytest.mark.parametrize(("tokens", "cols"), [(1, 8), (3, 520), (5, 4096), (2, 16384)])
def test_transforms_alone(
    generator: torch.Generator, dtype: torch.dtype, transform: str, tokens: int, cols: int
) -> None:
    norm = normal(generator, cols, dtype=dtype)
    x = x_for(transform, generator, tokens, cols, dtype) * 3
    y = torch.empty(tokens, cols, dtype=dtype, device=x.device)
    native_decode.apply_transform(make_input(transform, norm), x, y)
    expected = transformed(transform, x, norm)
    assert_close_units(y, expected, 2)
    assert (y == expected).float().mean() > 0.98


def test_a_token_begins(generator: torch.Generator) -> None:
    embeddings = normal(generator, 11, 37, dtype=torch.bfloat16)
    device = embeddings.device
    tokens = torch.tensor([3, -1, 10, 11], device=device)
    x, slot = (
        torch.empty(4, 37, dtype=torch.bfloat16, device=device),
        torch.tensor([41], dtype=torch.int32, device=device),
    )
    native_decode.begin_token(tokens, embeddings, x, slot)
    assert torch.equal(x, embeddings[[3, 0, 10, 0]])
    assert slot.item() == 42


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("vocabulary", [1, 7, 32000, 128256])
def test_the_most_probable_token(generator: torch.Generator, dtype: torch.dtype, vocabulary: int) -> None:
    logits = normal(generator, 6, vocabulary, dtype=dtype) - 20
    last = vocabulary - 1
    logits[1, last // 2] = logits[1, last] = 1.0  # tied: the first
    logits[2, last] = torch.nan
    logits[3, last // 2] = math.inf
    logits[4] = -math.inf
    logits[5, :] = -0.0
    logits[5, last] = 0.0
    scratch = torch.zeros(12, dtype=torch.int64, device=logits.device)
    tokens = torch.empty(6, dtype=torch.int64, device=logits.device)
    for _ in range(2):
        native_decode.argmax(logits, tokens, scratch)
        first = (logits[0] == logits[0].max()).nonzero()[0].item()
        assert tokens.tolist() == [first, last // 2, -1, -1, -1, 0]
        assert not scratch.any()


# Attention


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads"),
    [(16, 8, 4), (32, 6, 2), (64, 1, 1), (64, 12, 2), (128, 8, 8), (128, 8, 2), (128, 16, 1), (256, 4, 4), (256, 6, 1)],
)
@pytest.mark.parametrize(("earlier", "splits"), [(0, 1), (0, 3), (1, 2), (5, 1), (255, 1), (300, 7), (1000, 2)])
@pytest.mark.parametrize(("window", "norms"), [(0, False), (9, True)])
def test_attention(
    generator: torch.Generator,
    dtype: torch.dtype,
    head_dim: int,
    heads: int,
    kv_heads: int,
    earlier: int,
    splits: int,
    window: int,
    norms: bool,
) -> None:
    texts, capacity = 3, earlier + 5
    device = generator.device
    qkv = normal(generator, texts, heads + 2 * kv_heads, head_dim, dtype=dtype)
    keys, values = (normal(generator, texts, kv_heads, capacity, head_dim, dtype=dtype) for _ in range(2))
    angles = torch.rand(capacity, head_dim // 2, device=device, generator=generator) * 6
    cosines, sines = (torch.cat((f(angles), f(angles)), dim=-1).to(dtype) for f in (torch.cos, torch.sin))
    query_norm, key_norm = (normal(generator, head_dim, dtype=dtype) if norms else None for _ in range(2))
    first = torch.tensor([0, earlier // 2, earlier], dtype=torch.int32, device=device)
    slot = torch.tensor([earlier], dtype=torch.int32, device=device)
    scale = head_dim**-0.5

    position = earlier - first.long()
    turn = [table[position][:, None] for table in (cosines, sines)]
    queries = rotated(normalised(qkv[:, :heads], query_norm), *turn)
    new_keys = rotated(normalised(qkv[:, heads : heads + kv_heads], key_norm), *turn)
    expected_keys, expected_values = keys.clone(), values.clone()
    expected_keys[:, :, earlier] = new_keys
    expected_values[:, :, earlier] = qkv[:, heads + kv_heads :]
    shared = heads // kv_heads
    wide_keys, wide_values = (
        states[:, :, : earlier + 1].double().repeat_interleave(shared, dim=1)
        for states in (expected_keys, expected_values)
    )
    scores = torch.einsum("thd,thsd->ths", queries.double(), wide_keys) * scale
    slots = torch.arange(earlier + 1, device=device)
    hidden = slots < first[:, None]
    if window:
        hidden |= slots <= earlier - window
    probabilities = scores.masked_fill(hidden[:, None], -math.inf).softmax(dim=-1)
    expected = torch.einsum("ths,thsd->thd", probabilities, wide_values)

    y = torch.full((texts, heads, head_dim), torch.nan, dtype=dtype, device=device)
    partial = torch.empty(texts * heads * splits * (head_dim + 2), device=device)
    tickets = torch.zeros(texts * heads, dtype=torch.int32, device=device)
    arrays = (qkv, keys, values, cosines, sines, query_norm, key_norm, slot, first, y, partial, tickets)
    attention = Attention(
        *(None if array is None else array.data_ptr() for array in arrays),
        *(scale, EPSILON, texts, heads, kv_heads, head_dim, capacity, window, splits, CODES[dtype]),
    )
    native_decode.decode_attention(attention, y)
    once = y.clone()
    native_decode.decode_attention(attention, y)
    assert torch.equal(y, once)
    assert not tickets.any()
    # The new key's norm may round another way where float32 sums differ.
    assert_close_units(keys[:, :, earlier], expected_keys[:, :, earlier], 4 if norms else 0)
    keys[:, :, earlier] = expected_keys[:, :, earlier]
    assert torch.equal(keys, expected_keys)
    assert torch.equal(values, expected_values)
    tolerance = (8 if norms else 2) * torch.finfo(dtype).eps
    assert ((y.double() - expected).abs() <= tolerance * wide_values.abs().amax(dim=2)).all()


def test_attention_refuses_what_it_is_not_compiled_for(cuda: torch.device) -> None:
    y = zeros(cuda, 1, 1, 24)
    address = y.data_ptr()
    attention = Attention(
        *(address, address, address, address, address, None, None, address, address, address, None, None),
        *(1.0, EPSILON, 1, 1, 1, 24, 4, 0, 1, 0),
    )
    with pytest.raises(NativeError):
        native_decode.decode_attention(attention, y)
