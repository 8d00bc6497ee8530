"""The commands, run in this process: what they print where, settings, and help."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import transformers
import typer
import typer.main
from datasets import Dataset
from families import MAX_POSITIONS, SENTENCES, save_model
from helpers import assert_plain, copy_model, quiet_transformers, weights
from transformers import AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner, Result

import macko_llm
from macko_llm import loading, native
from macko_llm.benchmarks import quality
from macko_llm.calibration import calibration_tokens, tokens_sha256
from macko_llm.cli.console import megabytes, plain_errors, print_json
from macko_llm.cli.doctor import gpu_advice
from macko_llm.cli.main import app
from macko_llm.errors import CalibrationError, UsageError
from macko_llm.linear import MackoLinear
from macko_llm.packing import pack_checkpoint
from macko_llm.pruning import prune_checkpoint
from macko_llm.recipe import PruneRecipe

COMMANDS = [
    "prune",
    "pack",
    "unpack",
    "generate",
    "chat",
    "eval",
    "eval-perplexity",
    "compare",
    "inspect",
    "doctor",
    "demo",
    "bench quality",
    "bench spmv",
    "bench prune",
]
PROGRESS_LINE = re.compile(r".+: \d+/\d+")
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_transformers():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, dense, pruned and packed, and a text."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "dense", "llama", torch.float16)
    prune_checkpoint(folder / "dense", folder / "pruned", PruneRecipe(method="magnitude"), device="cpu")
    pack_checkpoint(folder / "pruned", folder / "packed")
    (folder / "text.txt").write_text(" ".join(SENTENCES * 4))
    data = folder / "dataset" / "data"
    data.mkdir(parents=True)
    for split, texts in (("train", SENTENCES), ("test", SENTENCES[::-1])):
        lines = [json.dumps({"body": text * 4, "id": 1}) for text in texts]
        (data / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(autouse=True)
def _in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def macko(*arguments: object, stdin: str | None = None, exit_code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    assert result.exit_code == exit_code, result.output
    return result


def macko_json(*arguments: object) -> dict[str, Any]:
    """What a command prints on stdout with --json: nothing but one JSON object."""
    result = macko(*arguments, "--json")
    for line in result.stderr.splitlines():
        assert PROGRESS_LINE.fullmatch(line), line
    content = json.loads(result.stdout)
    assert isinstance(content, dict)
    return content


def calibrated(*more: object) -> list[object]:
    return ["--calibration", "text.txt", "--nsamples", 4, "--seqlen", 24, *more]


# What the commands say


def test_prune(tmp_path: Path) -> None:
    content = macko_json("prune", "dense", "-o", tmp_path / "out", *calibrated())
    assert {"sparsity", "layers", "seconds", "calibration_sha256"} <= content.keys()
    assert content["sparsity"] == 0.5
    assert content["layers"][UP] == 0.5
    assert len(content["layers"]) == 14
    assert re.fullmatch(r"[0-9a-f]{64}", content["calibration_sha256"])
    record = json.loads((tmp_path / "out" / "macko.json").read_text())["prune"]
    assert (record["method"], record["nsamples"], record["seqlen"]) == ("wanda", 4, 24)
    result = macko("prune", "dense", "-o", tmp_path / "out", "--method", "magnitude", "--overwrite")
    assert re.fullmatch(r"Pruned 14 layers to 50\.0% sparsity with magnitude in .* s: .*out\n", result.stdout)
    assert "pruning blocks: 0/2" in result.stderr.splitlines()


def test_pack_and_unpack(tmp_path: Path) -> None:
    packed, dense = tmp_path / "packed", tmp_path / "dense"
    content = macko_json("pack", "pruned", "-o", packed)
    assert {"bytes_dense", "bytes_packed", "layers", "kept_dense", "seconds"} <= content.keys()
    assert content["bytes_packed"] == sum(tensor.nbytes for tensor in weights(packed).values()) < content["bytes_dense"]
    assert content["layers"][UP] == {
        "rows": 160,
        "cols": 64,
        "sparsity": 0.5,
        "entries": 160 * 32,
        "bytes_dense": 160 * 64 * 2,
        "bytes_packed": 160 * 32 * 5 // 2 + 161 * 4,
        "packed": True,
    }
    said = macko("pack", "pruned", "-o", packed, "--overwrite", "--dtype", "bfloat16").stdout
    assert re.fullmatch(
        r"Packed .* into .* \(1\.\d\dx smaller, 50\.0% sparsity\): .*packed\n"
        r"\d+ weights of \d+ tensors were rounded to bfloat16, by 0\.0\d+ of .*\n",
        said,
    )
    macko("pack", "pruned", "-o", packed, "--overwrite")
    content = macko_json("unpack", packed, "-o", dense)
    assert content["bytes_dense"] == (dense / "model.safetensors").stat().st_size
    assert all(torch.equal(tensor, weights(dense)[name]) for name, tensor in weights(Path("pruned")).items())
    assert macko("unpack", packed, "-o", dense, "--overwrite").stdout.startswith("Unpacked ")


def test_closing_lines_and_cards_name_update_and_allocation(tmp_path: Path) -> None:
    pruned, packed = tmp_path / "pruned", tmp_path / "packed"
    said = macko("prune", "dense", "-o", pruned, *calibrated("--update", "admm", "--allocation", "owl")).stdout
    assert re.fullmatch(r"Pruned 14 layers to 50\.\d% sparsity with wanda \+ admm, owl in .* s: .*pruned\n", said)
    macko("pack", pruned, "-o", packed)
    assert "(pruned by wanda + admm, owl)" in (packed / "README.md").read_text()
    assert "pruned by: wanda + admm, owl;" in macko("inspect", packed).stdout


def test_pack_says_what_stays_dense(tmp_path: Path) -> None:
    content = macko_json("pack", "dense", "-o", tmp_path / "packed")
    assert content["kept_dense"] == list(content["layers"])
    said = macko("pack", "dense", "-o", tmp_path / "packed", "--overwrite").stdout
    assert "All layers stay dense, because packing would make them larger; prune the model first" in said


def test_a_dry_run_of_pack_weighs_each_kind_of_layer_as_packing_does() -> None:
    content = macko_json("pack", "pruned", "--dry-run")
    assert (content["output"], content["dry_run"]) == (None, True)
    kinds = content["kinds"]
    projections = [f"self_attn.{name}_proj" for name in "qkvo"] + [
        f"mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    assert list(kinds) == projections
    dense, packed = weights(Path("pruned")), weights(Path("packed"))
    for kind, found in kinds.items():
        tensors = [tensor for name, tensor in dense.items() if name.endswith(f"{kind}.weight")]
        assert found["layers"] == len(tensors) == 2
        assert found["bytes_dense"] == sum(tensor.nbytes for tensor in tensors)
        assert found["bytes_packed"] == sum(tensor.nbytes for name, tensor in packed.items() if f".{kind}." in name)
        assert found["sparsity"] == torch.cat([(tensor == 0).float().flatten() for tensor in tensors]).mean().item()
    table = macko("pack", "pruned", "--dry-run").stdout
    assert re.search(r"mlp\.up_proj +2 +40\.96 kB +26\.89 kB +1\.52x +50\.0%", table)
    rest = sum(tensor.nbytes for name, tensor in dense.items() if not name.endswith("_proj.weight"))
    assert re.search(rf"all other tensors +{megabytes(rest)} +{megabytes(rest)} +1\.00x", table)
    whole = [megabytes(sum(tensor.nbytes for tensor in tensors.values())) for tensors in (dense, packed)]
    assert re.search(rf"total +14 +{whole[0]} +{whole[1]} +1\.\d\dx +50\.0%", table)
    assert table.splitlines()[-1].startswith(f"Would pack {whole[0]} into {whole[1]} (")
    assert macko("pack", "pruned", exit_code=2).stderr == (
        "macko: There is no folder to write; give -o OUT, or --dry-run to see only how large it would be.\n"
    )


def test_inspect() -> None:
    content = macko_json("inspect", "packed")
    assert content["valid"] is True
    assert content["layers"] == macko_json("pack", "pruned", "-o", "unused", "--dry-run")["layers"]
    assert content["provenance"]["prune"]["method"] == "magnitude"
    table = macko("inspect", "packed").stdout
    assert re.search(rf"{UP} +160 x 64 +50\.0% +20\.48 kB +13\.44 kB", table)
    assert "14 of 14 layers packed as float16" in table
    assert "Every packed matrix is valid, every other tensor finite, and the files hold the whole model." in table


@pytest.mark.parametrize("model", ["dense", "packed"])
def test_eval_perplexity(model: str) -> None:
    content = macko_json("eval-perplexity", model, "--dataset", "text.txt", "--limit", 2)
    assert content.keys() == {
        "perplexity",
        "nll",
        "windows",
        "tokens",
        "seqlen",
        "stride",
        "dataset",
        "split",
        "dtype",
        "reference",
    }
    assert (content["windows"], content["seqlen"], content["tokens"]) == (2, MAX_POSITIONS, 2 * (MAX_POSITIONS - 1))
    assert (content["dataset"], content["split"], content["dtype"]) == ("text.txt", None, "float16")
    assert content["reference"] is None
    result = macko("eval-perplexity", model, "--dataset", "text.txt", "--limit", 2, "--seqlen", 16, "--stride", 8)
    assert re.match(
        r"perplexity \d+\.\d{4}  \(dataset text\.txt, seqlen 16, stride 8, 2 windows, 23 tokens, .*float16\)\n$",
        result.stdout,
    )
    assert "perplexity on text.txt: 0/2" in result.stderr


def test_eval_perplexity_beside_the_model_that_it_was_made_from() -> None:
    call = ["--dataset", "text.txt", "--limit", 2, "--dtype", "float32"]
    dense = macko_json("eval-perplexity", "dense", *call)
    packed = macko_json("eval-perplexity", "packed", *call)
    beside = macko_json("eval-perplexity", "packed", *call, "--reference", "dense")
    reference = beside.pop("reference")
    assert {**beside, "reference": None} == packed
    assert reference.keys() == {"perplexity", "nll", "kl_divergence", "top_agreement", "dtype"}
    assert (reference["perplexity"], reference["nll"], reference["dtype"]) == (
        dense["perplexity"],
        dense["nll"],
        "float32",
    )
    assert reference["kl_divergence"] > 1e-3
    assert 0 <= reference["top_agreement"] < 1
    itself = macko_json("eval-perplexity", "packed", *call, "--reference", "packed")["reference"]
    assert (itself["kl_divergence"], itself["top_agreement"]) == (0, 1)
    said = macko("eval-perplexity", "packed", *call, "--reference", "dense").stdout.splitlines()[1]
    assert re.fullmatch(
        r"reference perplexity \d+\.\d{4}, KL\(reference \|\| model\) \d+\.\d{6} nats a token, "
        r"the same most probable token for \d+\.\d\d%",
        said,
    )


def test_a_reference_that_cannot_serve_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    call = ["eval-perplexity", "packed", "--dataset", "text.txt", "--reference"]
    assert "no model nowhere" in macko(*call, "nowhere", exit_code=1).stderr
    tokenizer = AutoTokenizer.from_pretrained("dense")
    tokenizer.add_tokens(["cat"])
    for config, files, sentence in (
        ({}, tokenizer, "another vocabulary; give --reference"),
        ({"vocab_size": 9999}, None, "another vocabulary; give --reference"),
        ({"max_position_embeddings": 8}, None, "at most 8 tokens; use a seqlen of 8"),
    ):
        other = copy_model(Path("dense"), tmp_path / "other", **config)
        (other / "model.safetensors").unlink()
        if files is not None:
            files.save_pretrained(other)
        error = macko(*call, other, exit_code=2).stderr.splitlines()[-1]
        assert sentence in error
        assert_plain(error)
        shutil.rmtree(other)


def test_eval_perplexity_of_a_dataset_is_that_of_its_texts(tmp_path: Path) -> None:
    joined = tmp_path / "joined.txt"
    for split, texts in (("train", SENTENCES), ("test", SENTENCES[::-1])):
        joined.write_text("\n\n".join(text * 4 for text in texts))
        expected = macko_json("eval-perplexity", "packed", "--dataset", joined)
        call = ["eval-perplexity", "packed", "--dataset", "dataset", "--text-column", "body"]
        call += [] if split == "test" else ["--split", split]
        assert macko_json(*call) == {**expected, "dataset": "dataset", "split": split}
        assert f"(dataset dataset, {split} split, seqlen" in macko(*call).stdout


def test_c4_is_evaluated_on_256_windows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    documents = Dataset.from_dict({"text": SENTENCES * 220})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: documents)
    (tmp_path / "joined.txt").write_text(" ".join(SENTENCES * 220))
    call = ["eval-perplexity", "dense", "--seqlen", 8, "--batch-size", 64]
    expected = macko_json(*call, "--dataset", tmp_path / "joined.txt", "--limit", 256)
    assert macko_json(*call, "--dataset", "c4") == {**expected, "dataset": "c4", "split": "test"}
    monkeypatch.setattr(quality, "SPEED_TOKENS", 2)
    recipe = PruneRecipe(calibration=str(tmp_path / "joined.txt"), nsamples=1, seqlen=8)
    model, work = Path("dense"), tmp_path / "work"
    report = quality.measure_chain(model, work, recipe, sparsities=[], dataset="c4", seqlen=8, device="cpu")
    assert report.windows == expected["windows"] == 256


def test_eval_perplexity_in_batches() -> None:
    call = ["eval-perplexity", "packed", "--dataset", "text.txt", "--dtype", "float32", "--seqlen", 16]
    alone, together = macko_json(*call), macko_json(*call, "--batch-size", 4)
    assert together == {**alone, **{key: pytest.approx(alone[key], rel=1e-5) for key in ("nll", "perplexity")}}


def test_prune_records_the_split_and_the_column_of_a_dataset(tmp_path: Path) -> None:
    call = ["prune", "dense", "-o", tmp_path / "out", "--calibration", "dataset", "--text-column", "body"]
    macko(*call, "--nsamples", 3, "--seqlen", 24)
    record = json.loads((tmp_path / "out" / "macko.json").read_text())["prune"]
    assert (record["calibration"], record["split"], record["text_column"]) == ("dataset", "train", "body")
    (tmp_path / "recipe.toml").write_text('split = "test"\ntext_column = "body"\ncalibration = "dataset"\n')
    planned = _planned("--recipe", tmp_path / "recipe.toml", "--seqlen", 24)
    assert (planned["split"], planned["text_column"]) == ("test", "body")
    planned = _planned("--recipe", tmp_path / "recipe.toml", "--seqlen", 24, "--split", "train")
    assert (planned["split"], planned["text_column"]) == ("train", "body")


@pytest.mark.parametrize("model", ["dense", "packed"])
def test_generate(model: str) -> None:
    call = ["generate", model, "--prompt", "Once upon a time", "--max-new-tokens", 12, "--dtype", "float32"]
    content = macko_json(*call)
    assert content.keys() == {
        "text",
        "prompt_tokens",
        "new_tokens",
        "prefill_tokens_per_second",
        "tokens_per_second",
        "peak_memory_bytes",
    }
    assert content["new_tokens"] <= 12
    result = macko(*call)
    assert result.stdout == content["text"] + "\n"
    summary = r"prompt: \d+ tokens, [\d.]+ tokens/s; decode: \d+ tokens, [\d.]+ tokens/s; peak memory: [\d.]+ [MG]B\n"
    assert re.fullmatch(summary, result.stderr)


def test_sampling_is_seeded() -> None:
    call = ["generate", "packed", "--prompt", "Once", "--max-new-tokens", 20, "--temperature", 1.5, "--top-p", 0.95]
    texts = [macko(*call, "--top-k", 200, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_min_p_and_the_repetition_penalty_arrive() -> None:
    """A min-p of 1 leaves the most probable token, which is greedy; a penalty changes what greedy says."""
    call = ["generate", "packed", "--prompt", "Once", "--max-new-tokens", 20, "--dtype", "float32"]
    greedy = macko(*call).stdout
    assert macko(*call, "--temperature", 1.5, "--min-p", 1).stdout == greedy
    assert macko(*call, "--repetition-penalty", 1.0).stdout == greedy
    assert macko(*call, "--repetition-penalty", 1e3).stdout != greedy


def test_the_prompt_from_stdin() -> None:
    """The file's last line end is no part of the prompt; all else is."""
    for prompt in ("Once upon a time", "Two\nlines\n"):
        call = ["generate", "packed", "--max-new-tokens", 5, "--json"]
        piped = macko(*call, "--prompt", "-", stdin=prompt + "\n")
        given = macko(*call, "--prompt", prompt)
        for key in ("text", "prompt_tokens"):
            assert json.loads(piped.stdout)[key] == json.loads(given.stdout)[key]


