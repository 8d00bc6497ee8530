"""Odd packed checkpoints: every reader refuses them, or every reader takes the same tensors from them."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import save_model
from helpers import assert_plain, copy_model, edit_config, edit_weights, weights
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import macko_llm
from macko_llm import checkpoint
from macko_llm.errors import FormatError, MackoError
from macko_llm.format import MackoMatrix, unpack
from macko_llm.inspecting import inspect_checkpoint
from macko_llm.linear import MackoLinear
from macko_llm.packed_checkpoint import ARRAY_NAMES
from macko_llm.packing import pack_checkpoint
from macko_llm.pruning import prune_checkpoint
from macko_llm.recipe import PruneRecipe
from macko_llm.unpacking import unpack_checkpoint

LAYER = "model.layers.1.mlp.up_proj"
DENSE_LAYER = "model.layers.0.self_attn.q_proj"
VALUES, DELTAS, ROW_OFFSETS = (f"{LAYER}.{array}" for array in ARRAY_NAMES)
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned Llama of which one layer has no zeros, so that packing leaves it dense."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "dense", "llama", torch.float16)
    prune_checkpoint(folder / "dense", folder / "pruned", PruneRecipe(method="magnitude"), device="cpu")
    key = f"{DENSE_LAYER}.weight"
    edit_weights(folder / "pruned", {key: weights(folder / "dense")[key]})
    return folder / "pruned"


@pytest.fixture(scope="module")
def packed(dense: Path) -> Path:
    pack_checkpoint(dense, dense.parent / "packed")
    return dense.parent / "packed"


@pytest.fixture
def folder(packed: Path, tmp_path: Path) -> Path:
    return copy_model(packed, tmp_path / "model")


def _tensors(model: PreTrainedModel) -> Tensors:
    """What a model computes with, packed matrices unpacked by the executable spec."""
    tensors = {}
    for prefix, module in model.named_modules():
        found = {name: parameter.data for name, parameter in module.named_parameters(recurse=False)}
        if isinstance(module, MackoLinear):
            state = module.state_dict()
            arrays = [state[array] for array in ARRAY_NAMES]
            found["weight"] = unpack(MackoMatrix(*arrays, (module.out_features, module.in_features)))
        tensors |= {f"{prefix}.{name}": tensor for name, tensor in found.items()}
    return tensors


def _unpacked(folder: Path) -> Tensors:
    target = folder.parent / "unpacked"
    unpack_checkpoint(folder, target)
    try:
        return _tensors(AutoModelForCausalLM.from_pretrained(target))
    finally:
        shutil.rmtree(target)


READERS: dict[str, Callable[[Path], Tensors]] = {
    "load": lambda folder: _tensors(macko_llm.load(str(folder), device="cpu")),
    "from_pretrained": lambda folder: _tensors(AutoModelForCausalLM.from_pretrained(folder)),
    "unpack": _unpacked,
}


def _assert_taken(folder: Path, expected: Tensors) -> None:
    """All readers take these tensors, and what inspecting reports is of them."""
    for reader, read in READERS.items():
        found = read(folder)
        assert found.keys() == expected.keys(), reader
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype, (reader, name)
            assert torch.equal(found[name], tensor), (reader, name)
    for name, layer in inspect_checkpoint(folder).layers.items():
        weight = expected[f"{name}.weight"]
        assert layer.sparsity == 1 - int(weight.count_nonzero()) / weight.numel(), name


def _assert_refused(folder: Path, words: str, *, in_own_words: bool = False) -> None:
    """All readers refuse, for one reason; transformers may say it in its own words, where it notices before macko can."""
    for reader, read in {**READERS, "inspect": inspect_checkpoint}.items():
        error = Exception if in_own_words and reader == "from_pretrained" else MackoError
        with pytest.raises(error) as caught:
            read(folder)
        if error is MackoError:
            assert_plain(str(caught.value))
            assert re.search(words, str(caught.value)), (reader, str(caught.value))
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]


def _quantization(folder: Path, **changes: object) -> None:
    edit_config(folder, quantization_config={**checkpoint.read_config(folder)["quantization_config"], **changes})


def _halved(folder: Path) -> Tensors:
    """The folder's tensors with zeros where every second row's entries were: the same headers, another model."""
    return {
        name: tensor * (torch.arange(len(tensor)) % 2).reshape(-1, *[1] * (tensor.ndim - 1)).to(tensor.dtype)
        if name.endswith(("weight", "weight_values"))
        else tensor
        for name, tensor in weights(folder).items()
    }


def _save_shards(tensors: Tensors, folder: Path, name: str) -> None:
    """Two shards with their index; the arrays of a matrix lie in both."""
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{name}-{number:05d}-of-00002.safetensors"
        save_file({key: tensors[key] for key in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index))


# Which files count


def test_a_folder_as_packing_leaves_it(folder: Path, dense: Path) -> None:
    _assert_taken(folder, weights(dense))


def test_arrays_of_one_matrix_in_two_shards(folder: Path, dense: Path) -> None:
    _save_shards(weights(folder), folder, "model")
    (folder / "model.safetensors").unlink()
    parts = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len({parts[key] for key in (VALUES, DELTAS, ROW_OFFSETS)}) == 2
    _assert_taken(folder, weights(dense))


def test_a_file_beside_an_index_is_read_and_the_index_is_not(folder: Path, dense: Path) -> None:
    _save_shards(_halved(folder), folder, "model")
    _assert_taken(folder, weights(dense))


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_that_the_config_names_are_read_in_place_of_the_usual_ones(
    sharded: bool, folder: Path, dense: Path
) -> None:
    stored, other = weights(folder), _halved(folder)
    if sharded:
        _save_shards(stored, folder, "own")
    else:
        save_file(stored, folder / "own.safetensors", metadata={"format": "pt"})
    save_file(other, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, transformers_weights="own.safetensors" + (".index.json" if sharded else ""))
    _assert_taken(folder, weights(dense))


@pytest.mark.parametrize(
    "name", ["own.safetensors", "own.safetensors.index.json", "own.bin", "", "../../own.safetensors"]
)
def test_a_config_that_names_weights_which_are_not_there(name: str, packed: Path, tmp_path: Path) -> None:
    folder = copy_model(packed, tmp_path / "models" / "model", transformers_weights=name)
    for elsewhere in (folder / "own.bin", tmp_path / "own.safetensors"):
        shutil.copy(folder / "model.safetensors", elsewhere)
    _assert_refused(folder, r"own\.|no safetensors file|The transformers file in the config", in_own_words=True)


def test_packing_reads_what_transformers_reads_and_names_it_as_usual(dense: Path, tmp_path: Path) -> None:
    folder = copy_model(dense, tmp_path / "dense", transformers_weights="own.safetensors")
    save_file(weights(dense), folder / "own.safetensors", metadata={"format": "pt"})
    save_file(_halved(dense), folder / "model.safetensors", metadata={"format": "pt"})
    pack_checkpoint(folder, tmp_path / "models" / "packed")
    _assert_taken(tmp_path / "models" / "packed", weights(dense))


def test_a_missing_shard(folder: Path) -> None:
    _save_shards(weights(folder), folder, "model")
    (folder / "model.safetensors").unlink()
    (folder / "model-00002-of-00002.safetensors").unlink()
    _assert_refused(folder, r"model-00002-of-00002\.safetensors")


# What must be in them


def test_a_dense_weight_beside_the_arrays_of_its_layer(folder: Path, dense: Path) -> None:
    key = f"{LAYER}.weight"
    for weight in (weights(dense)[key], weights(dense)[key] + 1):
        edit_weights(folder, {key: weight})
        _assert_refused(folder, rf"holds {LAYER} both packed and dense, as {key}; take one out")
        with pytest.raises(FormatError):
            inspect_checkpoint(folder)


@pytest.mark.parametrize("key", [VALUES, DELTAS, ROW_OFFSETS])
def test_a_missing_array(key: str, folder: Path) -> None:
    edit_weights(folder, {key: None})
    _assert_refused(folder, f"lacks an array of {LAYER}")


@pytest.mark.parametrize(
    ("key", "change"),
    [
        (VALUES, lambda array: array.float()),
        (VALUES, lambda array: array[:-8]),
        (VALUES, lambda array: array.reshape(2, -1)),
        (DELTAS, lambda array: array.to(torch.int8)),
        (DELTAS, lambda array: array[:-4]),
        (ROW_OFFSETS, lambda array: array.long()),
        (ROW_OFFSETS, lambda array: array[:-1]),
    ],
)
def test_an_array_of_another_dtype_or_shape(key: str, change: Callable[[Tensor], Tensor], folder: Path) -> None:
    edit_weights(folder, {key: change(weights(folder)[key])})
    _assert_refused(folder, f"arrays of {LAYER} .* do not fit its 160 x 64 matrix of float16")


def test_arrays_of_a_layer_that_the_model_does_not_have(folder: Path) -> None:
    stored = weights(folder)
    edit_weights(folder, {f"model.layers.7.mlp.up_proj.{array}": stored[f"{LAYER}.{array}"] for array in ARRAY_NAMES})
    _assert_refused(folder, r"packs model\.layers\.7\.mlp\.up_proj, which its config\.json does not have in a block")


def test_arrays_of_a_layer_outside_the_blocks(folder: Path) -> None:
    rows = weights(folder)["lm_head.weight"].shape[0]
    empty = (torch.empty(0).half(), torch.empty(0, dtype=torch.uint8), torch.zeros(rows + 1, dtype=torch.int32))
    arrays = {f"lm_head.{array}": tensor for array, tensor in zip(ARRAY_NAMES, empty, strict=True)}
    edit_weights(folder, {**arrays, "lm_head.weight": None})
    _assert_refused(folder, r"packs lm_head, which its config\.json does not have in a block")


@pytest.mark.parametrize(
    "key",
    [f"{DENSE_LAYER}.weight", "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight", "lm_head.weight"],
)
def test_a_missing_dense_tensor(key: str, folder: Path) -> None:
    edit_weights(folder, {key: None})
    _assert_refused(folder, re.escape(key))


def test_a_missing_layer(folder: Path) -> None:
    edit_weights(folder, dict.fromkeys((VALUES, DELTAS, ROW_OFFSETS)))
    _assert_refused(folder, f"{LAYER}.weight")


@pytest.mark.parametrize("key", [f"{DENSE_LAYER}.weight", "model.norm.weight"])
def test_a_dense_tensor_of_another_shape(key: str, folder: Path) -> None:
    edit_weights(folder, {key: weights(folder)[key][:-1]})
    _assert_refused(
        folder, rf"{key} .*is \[63.*\], but config\.json makes it \[64|no {key} that fits", in_own_words=True
    )


# What the config must say


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 2}, "format version 2 and this package reads 1; update"),
        ({"delta_bits": 3}, "has 3-bit deltas"),
        ({"value_dtype": "int8"}, "int8 values"),
        ({"value_dtype": ["float16"]}, r"\['float16'\] values"),
    ],
)
def test_a_quantization_config_that_cannot_be_read(changes: dict[str, object], words: str, folder: Path) -> None:
    _quantization(folder, **changes)
    _assert_refused(folder, words)


def test_a_value_dtype_that_is_not_that_of_the_arrays(folder: Path) -> None:
    _quantization(folder, value_dtype="bfloat16")
    edit_config(folder, dtype="bfloat16")
    _assert_refused(folder, "do not fit its .* matrix of bfloat16")


def test_a_model_of_another_dtype_than_its_packed_values(folder: Path, dense: Path) -> None:
    """As `model.to(...)` and `save_pretrained` make one: packed values keep their own."""
    edit_config(folder, dtype="bfloat16")
    expected = weights(dense)
    packed = [name for name, layer in inspect_checkpoint(folder).layers.items() if layer.packed]
    assert packed
    for reader, read in READERS.items():
        found = read(folder)
        for name in packed:
            # Reading a whole model casts what it gives; the values were all there.
            dtype = found[f"{name}.weight"].dtype
            assert torch.equal(found[f"{name}.weight"], expected[f"{name}.weight"].to(dtype)), (reader, name)


def test_keys_of_a_later_minor_version_are_ignored(folder: Path, dense: Path) -> None:
    _quantization(folder, made_on="a Tuesday")
    _assert_taken(folder, weights(dense))
