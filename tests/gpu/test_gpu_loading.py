"""Loading to a GPU: never more memory than the model takes in the end, and the model that from_pretrained gives."""

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import make_tokenizer, random_tokens
from test_gpu_canonical import GPU
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from macko_llm import checkpoint, loading, models, streaming
from macko_llm.errors import FormatError
from macko_llm.linear import MackoLinear
from macko_llm.packing import pack_checkpoint

pytestmark = pytest.mark.usefixtures("kernels")

PEAK = 1.03
"""Most memory while loading, of what the model takes in the end."""
MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A Llama of 730 MB, half of the weights of its blocks zero: dense in several shards, and packed in several."""
    parent = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 6, "vocab_size": 16384}
    config = LlamaConfig(**sizes, num_attention_heads=16, max_position_embeddings=64)
    with torch.device(GPU):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    for linear in models.prunable_linears(model).values():
        linear.weight.data.masked_fill_(torch.rand_like(linear.weight) < 0.5, 0)
    model.save_pretrained(parent / "dense", max_shard_size="150MB")
    make_tokenizer().save_pretrained(parent / "dense")
    del model
    pack_checkpoint(parent / "dense", parent / "packed", max_shard_size="100MB")
    yield {"dense": parent / "dense", "packed": parent / "packed"}
    shutil.rmtree(parent)


def assert_equal_models(model: PreTrainedModel, expected: PreTrainedModel) -> None:
    """Bit for bit, the packed layers by their canonical arrays, and the same layouts."""
    state, other = model.state_dict(), expected.state_dict()
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        assert (tensor.dtype, tensor.device) == (other[name].dtype, other[name].device), name
        assert torch.equal(tensor, other[name]), name
    buffers = dict(expected.named_buffers())
    for name, buffer in model.named_buffers():
        if name.endswith("weight_layout"):  # the arrays above are what it holds
            continue
        assert (buffer.dtype, buffer.device) == (buffers[name].dtype, buffers[name].device), name
        assert torch.equal(buffer, buffers[name]), name
    for tokens in (random_tokens(1, 1), random_tokens(2, 20)):
        with torch.inference_mode():
            assert torch.equal(model(tokens.to(GPU)).logits, expected(tokens.to(GPU)).logits)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("dense", "auto"), ("dense", "float32"), ("dense", "bfloat16"), ("packed", "auto"), ("packed", "float32")],
)
def test_it_is_the_model_of_from_pretrained(kind: str, dtype: str, folders: dict[str, Path]) -> None:
    model = loading.load(folders[kind], dtype=dtype, device="cuda")
    expected = models.load_model(folders[kind], dtype=dtype, device="cuda")
    layers = [module for module in model.modules() if isinstance(module, MackoLinear)]
    assert len(layers) == (6 * 7 if kind == "packed" else 0)
    assert all(layer.is_arranged for layer in layers)
    assert_equal_models(model, expected)


def requested_bytes() -> int:
    """Bytes of the tensors that live, without what torch's allocator rounds up (as much as 1 MiB each)."""
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_memory_never_passes_what_the_model_takes(kind: str, folders: dict[str, Path]) -> None:
    loading.load(folders[kind], device="cuda")  # whatever CUDA and its libraries keep is there now
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, requested = torch.cuda.memory_allocated(), requested_bytes()
    reserved = torch.cuda.memory_reserved()  # more than is allocated where other tests' graphs keep their pools
    model = loading.load(folders[kind], device="cuda")
    peak, final = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    assert final > 300 * MEBIBYTE
    assert abs(requested_bytes() - requested - models.memory_bytes(model)) < MEBIBYTE  # no scratch memory stays
    assert peak <= PEAK * final + MEBIBYTE
    assert torch.cuda.memory_reserved() - reserved <= 1.1 * final + 64 * MEBIBYTE


def test_layers_that_no_layout_suits_keep_arrays_of_their_own(tmp_path: Path) -> None:
    """Rows of very different lengths stay canonical: their arrays must not lie in memory that the next layer's are read to."""
    dense = tmp_path / "dense"
    config = LlamaConfig(
        hidden_size=512, intermediate_size=768, num_hidden_layers=2, num_attention_heads=8, vocab_size=320
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    for linear in models.prunable_linears(model).values():
        linear.weight.data[1:] *= torch.rand(len(linear.weight) - 1, linear.in_features) < 0.002
    model.save_pretrained(dense)
    make_tokenizer().save_pretrained(dense)
    pack_checkpoint(dense, tmp_path / "packed")
    loaded = loading.load(tmp_path / "packed", device="cuda")
    layers = [module for module in loaded.modules() if isinstance(module, MackoLinear)]
    assert layers
    assert not all(layer.is_arranged for layer in layers)
    assert_equal_models(loaded, models.load_model(tmp_path / "packed", device="cuda"))
    assert models.memory_bytes(loaded) < 2 * sum(
        file.stat().st_size for file in (tmp_path / "packed").glob("*.safetensors")
    )


def test_a_damaged_array_is_found(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["packed"], tmp_path / "model")
    info = next(
        info
        for file in sorted(folder.glob("*.safetensors"))
        for name, info in checkpoint.tensor_infos([file]).items()
        if name.endswith("layers.3.mlp.up_proj.weight_row_offsets")
    )
    with info.file.open("r+b") as stream:
        stream.seek(info.offset)
        stream.write(b"\x01")
    with pytest.raises(FormatError, match=r"model\.layers\.3\.mlp\.up_proj is not valid .*row offsets start at 1"):
        loading.load(folder, device="cuda")


def test_chunks_of_every_size_arrive(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]) -> None:
    """More chunks than buffers, and a last one that is not full."""
    expected = loading.load(folders["packed"], device="cuda")
    monkeypatch.setattr(streaming, "_CHUNK_BYTES", 1_000_000)
    assert_equal_models(loading.load(folders["packed"], device="cuda"), expected)


def test_another_gpu_than_the_current_one(folders: dict[str, Path]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    model = loading.load(folders["packed"], device="cuda:1")
    assert {tensor.device for tensor in (*model.parameters(), *model.buffers())} == {torch.device("cuda:1")}
    expected = loading.load(folders["packed"], device="cpu").state_dict()
    assert all(torch.equal(tensor.cpu(), expected[name]) for name, tensor in model.state_dict().items())