def test_prompts_from_files_come_after_those_given_as_text(folder: Path) -> None:
    (folder / "owl.txt").write_bytes("Zwölf Eulen\nsaßen\n".encode())
    (folder / "fox.txt").write_bytes(b"The fox")
    long = ["--prompt", "Once", "--prompt", "Zwölf Eulen\nsaßen", "--prompt", "The fox", "--max-new-tokens", 5]
    short = ["-f", "owl.txt", "-p", "Once", "--prompt-file", folder / "fox.txt", "-n", 5]
    assert macko("generate", "packed", *short).stdout == macko("generate", "packed", *long).stdout


@pytest.mark.parametrize("prompts", [1, 3])
def test_packed_layers_are_laid_out_for_as_many_texts_as_there_are_prompts(
    prompts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, models = loading.load, []

    def remember(*arguments: Any, **options: Any) -> PreTrainedModel:
        models.append(load(*arguments, **options))
        return models[-1]

    monkeypatch.setattr(loading, "load", remember)
    macko("generate", "packed", *["-p", "Once"] * prompts, "-n", 2, "--device", "cpu")
    layers = [module for module in models[0].modules() if isinstance(module, MackoLinear)]
    assert {(layer.layout, layer.tokens) for layer in layers} == {("auto", prompts)}


def test_several_prompts() -> None:
    """Each text is what its prompt gives alone; the summary is about all of them."""
    call = ["generate", "packed", "--max-new-tokens", 12, "--dtype", "float32"]
    prompts = ["Once upon a time", "The fox", "Every morning the old owl told"]
    alone = [macko_json(*call, "--prompt", prompt) for prompt in prompts]
    several = [argument for prompt in prompts for argument in ("--prompt", prompt)]
    together = json.loads(macko(*call, *several, "--json").stdout)
    for key in ("text", "prompt_tokens", "new_tokens"):
        assert [one[key] for one in together] == [one[key] for one in alone]
    result = macko(*call, *several)
    assert result.stdout == "".join(f"--- prompt {n} ---\n{one['text']}\n" for n, one in enumerate(alone, 1))
    read, written = (sum(one[key] for one in alone) for key in ("prompt_tokens", "new_tokens"))
    assert f"prompt: {read} tokens" in result.stderr
    assert f"decode: {written} tokens, " in result.stderr
    macko(*call, "--prompt", "-", "--prompt", "-", exit_code=2)


def test_stop_strings() -> None:
    call = ["generate", "packed", "--prompt", "Once", "--max-new-tokens", 30, "--dtype", "float32"]
    text = macko_json(*call)["text"]
    cut = macko(*call, "--stop", text[9:12], "--stop", "never said").stdout
    assert cut == text[: text.index(text[9:12])] + "\n"
    macko(*call, "--stop", "", exit_code=2)


def test_chat(folder: Path) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    (folder / "dense" / "chat_template.jinja").write_text(template)
    try:
        call = ["generate", "dense", "--prompt", "Hi", "--chat", "--max-new-tokens", 2]
        short = macko_json(*call)["prompt_tokens"]
        assert macko_json(*call, "--system-prompt", "Be brief")["prompt_tokens"] > short
    finally:
        (folder / "dense" / "chat_template.jinja").unlink()
    macko("generate", "dense", "--prompt", "Hi", "--chat", exit_code=2)


def test_prune_with_a_chat_template(folder: Path, tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": text * 2}] for text in SENTENCES]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    call = ["prune", "dense", "-o", tmp_path / "out", "--nsamples", 3, "--seqlen", 24]
    call += ["--calibration", tmp_path / "chats.jsonl"]
    (tmp_path / "chat.toml").write_text("chat_template = true\n")
    macko(*call, "--recipe", tmp_path / "chat.toml", exit_code=2)  # there is no template yet
    (folder / "dense" / "chat_template.jinja").write_text(template)
    try:
        macko(*call, "--recipe", tmp_path / "chat.toml")
        record = json.loads((tmp_path / "out" / "macko.json").read_text())["prune"]
        assert record["chat_template"] is True
        tokenizer = AutoTokenizer.from_pretrained(folder / "dense")
        tokens = calibration_tokens(str(tmp_path / "chats.jsonl"), tokenizer, 3, 24, 0, chat_template=True)
        assert record["calibration_sha256"] == tokens_sha256(tokens)
        again = [*call, "--overwrite", "--recipe", tmp_path / "chat.toml", "--no-chat-template"]
        assert 'has no field "text"' in macko(*again, exit_code=1).stderr
        report = macko_json(*call, "--overwrite", "--chat-template")
        assert report["calibration_sha256"] == tokens_sha256(tokens)
    finally:
        (folder / "dense" / "chat_template.jinja").unlink()


# Settings


def _planned(*arguments: object) -> dict[str, Any]:
    return macko_json("prune", "dense", "-o", "unused", "--dry-run", *arguments)["recipe"]


def test_flags_override_the_recipe_and_the_recipe_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('method = "magnitude"\nsparsity = 0.3\nseed = 7\n')
    defaults = _planned()
    assert (defaults["method"], defaults["sparsity"], defaults["nsamples"]) == ("wanda", 0.5, 128)
    from_file = _planned("--recipe", file)
    assert from_file == {**defaults, "method": "magnitude", "sparsity": 0.3, "seed": 7, "seqlen": None}
    both = _planned("--recipe", file, "--sparsity", 0.6, "--method", "wanda", "--nsamples", 9, "--dtype", "float32")
    assert both == {**defaults, "sparsity": 0.6, "seed": 7, "nsamples": 9, "dtype": "float32"}
    assert _planned("--pattern", "2:4")["sparsity"] == 0.5


FLAGS: dict[str, tuple[list[object], object]] = {
    "method": (["--method", "ria"], "ria"),
    "sparsity": (["--sparsity", 0.25], 0.25),
    "pattern": (["--pattern", "2:4"], "2:4"),
    "update": (["--update", "admm"], "admm"),
    "allocation": (["--allocation", "owl"], "owl"),
    "targets": (["--targets", "up_proj", "--targets", "down_proj"], ["up_proj", "down_proj"]),
    "ignore": (["--ignore", "up_proj"], ["up_proj"]),
    "layers": (
        ["--layers", "down_proj=0.4", "--layers", "re:.*(?=up_proj).* = 0"],
        [["down_proj", 0.4], ["re:.*(?=up_proj).*", 0.0]],
    ),
    "calibration": (["--calibration", "text.txt"], "text.txt"),
    "split": (["--calibration", "dataset", "--split", "test"], "test"),
    "text_column": (["--calibration", "dataset", "--text-column", "body"], "body"),
    "chat_template": (["--calibration", "text.txt", "--chat-template"], True),
    "nsamples": (["--nsamples", 3], 3),
    "seqlen": (["--seqlen", 12], 12),
    "seed": (["--seed", 5], 5),
    "dtype": (["--dtype", "bfloat16"], "bfloat16"),
}


def test_every_setting_of_a_recipe_is_a_flag_of_that_name(folder: Path) -> None:
    settings = {field.name for field in fields(PruneRecipe)}
    command = typer.main.get_command(app).commands["prune"]  # type: ignore[attr-defined]
    flags = {parameter.opts[0].removeprefix("--").replace("-", "_") for parameter in command.params}
    assert settings <= flags
    assert set(FLAGS) == settings
    template = folder / "dense" / "chat_template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    try:
        for name, (call, value) in FLAGS.items():
            assert getattr(PruneRecipe(), name) != value
            assert _planned(*call)[name] == value, name
    finally:
        template.unlink()


def test_what_was_used_is_what_macko_json_says(tmp_path: Path) -> None:
    """Flags win over the file, a table of layers as a whole."""
    file = tmp_path / "recipe.toml"
    file.write_text(
        'method = "magnitude"\nsparsity = 0.3\nseed = 7\nignore = ["o_proj"]\n[layers]\ndown_proj = 0.8\nup_proj = 0.7\n'
    )
    more = ["--sparsity", 0.6, "--layers", "up_proj=0.4", "--method", "wanda", *calibrated()]
    for name, flags, used, shares in (
        ("by-file", [], {"method": "magnitude", "sparsity": 0.3}, {"down_proj": 0.8, "up_proj": 0.7}),
        ("by-flags", more, {"method": "wanda", "sparsity": 0.6, "nsamples": 4, "seed": 7}, {"up_proj": 0.4}),
    ):
        macko("prune", "dense", "-o", tmp_path / name, "--recipe", file, *flags)
        record = json.loads((tmp_path / name / "macko.json").read_text())["prune"]
        assert {**record, **used, "ignore": ["o_proj"], "layer_sparsities": shares} == record
        layers = {"q_proj": used["sparsity"], "o_proj": 0.0, **shares}
        for weight, tensor in weights(tmp_path / name).items():
            share = next((share for layer, share in layers.items() if weight.endswith(f"{layer}.weight")), None)
            if share is not None:
                assert (tensor == 0).float().mean().item() == pytest.approx(share, abs=0.02), weight


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("down_proj", "'down_proj' gives layers no sparsity; write for example --layers"),
        ("down_proj=much", "'much' is not a sparsity"),
        ("down_proj=1", "outside [0, 1)"),
        ("=0.5", "The name of a layer is empty"),
    ],
)
def test_layers_that_make_no_sense(given: str, words: str) -> None:
    assert words in macko("prune", "dense", "-o", "unused", "--layers", given, exit_code=2).stderr


