"""Groups of tiled matrices on a GPU, which one kernel multiplies, and layers that are tiled."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from decode_helpers import assert_product
from sliced_helpers import large_matrix, poison
from sliced_reference import random_matrix
from test_gpu_canonical import GPU, HALVES, whole_numbers
from test_gpu_tiled import TOKENS
from tiled_helpers import (
    MULTIPROCESSORS,
    assert_tiles,
    spmm,
    tile,
    tiled_matrix,
)
from torch import Tensor

from macko_llm import native
from macko_llm.errors import NativeError
from macko_llm.layouts import canonical, sliced, tiled
from macko_llm.layouts.sliced import SlicedMatrix
from macko_llm.layouts.tiled import TiledGroup, TiledMatrix
from macko_llm.layouts.tiled_plan import choose_strips
from macko_llm.linear import MackoLinear, arrange_group, group_of
from macko_llm.native import TiledStruct

pytestmark = pytest.mark.usefixtures("kernels", "full_precision_sums", "tensor_cores")

GROUPS = [(7,), (70, 7), (33, 1, 64), (129, 8, 520, 40), (4096, 1024, 1024), (3000, 3000)]


def grouped(weights: Sequence[Tensor], strips: Sequence[int] | None = None) -> TiledGroup:
    """The group of these dense matrices in strips of their own, cut together unless told."""
    strips = strips or choose_strips([len(weight) for weight in weights], MULTIPROCESSORS)
    group = TiledGroup.of([tile(weight, own) for weight, own in zip(weights, strips, strict=True)])
    assert group is not None
    return group


def assert_group_products(group: TiledGroup, weights: Sequence[Tensor], tokens: int) -> None:
    """Exact ones of whole numbers: with and without a bias and a residual, in place too, and nothing beyond y's end."""
    whole, dtype = torch.cat([*weights]), group.dtype
    rows, cols = whole.shape
    x, bias, residual = whole_numbers(tokens, cols), whole_numbers(rows) * 9, whole_numbers(tokens, rows) * 3
    there, bias_there, residual_there = (tensor.to(GPU, dtype) for tensor in (x, bias, residual))
    product = x.double() @ whole.double().T
    for given_bias in (None, bias_there):
        rounded = (product if given_bias is None else product + bias).to(dtype)
        for added in ("nothing", "apart", "in place"):
            around = torch.full((tokens * rows + 128,), -7.0, dtype=dtype, device=GPU)
            y = around[64:-64].view(tokens, rows)
            if added == "in place":
                y.copy_(residual_there)
            group.multiply(there, given_bias, {"nothing": None, "apart": residual_there, "in place": y}[added], y)
            expected = rounded if added == "nothing" else (rounded.double() + residual).to(dtype)
            assert torch.equal(y.cpu(), expected), f"{added} added, {tokens} tokens"
            assert (around[:64] == -7).all()
            assert (around[-64:] == -7).all()


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("member_rows", GROUPS, ids=str)
def test_products_of_groups(member_rows: tuple[int, ...], dtype: torch.dtype, tokens: int) -> None:
    cols = 172 if len(member_rows) != 2 else 1000
    weights = [random_matrix(rows, cols, 0.5, dtype, seed).sign() for seed, rows in enumerate(member_rows)]
    assert_group_products(grouped(weights), weights, tokens)


