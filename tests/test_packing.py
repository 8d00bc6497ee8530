"""Checkpoint to packed checkpoint and back: every family, bit for bit, and what is refused on the way."""

import gc
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES, random_tokens, save_model
from helpers import assert_plain, copy_model, edit_config, edit_weights, weights
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration
from typer.testing import CliRunner

import macko_llm
from macko_llm import checkpoint, generation, models, outputs, packed_writer
from macko_llm.cli.main import app
from macko_llm.errors import CheckpointError, NonFiniteError, UsageError
from macko_llm.inspecting import inspect_checkpoint
from macko_llm.linear import ARRAY_NAMES, MackoLinear
from macko_llm.pack_report import KindReport, LayerReport, PackReport, Rounding
from macko_llm.packed_writer import PackedWriter
from macko_llm.packing import pack_checkpoint
from macko_llm.pruning import prune_checkpoint
from macko_llm.recipe import PruneRecipe
from macko_llm.shards import ShardWriter
from macko_llm.text import encode_prompt
from macko_llm.unpacking import unpack_checkpoint

UP = "model.layers.0.mlp.up_proj"


def _prune(source: Path, target: Path, sparsity: float = 0.5) -> Path:
    prune_checkpoint(source, target, PruneRecipe(method="magnitude", sparsity=sparsity), device="cpu")
    return target