def test_recipes_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    for content, words in (("sparsty = 0.5", "'sparsty', which is not a setting"), ("sparsity =", "is not TOML")):
        file.write_text(content)
        assert words in macko("prune", "dense", "-o", "unused", "--recipe", file, exit_code=2).stderr
    assert "cannot be read" in macko("prune", "dense", "-o", "x", "--recipe", tmp_path, exit_code=2).stderr


def test_a_dry_run_shows_the_sparsity_of_each_layer(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('sparsity = 0.6\n[layers]\n"*.mlp.*" = 0.4\ndown_proj = 0\n')
    table = macko("prune", "dense", "-o", "unused", "--dry-run", "--recipe", recipe).stdout
    for layer, share in (("self_attn.q_proj", "60.0%"), ("mlp.up_proj", "40.0%"), ("mlp.down_proj", "0.0%")):
        assert re.search(rf"layers\.0\.{layer} .* {re.escape(share)}", table)
    spread = macko("prune", "dense", "-o", "unused", "--dry-run", "--recipe", recipe, "--allocation", "owl").stdout
    assert re.search(r"layers\.0\.self_attn\.q_proj .* owl", spread)
    assert re.search(r"layers\.0\.mlp\.up_proj .* 40\.0%", spread)


def test_dry_runs_write_nothing(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    planned = macko_json("prune", "dense", "-o", "unused", "--dry-run", "--sparsity", 0.7)
    assert planned["layers"][UP] == [160, 64]
    assert planned["sparsity"] == pytest.approx(0.7, abs=0.02)
    assert "nothing was written" in macko("prune", "dense", "-o", "unused", "--dry-run").stdout
    assert macko_json("pack", "pruned", "-o", "unused", "--dry-run")["dry_run"] is True
    assert "Would pack" in macko("pack", "pruned", "-o", "unused", "--dry-run").stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


# About macko itself


def test_version_and_doctor() -> None:
    assert macko("--version").stdout == f"macko {macko_llm.__version__}\n"
    content = macko_json("doctor")
    assert content["macko"] == macko_llm.__version__
    assert content["packages"]["torch"] == torch.__version__
    assert content["packages"]["transformers"] == transformers.__version__
    assert content["kernels"] == (["cpu", "cuda"] if native.has_cuda() else ["cpu"])
    assert Path(content["native_library"]).is_file()
    said = macko("doctor").stdout
    assert content["native_library"] in said
    assert all(package in said for package in content["packages"])
    assert f"kernels         {', '.join(content['kernels'])}\n" in said


def test_the_doctor_says_how_to_get_cuda_kernels() -> None:
    gpu = {"name": "Tesla M1", "kernels_fail": None}
    (advice,) = gpu_advice([gpu], ["cpu"])
    assert "built without CUDA kernels" in advice
    assert "MACKO_CUDA=on pip install" in advice
    assert gpu_advice([gpu], ["cpu", "cuda"]) == []
    assert gpu_advice([], ["cpu"]) == []
    assert gpu_advice([gpu], []) == []  # a missing library is advice enough


def test_the_doctor_says_what_to_do_about_an_old_driver() -> None:
    reason = "its driver knows CUDA up to 12.4, and macko was built with CUDA 13.0"
    (advice,) = gpu_advice([{"name": "Tesla M1", "kernels_fail": reason}], ["cpu", "cuda"])
    assert advice == (
        f"The CUDA kernels do not run on Tesla M1 ({reason}), so packed models run there in plain torch, right but slow; "
        "update the GPU's driver, or build macko with a CUDA toolkit that suits driver and GPU: "
        "`CUDA_HOME=/usr/local/cuda-12.8 MACKO_CUDA=on pip install .` in the project's folder."
    )


@pytest.mark.parametrize(
    ("kernels", "reason", "words"),
    [
        (True, None, None),
        (False, None, "built without CUDA kernels"),
        (True, "no kernel image is available", r"do not run on NVIDIA Imaginary \(no kernel image is available\)"),
    ],
    ids=["kernels that run", "no kernels", "kernels that do not run"],
)
def test_the_doctor_sees_gpus_and_what_they_lack(
    kernels: bool, reason: str | None, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SimpleNamespace(name="NVIDIA Imaginary", total_memory=48 * 10**9, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: gpu)
    monkeypatch.setattr(native, "has_cuda", lambda: kernels)
    monkeypatch.setattr(native, "why_not_on", lambda _index: reason)
    said = macko("doctor").stdout.splitlines()
    assert "GPU             NVIDIA Imaginary, 48 GB, sm_90" in said
    if words is None:
        assert said[-1] == "Nothing is missing."
        assert macko_json("doctor")["advice"] == []
    else:
        (advice,) = macko_json("doctor")["advice"]
        assert said[-1] == f"! {advice}"
        assert re.search(words, advice)
        assert "MACKO_CUDA=on pip install" in advice


@pytest.mark.parametrize("command", ["", "bench", *COMMANDS])
def test_h_is_help(command: str) -> None:
    assert macko(*command.split(), "-h").stdout == macko(*command.split(), "--help").stdout != ""


@pytest.mark.parametrize("form", [["--output=~/out"], ["-o", "~/out"], ["-o~/out"]], ids=str)
def test_a_tilde_is_the_home_folder(
    form: list[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shell replaces it only where a word begins with it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "packed", tmp_path / "packed")
    macko("unpack", "~/packed", *form)
    assert (tmp_path / "out" / "config.json").is_file()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str) -> None:
    text = macko(*command.split(), "--help").stdout
    assert "Examples:" in text
    assert f"macko {command}" in text.split("Examples:")[1]


def test_help_lists_every_command() -> None:
    for call in ([], ["--help"]):
        text = macko(*call).stdout
        assert all(re.search(rf"\b{command.split()[0]}\b", text) for command in COMMANDS)
    assert "quality" in macko("bench", "--help").stdout


# How the command line speaks


def test_anything_unexpected_is_one_sentence_too(capsys: pytest.CaptureFixture[str]) -> None:
    cases: list[tuple[BaseException, int, str]] = [
        (UsageError("A wrong call; mend it."), 2, "A wrong call; mend it."),
        (CalibrationError("A failed job; mend it."), 1, "A failed job; mend it."),
        (ModuleNotFoundError("No module", name="rich.console"), 1, "The package rich is missing; install it"),
        (ImportError("needs einops"), 1, "Unexpected ImportError: needs einops; set MACKO_DEBUG=1"),
        (RuntimeError("first\nsecond"), 1, "Unexpected RuntimeError: first; set MACKO_DEBUG=1"),
        (ValueError(), 1, "Unexpected ValueError; set MACKO_DEBUG=1"),
        (KeyboardInterrupt(), 130, "Interrupted"),
    ]
    for error, code, words in cases:

        @plain_errors
        def command(error: BaseException = error) -> None:
            raise error

        with pytest.raises(typer.Exit) as caught:
            command()
        assert caught.value.exit_code == code
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"macko: {words}")
        assert_plain(err.removesuffix("\n"))


def test_the_traceback_is_there_for_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACKO_DEBUG", "1")
    assert isinstance(CliRunner().invoke(app, ["prune", "dense", "-o", "x", "--sparsity", "2"]).exception, UsageError)
    monkeypatch.setenv("MACKO_DEBUG", "0")
    assert "outside [0, 1)" in macko("prune", "dense", "-o", "x", "--sparsity", 2, exit_code=2).stderr


def test_json_has_no_infinity(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"perplexity": float("inf"), "layers": {"one": float("nan")}, "text": "é"})
    assert json.loads(capsys.readouterr().out) == {"perplexity": None, "layers": {"one": None}, "text": "é"}


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (2_500_000, "2.50 MB"), (7 * 10**9, "7.00 GB")]
)
def test_megabytes(count: int, text: str) -> None:
    assert megabytes(count) == text
