"""Recipes: defaults, precedence, validation, and TOML in and out."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from macko_llm.errors import UsageError
from macko_llm.recipe import ALLOCATIONS, METHODS, UPDATES, PruneRecipe, load_recipe, make_recipe, title, to_toml


def test_flags_override_the_file_and_the_file_overrides_defaults() -> None:
    recipe = make_recipe({"sparsity": 0.6, "nsamples": 8}, {"nsamples": 4, "sparsity": None, "seed": None})
    assert recipe == PruneRecipe(sparsity=0.6, nsamples=4)


def test_a_flag_of_zero_is_not_a_missing_flag() -> None:
    recipe = make_recipe({"seed": 3, "sparsity": 0.5}, {"seed": 0, "sparsity": 0})
    assert (recipe.seed, recipe.sparsity) == (0, 0.0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sparsity": 1.0}, r"outside \[0, 1\)"),
        ({"sparsity": -0.1}, r"outside \[0, 1\)"),
        ({"sparsity": float("nan")}, r"outside \[0, 1\)"),
        ({"sparsity": 2}, r"outside \[0, 1\)"),
        ({"sparsity": "0.5"}, "type float"),
        ({"sparsity": True}, "type float"),
        ({"method": "random"}, "wanda, magnitude"),
        ({"update": "sgd"}, "no update 'sgd'; use none or admm"),
        ({"allocation": "fair"}, "no allocation 'fair'; use uniform or owl"),
        (
            {"allocation": "owl", "pattern": "2:4"},
            "pattern 2:4 fixes the sparsity of every layer, which owl would vary",
        ),
        ({"layers": {"down_proj": 1.0}}, r"layers gives 'down_proj' the sparsity 1.0, outside \[0, 1\)"),
        ({"layers": {"down_proj": float("nan")}}, r"outside \[0, 1\)"),
        ({"layers": {"": 0.4}}, "name of a layer is empty"),
        ({"layers": {"re:(": 0.4}}, "no regular expression"),
        ({"layers": {"down_proj": "0.4"}}, "table of layer names and their sparsities"),
        ({"layers": {"down_proj": True}}, "table of layer names and their sparsities"),
        ({"layers": ["down_proj"]}, "table of layer names and their sparsities"),
        ({"layers": 0.4}, "table of layer names and their sparsities"),
        (
            {"layers": {"down_proj": 0.4}, "pattern": "2:4"},
            "pattern 2:4 fixes the sparsity of every layer, which layers",
        ),
        ({"pattern": "4:4"}, "2:4 or 4:8"),
        ({"pattern": "0:4"}, "2:4 or 4:8"),
        ({"pattern": "5:4"}, "2:4 or 4:8"),
        ({"pattern": "half"}, "2:4 or 4:8"),
        ({"pattern": "2:4\n"}, "2:4 or 4:8"),
        ({"nsamples": 0}, "at least 1 sequence"),
        ({"nsamples": 2.0}, "type int"),
        ({"seqlen": 0}, "at least 1 token"),
        ({"seqlen": "512"}, "type int"),
        ({"seed": None}, "type int"),
        ({"calibration": ""}, "calibration source is empty"),
        ({"split": ""}, "split is empty; name one"),
        ({"text_column": ""}, "text_column is empty; name one"),
        ({"split": 1}, "type str"),
        ({"chat_template": 1}, "chat_template is 1; it must be of type bool"),
        ({"chat_template": "yes"}, "type bool"),
    ],
)
def test_senseless_values_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        PruneRecipe(**settings)


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("4:8", 0.5), ("1:4", 0.25), ("3:4", 0.75)])
def test_a_pattern_fixes_the_sparsity(pattern: str, sparsity: float) -> None:
    assert PruneRecipe(pattern=pattern).sparsity == sparsity
    assert make_recipe({"pattern": pattern}, {"sparsity": sparsity}).sparsity == sparsity
    with pytest.raises(UsageError, match=f"{pattern} fixes the sparsity to {sparsity}, not 0.6"):
        PruneRecipe(pattern=pattern, sparsity=0.6)


def test_an_asked_for_default_sparsity_still_conflicts_with_a_pattern() -> None:
    with pytest.raises(UsageError, match=r"1:4 fixes the sparsity to 0.25, not 0.5"):
        make_recipe({"pattern": "1:4"}, {"sparsity": 0.5})


def test_group_of_a_pattern() -> None:
    assert PruneRecipe().group is None
    assert PruneRecipe(pattern="4:8").group == (4, 8)


def test_layers_are_a_table_whose_order_stays(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('sparsity = 0.6\n[layers]\n"*.down_proj" = 0.4\n"layers.0.*" = 0\n')
    recipe = make_recipe(load_recipe(path), {"sparsity": 0.5})
    assert recipe.layers == (("*.down_proj", 0.4), ("layers.0.*", 0.0))
    assert recipe.settings()["layers"] == {"*.down_proj": 0.4, "layers.0.*": 0.0}
    assert hash(recipe) == hash(PruneRecipe(layers=recipe.layers))
    again = PruneRecipe(layers=(("a", 0.1), ("b", 0.2), ("a", 0.3)))
    assert again.layers == (("b", 0.2), ("a", 0.3))


def test_titles_name_what_departs_from_the_method_alone() -> None:
    titles = [
        PruneRecipe(method=method, update=update, allocation=allocation).title
        for method in ("wanda", "magnitude")
        for update in UPDATES
        for allocation in ALLOCATIONS
    ]
    assert titles[:4] == ["wanda", "wanda, owl", "wanda + admm", "wanda + admm, owl"]
    assert titles[4] == "magnitude"
    assert title({}) == "an unknown method"


def test_unknown_settings_are_named_with_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("sparsitty = 0.5\n")
    with pytest.raises(UsageError, match=r"'sparsitty'.*method, sparsity, pattern"):
        load_recipe(path)
    with pytest.raises(UsageError, match=r"'density'"):
        make_recipe({}, {"density": 0.5})


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.toml cannot be read"):
        load_recipe(tmp_path / "absent.toml")
    damaged = tmp_path / "damaged.toml"
    damaged.write_text("sparsity = ")
    with pytest.raises(UsageError, match=r"damaged\.toml is not TOML"):
        load_recipe(damaged)
    damaged.write_bytes(b'calibration = "\xff"\n')
    with pytest.raises(UsageError, match=r"damaged\.toml is not TOML"):
        load_recipe(damaged)


def _is_no_regex(pattern: str) -> bool:
    return not pattern.startswith("re:")


_RECIPES = st.builds(
    PruneRecipe,
    method=st.sampled_from(METHODS),
    update=st.sampled_from(UPDATES),
    allocation=st.sampled_from(ALLOCATIONS),
    sparsity=st.floats(0, 1, exclude_max=True),
    calibration=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    targets=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(_is_no_regex)),
    ignore=st.lists(st.sampled_from(["lm_head", "re:.*down_proj", 'a"b'])),
    layers=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(_is_no_regex),
        st.floats(0, 1, exclude_max=True),
    ),
    split=st.none() | st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    text_column=st.none() | st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    chat_template=st.booleans(),
    nsamples=st.integers(1, 10**6),
    seqlen=st.none() | st.integers(1, 10**6),
    seed=st.integers(-(10**9), 10**9),
) | st.builds(PruneRecipe, pattern=st.sampled_from(["2:4", "4:8", "1:3"]))


@given(_RECIPES)
@example(PruneRecipe(calibration='C:\\texts\\"new"\n\t\x00\x1f\x7f\u2028\U0001f98a'))
def test_toml_keeps_every_setting(tmp_path_factory: pytest.TempPathFactory, recipe: PruneRecipe) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.toml"
    path.write_bytes(to_toml(recipe).encode())
    assert make_recipe(load_recipe(path), {}) == recipe
