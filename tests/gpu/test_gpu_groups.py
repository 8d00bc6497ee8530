"""Groups of sliced matrices on a GPU: one layout, whose members multiply, unpack, move and save as if they were alone."""

import copy
import gc
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import build, make_tokenizer, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from sliced_helpers import (
    LAYOUTS,
    assert_layout,
    assert_multiplies_whole_numbers,
    certainly_cut,
    large_matrix,
    layouts,
    linear,
    poison,
    spmv,
)
from sliced_reference import GROUPS, patterns, random_matrix
from test_gpu_canonical import GPU, HALVES, arrays, whole_numbers
from test_ops import assert_within_rounding
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

import macko_llm
from macko_llm import checkpoint, models, native
from macko_llm.layouts import canonical, sliced
from macko_llm.layouts.sliced import SlicedMatrix
from macko_llm.layouts.sliced_plan import MAX_OVERHEAD, Shape
from macko_llm.linear import ARRAY_NAMES, MackoLinear, arrange_group, group_of
from macko_llm.packing import pack_checkpoint
from macko_llm.transformers_integration import fuse_projections

pytestmark = pytest.mark.usefixtures("kernels", "full_precision_sums")

COLS = 2048
SIZES = (256, 64, 72)
"""Rows of the layers that `make_layers` makes: grouped query attention, and a last slice that is not full."""


def parts(weight: Tensor, member_rows: tuple[int, ...]) -> tuple[Tensor, ...]:
    return weight.split(list(member_rows))


def certainly_grouped(weights: tuple[Tensor, ...]) -> SlicedMatrix:
    members = sliced.arrange_group([canonical.pack(weight.to(GPU)) for weight in weights])
    assert members is not None
    assert [member.member for member in members] == list(range(len(weights)))
    assert all(member.data is members[0].data for member in members)
    return SlicedMatrix(members[0].data, members[0].plan)


def assert_members(group: SlicedMatrix, weights: tuple[Tensor, ...]) -> None:
    """The group's bytes are the naive encoder's, and each member unpacks to its own matrix, every element of it."""
    assert_layout(group, torch.cat(weights))
    for member, weight in zip(group.members, weights, strict=True):
        poison(weight.nbytes)
        unpacked = native.cuda_sliced_unpack(member)
        assert (unpacked.shape, unpacked.dtype, unpacked.device) == (weight.shape, weight.dtype, GPU)
        assert (patterns(unpacked) == patterns(weight + 0.0)).all()


def assert_one_product(group: SlicedMatrix, x: Tensor, bias: Tensor | None) -> Tensor:
    """The group's product is its members', bit for bit, through the op and past it."""
    y = group.linear(x, bias)
    biases = [None] * len(group.members) if bias is None else bias.split([m.rows for m in group.members])
    for multiply in (linear, spmv):
        products = [multiply(x, member, own) for member, own in zip(group.members, biases, strict=True)]
        assert [product.shape for product in products] == [(len(x), member.rows) for member in group.members]
        assert torch.equal(torch.cat(products, dim=1), y)
    return y


@layouts
@pytest.mark.parametrize("member_rows", GROUPS)
def test_groups_of_odd_sizes(member_rows: tuple[int, ...], shape: Shape, bits: int) -> None:
    for dtype in HALVES:
        weight = random_matrix(sum(member_rows), 172, 0.5, dtype)
        weight[:: max(member_rows) // 2 + 1] = 0
        group = certainly_cut(weight, shape, bits, member_rows=member_rows)
        assert group.plan.member_rows == member_rows
        assert_members(group, parts(weight, member_rows))
        for tokens in (1, 2, 3, 4, 7, 12):
            x, bias = torch.randn(tokens, 172).to(GPU, dtype), torch.randn(group.rows).to(GPU, dtype)
            for given_bias in (None, bias):
                y = assert_one_product(group, x, given_bias)
                assert_within_rounding(y.cpu(), x.cpu(), weight, None if given_bias is None else bias.cpu())


@given(
    member_rows=st.lists(st.integers(0, 200), min_size=1, max_size=4).filter(any).map(tuple),
    cols=st.sampled_from([1, 17, 172]) | st.integers(1, 3000),
    sparsity=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 1.0]),
    dtype=st.sampled_from(HALVES),
    layout=st.sampled_from(LAYOUTS),
    tokens=st.integers(1, 9),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=50, deadline=None)
