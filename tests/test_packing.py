"""Packing a checkpoint: what the new folder holds, and what is refused or interrupted on the way."""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import random_tokens, save_model
from helpers import assert_plain, copy_model, edit_config, edit_weights, weights
from packing_helpers import UP, bits, folder_bytes, logits, names, packed_llama, prune, pruned_family
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration
from typer.testing import CliRunner

import macko_llm
from macko_llm import checkpoint, generation, models
from macko_llm.cli.main import app
from macko_llm.errors import CheckpointError, UsageError
from macko_llm.inspecting import inspect_checkpoint
from macko_llm.packing import pack_checkpoint
from macko_llm.text import encode_prompt
from macko_llm.unpacking import unpack_checkpoint


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_llama(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_packed_generation_is_token_for_token_the_dense_one(family: str, tmp_path: Path) -> None:
    pruned = pruned_family(tmp_path, family, torch.float16)
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


def test_float32_is_packed_as_float16(tmp_path: Path) -> None:
    pruned = pruned_family(tmp_path, "llama", torch.float32)
    report = pack_checkpoint(pruned, tmp_path / "packed")
    assert report.value_dtype == "float16"
    unpack_checkpoint(tmp_path / "packed", tmp_path / "unpacked")
    halves = {name: tensor.half() for name, tensor in weights(pruned).items()}
    assert bits(weights(tmp_path / "unpacked")) == bits(halves)
    assert checkpoint.read_config(tmp_path / "packed")["dtype"] == "float16"
    tokens = random_tokens(1, 12)
    halved = macko_llm.load(tmp_path / "unpacked", dtype="float32", device="cpu")
    with torch.no_grad():
        assert (halved(tokens).logits - logits(tmp_path / "packed", tokens, "float32")).abs().max() < 1e-3
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


def test_what_a_packed_folder_holds(llama: Path) -> None:
    packed = llama / "packed"
    assert names(packed) == sorted([*names(llama / "pruned"), "README.md"])
    assert {"generation_config.json", "macko.json", "tokenizer.json"} <= set(names(packed))
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
    pruned = prune(llama / "dense", tmp_path / "pruned", sparsity)
    report = pack_checkpoint(pruned, tmp_path / "packed")
    assert report.kept_dense == list(report.layers)
    assert report.bytes_packed == report.bytes_dense
    assert bits(weights(tmp_path / "packed")) == bits(weights(pruned))
    tokens = random_tokens(1, 9)
    assert torch.equal(logits(tmp_path / "packed", tokens), logits(pruned, tokens))
    assert replace(inspect_checkpoint(tmp_path / "packed"), seconds=0) == replace(report, seconds=0)


def test_some_layers_dense_and_some_packed(llama: Path, tmp_path: Path) -> None:
    pruned = copy_model(llama / "pruned", tmp_path / "pruned")
    edit_weights(pruned, {f"{UP}.weight": weights(llama / "dense")[f"{UP}.weight"]})
    report = pack_checkpoint(pruned, tmp_path / "packed")
    assert report.kept_dense == [UP]
    config = checkpoint.read_config(tmp_path / "packed")["quantization_config"]
    assert config["modules_to_not_convert"] == [UP, "lm_head"]
    tokens = random_tokens(2, 35)  # many: dense products of the same weights on both sides
    assert torch.equal(logits(tmp_path / "packed", tokens), logits(pruned, tokens))
    unpack_checkpoint(tmp_path / "packed", tmp_path / "unpacked")
    assert bits(weights(tmp_path / "unpacked")) == bits(weights(pruned))


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
        "is packed; give": lambda: pack_checkpoint(llama / "packed", out),
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
    assert names(tmp_path) == ["gptq"]


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
    assert names(tmp_path) == []


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
    assert folder_bytes(tmp_path / "0") == folder_bytes(tmp_path / "1") == folder_bytes(llama / "packed")


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
    assert names(tmp_path) == []
    old = copy_model(llama / "pruned", tmp_path / "out")
    before = bits(weights(old))
    with pytest.raises(KeyboardInterrupt):
        job(source, old, overwrite=True, progress=interrupt)
    assert names(tmp_path) == ["out"]
    assert bits(weights(old)) == before
