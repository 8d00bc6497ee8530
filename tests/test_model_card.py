"""The card of a packed checkpoint: what the hub reads of it, and that its commands and its Python do what they say."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import SENTENCES, save_model
from helpers import quiet_transformers, weights
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from macko_llm import checkpoint
from macko_llm.cli.main import app
from macko_llm.model_card import model_card
from macko_llm.packing import pack_checkpoint
from macko_llm.pruning import prune_checkpoint
from macko_llm.recipe import PruneRecipe


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_transformers():
        yield


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A packed folder whose recipe says much, with the current folder beside it."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(" ".join(SENTENCES * 4))
    recipe = PruneRecipe(
        method="sparsegpt",
        calibration="text.txt",
        nsamples=3,
        seqlen=24,
        seed=5,
        sparsity=0.6,
        layers=(("layers.0.*", 0.4),),
    )
    prune_checkpoint(save_model(Path("model"), "llama", torch.float32), Path("first"), recipe, device="cpu")
    pack_checkpoint(Path("first"), tmp_path / "made", dtype="bfloat16")
    return tmp_path / "made"


def _blocks(folder: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (folder / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_its_commands_make_the_checkpoint_again(packed: Path) -> None:
    (recipe,) = _blocks(packed, "toml")
    Path("recipe.toml").write_text(recipe)
    install, made = _blocks(packed, "sh")
    assert install == "pip install .\n"
    commands = made.splitlines()
    assert commands == [
        "macko prune model -o pruned --recipe recipe.toml",
        "macko pack pruned -o packed --dtype bfloat16",
    ]
    for command in commands:
        result = CliRunner().invoke(app, command.split()[1:])
        assert result.exit_code == 0, result.output
    first, again = weights(packed), weights(Path("packed"))
    assert list(first) == list(again)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert (packed / "README.md").read_bytes() == Path("packed/README.md").read_bytes()


def test_its_python_runs(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = _blocks(packed, "python")
    exec(code.replace("PATH", str(packed)), {})
    assert capsys.readouterr().out.removeprefix("<s>").startswith("Once upon a time")


def _card(**provenance: object) -> ModelCard:
    pack = {"value_dtype": "float16", "sparsity": 0.5, "bytes_dense": 2_000_000, "bytes_packed": 1_250_000}
    return ModelCard(model_card({**provenance, "pack": pack}))


@pytest.mark.parametrize("name", ["owner/name", "owner/name@v1.0"])
def test_the_hub_reads_where_a_model_comes_from(name: str) -> None:
    card = _card(prune={"method": "wanda", "sparsity": 0.5, "model": name, "layers": {"a": 0.5}})
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "owner/name",
        "tags": ["macko", "pruned", "sparse"],
    }
    assert f"macko prune {name} -o pruned --recipe recipe.toml\n" in card.text
    assert 'method = "wanda"\n' in card.text
    assert "; the model takes\n1.2 MB instead of 2.0 MB" in card.text


def test_what_is_not_known_is_not_told(packed: Path) -> None:
    assert "base_model" not in ModelCard.load(packed / "README.md").data.to_dict()  # of a folder on this machine
    unknown = _card()
    assert "base_model" not in unknown.data.to_dict()
    assert "```sh\nmacko pack MODEL -o packed --dtype float16\n```\n" in unknown.text
    assert "toml" not in unknown.text
    newer = _card(prune={"method": "a method of tomorrow", "model": "owner/name"})
    assert "macko prune owner/name -o pruned\n" in newer.text
    assert "toml" not in newer.text


def test_a_tuned_model_says_so() -> None:
    runs = [{"dataset": "c4", "steps": 10}, {"dataset": "my texts.jsonl", "steps": 5}]
    text = _card(prune={"method": "magnitude", "model": "a"}, tune=runs[:1]).text
    assert "macko tune pruned -o tuned --dataset c4\nmacko pack tuned -o packed --dtype float16\n" in text
    text = _card(prune={"method": "magnitude", "model": "a"}, tune=runs).text
    assert "macko tune tuned -o tuned-2 --dataset 'my texts.jsonl'\nmacko pack tuned-2 -o packed" in text


def test_pack_writes_it_beside_macko_json(packed: Path) -> None:
    record = checkpoint.read_provenance(packed)
    said = f"{record['pack']['sparsity']:.0%} of the weights"
    assert said in (packed / "README.md").read_text()