def test_any_group(
    member_rows: tuple[int, ...],
    cols: int,
    sparsity: float,
    dtype: torch.dtype,
    layout: tuple[Shape, int],
    tokens: int,
    seed: int,
) -> None:
    weight = random_matrix(sum(member_rows), cols, sparsity, dtype, seed)
    group = certainly_cut(weight, *layout, member_rows=member_rows)
    assert_members(group, parts(weight, member_rows))
    assert_one_product(group, torch.randn(tokens, cols).to(GPU, dtype), None)
    whole = certainly_cut(weight.sign(), *layout, member_rows=member_rows)
    assert_multiplies_whole_numbers(whole, weight.sign(), tokens)
    for member, own in zip(whole.members, parts(weight.sign(), member_rows), strict=True):
        if len(own):
            assert_multiplies_whole_numbers(member, own, tokens)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("member_rows", "cols", "sparsity"),
    [
        ((4096, 4096, 4096), 1024, 0.5),
        ((4096, 1024, 1024), 4096, 0.5),
        ((3584, 512, 512), 3584, 0.6),
        ((5504, 5504), 2048, 0.7),
        ((33, 1000), 8000, 0.9),
    ],
)
def test_arranged_groups(member_rows: tuple[int, ...], cols: int, sparsity: float, dtype: torch.dtype) -> None:
    weights = tuple(large_matrix(rows, cols, sparsity, dtype, seed).cpu() for seed, rows in enumerate(member_rows))
    stored = [canonical.pack(weight.to(GPU)) for weight in weights]
    group = certainly_grouped(weights)
    assert group.plan.member_rows == member_rows
    assert group.data.nbytes <= MAX_OVERHEAD * sum(matrix.nbytes for matrix in stored)
    assert_members(group, weights)
    for member, matrix in zip(group.members, stored, strict=True):
        for array, expected in zip(arrays(member.canonical()), arrays(matrix), strict=True):
            assert torch.equal(array.view(torch.uint8), expected.view(torch.uint8))
    for tokens in (1, 4):
        x = torch.randn(tokens, cols).to(GPU, dtype)
        y = assert_one_product(group, x, None)
        assert_within_rounding(y.cpu(), x.cpu(), torch.cat(weights), None)


def test_what_makes_no_group() -> None:
    matrix = canonical.pack(random_matrix(64, COLS, 0.5, torch.float16).to(GPU))
    other_width = canonical.pack(random_matrix(64, COLS - 1, 0.5, torch.float16).to(GPU))
    other_dtype = canonical.pack(random_matrix(64, COLS, 0.5, torch.bfloat16).to(GPU))
    elsewhere = canonical.pack(random_matrix(64, COLS, 0.5, torch.float16))
    uneven = random_matrix(64, COLS, 0.5, torch.float16)
    uneven[1:] = 0
    assert sliced.arrange_group([matrix, matrix]) is not None
    for other in (other_width, other_dtype, elsewhere, canonical.pack(uneven.to(GPU))):
        assert sliced.arrange_group([matrix, other]) is None


