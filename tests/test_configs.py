"""The recipes in configs/: what their names and comments say is what they do, and the documents tell of them."""

import re
from pathlib import Path

import pytest

from macko_llm.recipe import NO_UPDATE, UNIFORM, PruneRecipe, load_recipe, make_recipe

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").iterdir())
MODELS = {
    "llama2-7b": ("Llama-2-7B", "meta-llama/Llama-2-7b-hf"),
    "llama2-13b": ("Llama-2-13B", "meta-llama/Llama-2-13b-hf"),
    "llama2-70b": ("Llama-2-70B", "meta-llama/Llama-2-70b-hf"),
    "llama3.1-8b": ("Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
    "mistral-7b": ("Mistral-7B", "mistralai/Mistral-7B-v0.3"),
    "qwen3-8b": ("Qwen3-8B", "Qwen/Qwen3-8B"),
}
"""By the beginning of a file's name, what its comment and the README call the model, and where the hub has it."""


def parts(file: Path) -> tuple[str, str, int]:
    """Model, method and percent of a file's name."""
    match = re.fullmatch(r"([^-]+-\d+b)-(.+)-(\d\d)\.toml", file.name)
    assert match is not None, file.name
    return match[1], match[2], int(match[3])


def comment(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def test_every_model_has_a_recipe_at_each_sparsity() -> None:
    found = [(model, percent) for model, _, percent in map(parts, FILES)]
    assert sorted(found) == sorted((model, percent) for model in MODELS for percent in (50, 60, 70))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_recipe_does_what_its_name_says(file: Path) -> None:
    _, method, percent = parts(file)
    recipe = make_recipe(load_recipe(file), {})
    steps = [recipe.method, *({recipe.update} - {NO_UPDATE}), *({recipe.allocation} - {UNIFORM})]
    assert method == "-".join(steps)
    assert recipe.sparsity == percent / 100
    # The calibration of the papers, at the model's own context or what they cut it to.
    assert (recipe.calibration, recipe.nsamples, recipe.seed) == ("c4", 128, PruneRecipe.seed)
    assert recipe.seqlen in (2048, 4096)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_comment_names_the_model_the_command_and_the_source_of_its_figures(file: Path) -> None:
    model, _, percent = parts(file)
    label, repository = MODELS[model]
    text = comment(file)
    assert text.startswith(f"{label}, ")
    assert f", {percent} %. " in text
    assert text.endswith(f"macko prune {repository} -o pruned --recipe configs/{file.name}")
    known, unknown = "Published WikiText-2 perplexity" in text, "No published figure known to us" in text
    assert known != unknown
    if known or "The nearest" in text:
        assert re.search(r"arXiv \d{4}\.\d{5}", text)
    if known:
        assert re.search(r"at seqlen (4096|8192): dense \d", text)
    for other in re.findall(r"[\w.-]+\.toml", text):
        assert (ROOT / "configs" / other).exists()


def test_the_documents_tell_of_the_recipes() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    paragraph = next(part for part in readme.split("\n\n") if part.startswith("`configs/`"))
    named = re.findall(r"(?:Llama|Mistral|Qwen)[\w.-]*-\d+B", paragraph)
    assert sorted(named) == sorted(label for label, _ in MODELS.values())
    assert re.findall(r"\d\d, \d\d and \d\d %", paragraph) == ["50, 60 and 70 %"]
    for document in (readme, (ROOT / "docs" / "design.md").read_text(encoding="utf-8")):
        for name in re.findall(r"configs/([\w.-]+\.toml)", document):
            assert (ROOT / "configs" / name).exists()
