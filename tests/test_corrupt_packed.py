"""Packed checkpoints that are damaged: inspecting, loading and unpacking refuse each of them, and never guess."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import save_model
from helpers import assert_plain, copy_model, edit_config, edit_weights, truncate, weights
from torch import Tensor
from transformers import AutoModelForCausalLM

import macko_llm
from macko_llm import checkpoint
from macko_llm.errors import CheckpointError
from macko_llm.inspecting import inspect_checkpoint
from macko_llm.linear import ARRAY_NAMES
from macko_llm.packing import pack_checkpoint
from macko_llm.pruning import prune_checkpoint
from macko_llm.recipe import PruneRecipe
from macko_llm.unpacking import unpack_checkpoint

LAYER = "model.layers.1.mlp.up_proj"
COLUMNS = 64


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed Llama whose LAYER has a count of entries that is odd, so that its arrays have a tail."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "dense", "llama", torch.float16)
    prune_checkpoint(folder / "dense", folder / "pruned", PruneRecipe(method="magnitude"), device="cpu")
    weight = weights(folder / "pruned")[f"{LAYER}.weight"]
    row = weight[-1]
    row[row.nonzero()[-1]] = 0  # the last entry of all
    edit_weights(folder / "pruned", {f"{LAYER}.weight": weight})
    pack_checkpoint(folder / "pruned", folder / "packed")
    assert int(weights(folder / "packed")[f"{LAYER}.weight_row_offsets"][-1]) % 8 == 7
    return folder / "packed"


def _assert_refused(folder: Path, words: str) -> None:
    jobs: dict[str, Callable[[], object]] = {
        "inspect": lambda: inspect_checkpoint(folder),
        "load": lambda: macko_llm.load(folder, device="cpu"),
        "unpack": lambda: unpack_checkpoint(folder, folder.parent / "unpacked"),
        "from_pretrained": lambda: AutoModelForCausalLM.from_pretrained(folder),
    }
    for name, job in jobs.items():
        with pytest.raises(CheckpointError, match=words) as caught:
            job()
        assert_plain(f"{caught.value}"), name
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]


def _set(index: int, value: float) -> Callable[[Tensor], Tensor]:
    def change(array: Tensor) -> Tensor:
        array = array.clone()
        array[index] = value
        return array

    return change


def _add(start: int, value: int) -> Callable[[Tensor], Tensor]:
    def change(array: Tensor) -> Tensor:
        array = array.clone()
        array[start:] += value
        return array

    return change


@pytest.mark.parametrize(
    ("array", "change", "words"),
    [
        ("row_offsets", _set(0, 1), "row offsets start at 1"),
        ("row_offsets", _set(0, -1), "row offsets start at -1"),
        ("row_offsets", _set(5, 10_000), "row offsets decrease"),
        ("row_offsets", _set(5, -3), "row offsets decrease"),
        ("row_offsets", _set(-1, 2**31 - 1), "values for 2147483647 entries"),
        ("row_offsets", _add(-1, -10), "row offsets decrease|values for"),
        ("row_offsets", _set(1, 0), rf"row 1 reaches column \d+ of {COLUMNS}"),
        ("row_offsets", lambda a: a[:-1], "do not fit its 160 x 64 matrix"),
        ("row_offsets", lambda a: a.long(), "do not fit its 160 x 64 matrix"),
        ("deltas", _set(0, 0xFF), rf"row 0 reaches column \d+ of {COLUMNS}"),
        ("deltas", lambda a: torch.full_like(a, 0xFF), "reaches column|tail of the deltas"),
        ("deltas", _set(-1, 0x10), "tail of the deltas is not zero|reaches column"),
        ("deltas", _set(-1, 0xF0), "tail of the deltas is not zero|reaches column"),
        ("deltas", lambda a: a[:-1], "do not fit its 160 x 64 matrix"),
        ("deltas", lambda a: a.to(torch.int8), "do not fit its 160 x 64 matrix"),
        ("values", _set(-1, 1.0), "tail of the values is not zero"),
        ("values", _set(3, float("nan")), "values hold NaN or infinity"),
        ("values", _set(3, float("inf")), "values hold NaN or infinity"),
        ("values", lambda a: a[:-8], "do not fit its 160 x 64 matrix"),
        ("values", lambda a: a[:-1], "do not fit its 160 x 64 matrix"),
        ("values", lambda a: a.bfloat16(), "do not fit its 160 x 64 matrix of float16"),
        ("values", lambda a: a.float(), "do not fit its 160 x 64 matrix of float16"),
        ("values", lambda a: a.view(2, -1), "do not fit its 160 x 64 matrix"),
        ("values", lambda _: None, f"lacks an array of {LAYER}"),
        ("deltas", lambda _: None, f"lacks an array of {LAYER}"),
        ("row_offsets", lambda _: None, f"lacks an array of {LAYER}"),
    ],
)
def test_a_changed_array(
    array: str, change: Callable[[Tensor], Tensor | None], words: str, packed: Path, tmp_path: Path
) -> None:
    folder = copy_model(packed, tmp_path / "model")
    name = f"{LAYER}.weight_{array}"
    edit_weights(folder, {name: change(weights(folder)[name])})
    _assert_refused(folder, words)


def test_arrays_that_agree_with_each_other_but_not_with_the_offsets(packed: Path, tmp_path: Path) -> None:
    folder = copy_model(packed, tmp_path / "model")
    values, deltas, _ = (weights(folder)[f"{LAYER}.{array}"] for array in ARRAY_NAMES)
    for more in (8, -8):
        longer = [torch.cat([array, array.new_zeros(more)]) if more > 0 else array for array in (values, deltas)]
        size = len(values) + more
        edit_weights(
            folder, {f"{LAYER}.weight_values": longer[0][:size], f"{LAYER}.weight_deltas": longer[1][: size // 2]}
        )
        _assert_refused(folder, f"{size} values for {len(values) - 1} entries")


def test_a_layer_that_is_not_there_at_all(packed: Path, tmp_path: Path) -> None:
    folder = copy_model(packed, tmp_path / "model")
    edit_weights(folder, {f"{LAYER}.{array}": None for array in ARRAY_NAMES})
    for job in (inspect_checkpoint, lambda source: unpack_checkpoint(source, tmp_path / "out"), macko_llm.load):
        with pytest.raises(CheckpointError, match=f"{LAYER}.weight") as caught:
            job(folder)
        assert_plain(str(caught.value))


def test_arrays_of_a_layer_that_the_model_does_not_have(packed: Path, tmp_path: Path) -> None:
    folder = copy_model(packed, tmp_path / "model")
    tensors = weights(folder)
    edit_weights(folder, {f"model.layers.7.mlp.up_proj.{array}": tensors[f"{LAYER}.{array}"] for array in ARRAY_NAMES})
    _assert_refused(folder, r"packs model\.layers\.7\.mlp\.up_proj, which its config\.json does not have")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 2}, "format version 2 and this package reads 1; update"),
        ({"format_version": 0}, "format version 0"),
        ({"format_version": "1"}, "format version 1 and"),
        ({"delta_bits": 8}, "has 8-bit deltas"),
        ({"value_dtype": "int8"}, "int8 values"),
    ],
)
def test_a_changed_quantization_config(changes: dict[str, object], words: str, packed: Path, tmp_path: Path) -> None:
    folder = copy_model(packed, tmp_path / "model")
    edit_config(folder, quantization_config={**checkpoint.read_config(packed)["quantization_config"], **changes})
    _assert_refused(folder, words)


def test_values_of_another_dtype_than_the_config_says(packed: Path, tmp_path: Path) -> None:
    folder = copy_model(packed, tmp_path / "model", dtype="bfloat16")
    quantization = {**checkpoint.read_config(packed)["quantization_config"], "value_dtype": "bfloat16"}
    edit_config(folder, quantization_config=quantization)
    _assert_refused(folder, "do not fit its .* matrix of bfloat16")
    edit_config(folder, dtype="float16")
    _assert_refused(folder, "do not fit its .* matrix of bfloat16")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"intermediate_size": 152}, "do not fit its 152 x 64 matrix|reaches column"),
        ({"num_key_value_heads": 1}, "do not fit its 16 x 64 matrix"),
        ({"num_hidden_layers": 1}, r"packs model\.layers\.1\."),
    ],
)
def test_a_config_of_another_size(changes: dict[str, int], words: str, packed: Path, tmp_path: Path) -> None:
    _assert_refused(copy_model(packed, tmp_path / "model", **changes), words)


def test_columns_come_from_the_config_and_are_checked(packed: Path, tmp_path: Path) -> None:
    """Rows still fit where only the columns of a matrix shrink: the entries themselves tell."""
    folder = copy_model(packed, tmp_path / "model", intermediate_size=152)
    rows: dict[str, Tensor | None] = {}
    for index in (0, 1):
        for part in ("gate_proj", "up_proj"):
            name = f"model.layers.{index}.mlp.{part}"
            rows |= {f"{name}.{array}": None for array in ARRAY_NAMES}
            rows[f"{name}.weight"] = torch.zeros(152, 64, dtype=torch.float16)
    edit_weights(folder, rows)
    _assert_refused(folder, r"down_proj .*row \d+ reaches column 15\d of 152")


def test_a_truncated_or_overwritten_file(packed: Path, tmp_path: Path) -> None:
    folder = copy_model(packed, tmp_path / "model")
    file = folder / "model.safetensors"
    truncate(file)
    for _ in range(2):
        for job in (inspect_checkpoint, lambda source: unpack_checkpoint(source, tmp_path / "out"), macko_llm.load):
            with pytest.raises(CheckpointError, match="corrupt or truncated") as caught:
                job(folder)
            assert_plain(str(caught.value))
        file.write_bytes(b"\xff" * 500)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_missing_shard(packed: Path, tmp_path: Path) -> None:
    unpack_checkpoint(packed, tmp_path / "pruned")
    folder = tmp_path / "model"
    pack_checkpoint(tmp_path / "pruned", folder, max_shard_size="60KB")
    shards = checkpoint.weight_files(folder)
    assert len(shards) > 1
    shards[-1].unlink()
    for job in (inspect_checkpoint, lambda source: unpack_checkpoint(source, tmp_path / "out"), macko_llm.load):
        with pytest.raises(CheckpointError, match=shards[-1].name) as caught:
            job(folder)
        assert_plain(str(caught.value))
