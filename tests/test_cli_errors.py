"""Every error that a user can run into: one sentence on stderr, the right exit code, and nothing left behind."""

import errno
import json
import re
import shutil
import socket
import warnings
from pathlib import Path

import pytest
import torch
from families import SENTENCES, VOCABULARY, save_model
from helpers import assert_plain, copy_model, edit_config, edit_weights, quiet_transformers, truncate, weights
from safetensors.torch import save_file
from transformers import GPT2Config, MixtralConfig, T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner

from macko_llm.cli.console import plain_errors
from macko_llm.cli.main import app
from macko_llm.errors import MackoWarning
from macko_llm.packing import pack_checkpoint
from macko_llm.pruning import prune_checkpoint
from macko_llm.recipe import PruneRecipe

PROGRESS_LINE = re.compile(r".+: \d+/\d+")
UP = "model.layers.1.mlp.up_proj"
WRONG_CALL, FAILED_JOB = 2, 1


def _with_weight(folder: Path, name: str, value: float) -> None:
    weight = weights(folder)[name]
    weight.view(-1)[5] = value
    edit_weights(folder, {name: weight})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, whole and damaged, and texts, under the names that the calls below use."""
    folder = tmp_path_factory.mktemp("models")
    dense = save_model(folder / "dense", "llama", torch.float16)
    prune_checkpoint(dense, folder / "pruned", PruneRecipe(method="magnitude"), device="cpu")
    pack_checkpoint(folder / "pruned", folder / "packed")

    _with_weight(copy_model(folder / "dense", folder / "nan"), f"{UP}.weight", float("nan"))
    _with_weight(copy_model(folder / "dense", folder / "inf"), "model.norm.weight", float("inf"))
    hot = copy_model(folder / "dense", folder / "hot")  # finite weights that make activations overflow
    edit_weights(hot, {f"{UP}.weight": torch.full((160, 64), 6e4, dtype=torch.float16)})
    large = save_model(folder / "large", "llama", torch.float32)
    _with_weight(large, f"{UP}.weight", 1e6)
    for model in ("dense", "packed"):
        truncate(copy_model(folder / model, folder / f"cut-{model}") / "model.safetensors")
    edit_weights(copy_model(folder / "packed", folder / "bad"), {f"{UP}.weight_values": None})
    edit_weights(copy_model(folder / "dense", folder / "incomplete"), {f"{UP}.weight": None})
    no_weights = copy_model(folder / "dense", folder / "no-weights")
    (no_weights / "model.safetensors").unlink()
    no_tokenizer = copy_model(folder / "dense", folder / "no-tokenizer")
    for file in no_tokenizer.glob("tokenizer*"):
        file.unlink()
    tiny = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2).save_pretrained(folder / "gpt2")
    MixtralConfig(**tiny, num_key_value_heads=2, intermediate_size=16).save_pretrained(folder / "mixtral")
    t5 = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(t5).save_pretrained(folder / "t5")
    copy_model(folder / "dense", folder / "gptq", quantization_config={"quant_method": "gptq", "bits": 4})

    (folder / "text.txt").write_text(" ".join(SENTENCES * 4))
    (folder / "short.txt").write_text("Too short.")
    (folder / "empty.txt").write_text("")
    (folder / "text.pdf").write_text("%PDF")
    (folder / "broken.jsonl").write_text('{"text": 1}')
    (folder / "dataset" / "data").mkdir(parents=True)
    (folder / "dataset" / "data" / "train.jsonl").write_text('{"body": "A fox.", "id": 1}')
    save_file({"words": torch.zeros(2, 2)}, folder / "words.safetensors")
    (folder / "thesis").mkdir()
    (folder / "thesis" / "chapter.tex").touch()
    return folder


WANDA = "--calibration text.txt --nsamples 2 --seqlen 16"


@pytest.mark.parametrize(
    ("call", "exit_code", "words"),
    [
        # No such model, or not one that will do.
        ("prune nowhere -o out", FAILED_JOB, "no model nowhere; name an existing folder"),
        ("pack nowhere -o out", FAILED_JOB, "no model nowhere"),
        ("unpack nowhere -o out", FAILED_JOB, "no model nowhere"),
        ("inspect nowhere", FAILED_JOB, "no model nowhere"),
        ("generate nowhere --prompt Hi", FAILED_JOB, "no model nowhere"),
        ("eval-perplexity nowhere --dataset text.txt", FAILED_JOB, "no model nowhere"),
        ("generate thesis --prompt Hi", FAILED_JOB, r"thesis has no config\.json"),
        (f"prune t5 -o out {WANDA}", FAILED_JOB, "T5ForConditionalGeneration, which is not a causal language model"),
        ("generate t5 --prompt Hi", FAILED_JOB, "tokenizer|not a causal language model"),
        (f"prune gpt2 -o out {WANDA}", FAILED_JOB, "Conv1D layer, as in GPT-2"),
        (f"prune mixtral -o out {WANDA}", FAILED_JOB, "several experts"),
        ("generate ~nobody-here/model --prompt Hi", FAILED_JOB, "no model ~nobody-here/model"),
        ("generate no-weights --prompt Hi --max-new-tokens 2", FAILED_JOB, "no safetensors weights"),
        ("pack no-weights -o out", FAILED_JOB, "no safetensors weights"),
        (f"prune no-tokenizer -o out {WANDA}", FAILED_JOB, "no-tokenizer has no tokenizer"),
        ("generate no-tokenizer --prompt Hi", FAILED_JOB, "no-tokenizer has no tokenizer"),
        ("eval-perplexity incomplete --dataset text.txt", FAILED_JOB, f"lacks 1 of the model's weights, {UP}"),
        ("pack incomplete -o out", FAILED_JOB, f"no tensor {UP}.weight"),
        # Packed where dense is needed, and the other way round.
        ("prune packed -o out", WRONG_CALL, "packed is packed; unpack it first"),
        ("pack packed -o out", WRONG_CALL, "packed is packed; give"),
        ("unpack pruned -o out", WRONG_CALL, "pruned is not packed"),
        ("inspect pruned", WRONG_CALL, "pruned is not packed"),
        ("prune gptq -o out", WRONG_CALL, "quantized with gptq"),
        ("pack gptq -o out", WRONG_CALL, "quantized with gptq"),
        # Settings.
        ("prune dense -o out --sparsity 1", WRONG_CALL, r"sparsity 1\.0 is outside \[0, 1\)"),
        ("prune dense -o out --sparsity -0.1", WRONG_CALL, r"sparsity -0\.1 is outside"),
        ("prune dense -o out --sparsity nan", WRONG_CALL, "sparsity nan is outside"),
        ("prune dense -o out --sparsity half", WRONG_CALL, "Invalid value for '--sparsity'"),
        ("prune dense -o out --method best", WRONG_CALL, "no pruning method 'best'"),
        ("prune dense -o out --pattern 4:2", WRONG_CALL, "no pattern '4:2'"),
        ("prune dense -o out --pattern 2:4 --sparsity 0.6", WRONG_CALL, "fixes the sparsity to 0.5"),
        ("prune dense -o out --nsamples 0", WRONG_CALL, "nsamples is 0"),
        ("prune dense -o out --calibration text.txt --seqlen 65", WRONG_CALL, "at most 64 tokens"),
        ("prune dense -o out --dtype int8", WRONG_CALL, "dtype int8 is not supported"),
        (f"prune dense -o out {WANDA} --device tpu", WRONG_CALL, "device 'tpu' is not available"),
        ("prune dense -o out --recipe nowhere.toml", WRONG_CALL, r"recipe nowhere\.toml cannot be read"),
        ("pack pruned -o out --dtype float32", WRONG_CALL, "float32 cannot be packed"),
        ("pack pruned -o out --max-shard-size big", WRONG_CALL, "'big' is not a size"),
        ("generate packed --prompt Hi --max-new-tokens 0", WRONG_CALL, "--max-new-tokens 1 or more"),
        ("generate packed --prompt Hi --max-new-tokens 99", WRONG_CALL, "more than the model's 64 positions"),
        ("generate packed --prompt Hi --temperature -1", WRONG_CALL, "temperature -1"),
        (
            "generate packed --prompt Hi --layout tiled --device cpu",
            WRONG_CALL,
            "an NVIDIA GPU's, and this runs on cpu",
        ),
        ("generate packed --prompt Hi --top-k 5", WRONG_CALL, "add --temperature"),
        ("generate packed --prompt Hi --min-p 0.1", WRONG_CALL, "add --temperature"),
        ("generate packed --prompt Hi --temperature 1 --min-p 2", WRONG_CALL, r"min-p 2\.0 is not a share"),
        ("generate packed --prompt Hi --repetition-penalty 0", WRONG_CALL, r"repetition penalty 0\.0 is not possible"),
        ("generate packed --prompt Hi --system-prompt Ho", WRONG_CALL, "add --chat"),
        ("generate packed --prompt Hi --chat", WRONG_CALL, "no chat template"),
        ("eval-perplexity packed --dataset text.txt --limit 0", WRONG_CALL, "--limit 1 or more"),
        ("eval-perplexity packed --dataset text.txt --stride 0", WRONG_CALL, "stride"),
        ("eval-perplexity packed --dataset text.txt --seqlen 65", WRONG_CALL, "at most 64 tokens; use a seqlen of 64"),
        ("eval-perplexity packed --dataset text.txt --split test", WRONG_CALL, "no splits; leave the split out"),
        ("eval-perplexity packed --dataset c4 --split test", WRONG_CALL, "c4 is read by its published rule"),
        ("prune dense -o out --calibration text.txt --split train", WRONG_CALL, "no splits; leave the split out"),
        ("prune dense -o out --calibration text.txt --text-column body", WRONG_CALL, "has no columns"),
        # Calls that the parser refuses.
        ("prune dense", WRONG_CALL, "Missing option '--output' / '-o'; see `macko prune --help`"),
        ("generate packed", WRONG_CALL, "no prompt; give --prompt TEXT"),
        ("generate packed -f nowhere.txt", WRONG_CALL, r"prompt file nowhere\.txt cannot be read \(No such file"),
        ("generate packed -f thesis", WRONG_CALL, r"prompt file thesis cannot be read \(Is a directory"),
        ("prune dense -o out --sparsty 0.5", WRONG_CALL, "No such option: --sparsty"),
        ("prun dense -o out", WRONG_CALL, "No such command 'prun'"),
        ("bench", WRONG_CALL, "Missing command"),
        # Outputs.
        ("prune dense -o thesis", WRONG_CALL, "thesis is not empty; choose another or add --overwrite"),
        ("prune dense -o thesis --overwrite", WRONG_CALL, "is not a model folder, so it is kept"),
        ("prune dense -o text.txt", WRONG_CALL, r"text\.txt is a file"),
        ("prune dense -o dense --overwrite", WRONG_CALL, "holds the input model"),
        ("pack pruned -o packed", WRONG_CALL, "packed is not empty"),
        ("unpack packed -o pruned", WRONG_CALL, "pruned is not empty"),
        ("prune dense -o text.txt/out --method magnitude", WRONG_CALL, "text.txt is a file; choose another folder"),
        # Texts.
        (
            "prune dense -o out --calibration short.txt --seqlen 32",
            FAILED_JOB,
            r"too few for sequences of 32; give longer",
        ),
        ("prune dense -o out --calibration nowhere.txt", FAILED_JOB, r"no text or dataset nowhere\.txt"),
        ("prune dense -o out --calibration empty.txt", FAILED_JOB, "holds no text"),
        ("prune dense -o out --calibration text.pdf", FAILED_JOB, "not text that can be read"),
        ("prune dense -o out --calibration broken.jsonl", FAILED_JOB, r'"text" of broken\.jsonl, line 1, is not text'),
        (
            "prune dense -o out --calibration broken.jsonl --text-column body",
            FAILED_JOB,
            r'broken\.jsonl, line 1, has no field "body"; set the text column to one of text',
        ),
        ("prune dense -o out --calibration dataset --split all", FAILED_JOB, "no split all; .* one of train"),
        ("prune dense -o out --calibration dataset", FAILED_JOB, 'no column "text"; .* one of body, id'),
        ("prune dense -o out --calibration dataset --text-column id", FAILED_JOB, '"id" of dataset is not text'),
        ("eval-perplexity packed --dataset dataset", FAILED_JOB, "no split test; .* one of train"),
        ("eval-perplexity packed --dataset dataset --split train --text-column id", FAILED_JOB, "is not text"),
        ("prune dense -o out --calibration words.safetensors", FAILED_JOB, 'has no tensor "tokens"'),
        ("eval-perplexity packed --dataset short.txt", FAILED_JOB, "tokens"),
        ("eval-perplexity packed --dataset nowhere.txt", FAILED_JOB, r"no text or dataset nowhere\.txt"),
        # Numbers.
        (f"prune nan -o out {WANDA}", FAILED_JOB, f"weights of {UP} hold NaN or infinity"),
        ("prune nan -o out --method magnitude", FAILED_JOB, f"weights of {UP} hold NaN or infinity"),
        (f"prune hot -o out {WANDA}", FAILED_JOB, r"inputs of model\.layers\.1\.mlp\.down_proj hold NaN or infinity"),
        ("pack nan -o out", FAILED_JOB, rf"{UP}\.weight holds NaN or infinity"),
        ("pack inf -o out", FAILED_JOB, r"model\.norm\.weight holds NaN or infinity"),
        (
            "pack large -o out",
            FAILED_JOB,
            rf"{UP}\.weight holds 1e\+06, which overflows float16; pack with --dtype bfloat16",
        ),
        ("eval-perplexity nan --dataset text.txt", FAILED_JOB, "loss of window 1 is nan"),
        ("generate nan --prompt Hi --max-new-tokens 2", FAILED_JOB, "logits of new token 0 are NaN or infinite"),
        # Damage.
        (f"prune cut-dense -o out {WANDA}", FAILED_JOB, "corrupt or truncated"),
        ("pack cut-dense -o out", FAILED_JOB, r"cut-dense/model\.safetensors is corrupt or truncated"),
        ("generate cut-dense --prompt Hi --max-new-tokens 2", FAILED_JOB, "corrupt or truncated"),
        ("generate cut-packed --prompt Hi --max-new-tokens 2", FAILED_JOB, "corrupt or truncated"),
        ("eval-perplexity cut-packed --dataset text.txt", FAILED_JOB, "corrupt or truncated"),
        ("inspect cut-packed", FAILED_JOB, "corrupt or truncated"),
        ("unpack cut-packed -o out", FAILED_JOB, "corrupt or truncated"),
        ("inspect bad", FAILED_JOB, f"lacks an array of {UP}"),
        # A file where a folder is meant, and what is missing.
        (
            "generate dense/model.safetensors --prompt Hi",
            FAILED_JOB,
            "is a file; name the folder that holds it, /.*dense",
        ),
        ("inspect packed/config.json", FAILED_JOB, "is a file; name the folder that holds it, /.*packed"),
        ("generate bad --prompt Hi --max-new-tokens 2", FAILED_JOB, f"lacks an array of {UP}"),
    ],
)
def test_an_error(call: str, exit_code: int, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    with quiet_transformers():
        result = CliRunner().invoke(app, call.split())
    assert result.exit_code == exit_code, result.output
    assert result.stdout.strip() == ""
    *progress, sentence = result.stderr.splitlines()
    for line in progress:
        assert PROGRESS_LINE.fullmatch(line), line
    assert sentence.startswith("macko: ")
    assert_plain(sentence)
    assert re.search(words, sentence), sentence
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("generate MODEL --prompt Hi --max-new-tokens 0", "--max-new-tokens 1 or more"),
        ("generate MODEL --prompt Hi --max-new-tokens 1000", "more than the model's 64 positions"),
        ("eval-perplexity MODEL --dataset text.txt --limit 0", "--limit 1 or more"),
        ("eval-perplexity MODEL --dataset text.txt --seqlen 1", "--seqlen 2 or more"),
        ("eval-perplexity MODEL --dataset text.txt --seqlen 8 --stride 9", "--stride from 1 to 8"),
        ("eval-perplexity MODEL --dataset text.txt --seqlen 65", "at most 64 tokens"),
        ("eval-perplexity MODEL --dataset text.txt --batch-size 0", "--batch-size 1 or more"),
        ("bench quality MODEL --dataset text.txt --calibration text.txt --seqlen 65", "at most 64 tokens"),
        ("bench quality MODEL --dataset text.txt --calibration c4 --calibration-split train", "c4 is read by its"),
        ("bench quality MODEL --dataset text.txt --calibration c4 --dataset-column body", r"text\.txt has no columns"),
        ("bench quality MODEL --dataset text.txt --calibration text.txt --sparsity 1.5", r"sparsity 1\.5 is outside"),
        ("bench quality MODEL --dataset text.txt --calibration text.txt --limit 0", "--limit 1 or more"),
    ],
)
def test_a_wrong_setting_is_refused_before_weights_are_read(
    call: str, words: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's weights cannot be read at all, and nobody notices."""
    monkeypatch.chdir(folder)
    model = shutil.copytree(folder / "dense", tmp_path / "model")
    for file in model.glob("*.safetensors"):
        file.write_bytes(b"no weights")
    with quiet_transformers():
        result = CliRunner().invoke(app, call.replace("MODEL", str(model)).split())
    assert result.exit_code == WRONG_CALL, result.output
    assert re.search(words, result.stderr.splitlines()[-1]), result.stderr


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("eval-perplexity owner/model --limit 0", "--limit 1 or more"),
        ("eval-perplexity owner/model --seqlen 1", "--seqlen 2 or more"),
        ("eval-perplexity owner/model --seqlen 8 --stride 9", "--stride from 1 to 8"),
        ("eval-perplexity owner/model --batch-size 0", "--batch-size 1 or more"),
        ("eval-perplexity owner/model --split train", "wikitext2 is read by its published rule"),
        ("eval-perplexity packed --seqlen 65", "at most 64 tokens"),  # before WikiText-2 is fetched
        ("prune owner/model -o out --split train", "c4 is read by its published rule"),
        ("prune dense -o out --seqlen 65", "at most 64 tokens"),  # before C4 is fetched
        ("bench quality owner/model --limit 0", "--limit 1 or more"),
        ("bench quality owner/model --dataset-split train", "wikitext2 is read by its published rule"),
        ("bench quality dense --seqlen 65", "at most 64 tokens"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_fetched(
    call: str, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub cannot be reached, and nobody notices."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was asked"))
    with quiet_transformers():
        result = CliRunner().invoke(app, call.split())
    assert result.exit_code == WRONG_CALL, result.output
    assert re.search(words, result.stderr.splitlines()[-1]), result.stderr