def _pruned(folder: Path, family: str, dtype: torch.dtype) -> Path:
    return _prune(save_model(folder / "dense", family, dtype), folder / "pruned")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama in float16: dense, pruned and packed."""
    folder = tmp_path_factory.mktemp("llama")
    pack_checkpoint(_pruned(folder, "llama", torch.float16), folder / "packed")
    return folder


@torch.no_grad()
def _logits(folder: Path, tokens: Tensor, dtype: str = "auto") -> Tensor:
    return macko_llm.load(folder, dtype=dtype, device="cpu")(tokens).logits


def _bits(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, bytes]]:
    return {name: (tensor.dtype, tensor.view(torch.uint8).numpy().tobytes()) for name, tensor in tensors.items()}


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_there_and_back(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pruned = _pruned(tmp_path, family, dtype)
    packed, unpacked = tmp_path / "packed", tmp_path / "unpacked"
    report = pack_checkpoint(pruned, packed)
    assert report.kept_dense == []
    assert set(report.layers) == set(models.prunable_linears(FAMILIES[family]()))
    model = macko_llm.load(packed, device="cpu")
    assert {name for name, module in model.named_modules() if isinstance(module, MackoLinear)} == set(report.layers)
    assert model.dtype == dtype

    # Many tokens: the same dense product on the same weights, so the same bits.
    tokens = random_tokens(2, 20)
    assert torch.equal(_logits(packed, tokens), _logits(pruned, tokens))
    # Few tokens: sums in another order. Both are as far from fp32 as 16 bits are; in fp32 they agree.
    few = tokens[:1, :3]
    exact = _logits(pruned, few, "float32")
    assert (_logits(packed, few, "float32") - exact).abs().max() < 1e-3
    rounding = (_logits(pruned, few).float() - exact).abs().max()
    assert (_logits(packed, few).float() - exact).abs().max() <= 2 * rounding + 1e-3

    unpack_checkpoint(packed, unpacked)
    assert _bits(weights(unpacked)) == _bits(weights(pruned))
    assert _names(unpacked) == _names(pruned)
    for name in _names(pruned):
        if name.endswith(".json"):
            assert json.loads((unpacked / name).read_text()) == json.loads((pruned / name).read_text()), name


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_packed_generation_is_token_for_token_the_dense_one(family: str, tmp_path: Path) -> None:
    pruned = _pruned(tmp_path, family, torch.float16)
    pack_checkpoint(pruned, tmp_path / "packed")
    tokenizer = models.load_tokenizer(pruned)
    prompt = encode_prompt(tokenizer, "Once upon a time there was a little fox")
    texts = []
    for folder in (pruned, tmp_path / "packed"):
        model = macko_llm.load(folder, dtype="float32", device="cpu")
        steps = generation.stream(model, tokenizer, prompt, max_new_tokens=24, stop_ids=())
        texts.append([step.token_id for step in steps])
    assert texts[0] == texts[1]
    assert len(texts[0]) == 24


@pytest.mark.parametrize(
    ("stored", "asked", "rounds"),
    [
        (torch.float32, None, True),
        (torch.bfloat16, "float16", True),
        (torch.float16, "bfloat16", True),
        (torch.float16, None, False),
        (torch.bfloat16, None, False),
    ],
)
def test_what_was_rounded_is_reported(
    stored: torch.dtype, asked: str | None, rounds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_writer, "_ROUNDED_AT_ONCE", 1000)
    pruned = _pruned(tmp_path, "llama", stored)
    tiny = weights(pruned)[f"{UP}.weight"]
    # In float16 nothing is left of three of them, and little precision of the fourth.
    tiny[0, tiny[0].nonzero()[:4, 0]] = torch.tensor([1e-9, -2e-9, 3e-9, 1.3e-6]).to(stored)
    edit_weights(pruned, {f"{UP}.weight": tiny})
    report = pack_checkpoint(pruned, tmp_path / "packed", dtype=asked)
    target = getattr(torch, report.value_dtype)
    smallest = {torch.float16: 2.0**-14, torch.bfloat16: 2.0**-126}[target]
    changed, zeros, largest, subnormal, tensors = 0, 0, 0.0, 0, 0
    for tensor in weights(pruned).values():
        before, after = tensor.double().numpy(), tensor.to(target).double().numpy()
        changed += int((before != after).sum())
        zeros += int(((before != after) & (after == 0)).sum())
        subnormal += int(((before != after) & (after != 0) & (abs(after) < smallest)).sum())
        tensors += int((before != after).any())
        kept = after != 0
        largest = max(largest, abs(after[kept] / before[kept] - 1).max())
    assert report.rounding == Rounding(changed, zeros, pytest.approx(largest, rel=1e-6), subnormal, tensors)
    assert (subnormal > 0) == (rounds and target == torch.float16)
    assert (changed > 0) == rounds
    assert checkpoint.read_provenance(tmp_path / "packed")["pack"]["rounding"]["weights"] == changed
    unpack_checkpoint(tmp_path / "packed", tmp_path / "unpacked")
    assert _bits(weights(tmp_path / "unpacked")) == _bits({k: v.to(target) + 0.0 for k, v in weights(pruned).items()})


def test_float32_is_packed_as_float16(tmp_path: Path) -> None:
    pruned = _pruned(tmp_path, "llama", torch.float32)
    report = pack_checkpoint(pruned, tmp_path / "packed")
    assert report.value_dtype == "float16"
    unpack_checkpoint(tmp_path / "packed", tmp_path / "unpacked")
    halves = {name: tensor.half() for name, tensor in weights(pruned).items()}
    assert _bits(weights(tmp_path / "unpacked")) == _bits(halves)
    assert checkpoint.read_config(tmp_path / "packed")["dtype"] == "float16"
    tokens = random_tokens(1, 12)
    halved = macko_llm.load(tmp_path / "unpacked", dtype="float32", device="cpu")
    with torch.no_grad():
        assert (halved(tokens).logits - _logits(tmp_path / "packed", tokens, "float32")).abs().max() < 1e-3
    assert report.bytes_dense == sum(tensor.nbytes for tensor in halves.values())


@pytest.mark.parametrize(
    ("stored", "config", "asked", "expected"),
    [
        (torch.float16, "float16", None, "float16"),
        (torch.bfloat16, None, None, "bfloat16"),  # nothing in the config: float16 would silently lose small values
        (torch.float32, "bfloat16", None, "bfloat16"),
        (torch.float32, None, None, "float16"),
        (torch.float32, "float32", "bfloat16", "bfloat16"),
        (torch.float16, "float16", "bfloat16", "bfloat16"),
    ],
)
def test_the_dtype_of_the_values(
    stored: torch.dtype, config: str | None, asked: str | None, expected: str, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "dense", "llama", stored)
    edit_config(folder, dtype=config, torch_dtype=None)
    edit_weights(folder, {f"{UP}.weight": weights(folder)[f"{UP}.weight"].tril()})
    assert pack_checkpoint(folder, tmp_path / "packed", dtype=asked).value_dtype == expected
    assert {tensor.dtype for name, tensor in weights(tmp_path / "packed").items() if not name.startswith(UP)} == {
        getattr(torch, expected)
    }
    assert macko_llm.load(tmp_path / "packed", device="cpu").dtype == getattr(torch, expected)


def test_a_nested_config_that_names_a_dtype_names_the_new_one(llama: Path, tmp_path: Path) -> None:
    """Other nested configs stay as they are, those too that a model does without."""
    parts = {"audio_config": {"dtype": "float32", "size": 3}, "vision_config": {"size": 4}, "speech_config": None}
    pruned = copy_model(llama / "pruned", tmp_path / "pruned")
    config = {**checkpoint.read_config(pruned), **parts}
    checkpoint.write_json(pruned / "config.json", config)
    pack_checkpoint(pruned, tmp_path / "packed", dtype="bfloat16")
    packed = checkpoint.read_config(tmp_path / "packed")
    del packed["quantization_config"]
    assert packed == {**config, "dtype": "bfloat16", "audio_config": {"dtype": "bfloat16", "size": 3}}
    assert macko_llm.load(tmp_path / "packed", device="cpu").dtype == torch.bfloat16


def test_a_generation_config_that_transformers_may_not_write_is_kept(llama: Path, tmp_path: Path) -> None:
    pruned = copy_model(llama / "pruned", tmp_path / "pruned")
    odd = '{"temperature": 0.6, "do_sample": false,\n"top_p": 0.9, "eos_token_id": [1, 2]}'  # as Llama 2 was published
    (pruned / "generation_config.json").write_text(odd)
    pack_checkpoint(pruned, tmp_path / "packed")
    unpack_checkpoint(tmp_path / "packed", tmp_path / "unpacked")
    for folder in ("packed", "unpacked"):
        assert (tmp_path / folder / "generation_config.json").read_text() == odd
        model = macko_llm.load(tmp_path / folder, device="cpu")
        assert generation.stop_token_ids(model, models.load_tokenizer(pruned)) == {1, 2}


def test_what_a_packed_folder_holds(llama: Path) -> None:
    packed = llama / "packed"
    assert _names(packed) == sorted([*_names(llama / "pruned"), "README.md"])
    assert {"generation_config.json", "macko.json", "tokenizer.json"} <= set(_names(packed))
    config = checkpoint.read_config(packed)
    assert config.pop("quantization_config") == {
        "quant_method": "macko",
        "format_version": 1,
        "delta_bits": 4,
        "value_dtype": "float16",
        "modules_to_not_convert": ["lm_head"],
    }
    assert config == checkpoint.read_config(llama / "pruned")
    card = (packed / "README.md").read_text()
    assert card.startswith("---\n")
    assert all(words in card for words in ("50%", "magnitude", "import macko_llm", "macko generate"))
    record = checkpoint.read_provenance(packed)
    assert record["prune"] == checkpoint.read_provenance(llama / "pruned")["prune"]
    assert record["pack"]["layers"][UP] == 0.5


@pytest.mark.parametrize("sparsity", [0.0, 0.1])
def test_what_packing_would_enlarge_stays_dense(sparsity: float, llama: Path, tmp_path: Path) -> None:
    pruned = _prune(llama / "dense", tmp_path / "pruned", sparsity)
    report = pack_checkpoint(pruned, tmp_path / "packed")
    assert report.kept_dense == list(report.layers)
    assert report.bytes_packed == report.bytes_dense
    assert _bits(weights(tmp_path / "packed")) == _bits(weights(pruned))
    tokens = random_tokens(1, 9)
    assert torch.equal(_logits(tmp_path / "packed", tokens), _logits(pruned, tokens))
    assert replace(inspect_checkpoint(tmp_path / "packed"), seconds=0) == replace(report, seconds=0)


def test_some_layers_dense_and_some_packed(llama: Path, tmp_path: Path) -> None:
    pruned = copy_model(llama / "pruned", tmp_path / "pruned")
    edit_weights(pruned, {f"{UP}.weight": weights(llama / "dense")[f"{UP}.weight"]})
    report = pack_checkpoint(pruned, tmp_path / "packed")
    assert report.kept_dense == [UP]
    config = checkpoint.read_config(tmp_path / "packed")["quantization_config"]
    assert config["modules_to_not_convert"] == [UP, "lm_head"]
    tokens = random_tokens(1, 9)
    assert torch.equal(_logits(tmp_path / "packed", tokens), _logits(pruned, tokens))
    unpack_checkpoint(tmp_path / "packed", tmp_path / "unpacked")
    assert _bits(weights(tmp_path / "unpacked")) == _bits(weights(pruned))


def test_shards(llama: Path, tmp_path: Path) -> None:
    packed, unpacked = tmp_path / "packed", tmp_path / "unpacked"
    pack_checkpoint(llama / "pruned", packed, max_shard_size="20KB")
    files = checkpoint.weight_files(packed)
    assert len(files) > 3
    for file in files:
        sizes = [tensor.nbytes for tensor in load_file(file).values()]
        assert sum(sizes) <= max(20_000, *sizes)
    assert _bits(weights(packed)) == _bits(weights(llama / "packed"))
    inspect_checkpoint(packed)
    tokens = random_tokens(1, 9)
    assert torch.equal(_logits(packed, tokens), _logits(llama / "packed", tokens))
    unpack_checkpoint(packed, unpacked, max_shard_size="30KB")
    assert len(checkpoint.weight_files(unpacked)) > 3
    assert _bits(weights(unpacked)) == _bits(weights(llama / "pruned"))
    assert torch.equal(_logits(unpacked, tokens), _logits(llama / "pruned", tokens))


def _entries(weight: Tensor) -> int:
    """Stored entries of a matrix: its nonzeros, and one for every 16 columns of a gap between them."""
    count = 0
    for row in weight.tolist():
        previous = -1
        for column, value in enumerate(row):
            if value != 0:
                count += 1 + (column - previous - 1) // 16
                previous = column
    return count


def test_inspect_reports_what_is_inside(llama: Path, tmp_path: Path) -> None:
    pruned = copy_model(llama / "pruned", tmp_path / "pruned")
    edit_weights(pruned, {f"{UP}.weight": weights(pruned)[f"{UP}.weight"].tril(-40)})  # empty rows, long gaps
    packed_report = pack_checkpoint(pruned, tmp_path / "packed")
    report = inspect_checkpoint(tmp_path / "packed")
    assert replace(report, seconds=0) == replace(packed_report, seconds=0)
    dense, stored = weights(pruned), weights(tmp_path / "packed")
    assert report.bytes_dense == sum(tensor.nbytes for tensor in dense.values())
    assert report.bytes_packed == sum(tensor.nbytes for tensor in stored.values())
    zeros = elements = 0
    for name, layer in report.layers.items():
        weight = dense[f"{name}.weight"]
        assert (layer.rows, layer.cols) == weight.shape
        assert layer.sparsity == pytest.approx((weight == 0).float().mean().item())
        assert layer.entries == _entries(weight)
        assert layer.bytes_dense == weight.nbytes
        assert layer.bytes_packed == sum(stored[f"{name}.{array}"].nbytes for array in ARRAY_NAMES)
        zeros, elements = zeros + int((weight == 0).sum()), elements + weight.numel()
    assert report.sparsity == pytest.approx(zeros / elements)


def test_a_dry_run_reports_the_same_and_writes_nothing(llama: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in llama.rglob("*")}
    dry = pack_checkpoint(llama / "pruned", None)
    assert {path: path.stat().st_mtime_ns for path in llama.rglob("*")} == before
    assert replace(dry, seconds=0) == replace(inspect_checkpoint(llama / "packed"), seconds=0)


def test_layers_of_a_kind_are_those_of_one_place_in_all_blocks() -> None:
    def layer(rows: int, sparsity: float) -> LayerReport:
        return LayerReport(rows, 10, sparsity, 0, 20 * rows, 11 * rows, True)

    layers = {
        "model.layers.0.mlp.experts.0.up_proj": layer(1, 0.2),
        "model.layers.0.mlp.experts.1.up_proj": layer(3, 0.6),
        "model.layers.10.mlp.experts.0.up_proj": layer(4, 0.5),
        "model.decoder.layers.3.fc1": layer(2, 0.7),
        "lm_head": layer(5, 0.0),
    }
    kinds = PackReport("float16", 0, 0, layers, 0.0).kinds
    assert list(kinds) == ["mlp.experts.*.up_proj", "fc1", "lm_head"]
    assert kinds["mlp.experts.*.up_proj"] == KindReport(3, 160, 88, pytest.approx((0.2 + 3 * 0.6 + 4 * 0.5) / 8))
    assert kinds["lm_head"] == KindReport(1, 100, 55, 0.0)


def _folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("done", [0, 1, 7, 20])
def test_a_packed_writer_that_was_cut_off_goes_on_to_the_same_files(done: int, llama: Path, tmp_path: Path) -> None:
    """One process adds some tensors, and one more of which no state is kept; another goes on from what JSON kept."""
    source = llama / "pruned"
    tensors = weights(source)
    names = list(tensors)
    skeleton = models.skeleton(source)
    linears = list(models.prunable_linears(skeleton))
    with outputs.new_folder(tmp_path / "packed", overwrite=False) as target:
        shards = ShardWriter(target, 20_000)
        first = PackedWriter(linears, "bfloat16", shards)
        for name in names[:done]:
            first.add(name, tensors[name])
        kept = json.dumps([shards.state(), first.state()])
        first.add(names[done], tensors[names[done]])
        shards_state, state = json.loads(kept)
        second = PackedWriter(linears, "bfloat16", ShardWriter(target, 20_000, shards_state), state)
        for name in names[done:]:
            second.add(name, tensors[name])
        report = second.finish(source, target, skeleton)
    whole = pack_checkpoint(source, tmp_path / "whole", dtype="bfloat16", max_shard_size="20KB")
    assert report == replace(whole, seconds=0.0)
    assert whole.rounding.weights > 0
    assert _folder_bytes(tmp_path / "packed") == _folder_bytes(tmp_path / "whole")


def _memory(line: str) -> int:
    """Bytes, by a line of Linux's account of this process."""
    found = next(entry for entry in Path("/proc/self/status").read_text().splitlines() if entry.startswith(line))
    return int(found.split()[1]) * 1024


