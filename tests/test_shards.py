"""Shards: names, sizes and bytes, the same as safetensors writes, and a writer that goes on where another was cut off."""

import json
from pathlib import Path

import pytest
import torch
from helpers import assert_plain
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from macko_llm import checkpoint
from macko_llm.dtypes import HEADERS
from macko_llm.errors import CheckpointError
from macko_llm.shards import ShardWriter


def _write(folder: Path, sizes: dict[str, int], max_shard_bytes: int) -> dict[str, torch.Tensor]:
    tensors = {name: torch.full((size,), index, dtype=torch.uint8) for index, (name, size) in enumerate(sizes.items())}
    writer = ShardWriter(folder, max_shard_bytes)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    return tensors


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_one_shard_has_the_plain_name_and_no_index(tmp_path: Path) -> None:
    tensors = _write(tmp_path, {"a": 10, "b": 20}, 30)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as reader:
        assert reader.metadata() == {"format": "pt"}


def test_shards_stay_below_the_limit_and_are_indexed(tmp_path: Path) -> None:
    sizes = {"d": 10, "c": 20, "huge": 95, "b": 25, "a": 1}
    tensors = _write(tmp_path, sizes, 30)
    shards = [["d", "c"], ["huge"], ["b", "a"]]
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "model.safetensors.index.json"]
    for name, keys in zip(names, shards, strict=True):
        assert sorted(load_file(tmp_path / name)) == sorted(keys)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": sum(sizes.values())},
        "weight_map": {key: name for name, keys in zip(names, shards, strict=True) for key in keys},
    }
    files = checkpoint.weight_files(tmp_path)
    assert [file.name for file in files] == names
    infos = checkpoint.tensor_infos(files)
    assert {name: (info.dtype, info.shape) for name, info in infos.items()} == {
        name: ("U8", (size,)) for name, size in sizes.items()
    }
    for name, info in infos.items():
        assert torch.equal(load_file(info.file)[name], tensors[name])
    assert checkpoint.folder_bytes(tmp_path) == sum(file.stat().st_size for file in files)


def test_no_tensors_and_views_of_tensors(tmp_path: Path) -> None:
    ShardWriter(tmp_path, 10).close()
    assert load_file(tmp_path / "model.safetensors") == {}
    writer = ShardWriter(tmp_path, 10_000)
    matrix = torch.arange(12.0).reshape(3, 4)
    writer.add("transposed", matrix.T)
    writer.add("column", matrix[:, 1])
    writer.add("empty", torch.empty(0, 3))
    writer.add("number", torch.tensor(7))
    writer.close()
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored["transposed"], matrix.T)
    assert torch.equal(stored["column"], matrix[:, 1])
    assert stored["empty"].shape == (0, 3)
    assert stored["number"] == 7


_DTYPES = sorted(HEADERS.values(), key=str)


@given(
    tensors=st.lists(st.tuples(st.sampled_from(_DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=8),
    limit=st.integers(1, 200),
    cut=st.integers(0, 8),
    lost=st.integers(0, 2),
)
def test_a_writer_that_was_cut_off_goes_on_to_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: list[tuple[torch.dtype, list[int]]],
    limit: int,
    cut: int,
    lost: int,
) -> None:
    """Cut off after some tensors were written for which no state was kept."""
    values = {
        f'layer "{number}" \u00fc': torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(number)).to(
            dtype
        )
        for number, (dtype, shape) in enumerate(tensors)
    }
    names = list(values)
    whole, parts = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("parts")
    writer = ShardWriter(whole, limit)
    for name in names:
        writer.add(name, values[name])
    writer.close()

    first = ShardWriter(parts, limit)
    for name in names[:cut]:
        first.add(name, values[name])
    state = json.loads(json.dumps(first.state()))
    for name in names[cut : cut + lost]:
        first.add(name, 1 - values[name].to(torch.uint8) if values[name].dtype == torch.uint8 else values[name])
    second = ShardWriter(parts, limit, state)
    for name in names[:cut]:
        info = second.info(name)
        stored = info.file.read_bytes()[info.offset : info.offset + values[name].nbytes]
        assert stored == values[name].reshape(-1).view(torch.uint8).numpy().tobytes()
    for name in names[cut:]:
        second.add(name, values[name])
    second.close()

    assert _files(parts) == _files(whole)
    stored_values = {}
    for file in whole.glob("*.safetensors"):
        stored_values.update(load_file(file))
        save_file(load_file(file), whole / "reference", metadata={"format": "pt"})
        assert file.read_bytes() == (whole / "reference").read_bytes()
    assert stored_values.keys() == values.keys()
    for name, tensor in stored_values.items():
        assert tensor.dtype == values[name].dtype
        assert torch.equal(tensor, values[name])


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_disk_that_is_full_while_shards_are_put_in_order(name: str, tmp_path: Path) -> None:
    """Whichever shard it is: a limit lets each be appended to, but not be written once more with its header."""
    resource = pytest.importorskip("resource", reason="needs limits on the sizes of files")
    sizes = {"a": 3 * 2**20, "b": 3 * 2**20, name: 5 * 2**20}
    writer = ShardWriter(tmp_path, 5 * 2**20)
    for key, size in sizes.items():
        writer.add(key, torch.zeros(size, dtype=torch.uint8))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 * 2**20, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"could not be written .* free some space on the disk") as caught:
            writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_plain(str(caught.value))


def test_more_shards_than_are_put_in_order_at_once(tmp_path: Path) -> None:
    """And tensors of more bytes than are copied at once."""
    tensors = {f"t{number:02d}": torch.randint(0, 255, (2_500_000 + number,)).to(torch.uint8) for number in range(11)}
    writer = ShardWriter(tmp_path, 6_000_000)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [sorted(load_file(file)) for file in files] == [
        [f"t{number:02d}" for number in range(first, min(first + 2, 11))] for first in range(0, 11, 2)
    ]
    for file in files:
        stored = load_file(file)
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in stored.items())
        save_file(stored, tmp_path / "reference", metadata={"format": "pt"})
        assert file.read_bytes() == (tmp_path / "reference").read_bytes()
    assert not list(tmp_path.glob("*.part"))


def test_a_dtype_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"scale is torch\.complex64"):
        ShardWriter(tmp_path, 10).add("scale", torch.zeros(1, dtype=torch.complex64))