def test_our_warnings_are_sentences_and_those_of_libraries_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    @plain_errors
    def command() -> None:
        warnings.warn("It could be faster.", MackoWarning, stacklevel=1)
        warnings.warn("an old name", FutureWarning, stacklevel=1)
        warnings.warn("It could be faster.", MackoWarning, stacklevel=1)

    command()
    assert capsys.readouterr().err == "macko: It could be faster.\n" * 2


SENSELESS = {
    "num_hidden_layers": [-1, 0, "two"],
    "vocab_size": [0, -1],
    "hidden_size": [0, 100],
    "intermediate_size": [0, -3],
    "head_dim": [0],
    "num_attention_heads": [0, 7],
    "num_key_value_heads": [0],
    "hidden_act": ["nothing"],
    "dtype": [7, "float7", [1]],
    "architectures": [[3]],
    "text_config": [5],
    "pad_token_id": [10**6],
    "transformers_weights": [5],
    "rope_parameters": ["x"],
    "model_type": ["nothing", 3],
}


@pytest.mark.parametrize(("setting", "value"), [(name, value) for name in SENSELESS for value in SENSELESS[name]])
@pytest.mark.parametrize("model", ["dense", "packed"])
def test_a_config_that_makes_no_sense_is_named(
    setting: str, value: object, model: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By every command that reads it, and never as a fault of macko's or of the tokenizer's."""
    broken = copy_model(folder / model, tmp_path / "broken")
    edit_config(broken, **{setting: value})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("Once upon a time there was a fox. " * 20)
    calls = ["generate broken --prompt Hi -n 2", "eval-perplexity broken --dataset text.txt --seqlen 16 --limit 1"]
    if model == "dense":
        calls += ["prune broken -o out --calibration text.txt --nsamples 1 --seqlen 8", "pack broken -o out"]
    else:
        calls += ["inspect broken", "unpack broken -o out"]
    for call in calls:
        with quiet_transformers():
            result = CliRunner().invoke(app, call.split())
        assert result.exit_code == FAILED_JOB, (call, result.output)
        sentence = result.stderr.splitlines()[-1]
        assert_plain(sentence.removeprefix("macko: "))
        assert "Unexpected" not in sentence, call
        assert "tokenizer" not in sentence, call
        assert "meta" not in sentence, call
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", r"index\.json cannot be read as JSON"),
        ("[]", r"index\.json does not hold a JSON object"),
        ("{}", "lacks its shards"),
        ('{"weight_map": [1]}', "lacks its shards"),
        ('{"metadata": {}, "weight_map": {"a": "gone.safetensors"}}', r"lacks gone\.safetensors"),
    ],
)
def test_an_index_that_makes_no_sense_is_named(
    content: str, words: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = copy_model(folder / "packed", tmp_path / "broken")
    (broken / "model.safetensors").rename(broken / "model-00001-of-00001.safetensors")
    (broken / "model.safetensors.index.json").write_text(content)
    monkeypatch.chdir(tmp_path)
    for call in ("generate broken --prompt Hi -n 2", "inspect broken", "unpack broken -o out"):
        assert re.search(words, _refusal(call)), call


NO_VOCABULARY = r"The tokenizer of broken has no vocabulary \(such as tokenizer\.json or tokenizer\.model\); copy"


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tokenizer.json", "", r"^broken/tokenizer\.json cannot be read as JSON"),
        ("tokenizer.json", "[1]", r"^broken/tokenizer\.json does not hold a JSON object"),
        ("tokenizer.json", '{"added_tokens": [], "model": {"type": "BPE"}}', "has no usable tokenizer"),
        ("tokenizer_config.json", "null", r"^broken/tokenizer_config\.json does not hold a JSON object"),
        ("tokenizer.json", None, NO_VOCABULARY),
    ],
)
def test_a_damaged_tokenizer_is_named(
    file: str, content: str | None, words: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = copy_model(folder / "packed", tmp_path / "broken")
    (broken / file).unlink()
    if content is not None:
        (broken / file).write_text(content)
    monkeypatch.chdir(tmp_path)
    assert re.search(words, _refusal("generate broken --prompt Hi -n 2"))


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "PreTrainedTokenizerFast", None])
def test_a_tokenizer_without_a_vocabulary_is_none(
    kind: str | None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some classes of transformers make an empty tokenizer of no files, others complain at length."""
    broken = copy_model(folder / "packed", tmp_path / "broken")
    (broken / "tokenizer.json").unlink()
    (broken / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind} if kind else {}))
    monkeypatch.chdir(tmp_path)
    assert re.search(NO_VOCABULARY, _refusal("generate broken --prompt Hi -n 2"))