def test_memory_is_that_of_a_few_tensors(tmp_path: Path) -> None:
    """Not that of a shard: its file is not mapped, and no tensor stays."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux, which tells the most memory that a process has had")
    config = AutoConfig.for_model(
        "llama", hidden_size=1024, intermediate_size=2816, num_hidden_layers=10, vocab_size=320, num_attention_heads=8
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    for linear in models.prunable_linears(model).values():
        linear.weight.data.tril_()
    model.save_pretrained(tmp_path / "pruned")
    del model
    pack_checkpoint(tmp_path / "pruned", None, device="cpu")  # what the libraries keep is there now
    size = (tmp_path / "pruned" / "model.safetensors").stat().st_size
    gc.collect()
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the most from now on
    pack_checkpoint(tmp_path / "pruned", tmp_path / "packed", device="cpu")
    assert size > 250_000_000
    assert _memory("VmHWM") - before < size / 4


# What is refused


@pytest.mark.parametrize("place", [UP, "model.embed_tokens"])
def test_values_that_overflow_float16(place: str, tmp_path: Path) -> None:
    pruned = _pruned(tmp_path, "llama", torch.float32)
    weight = weights(pruned)[f"{place}.weight"]
    weight[3, 5] = -70_000.0
    edit_weights(pruned, {f"{place}.weight": weight})
    with pytest.raises(NonFiniteError, match=rf"{place}\.weight holds 7e\+04, .*pack with --dtype bfloat16") as caught:
        pack_checkpoint(pruned, tmp_path / "packed")
    assert_plain(str(caught.value))
    assert not (tmp_path / "packed").exists()
    assert pack_checkpoint(pruned, tmp_path / "packed", dtype="bfloat16").value_dtype == "bfloat16"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [f"{UP}.weight", "model.norm.weight"])
def test_weights_that_are_not_finite(name: str, value: float, llama: Path, tmp_path: Path) -> None:
    folder = copy_model(llama / "pruned", tmp_path / "pruned")
    weight = weights(folder)[name]
    weight.view(-1)[7] = value
    edit_weights(folder, {name: weight})
    with pytest.raises(NonFiniteError, match=f"{name} holds NaN or infinity") as caught:
        pack_checkpoint(folder, tmp_path / "packed")
    assert_plain(str(caught.value))
    assert _names(tmp_path) == ["pruned"]


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("asked", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", [f"{UP}.weight", "model.norm.weight"])
def test_what_is_not_finite_is_told_from_what_overflows(
    name: str, asked: str, stored: torch.dtype, llama: Path, tmp_path: Path
) -> None:
    """Whatever the dtypes, at the first place and at the last, and where both are there NaN and infinity are named."""
    folder = copy_model(llama / "pruned", tmp_path / "pruned")
    edit_weights(folder, {key: tensor.to(stored) for key, tensor in weights(folder).items()})
    whole = weights(folder)[name]
    overflow = 1e5 if asked == "float16" else 3.4e38
    for place in (0, -1):
        for value in (float("nan"), float("inf"), float("-inf"), overflow, -overflow):
            weight = whole.clone()
            weight.view(-1)[place] = value
            kept = float(weight.view(-1)[place])  # infinite where the stored dtype overflows already
            words = f"{name} holds {abs(kept):.4g}, which overflows {asked}; pack with --dtype bfloat16."
            if not math.isfinite(kept):
                weight.view(-1)[3] = overflow
                words = f"{name} holds NaN or infinity; repair the checkpoint before packing it."
            edit_weights(folder, {name: weight})
            if math.isfinite(float(torch.tensor(kept).to(getattr(torch, asked)))):
                pack_checkpoint(folder, None, dtype=asked)
                continue
            with pytest.raises(NonFiniteError) as caught:
                pack_checkpoint(folder, None, dtype=asked)
            assert str(caught.value) == words


def test_each_tensor_is_looked_through_once(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For NaN and infinity, by whatever of torch's finds them, which is most of the work of packing on a CPU."""
    looked: list[int] = []
    for finder in ("isfinite", "isnan", "isinf", "aminmax"):
        original = getattr(torch, finder)

        def find(tensor: Tensor, original: Callable[..., object] = original) -> object:
            if tensor.ndim:
                looked.append(tensor.numel())
            return original(tensor)

        monkeypatch.setattr(torch, finder, find)
    pack_checkpoint(llama / "pruned", None)
    assert sorted(looked) == sorted(tensor.numel() for tensor in weights(llama / "pruned").values())


