"""vLLM's own parallel layers with packed weights, one rank after the other, against slices of the dense matrices.

The arrays go through the weight loaders as vLLM's models call them; of each rank the product is compared with a dense one of
the rows and columns that the rank must hold, which are counted here.
"""

import gc
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("vllm.version", reason="needs vLLM: make test-vllm")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import linear as vllm_linear

from macko_llm import format as spec
from macko_llm.errors import FormatError, UsageError
from macko_llm.format import MackoMatrix
from macko_llm.packed_checkpoint import ARRAY_NAMES
from macko_llm.vllm_plugin import quantization as plugin
from macko_llm.vllm_plugin.product import arrange
from macko_llm.vllm_plugin.quantization import MackoVllmConfig

PARENT = "model.layers.0.block"
COLS = 96
HEAD = 8
MEMBERS = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture(autouse=True)
def config() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture
def be_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Make the layers that are built from now on those of a rank of a tensor-parallel group."""

    def become(rank: int, ranks: int) -> None:
        monkeypatch.setattr(vllm_linear, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(vllm_linear, "get_tensor_model_parallel_world_size", lambda: ranks)

    return become


def sparse(rows: int, cols: int = COLS, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    return weight.masked_fill(torch.rand(rows, cols, generator=generator) < 0.6, 0).half()


def quantization(dense: tuple[str, ...] = ()) -> MackoVllmConfig:
    config = MackoVllmConfig.from_config(
        {"quant_method": "macko", "value_dtype": "float16", "modules_to_not_convert": [f"{PARENT}.{d}" for d in dense]}
    )
    config.packed_modules_mapping = MEMBERS
    return config


def arrays_of(matrix: MackoMatrix) -> dict[str, Tensor]:
    return dict(zip(ARRAY_NAMES, (matrix.values, matrix.deltas, matrix.row_offsets), strict=True))


def load(layer: Any, arrays: list[tuple[str, Tensor, tuple[Any, ...]]]) -> None:
    """Any order is right: files have theirs, and an array of a member may lie in another file than the next."""
    random.Random(0).shuffle(arrays)
    for name, tensor, shard in arrays:
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, tensor, *shard)
    layer.quant_method.process_weights_after_loading(layer)


def load_members(layer: Any, members: dict[Any, Tensor], dense: tuple[Any, ...] = ()) -> None:
    arrays: list[tuple[str, Tensor, tuple[Any, ...]]] = []
    for shard, weight in members.items():
        stored = {"weight": weight} if shard in dense else arrays_of(spec.pack(weight))
        arrays += [(name, tensor, () if shard is None else (shard,)) for name, tensor in stored.items()]
    load(layer, arrays)


def check(layer: Any, own: Tensor) -> None:
    """The layer multiplies as the dense rows and columns do that its rank must hold; few tokens and many."""
    for tokens in (1, 3, 70):
        x, bias = torch.randn(tokens, own.shape[1]), torch.randn(own.shape[0])
        with torch.inference_mode():
            y = layer.quant_method.apply(layer, x, bias)
        torch.testing.assert_close(y, F.linear(x, own.float(), bias), rtol=1e-4, atol=1e-4)


RANKS = [(0, 1), (0, 2), (1, 2), (2, 4), (3, 4)]


@pytest.mark.parametrize(("rank", "ranks"), RANKS)
def test_a_column_parallel_layer_holds_its_rank_s_rows(rank: int, ranks: int, be_rank: Callable) -> None:
    be_rank(rank, ranks)
    layer = vllm_linear.ColumnParallelLinear(COLS, 64, quant_config=quantization(), prefix=f"{PARENT}.fc")
    weight = sparse(64)
    load_members(layer, {None: weight})
    check(layer, weight.chunk(ranks)[rank])


@pytest.mark.parametrize(("rank", "ranks"), RANKS)
def test_a_row_parallel_layer_holds_its_rank_s_columns(rank: int, ranks: int, be_rank: Callable) -> None:
    be_rank(rank, ranks)
    layer = vllm_linear.RowParallelLinear(COLS, 40, quant_config=quantization(), prefix=f"{PARENT}.o_proj")
    weight = sparse(40)
    load_members(layer, {None: weight})
    check(layer, weight.chunk(ranks, dim=1)[rank])


def test_a_replicated_layer_holds_all_on_every_rank(be_rank: Callable) -> None:
    be_rank(1, 2)
    layer = vllm_linear.ReplicatedLinear(COLS, 40, quant_config=quantization(), prefix=f"{PARENT}.gate")
    weight = sparse(40)
    load_members(layer, {None: weight})
    check(layer, weight)


@pytest.mark.parametrize("fused_in_file", [False, True], ids=["two in the file", "one in the file"])
@pytest.mark.parametrize(("rank", "ranks"), RANKS)
def test_gate_and_up_become_one_matrix_of_the_rank_s_rows_of_each(
    rank: int, ranks: int, fused_in_file: bool, be_rank: Callable
) -> None:
    be_rank(rank, ranks)
    layer = vllm_linear.MergedColumnParallelLinear(
        COLS, [48, 48], quant_config=quantization(), prefix=f"{PARENT}.gate_up_proj"
    )
    gate, up = sparse(48, seed=1), sparse(48, seed=2)
    load_members(layer, {None: torch.cat([gate, up])} if fused_in_file else {0: gate, 1: up})
    check(layer, torch.cat([gate.chunk(ranks)[rank], up.chunk(ranks)[rank]]))


@pytest.mark.parametrize("fused_in_file", [False, True], ids=["three in the file", "one in the file"])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize(("rank", "ranks"), RANKS)
def test_q_k_and_v_become_one_matrix_of_the_rank_s_heads_and_ranks_share_heads_where_they_are_more(
    rank: int, ranks: int, kv_heads: int, fused_in_file: bool, be_rank: Callable
) -> None:
    be_rank(rank, ranks)
    layer = vllm_linear.QKVParallelLinear(
        COLS, HEAD, 8, kv_heads, quant_config=quantization(), prefix=f"{PARENT}.qkv_proj"
    )
    q, k, v = sparse(8 * HEAD, seed=1), sparse(kv_heads * HEAD, seed=2), sparse(kv_heads * HEAD, seed=3)
    load_members(layer, {None: torch.cat([q, k, v])} if fused_in_file else {"q": q, "k": k, "v": v})
    kv_parts = min(ranks, kv_heads)
    kv = rank * kv_parts // ranks
    check(layer, torch.cat([q.chunk(ranks)[rank], k.chunk(kv_parts)[kv], v.chunk(kv_parts)[kv]]))


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (1, 2)])
def test_a_member_that_the_checkpoint_holds_dense_is_packed_with_the_others(
    rank: int, ranks: int, be_rank: Callable
) -> None:
    be_rank(rank, ranks)
    config = quantization(dense=("k_proj",))
    layer = vllm_linear.QKVParallelLinear(COLS, HEAD, 8, 4, quant_config=config, prefix=f"{PARENT}.qkv_proj")
    q, k, v = sparse(64, seed=1), torch.randn(32, COLS).half(), sparse(32, seed=3)
    load_members(layer, {"q": q, "k": k, "v": v}, dense=("k",))
    check(layer, torch.cat([part.chunk(ranks)[rank] for part in (q, k, v)]))


def test_what_a_rank_holds_is_what_packing_its_dense_rows_gives(be_rank: Callable) -> None:
    be_rank(1, 2)
    layer = vllm_linear.MergedColumnParallelLinear(
        COLS, [48, 48], quant_config=quantization(), prefix=f"{PARENT}.gate_up_proj"
    )
    gate, up = sparse(48, seed=1), sparse(48, seed=2)
    for shard, weight in enumerate((gate, up)):
        for name, array in arrays_of(spec.pack(weight)).items():
            getattr(layer, name).weight_loader(getattr(layer, name), array, shard)
    held = layer.macko_parts.take()
    expected = spec.pack(torch.cat([gate[24:], up[24:]]))
    for array, of_packing in zip(arrays_of(held).values(), arrays_of(expected).values(), strict=True):
        assert torch.equal(array, of_packing)


def test_layers_that_are_stored_dense_and_those_that_are_not_linear_are_vllm_s(be_rank: Callable) -> None:
    be_rank(0, 1)
    config = quantization(dense=("o_proj", "gate_proj", "up_proj", "k_proj"))

    def method(name: str, config: MackoVllmConfig = config) -> str:
        layer = vllm_linear.ReplicatedLinear(8, 8, quant_config=quantization(), prefix="any")
        return type(config.get_quant_method(layer, f"{PARENT}.{name}")).__name__

    assert method("o_proj") == method("gate_up_proj") == "UnquantizedLinearMethod"
    assert method("down_proj") == method("qkv_proj") == "MackoLinearMethod"
    fused_in_file = quantization(dense=("gate_up_proj",))
    assert method("gate_up_proj", fused_in_file) == "UnquantizedLinearMethod"
    assert method("qkv_proj", fused_in_file) == "MackoLinearMethod"
    assert config.get_quant_method(torch.nn.Embedding(2, 2), "lm_head") is None


def test_a_layer_is_arranged_for_as_many_tokens_as_there_may_be_sequences(
    be_rank: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_rank(0, 1)
    asked: list[int] = []
    monkeypatch.setattr(plugin, "arrange", lambda matrix, tokens: asked.append(tokens) or arrange(matrix, tokens))
    config = VllmConfig()
    config.scheduler_config.max_num_seqs = 5
    with set_current_vllm_config(config):
        layer = a_layer()
    load_members(layer, {None: sparse(40)})
    assert asked == [5]


def a_layer() -> Any:
    return vllm_linear.ReplicatedLinear(COLS, 40, quant_config=quantization(), prefix=f"{PARENT}.fc")


@pytest.mark.parametrize("missing", ARRAY_NAMES)
def test_a_layer_that_lacks_an_array_is_named(missing: str, be_rank: Callable) -> None:
    be_rank(0, 1)
    stored = arrays_of(spec.pack(sparse(40)))
    del stored[missing]
    with pytest.raises(FormatError, match=rf"does not hold each array of {PARENT}\.fc once"):
        load(a_layer(), [(name, array, ()) for name, array in stored.items()])


def test_arrays_that_are_not_valid_are_refused(be_rank: Callable) -> None:
    be_rank(0, 1)
    stored = arrays_of(spec.pack(sparse(40)))
    stored["weight_deltas"] = torch.full_like(stored["weight_deltas"], 0xFF)
    with pytest.raises(FormatError, match=rf"{PARENT}\.fc is not valid MACKO data"):
        load(a_layer(), [(name, array, ()) for name, array in stored.items()])


def test_values_of_another_dtype_than_the_config_s_are_refused(be_rank: Callable) -> None:
    be_rank(0, 1)
    with pytest.raises(FormatError, match=rf"{PARENT}\.fc holds torch\.bfloat16 values"):
        load_members(a_layer(), {None: sparse(40).bfloat16()})


def test_a_matrix_of_another_height_is_refused(be_rank: Callable) -> None:
    be_rank(0, 1)
    with pytest.raises(FormatError, match=rf"{PARENT}\.fc is 24 x {COLS} in the checkpoint"):
        load_members(a_layer(), {None: sparse(24)})


def test_what_vllm_keeps_of_a_loaded_layer_keeps_neither_arrays_nor_the_layer_and_loads_no_more(
    be_rank: Callable,
) -> None:
    be_rank(0, 1)
    layer = a_layer()
    kept = layer.weight_values
    load_members(layer, {None: sparse(40)})
    gc.collect()
    assert not [thing for thing in gc.get_objects() if issubclass(type(thing), MackoMatrix)]
    alive = weakref.ref(layer)
    del layer
    gc.collect()
    assert alive() is None
    with pytest.raises(UsageError, match=rf"{PARENT}\.fc is loaded and arranged already"):
        kept.weight_loader(kept, torch.zeros(8, dtype=torch.float16))