def _refusal(call: str) -> str:
    """The sentence with which a job fails."""
    with quiet_transformers():
        result = CliRunner().invoke(app, call.split())
    assert result.exit_code == FAILED_JOB, (call, result.output)
    sentence = result.stderr.splitlines()[-1].removeprefix("macko: ")
    assert_plain(sentence)
    assert "Unexpected" not in sentence, call
    return sentence


def test_inspect_says_what_it_looked_at(folder: Path, tmp_path: Path) -> None:
    packed = copy_model(folder / "packed", tmp_path / "packed")
    said = CliRunner().invoke(app, ["inspect", str(packed)]).stdout
    assert "Every packed matrix is valid, every other tensor finite, and the files hold the whole model." in said
    assert "no tokenizer" not in said
    for file in packed.glob("tokenizer*"):
        file.unlink()
    assert "There is no tokenizer, which `macko generate`" in CliRunner().invoke(app, ["inspect", str(packed)]).stdout


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_inspect_looks_at_what_is_not_packed(name: str, value: float, folder: Path, tmp_path: Path) -> None:
    packed = copy_model(folder / "packed", tmp_path / "packed")
    _with_weight(packed, name, value)
    assert _refusal(f"inspect {packed}").startswith(f"{name} holds NaN or infinity; pack the model again")


def test_a_file_that_cannot_be_used_is_named_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("macko_llm.refusals.find_model", lambda _: (tmp_path / "gone").read_text())
    result = CliRunner().invoke(app, ["generate", "model", "--prompt", "Hi"])
    assert result.exit_code == FAILED_JOB
    assert f"{tmp_path / 'gone'} cannot be used (No such file or directory); check the path" in result.stderr


def test_an_error_of_the_system_without_a_file_is_given_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("macko_llm.refusals.find_model", fail)
    assert _refusal("generate model --prompt Hi").startswith("A file cannot be used (Input/output error); check")


def test_an_output_folder_of_a_user_who_is_none_is_a_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is to a shell."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["pack", str(folder / "pruned"), "--output=~nobody-here"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "~nobody-here" / "config.json").is_file()