def test_no_tensor_that_needs_scales_is_packed(llama: Path, tmp_path: Path) -> None:
    """Not in the blocks, and not outside them."""
    for key in (f"{UP}.weight", "model.norm.weight"):
        model = copy_model(llama / "dense", tmp_path / key)
        edit_weights(model, {key: weights(model)[key].to(torch.float8_e4m3fn)})
        with pytest.raises(CheckpointError, match=f"^{key} is stored as F8_E4M3, which needs scales") as caught:
            pack_checkpoint(model, tmp_path / "out")
        assert_plain(str(caught.value))


def test_calls_that_make_no_sense(llama: Path, tmp_path: Path) -> None:
    quantized = copy_model(llama / "pruned", tmp_path / "gptq", quantization_config={"quant_method": "gptq"})
    out = tmp_path / "out"
    calls = {
        "is packed already": lambda: pack_checkpoint(llama / "packed", out),
        "is quantized with gptq": lambda: pack_checkpoint(quantized, out),
        "float32 cannot be packed": lambda: pack_checkpoint(llama / "pruned", out, dtype="float32"),
        "is not a size": lambda: pack_checkpoint(llama / "pruned", out, max_shard_size="big"),
        "is not empty": lambda: pack_checkpoint(llama / "pruned", llama / "packed"),
        "holds the input model": lambda: pack_checkpoint(llama / "pruned", llama / "pruned", overwrite=True),
        "is not packed": lambda: unpack_checkpoint(llama / "pruned", out),
        "not packed": lambda: inspect_checkpoint(llama / "pruned"),
        "the input model": lambda: unpack_checkpoint(llama / "packed", llama / "packed", overwrite=True),
    }
    for words, call in calls.items():
        with pytest.raises(UsageError, match=words) as caught:
            call()
        assert_plain(str(caught.value))
    assert _names(tmp_path) == ["gptq"]