def test_nothing_is_written_beyond_a_members_rows() -> None:
    """Results and unpacked rows of one member must stay clear of its neighbours'."""
    for shape, bits in LAYOUTS:
        weight = random_matrix(105, 172, 0.5, torch.float16).sign()
        group = certainly_cut(weight, shape, bits, member_rows=(33, 7, 65))
        x = whole_numbers(3, 172)
        for member, own in zip(group.members, parts(weight, (33, 7, 65)), strict=True):
            around = torch.full((3 * len(own) + 128,), -7.0, dtype=torch.float16, device=GPU)
            y = around[64:-64].view(3, len(own))
            native.cuda_sliced_spmv(member, x.to(GPU, torch.float16), None, y)
            assert torch.equal(y.double().cpu(), x.double() @ own.double().T)
            assert (around[:64] == -7).all()
            assert (around[-64:] == -7).all()
            around = torch.full((len(own) * 172 + 128,), -7.0, dtype=torch.float16, device=GPU)
            unpacked = around[64:-64]
            native.call_cuda("macko_cuda_sliced_unpack", (member.data,), member.address, unpacked.data_ptr())
            assert torch.equal(unpacked.view_as(own).cpu(), own)
            assert (around[:64] == -7).all()
            assert (around[-64:] == -7).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_opcheck_of_a_member(dtype: torch.dtype) -> None:
    weight = random_matrix(105, 40, 0.5, dtype)
    for shape, bits in (LAYOUTS[0], LAYOUTS[-1]):
        group = certainly_cut(weight, shape, bits, member_rows=(33, 7, 65))
        for matrix, own in ((group.members[1], weight[33:40]), (group.members[2], weight[40:]), (group, weight)):
            x, bias = torch.randn(3, 40).to(GPU, dtype), torch.randn(len(own)).to(GPU, dtype)
            torch.library.opcheck(torch.ops.macko.sliced_spmv, (x, matrix.data, bias, matrix.dtype, matrix.numbers))
            torch.library.opcheck(torch.ops.macko.sliced_unpack, (matrix.data, dtype, matrix.numbers))
            assert torch.equal(torch.ops.macko.sliced_unpack(matrix.data, dtype, matrix.numbers).cpu(), own)


# Layers


def make_layers(
    dtype: torch.dtype = torch.float16, *, bias: bool = True
) -> tuple[list[MackoLinear], list[Tensor], list[dict[str, Tensor]]]:
    """Grouped layers of whole numbers, their dense weights on the CPU, and their canonical states."""
    weights = [random_matrix(rows, COLS, 0.5, dtype, seed).sign() for seed, rows in enumerate(SIZES)]
    biases = [whole_numbers(rows).to(GPU, dtype) if bias else None for rows in SIZES]
    layers = [
        MackoLinear.from_matrix(canonical.pack(weight.to(GPU)), own)
        for weight, own in zip(weights, biases, strict=True)
    ]
    states = [{name: tensor.clone() for name, tensor in layer.state_dict().items()} for layer in layers]
    arrange_group(layers)
    assert group_of(layers) is not None
    return layers, weights, states


def assert_state(layer: MackoLinear, expected: dict[str, Tensor]) -> None:
    state = layer.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor.cpu().view(torch.uint8), expected[name].cpu().view(torch.uint8))


def assert_layers(layers: list[MackoLinear], weights: list[Tensor], states: list[dict[str, Tensor]]) -> None:
    """Each multiplies few and many tokens, and its state is the canonical one."""
    for layer, weight, state in zip(layers, weights, states, strict=True):
        assert_state(layer, state)
        for tokens in (1, 3, 20):
            x = whole_numbers(tokens, COLS)
            exact = x.double() @ weight.double().T + (0 if layer.bias is None else layer.bias.double().cpu())
            for dtype in (weight.dtype, torch.float32):
                y = layer(x.to(next(iter((*layer.parameters(), *layer.buffers()))).device, dtype))
                assert torch.equal(y.cpu(), exact.to(dtype))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_layers_of_a_group(dtype: torch.dtype, bias: bool) -> None:
    layers, weights, states = make_layers(dtype, bias=bias)
    assert all(layer.is_arranged for layer in layers)
    assert len({layer.weight_layout.data_ptr() for layer in layers}) == 1
    assert_layers(layers, weights, states)
    group = group_of(layers)
    x = whole_numbers(2, COLS).to(GPU, dtype)
    assert torch.equal(group.linear(x, None).double(), x.double() @ torch.cat(weights).to(GPU).double().T)
    before = group.data
    arrange_group(layers)  # once more is nothing more
    assert group_of(layers).data is before
    for others in (layers[:2], layers[::-1], [*layers[:2], layers[1]], layers[:1]):
        assert group_of(others) is None
    model = torch.nn.ModuleList(layers)
    assert models.memory_bytes(model) == group.data.nbytes + sum(state["bias"].nbytes for state in states if bias)


