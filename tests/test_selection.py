"""Which layers a recipe prunes: patterns of names, what they leave alone, and patterns that mean nothing."""

from pathlib import Path

import pytest
import torch
from families import SENTENCES, random_tokens, save_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from macko_llm.errors import UsageError
from macko_llm.pruning import plan, prune_checkpoint
from macko_llm.pruning.pipeline import prune_model
from macko_llm.pruning.selection import fits
from macko_llm.recipe import PruneRecipe, load_recipe, to_toml

LAYERS = 2
ATTENTION = [f"self_attn.{part}_proj" for part in "qkvo"]
MLP = [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
ALL = {f"model.layers.{index}.{part}" for index in range(LAYERS) for part in ATTENTION + MLP}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama", "llama")


def _load(llama: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(llama)


@pytest.mark.parametrize(
    ("pattern", "name", "does"),
    [
        ("down_proj", "model.layers.0.mlp.down_proj", True),
        ("mlp.down_proj", "model.layers.0.mlp.down_proj", True),
        ("model.layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj", True),
        ("down", "model.layers.0.mlp.down_proj", False),
        ("proj", "model.layers.0.mlp.down_proj", False),
        ("layers.1.*", "model.layers.1.mlp.down_proj", True),
        ("layers.1.*", "model.layers.11.mlp.down_proj", False),
        ("layers.[01].*", "model.layers.1.mlp.up_proj", True),
        ("*", "lm_head", True),
        ("Down_proj", "model.layers.0.mlp.down_proj", False),
        ("re:.*(gate|up)_proj$", "model.layers.3.mlp.gate_proj", True),
        ("re:down_proj", "model.layers.0.mlp.down_proj", False),  # a regular expression begins where the name begins
        (r"re:model\.layers\.[0-3]\.", "model.layers.3.mlp.gate_proj", True),
    ],
)
def test_what_a_pattern_means(pattern: str, name: str, does: bool) -> None:
    assert fits(pattern, name) is does


@pytest.mark.parametrize(
    ("targets", "ignore", "left"),
    [
        ((), (), ALL),
        (("down_proj",), (), {name for name in ALL if name.endswith("down_proj")}),
        ((), ("down_proj", "model.layers.0.*"), {f"model.layers.1.{part}" for part in ATTENTION + MLP[:2]}),
        (
            ("re:.*mlp",),
            ("up_proj",),
            {f"model.layers.{i}.mlp.{part}_proj" for i in (0, 1) for part in ("gate", "down")},
        ),
        ((), ("lm_head",), ALL),
    ],
)
@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_only_the_chosen_layers_are_pruned(
    llama: Path, method: str, targets: tuple[str, ...], ignore: tuple[str, ...], left: set[str]
) -> None:
    before, model = _load(llama).state_dict(), _load(llama)
    recipe = PruneRecipe(method=method, targets=targets, ignore=ignore)
    report = prune_model(model, random_tokens(4, 16), recipe)
    assert set(report.layers) == left
    assert report.sparsity == pytest.approx(0.5)
    for name, weight in model.state_dict().items():
        if name.removesuffix(".weight") in left:
            assert (weight == 0).float().mean() == 0.5, name
        else:
            assert torch.equal(weight, before[name]), name


def test_a_weight_that_an_ignored_layer_shares_is_left_alone(llama: Path) -> None:
    model = _load(llama)
    first, second = (model.model.layers[index].mlp.down_proj for index in (0, 1))
    second.weight = first.weight
    report = prune_model(model, None, PruneRecipe(method="magnitude", ignore=("layers.0.mlp.down_proj",)))
    assert set(report.layers) == {name for name in ALL if not name.endswith("down_proj")}
    assert first.weight.count_nonzero() == first.weight.numel()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"targets": ("donw_proj",)},
            "targets has 'donw_proj', which fits no layer; write names such as model.layers.0.",
        ),
        ({"ignore": ("q_proj", "re:nothing")}, "ignore has 're:nothing', which fits no layer"),
        ({"targets": ("lm_head",)}, "targets has 'lm_head', which fits no layer"),
        ({"ignore": ("*",)}, "leaves every layer alone"),
        ({"targets": ("q_proj",), "ignore": ("self_attn.*",)}, "leaves every layer alone"),
    ],
)
def test_patterns_that_mean_nothing_are_refused_before_weights_are_read(
    llama: Path, tmp_path: Path, settings: dict[str, tuple[str, ...]], words: str
) -> None:
    with pytest.raises(UsageError) as refused:
        plan(llama, tmp_path / "out", PruneRecipe(method="magnitude", **settings))
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"targets": ("",)}, "name of a layer is empty"),
        ({"ignore": ("re:(",)}, "is no regular expression"),
        ({"ignore": "q_proj"}, "must be a list of layer names"),
        ({"targets": [1]}, "must be a list of layer names"),
    ],
)
def test_patterns_that_make_no_sense(settings: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        PruneRecipe(**settings)


def test_a_pattern_of_columns_is_asked_only_of_the_chosen_layers(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "qwen2", "qwen2")  # its down projections have 172 columns
    with pytest.raises(UsageError, match="172 columns"):
        plan(folder, tmp_path / "out", PruneRecipe(method="magnitude", pattern="4:8"))
    planned = plan(folder, tmp_path / "out", PruneRecipe(method="magnitude", pattern="4:8", ignore=("down_proj",)))
    assert not any(name.endswith("down_proj") for name in planned.layers)


def test_the_choice_stands_in_macko_json_and_in_recipes(llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(SENTENCES * 4), encoding="utf-8")
    recipe = PruneRecipe(calibration=str(text), nsamples=2, seqlen=16, targets=("mlp.*",), ignore=("re:.*\\.up",))
    file = tmp_path / "recipe.toml"
    file.write_text(to_toml(recipe), encoding="utf-8")
    assert PruneRecipe(**load_recipe(file)) == recipe
    prune_checkpoint(llama, tmp_path / "out", recipe, device="cpu")
    made = (tmp_path / "out" / "macko.json").read_text(encoding="utf-8")
    assert '"mlp.*"' in made
    assert '"re:.*\\\\.up"' in made
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all((weights[f"model.layers.{index}.mlp.up_proj.weight"] != 0).all() for index in range(LAYERS))