@pytest.mark.parametrize("tokens", [1, 9, 17, 33, 100])
@pytest.mark.parametrize("each", [1, 2, 4, 7, 8])
def test_groups_of_any_strips_and_records_of_any_length(each: int, tokens: int) -> None:
    """Strips of up to so many tiles beside lower ones, and a full matrix beside an empty one."""
    weights = [
        random_matrix(rows, 300, sparsity, torch.float16, rows).sign()
        for rows, sparsity in ((203, 0.9), (8 * each, 0.0), (1, 1.0), (64, 1.0))
    ]
    strips = [-(-len(weight) // (8 * each)) for weight in weights]
    assert_group_products(grouped(weights, strips), weights, tokens)
    assert_group_products(grouped(weights, [*strips[:3], 8]), weights, tokens)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("member_rows", [(4096, 1024, 1024), (2048, 2048, 2048), (5504, 5504)], ids=str)
def test_products_of_large_groups_are_within_rounding(
    member_rows: tuple[int, ...], dtype: torch.dtype, tokens: int
) -> None:
    weights = [large_matrix(rows, 1024, 0.5, dtype, seed) for seed, rows in enumerate(member_rows)]
    group, whole = grouped(weights), torch.cat(weights)
    generator = torch.Generator(GPU).manual_seed(0)
    shapes = (tokens, 1024), (len(whole),), (tokens, len(whole))
    x, bias, residual = (torch.randn(shape, generator=generator, device=GPU).to(dtype) for shape in shapes)
    poison(residual.nbytes)
    y, with_residual = torch.empty_like(residual), residual.clone()
    group.multiply(x, bias, None, y)
    assert_product(y, x, whole, bias, None)
    group.multiply(x, bias, with_residual, with_residual)
    assert torch.equal(with_residual, y + residual)


def test_a_group_of_one_is_the_matrix() -> None:
    weight = large_matrix(1024, 1024, 0.5, torch.float16)
    matrix = tiled_matrix(weight)
    group = TiledGroup.of([matrix])
    for tokens in TOKENS:
        x = torch.randn(tokens, 1024, device=GPU).half()
        y = x.new_empty(tokens, 1024)
        group.multiply(x, None, None, y)
        assert torch.equal(y, spmm(x, matrix, None))


@pytest.mark.parametrize("tokens", [1, 9, 17, 65])
def test_a_token_that_is_not_finite_spoils_its_product_with_all_members(tokens: int) -> None:
    weights = [random_matrix(rows, 172, 0.9, torch.bfloat16).sign() for rows in (70, 7, 129)]
    weights[1][:] = 0
    group = grouped(weights)
    x, residual = (whole_numbers(tokens, width).to(GPU, torch.bfloat16) for width in (172, 206))
    y, expected = torch.empty_like(residual), torch.empty_like(residual)
    group.multiply(x, None, residual, expected)
    x[-1, 171] = torch.nan
    group.multiply(x, None, residual, y)
    assert not y[-1].isfinite().any()
    assert torch.equal(y[:-1], expected[:-1])


def test_members_without_rows_are_passed_by() -> None:
    weights = [random_matrix(rows, 172, 0.5, torch.float16, rows).sign() for rows in (33, 70)]
    members = [tile(weight) for weight in weights]
    empty = TiledStruct(cols=172, value_dtype=members[0].struct.value_dtype)
    for order in ((0, empty, 1), (empty, 0, 1), (0, 1, empty), (empty, 0, empty, 1)):
        structs = (TiledStruct * len(order))(*(own if own is empty else members[own].struct for own in order))
        for tokens in (1, 20):
            x = whole_numbers(tokens, 172)
            y = torch.empty(tokens, 103, dtype=torch.float16, device=GPU)
            address = native.address_of(structs)
            native.cuda_tiled_spmm(address, len(order), x.to(GPU, torch.float16), None, None, y)
            assert torch.equal(y.double().cpu(), x.double() @ torch.cat(weights).double().T)
    y.fill_(-7)
    native.cuda_tiled_spmm(native.address_of(empty), 1, x.to(GPU, torch.float16), None, None, y)
    assert (y == -7).all()


def test_matrices_that_no_kernel_multiplies_together_are_refused() -> None:
    matrix = tile(random_matrix(33, 172, 0.5, torch.float16))
    others = [
        tile(random_matrix(33, 173, 0.5, torch.float16)),
        tile(random_matrix(33, 172, 0.5, torch.bfloat16)),
    ]
    x = torch.ones(1, 172, device=GPU, dtype=torch.float16)
    y = torch.full((1, 33 * 5), -7.0, device=GPU, dtype=torch.float16)
    joined = [[matrix, other] for other in others] + [[matrix] * (native.TILED_MEMBERS + 1)]
    for members in joined:
        structs = (TiledStruct * len(members))(*(member.struct for member in members))
        with pytest.raises(NativeError, match="refused its arguments"):
            native.cuda_tiled_spmm(native.address_of(structs), len(members), x, None, None, y)
    for count in (0, -1):
        with pytest.raises(NativeError, match="refused its arguments"):
            native.cuda_tiled_spmm(matrix.address, count, x, None, None, y)
    assert (y == -7).all()


def test_matrices_are_arranged_together_or_not_at_all() -> None:
    weights = [large_matrix(rows, 1024, 0.5, torch.float16, seed) for seed, rows in enumerate((2048, 256, 256))]
    stored = [canonical.pack(weight) for weight in weights]
    members = tiled.arrange_group(stored)
    assert members is not None
    multiprocessors = torch.cuda.get_device_properties(GPU).multi_processor_count
    assert [member.plan.strips for member in members] == choose_strips([2048, 256, 256], multiprocessors)
    for member, weight in zip(members, weights, strict=True):
        assert_tiles(member, weight)
    for other in (
        canonical.pack(large_matrix(1024, 1032, 0.5, torch.float16)),
        canonical.pack(large_matrix(1024, 1024, 0.5, torch.bfloat16)),
        canonical.pack(large_matrix(1024, 1024, 0.0, torch.float16)),  # full: more bytes than dense
        canonical.pack(torch.zeros(0, 1024, dtype=torch.float16, device=GPU)),
        canonical.pack(weights[0].cpu()),
    ):
        assert tiled.arrange_group([stored[0], other]) is None
    assert tiled.arrange_group([stored[1]] * (native.TILED_MEMBERS + 1)) is None


# Layers


def make_layers(count: int, *, layout: str = "auto", tokens: int = 1) -> tuple[list[MackoLinear], list[Tensor]]:
    """Layers of whole numbers, and their dense weights on the CPU."""
    weights = [random_matrix(1024, 1024, 0.5, torch.float16, seed).sign() for seed in range(count)]
    layers = [MackoLinear.from_matrix(canonical.pack(weight), whole_numbers(1024).half()) for weight in weights]
    for layer in layers:
        layer.layout, layer.tokens = layout, tokens
    return layers, weights


@pytest.mark.parametrize(
    ("layout", "tokens", "kind"),
    [("auto", 1, SlicedMatrix), ("sliced", 8, SlicedMatrix), ("tiled", 1, TiledMatrix)],
)
def test_a_layer_is_arranged_in_the_layout_that_it_is_told(layout: str, tokens: int, kind: type) -> None:
    (layer,), (weight,) = make_layers(1, layout=layout, tokens=tokens)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for move in (layer.cuda, layer.cpu, layer.cuda):
        move()
        on_gpu = layer.bias.is_cuda
        assert isinstance(layer.packed, kind) == on_gpu
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor.cpu().view(torch.uint8), state[name].view(torch.uint8))
        x = whole_numbers(3, 1024)
        y = layer(x.to(layer.bias.device, torch.float16))
        assert torch.equal(y.double().cpu(), x.double() @ weight.double().T + layer.bias.double().cpu())
    layer.load_state_dict({**state, "bias": state["bias"] + 1})
    assert isinstance(layer.packed, kind)
    assert torch.equal(layer.packed.dense().cpu(), weight)


def test_layers_with_one_input_have_tiles_of_their_own_and_one_kernel() -> None:
    layers, weights = make_layers(3, layout="tiled")
    for layer in layers:
        layer.to(GPU)
    arrange_group(layers)
    assert len({layer.weight_layout.data_ptr() for layer in layers}) == 3
    group = group_of(layers)
    assert isinstance(group, TiledGroup)
    assert group.is_cut_together
    for tokens in (8, 40):
        x = whole_numbers(tokens, 1024)
        products = []
        for layer, weight in zip(layers, weights, strict=True):
            products.append(layer(x.to(GPU, torch.float16)))
            exact = x.double() @ weight.double().T + layer.bias.double().cpu()
            assert torch.equal(products[-1].double().cpu(), exact)
        y = torch.empty_like(torch.cat(products, dim=1))
        group.multiply(x.to(GPU, torch.float16), torch.cat([layer.bias for layer in layers]), None, y)
        assert torch.equal(y, torch.cat(products, dim=1))
    layers[1].restore()
    assert group_of(layers) is None
    arrange_group(layers)
    assert group_of(layers).is_cut_together


def test_a_layer_that_tiles_do_not_suit_is_arranged_otherwise() -> None:
    weight = large_matrix(1024, 1024, 0.0, torch.float16)
    stored = canonical.pack(weight)
    assert tiled.arrange(stored) is None
    layer = MackoLinear.from_matrix(stored)
    layer.layout = "tiled"
    layer.arrange()
    assert layer.is_arranged == (sliced.arrange(stored) is not None)
    assert not isinstance(layer.packed, TiledMatrix)
    assert np.array_equal(layer.packed.dense().cpu().numpy(), weight.cpu().numpy())
