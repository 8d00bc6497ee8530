"""`macko eval-perplexity`: what it reports, beside a reference, of a text and of datasets."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from cli_helpers import macko, macko_json, write_models_and_texts
from datasets import Dataset
from families import MAX_POSITIONS, SENTENCES
from helpers import assert_plain, copy_model, quiet_transformers
from transformers import AutoTokenizer

from macko_llm.benchmarks import quality
from macko_llm.recipe import PruneRecipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models_and_texts(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def _in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(folder)
    with quiet_transformers():
        yield


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