def test_devices_that_do_not_pack(llama: Path, tmp_path: Path) -> None:
    for device in ("meta", "nonsense", "cuda:99"):
        with pytest.raises(UsageError, match=device) as caught:
            pack_checkpoint(llama / "pruned", tmp_path / "out", device=device)
        assert_plain(str(caught.value))
        result = CliRunner().invoke(
            app, ["pack", str(llama / "pruned"), "-o", str(tmp_path / "out"), "--device", device]
        )
        assert result.exit_code != 0
        assert device in result.output
    assert _names(tmp_path) == []


def test_the_command_packs_where_it_is_told(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[torch.device] = []

    def resolve(device: str) -> torch.device:
        devices.append(torch.device("cpu") if device == "auto" else torch.device(device))
        return devices[-1]

    monkeypatch.setattr(models, "resolve_device", resolve)
    for index, options in enumerate(([], ["--device", "cpu:0"])):
        result = CliRunner().invoke(app, ["pack", str(llama / "pruned"), "-o", str(tmp_path / str(index)), *options])
        assert result.exit_code == 0, result.output
    assert devices == [torch.device("cpu"), torch.device("cpu:0")]
    assert _folder_bytes(tmp_path / "0") == _folder_bytes(tmp_path / "1") == _folder_bytes(llama / "packed")


def test_a_dtype_that_files_cannot_hold_is_named(llama: Path, tmp_path: Path) -> None:
    model = copy_model(llama / "pruned", tmp_path / "model")
    edit_weights(model, {"counts": torch.zeros(3, dtype=torch.uint32)})
    with pytest.raises(CheckpointError, match=r"^counts is stored as U32, which cannot be written") as caught:
        pack_checkpoint(model, tmp_path / "packed")
    assert_plain(str(caught.value))


def test_checkpoints_that_cannot_be_packed(llama: Path, tmp_path: Path) -> None:
    weight = weights(llama / "pruned")[f"{UP}.weight"]
    cases = {
        "no tensor": None,
        "is .* but config.json makes it": weight.T,
        "is stored as F8": weight.to(torch.float8_e4m3fn),
    }
    for number, (words, tensor) in enumerate(cases.items()):
        folder = copy_model(llama / "pruned", tmp_path / str(number))
        edit_weights(folder, {f"{UP}.weight": tensor})
        with pytest.raises(CheckpointError, match=words) as caught:
            pack_checkpoint(folder, tmp_path / "packed")
        assert UP in str(caught.value)
        assert_plain(str(caught.value))
    assert not (tmp_path / "packed").exists()


def test_files_that_name_the_layers_otherwise_are_told_from_incomplete_ones(tmp_path: Path) -> None:
    """Gemma 3 for text and images: transformers translates its names on the way."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = Gemma3Config(
        text_config={**text, **heads},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=1,
    )
    Gemma3ForConditionalGeneration(config).half().save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"^The files call the weights .* otherwise .*text model alone") as caught:
        pack_checkpoint(tmp_path / "model", tmp_path / "packed")
    assert_plain(str(caught.value))


@pytest.mark.parametrize("job", [pack_checkpoint, unpack_checkpoint])
@pytest.mark.parametrize("when", [0.0, 0.5, 1.0])
def test_an_interrupted_job_leaves_nothing(
    job: Callable[..., object], when: float, llama: Path, tmp_path: Path
) -> None:
    source = llama / ("pruned" if job is pack_checkpoint else "packed")

    def interrupt(_what: str, done: int, total: int) -> None:
        if done >= when * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job(source, tmp_path / "out", progress=interrupt)
    assert _names(tmp_path) == []
    old = copy_model(llama / "pruned", tmp_path / "out")
    before = _bits(weights(old))
    with pytest.raises(KeyboardInterrupt):
        job(source, old, overwrite=True, progress=interrupt)
    assert _names(tmp_path) == ["out"]
    assert _bits(weights(old)) == before
