"""Pruning a checkpoint, folder to folder: what is written, what is refused before any weight is read, what is left behind."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, MAX_POSITIONS, SENTENCES, VOCABULARY, make_tokenizer, random_tokens, save_model
from helpers import copy_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import macko_llm
from macko_llm.errors import CalibrationError, CheckpointError, MackoError, NonFiniteError, UsageError
from macko_llm.pruning import plan, prune_checkpoint
from macko_llm.recipe import PruneRecipe

TEXT = " ".join(SENTENCES * 4)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text" / "calibration.txt"
    path.parent.mkdir()
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def _recipe(text: str, **settings: Any) -> PruneRecipe:
    return PruneRecipe(**{"calibration": text, "nsamples": 4, "seqlen": 24, **settings})


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_result_is_an_ordinary_dense_checkpoint(family: str, tmp_path: Path, text: str) -> None:
    source = save_model(tmp_path / "dense", family)
    report = prune_checkpoint(source, tmp_path / "out", _recipe(text), device="cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert report.layers
    for name in report.layers:
        weight = model.get_submodule(name).weight
        assert ((weight == 0).sum(dim=1) == int(weight.shape[1] * 0.5)).all(), name
    before, after = _weights(source), _weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} <= {
        f"{name}.weight" for name in report.layers
    }
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the fox").input_ids == make_tokenizer()("the fox").input_ids
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out", "text"]


def test_macko_json_says_how_it_was_made(llama: Path, tmp_path: Path, text: str) -> None:
    report = prune_checkpoint(llama, tmp_path / "out", _recipe(text, seqlen=None, seed=5, sparsity=0.6), device="cpu")
    record = json.loads((tmp_path / "out" / "macko.json").read_text())
    assert record["macko_version"] == macko_llm.__version__
    assert record["prune"] == {
        "method": "wanda",
        "update": "none",
        "allocation": "uniform",
        "sparsity": 0.6,
        "pattern": "unstructured",
        "calibration": text,
        "nsamples": 4,
        "seqlen": MAX_POSITIONS,
        "seed": 5,
        "dtype": "auto",
        "model": "llama",
        "calibration_sha256": report.calibration_sha256,
        "measured_sparsity": report.sparsity,
        "layers": report.layers,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    assert (report.nsamples, report.seqlen) == (4, MAX_POSITIONS)


def test_magnitude_needs_no_text_and_records_none(llama: Path, tmp_path: Path) -> None:
    recipe = PruneRecipe(method="magnitude", calibration="nowhere.txt")
    report = prune_checkpoint(llama, tmp_path / "out", recipe, device="cpu")
    record = json.loads((tmp_path / "out" / "macko.json").read_text())["prune"]
    assert report.sparsity == record["measured_sparsity"] == 0.5
    assert record["calibration_sha256"] is None
    assert not {"calibration", "nsamples", "seqlen", "seed"} & record.keys()


def test_the_seed_decides(llama: Path, tmp_path: Path, text: str) -> None:
    reports = {
        name: prune_checkpoint(llama, tmp_path / name, _recipe(text, seed=seed), device="cpu")
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    }
    first, again, other = (_weights(tmp_path / name) for name in ("first", "again", "other"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert reports["first"].calibration_sha256 == reports["again"].calibration_sha256
    assert reports["first"].calibration_sha256 != reports["other"].calibration_sha256
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_dtype_of_the_result(llama: Path, tmp_path: Path, text: str, dtype: str) -> None:
    prune_checkpoint(llama, tmp_path / "out", _recipe(text, dtype=dtype), device="cpu")
    assert {str(tensor.dtype) for tensor in _weights(tmp_path / "out").values()} == {f"torch.{dtype}"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == getattr(torch, dtype)


def test_a_token_file_is_used_as_it_is(llama: Path, tmp_path: Path) -> None:
    tokens = random_tokens(3, 17)
    path = str(tmp_path / "tokens.safetensors")
    save_file({"tokens": tokens}, path)
    report = prune_checkpoint(llama, tmp_path / "out", PruneRecipe(calibration=path), device="cpu")
    packed = struct.pack(f"<{2 + 3 * 17}q", 3, 17, *tokens.flatten().tolist())
    assert report.calibration_sha256 == hashlib.sha256(packed).hexdigest()
    for settings in ({"nsamples": 4}, {"seqlen": 16}):
        with pytest.raises(UsageError, match="holds 3 sequences of 17 tokens"):
            prune_checkpoint(llama, tmp_path / "no", PruneRecipe(calibration=path, **settings), device="cpu")


def test_generation_config_and_other_side_files_are_kept(
    llama: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = GenerationConfig.save_pretrained

    def strict(self: GenerationConfig, *arguments: Any, **options: Any) -> None:
        """Write as transformers 5.17 does; later ones let pass what did not change since it was loaded."""
        self.validate(strict=True)
        write(self, *arguments, **options)

    monkeypatch.setattr(GenerationConfig, "save_pretrained", strict)
    source = tmp_path / "dense"
    source.mkdir()
    for path in llama.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    odd = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2]}  # as Llama 2 was published
    (source / "generation_config.json").write_text(json.dumps(odd))
    with pytest.raises(ValueError, match="temperature"):
        GenerationConfig.from_pretrained(source).save_pretrained(tmp_path / "refused")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    prune_checkpoint(source, tmp_path / "out", _recipe(text), device="cpu")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == odd
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


def _without_weights(llama: Path, folder: Path, **config: Any) -> Path:
    """A copy of the model that cannot be loaded: what is refused on it is refused before the long work."""
    folder.mkdir()
    for path in llama.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    settings = json.loads((llama / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **config}))
    return folder


def test_plan_needs_no_weights(llama: Path, tmp_path: Path, text: str) -> None:
    source = _without_weights(llama, tmp_path / "dense")
    seen = plan(source, tmp_path / "out", _recipe(text, sparsity=0.7, seqlen=None))
    real = prune_checkpoint(llama, tmp_path / "real", _recipe(text, sparsity=0.7, seqlen=None), device="cpu")
    assert seen.sparsity == real.sparsity
    assert seen.layers.keys() == real.layers.keys()
    assert seen.layers["model.layers.0.self_attn.k_proj"] == (32, 64)
    assert seen.recipe == _recipe(text, sparsity=0.7, seqlen=MAX_POSITIONS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "config", "error", "words"),
    [
        ({"seqlen": MAX_POSITIONS + 1}, {}, UsageError, "the model takes at most 64 tokens"),
        ({"dtype": "int8"}, {}, UsageError, "dtype int8"),
        ({"calibration": "absent.txt"}, {}, CalibrationError, "no text or dataset absent.txt"),
        ({"calibration": "absent.safetensors"}, {}, CalibrationError, "no text or dataset absent.safetensors"),
        ({"pattern": "4:8"}, {"intermediate_size": 172}, UsageError, r"layers\.0\.mlp\.down_proj has 172 columns"),
        ({}, {"vocab_size": 300}, CalibrationError, "the model knows 0 to 299"),
        ({}, {"quantization_config": {"quant_method": "macko"}}, UsageError, "is packed; unpack it first"),
        ({}, {"quantization_config": {"quant_method": "gptq"}}, UsageError, "quantized with gptq"),
        ({}, {"model_type": "t5"}, CheckpointError, "not a causal language model"),
    ],
)
def test_refused_before_the_long_work(
    llama: Path,
    tmp_path: Path,
    text: str,
    settings: dict[str, Any],
    config: dict[str, Any],
    error: type[MackoError],
    words: str,
) -> None:
    source = _without_weights(llama, tmp_path / "dense", **config)
    if "vocab_size" not in config and settings.get("calibration") != "absent.txt":  # a plan draws no text
        with pytest.raises(error, match=words):
            plan(source, tmp_path / "out", _recipe(text, **settings))
    with pytest.raises(error, match=words):
        prune_checkpoint(source, tmp_path / "out", _recipe(text, **settings), device="cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "text"]


def test_short_text_is_refused_before_the_long_work(llama: Path, tmp_path: Path, text: str) -> None:
    Path(text).write_text("Too short.")
    with pytest.raises(CalibrationError, match="too few for sequences of 24"):
        prune_checkpoint(_without_weights(llama, tmp_path / "dense"), tmp_path / "out", _recipe(text), device="cpu")


def test_tokens_of_another_vocabulary_are_refused(llama: Path, tmp_path: Path) -> None:
    tokens = random_tokens(2, 8)
    tokens[1, 1] = VOCABULARY
    path = str(tmp_path / "tokens.safetensors")
    save_file({"tokens": tokens}, path)
    source = _without_weights(llama, tmp_path / "dense")
    with pytest.raises(CalibrationError, match=f"run from .* to {VOCABULARY}"):
        prune_checkpoint(source, tmp_path / "out", PruneRecipe(calibration=path), device="cpu")


def test_an_existing_folder_is_not_overwritten_unasked(llama: Path, tmp_path: Path, text: str) -> None:
    target = tmp_path / "out"
    prune_checkpoint(llama, target, _recipe(text), device="cpu")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    for call in (plan, prune_checkpoint):
        with pytest.raises(UsageError, match="not empty"):
            call(llama, target, _recipe(text, sparsity=0.25))
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    report = prune_checkpoint(llama, target, _recipe(text, sparsity=0.25), device="cpu", overwrite=True)
    assert report.sparsity == 0.25
    assert json.loads((target / "macko.json").read_text())["prune"]["sparsity"] == 0.25


def test_the_source_is_never_overwritten(tmp_path: Path, text: str) -> None:
    source = save_model(tmp_path / "dense", "llama")
    with pytest.raises(UsageError, match="holds the input model"):
        prune_checkpoint(source, source, _recipe(text), device="cpu", overwrite=True)
    assert (source / "model.safetensors").is_file()


def test_a_failed_job_leaves_nothing_behind(llama: Path, tmp_path: Path, text: str) -> None:
    source = _without_weights(llama, tmp_path / "dense")
    weights = _weights(llama)
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj"):
        prune_checkpoint(source, tmp_path / "out", _recipe(text), device="cpu")
    (source / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="corrupt or truncated"):
        prune_checkpoint(source, tmp_path / "out", _recipe(text), device="cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "text"]


def test_an_interrupted_job_that_is_not_resumable_leaves_nothing_behind(llama: Path, tmp_path: Path, text: str) -> None:
    def interrupt(what: str, done: int, _total: int) -> None:
        if (what, done) == ("saving", 1):  # all files are written
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(llama, tmp_path / "out", _recipe(text), device="cpu", progress=interrupt, resumable=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text"]


@pytest.mark.parametrize("asked", [None, "text", "messages"])
def test_macko_json_names_the_column_of_a_dataset_that_was_read(asked: str | None, llama: Path, tmp_path: Path) -> None:
    source = copy_model(llama, tmp_path / "dense")
    (source / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    (tmp_path / "chats" / "data").mkdir(parents=True)
    chats = [{"messages": [{"role": "user", "content": text * 2}]} for text in SENTENCES]
    (tmp_path / "chats" / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, chats)))
    recipe = _recipe(str(tmp_path / "chats"), chat_template=True, text_column=asked)
    assert plan(source, tmp_path / "out", recipe).recipe.text_column == asked  # what is there is not known yet
    first = prune_checkpoint(source, tmp_path / "out", recipe, device="cpu")
    record = json.loads((tmp_path / "out" / "macko.json").read_text())["prune"]
    assert (record["split"], record["text_column"]) == ("train", "messages")
    again = _recipe(str(tmp_path / "chats"), chat_template=True, text_column=record["text_column"])
    second = prune_checkpoint(source, tmp_path / "again", again, device="cpu")
    assert second.calibration_sha256 == first.calibration_sha256
    (tmp_path / "chats" / "data" / "train.jsonl").write_text(json.dumps({"text": TEXT, "messages": []}))
    prune_checkpoint(source, tmp_path / "texts", _recipe(str(tmp_path / "chats"), chat_template=True), device="cpu")
    assert json.loads((tmp_path / "texts" / "macko.json").read_text())["prune"]["text_column"] == "text"
