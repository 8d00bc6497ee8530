"""Packing on a GPU: the CPU's files byte for byte, the same refusals, and the memory of a few tensors."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import make_tokenizer
from helpers import assert_plain, copy_model, edit_weights, weights
from test_gpu_canonical import GPU
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from macko_llm import format as spec
from macko_llm import models, shards, streaming
from macko_llm.errors import CheckpointError, NonFiniteError
from macko_llm.packing import pack_checkpoint
from macko_llm.shards import ShardWriter

pytestmark = pytest.mark.usefixtures("kernels")

MEBIBYTE = 2**20
UP = "model.layers.0.mlp.up_proj.weight"


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in float32 with rows and gaps of all kinds, and values that neither 16-bit dtype holds exactly."""
    folder = tmp_path_factory.mktemp("llama") / "float32"
    config = LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=3, num_attention_heads=8, vocab_size=320
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for number, linear in enumerate(models.prunable_linears(model).values()):
        weight = linear.weight.data
        weight.masked_fill_(torch.rand(weight.shape) < (0.0, 0.5, 0.6, 0.99)[number % 4], 0)
        weight[3], weight[5, 7] = 0.0, -0.0
        weight[9, 11:14] = torch.tensor([1e-9, -3e-6, 60000.0])
    model.save_pretrained(folder, max_shard_size="2MB")
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("asked", [None, "float16", "bfloat16"])
@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32", "float64"])
def test_files_are_the_cpus(
    stored: str, asked: str | None, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read and written in many parts, the last of which is not full."""
    source = copy_model(pruned, tmp_path / "source")
    tensors = {name: tensor.to(getattr(torch, stored)) for name, tensor in weights(pruned).items()}
    for file in source.glob("model*.safetensors*"):
        file.unlink()
    edit_weights(source, tensors)  # type: ignore[arg-type]
    expected = pack_checkpoint(source, tmp_path / "cpu", dtype=asked, max_shard_size="1MB", device="cpu")
    monkeypatch.setattr(streaming, "_CHUNK_BYTES", 100_000)
    monkeypatch.setattr(shards, "_STAGED_BYTES", 77_777)
    report = pack_checkpoint(source, tmp_path / "gpu", dtype=asked, max_shard_size="1MB", device="cuda")
    assert _files(tmp_path / "gpu") == _files(tmp_path / "cpu")
    assert report.rounding == expected.rounding
    assert report.layers == expected.layers
    assert report.kept_dense  # some layers, not all
    assert len(report.kept_dense) < len(report.layers)


def test_auto_is_the_gpu(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices: set[str] = set()
    original = spec.all_finite

    def look(tensor: Tensor) -> bool:
        devices.add(tensor.device.type)
        return original(tensor)

    monkeypatch.setattr("macko_llm.packed_writer.all_finite", look)
    pack_checkpoint(pruned, None)
    assert devices == {"cuda"}
    pack_checkpoint(pruned, None, device="cpu")
    assert devices == {"cuda", "cpu"}


@pytest.mark.parametrize("name", [UP, "model.norm.weight"])
def test_what_is_not_finite_is_refused_in_the_same_words(name: str, pruned: Path, tmp_path: Path) -> None:
    source = copy_model(pruned, tmp_path / "source")
    tensors = weights(pruned)
    for file in source.glob("model*.safetensors*"):
        file.unlink()
    for value in (float("nan"), float("inf"), float("-inf"), -70_000.0):
        weight = tensors[name].clone()
        weight.view(-1)[-1] = value
        edit_weights(source, {**tensors, name: weight})
        said = []
        for device in ("cpu", "cuda"):
            with pytest.raises(NonFiniteError) as caught:
                pack_checkpoint(source, tmp_path / "packed", device=device, dtype="float16")
            said.append(str(caught.value))
        assert said[0] == said[1]
        assert ("overflows float16" in said[0]) == (value == -70_000.0)
        assert_plain(said[0])
    assert not (tmp_path / "packed").exists()


def test_memory_is_that_of_a_few_tensors(tmp_path: Path) -> None:
    """On the GPU: the tensor that is packed, the next one, and what packing makes of the first."""
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=10, num_attention_heads=8, vocab_size=320
    )
    with torch.device(GPU):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    for linear in models.prunable_linears(model).values():
        linear.weight.data.masked_fill_(torch.rand_like(linear.weight) < 0.5, 0)
    largest = max(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(tmp_path / "pruned")
    del model, linear
    pack_checkpoint(tmp_path / "pruned", None, device="cuda")  # what the libraries keep is there now
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    pack_checkpoint(tmp_path / "pruned", tmp_path / "packed", device="cuda")
    assert torch.cuda.max_memory_allocated() - before < 5 * largest + MEBIBYTE
    assert torch.cuda.memory_allocated() == before


def test_what_does_not_fit_names_the_cpu(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_weight: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("macko_llm.layouts.canonical.pack_finite", fail)
    with pytest.raises(CheckpointError, match="does not fit on cuda; use --device cpu") as caught:
        pack_checkpoint(pruned, None, device="cuda")
    assert_plain(str(caught.value))


def _transposed(rows: int, cols: int) -> Callable[[torch.device], Tensor]:
    return lambda device: torch.arange(rows * cols, device=device).reshape(rows, cols).to(torch.int16).T


@pytest.mark.parametrize("staged", [16, 1000, 16 * MEBIBYTE])
def test_tensors_on_a_gpu_are_written_as_those_on_the_cpu_are(
    staged: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_STAGED_BYTES", staged)
    makers: dict[str, Callable[[torch.device], Tensor]] = {
        "transposed": _transposed(33, 17),
        "bytes": lambda device: torch.arange(5001, device=device).to(torch.uint8),
        "doubles": lambda device: torch.arange(77, dtype=torch.float64, device=device),
        "truths": lambda device: torch.arange(77, device=device) % 3 == 0,
        "empty": lambda device: torch.empty(0, 3, device=device),
        "number": lambda device: torch.tensor(7, device=device),
    }
    for device in ("cpu", "cuda"):
        (tmp_path / device).mkdir()
        writer = ShardWriter(tmp_path / device, 4000)
        for name, make in makers.items():
            writer.add(name, make(torch.device(device)))
        writer.close()
    assert _files(tmp_path / "cuda") == _files(tmp_path / "cpu")