def test_layers_leave_their_group_one_by_one() -> None:
    layers, weights, states = make_layers()
    layers[1].restore()
    assert group_of(layers) is None
    assert [layer.is_arranged for layer in layers] == [True, False, True]
    assert_layers(layers, weights, states)
    layers[0].cpu()
    assert_layers(layers, weights, states)
    layers[0].cuda()
    layers[1].arrange()
    layers[2].half()
    assert all(layer.is_arranged for layer in layers)
    assert group_of(layers) is None
    assert [group_of([layer]) is not None for layer in layers] == [True] * 3
    assert_layers(layers, weights, states)
    arrange_group(layers)
    assert group_of(layers) is not None
    assert_layers(layers, weights, states)


def test_a_state_loaded_into_one_layer_leaves_the_others_alone() -> None:
    layers, weights, states = make_layers()
    negative = {**states[1], "weight_values": -states[1]["weight_values"] + 0.0}
    layers[1].load_state_dict(negative)
    assert layers[1].is_arranged
    assert_layers(layers, [weights[0], -weights[1], weights[2]], [states[0], negative, states[2]])


def test_layers_that_no_layout_suits_together() -> None:
    _, weights, _ = make_layers()
    uneven = random_matrix(64, COLS, 0.5, torch.float16).sign()
    uneven[1:] = 0
    for other in (uneven, weights[1].bfloat16()):
        layers = [MackoLinear.from_matrix(canonical.pack(weight.to(GPU))) for weight in (weights[0], other, weights[2])]
        arrange_group(layers)
        assert group_of(layers) is None
        assert [layer.is_arranged for layer in layers] == [True, other is not uneven, True]
        for layer, weight in zip(layers, (weights[0], other, weights[2]), strict=True):
            x = whole_numbers(1, COLS)
            assert torch.equal(layer(x.to(GPU, weight.dtype)).double().cpu(), x.double() @ weight.double().T)


def pickled(thing: object) -> object:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("remake", [copy.deepcopy, pickled])
def test_copies_of_grouped_layers(remake: Callable) -> None:
    layers, weights, states = make_layers()
    twins, lone = list(remake(torch.nn.ModuleList(layers))), remake(layers[1])
    assert group_of(twins) is not None
    assert lone.is_arranged
    assert group_of([layers[0], lone, layers[2]]) is None
    group_of(layers).data.zero_()  # the copies must not read the first ones' memory
    assert_layers(twins, weights, states)
    assert_layers([lone], weights[1:2], states[1:2])


def test_grouping_frees_what_was_there() -> None:
    weights = [large_matrix(rows, 4096, 0.5, torch.float16, seed) for seed, rows in enumerate((4096, 1024, 1024))]
    certainly_grouped(tuple(weights))  # all that is ever loaded
    gc.collect()
    before = torch.cuda.memory_allocated()
    layers = [MackoLinear.from_matrix(canonical.pack(weight)) for weight in weights]
    stored = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    arrange_group(layers)
    slack = 2**22  # the allocator's rounding, at most 1 MiB a tensor
    nbytes = layers[0].weight_layout.nbytes
    assert nbytes <= torch.cuda.memory_allocated() - before < nbytes + slack
    dense = max(weight.nbytes for weight in weights)  # one at a time
    assert torch.cuda.max_memory_allocated() - before < stored + nbytes + dense + slack


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_grouped_layers_compile_into_one_graph(backend: str) -> None:
    if backend == "inductor":
        pytest.importorskip("triton")
    layers, weights, _ = make_layers()

    def project(x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in layers]

    torch._dynamo.reset()
    compiled = torch.compile(project, fullgraph=True, backend=backend)
    for tokens in (1, 3, 20):
        x = whole_numbers(tokens, COLS)
        with torch.inference_mode():
            products = compiled(x.to(GPU, torch.float16))
        for y, layer, weight in zip(products, layers, weights, strict=True):
            assert torch.equal(y.double().cpu(), x.double() @ weight.double().T + layer.bias.double().cpu())


def test_a_group_in_a_graph() -> None:
    layers, weights, _ = make_layers(bias=False)
    x = torch.zeros(1, COLS, dtype=torch.float16, device=GPU)
    group, graph = group_of(layers), torch.cuda.CUDAGraph()
    group.linear(x, None)
    torch.cuda.synchronize()
    with torch.inference_mode(), torch.cuda.graph(graph):
        y = group.linear(x, None)
        own = [layer(x) for layer in layers]
    for turn in range(3):
        new = whole_numbers(1, COLS).roll(turn * 13, dims=1)
        x.copy_(new)
        graph.replay()
        assert torch.equal(y.double().cpu(), new.double() @ torch.cat(weights).double().T)
        assert torch.equal(torch.cat(own, dim=1), y)


# Models


@pytest.fixture(scope="module", params=HALVES, ids=["float16", "bfloat16"])
def packed_llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers, half of its weights zero, wide enough that its matrices are arranged."""
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 1024, "intermediate_size": 1280, "num_hidden_layers": 2, "vocab_size": 320}
    model = build(LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=64))
    for layer in models.prunable_linears(model).values():
        layer.weight.data.masked_fill_(layer.weight.abs() < layer.weight.abs().median(), 0)
    model.to(request.param).save_pretrained(folder / "dense")
    make_tokenizer().save_pretrained(folder / "dense")
    pack_checkpoint(folder / "dense", folder / "packed")
    return folder / "packed"


def groups_of(model: PreTrainedModel) -> list[SlicedMatrix | None]:
    return [group_of([model.get_submodule(name) for name in names]) for names in models.projection_groups(model)]


def logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(tokens.to(GPU)).logits.double()


def test_a_model_is_loaded_in_groups(packed_llama: Path) -> None:
    model = macko_llm.load(packed_llama, device="cuda")
    groups = groups_of(model)
    assert [group.plan.member_rows for group in groups] == [(1024, 512, 512), (1280, 1280)] * 2
    alone = [module for module in model.modules() if isinstance(module, MackoLinear) and group_of([module])]
    assert len(alone) == 4  # o and down
    before = [group.data for group in groups]
    fuse_projections(model)  # nothing to do
    assert all(group.data is data for group, data in zip(groups_of(model), before, strict=True))


def test_a_grouped_model_saves_the_files_that_it_came_from(packed_llama: Path, tmp_path: Path) -> None:
    model = macko_llm.load(packed_llama, device="cuda")
    model.save_pretrained(tmp_path)
    assert all(groups_of(model))
    files, saved = checkpoint.weight_files(packed_llama), checkpoint.weight_files(tmp_path)
    assert [file.name for file in files] == [file.name for file in saved]
    for file, twin in zip(files, saved, strict=True):
        assert file.read_bytes() == twin.read_bytes()


def test_a_grouped_model_moves_and_is_grouped_again(packed_llama: Path) -> None:
    model = macko_llm.load(packed_llama, device="cuda")
    stored = macko_llm.load(packed_llama, device="cpu").state_dict()
    tokens = random_tokens(1, 3)
    expected = logits(model, tokens)
    model.cpu()
    assert not any(groups_of(model))
    fuse_projections(model)  # there is no GPU's layout to share
    assert not any(groups_of(model))
    assert model.cuda() is model
    assert not any(groups_of(model))
    fuse_projections(model)
    assert all(groups_of(model))
    assert torch.equal(logits(model, tokens), expected)
    state = model.state_dict()
    assert state.keys() == stored.keys()
    assert sum(name.endswith(ARRAY_NAMES) for name in state) == 3 * 14
    assert all(torch.equal(tensor.cpu(), stored[name]) for name, tensor in state.items())


def test_a_grouped_model_gives_the_logits_of_the_canonical_one(packed_llama: Path) -> None:
    model = macko_llm.load(packed_llama, device="cuda")
    exact = macko_llm.load(packed_llama, dtype="float32", device="cuda")
    stored = macko_llm.load(packed_llama, device="cuda")
    for module in stored.modules():
        if isinstance(module, MackoLinear):
            module.restore()
    for tokens in (random_tokens(1, 1), random_tokens(1, 3), random_tokens(2, 20)):
        expected = logits(exact, tokens)
        rounding = (logits(stored, tokens) - expected).abs().max()
        assert (logits(model, tokens) - expected).abs().max() < 2 * rounding + 1e-3
