"""Sparsities of blocks, against the definitions of OWL written out, and their budget."""

import itertools
from typing import Any

import pytest
import torch
from families import FAMILIES, random_tokens
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from macko_llm.errors import UsageError
from macko_llm.pruning import prune_model
from macko_llm.pruning.allocation import block_sparsities, layer_sparsities, outlier_ratio, overrides
from macko_llm.pruning.methods import METHODS, Amount, base
from macko_llm.recipe import PruneRecipe

SHARES = st.floats(0, 1, exclude_max=True)


@pytest.mark.parametrize("at_once", [1 << 24, 7])
def test_outliers_are_scores_above_five_times_the_mean_of_the_whole_block(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "WEIGHTS_AT_ONCE", at_once)
    monkeypatch.setattr("macko_llm.pruning.allocation.WEIGHTS_AT_ONCE", at_once)
    torch.manual_seed(0)
    weights = [(torch.randn(rows, cols) ** 3, torch.rand(cols)) for rows, cols in ((5, 6), (9, 4), (3, 20))]
    scores = [
        abs(weight[row, column].item()) * statistic[column].item() ** 0.5
        for weight, statistic in weights
        for row in range(weight.shape[0])
        for column in range(weight.shape[1])
    ]
    mean = sum(scores) / len(scores)
    outliers = sum(score > 5 * mean for score in scores)
    assert outliers > 2
    assert outlier_ratio(weights) == outliers / len(scores)


def test_block_sparsities_by_hand() -> None:
    # They span 0.16: densities 0.5 + (0, 0.04, 0.16) less their mean.
    found = block_sparsities([0.01, 0.02, 0.05], [100, 100, 100], 0.5)
    assert found == pytest.approx([0.5 + 0.2 / 3, 0.5 + 0.2 / 3 - 0.04, 0.5 + 0.2 / 3 - 0.16])
    assert block_sparsities([0.03, 0.03], [100, 50], 0.6) == [0.6, 0.6]
    # A block that counts three times has a third of the other's distance.
    assert block_sparsities([0.0, 0.1], [300, 100], 0.5) == pytest.approx([0.54, 0.38])


@example(blocks=[(0.0, 1), (5e-324, 1)], sparsity=0.5)
@given(st.lists(st.tuples(st.floats(0, 0.2), st.integers(1, 10**9)), min_size=1, max_size=8), SHARES)
def test_block_sparsities_keep_the_mean_the_order_and_their_limits(
    blocks: list[tuple[float, int]], sparsity: float
) -> None:
    ratios, sizes = [ratio for ratio, _ in blocks], [size for _, size in blocks]
    found = block_sparsities(ratios, sizes, sparsity)
    mean = sum(size * share for size, share in zip(sizes, found, strict=True)) / sum(sizes)
    assert mean == pytest.approx(sparsity, abs=1e-9)
    assert all(0 <= share <= 1 for share in found)
    assert max(found) - min(found) <= 0.16 + 1e-9
    by_outliers = sorted(range(len(blocks)), key=lambda block: ratios[block])
    assert all(found[one] >= found[other] for one, other in itertools.pairwise(by_outliers))


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300), st.floats(-0.08, 0.08)), min_size=1, max_size=8),
    SHARES,
)
def test_layers_lose_as_many_weights_as_with_one_sparsity(
    layers: list[tuple[int, int, float]], sparsity: float
) -> None:
    """To within one weight in each row of one layer, however uneven they are: the budget of the blocks is the caller's."""
    shapes = {str(index): (rows, cols) for index, (rows, cols, _) in enumerate(layers)}
    wanted = {str(index): min(1.0, max(0.0, sparsity + more)) for index, (_, _, more) in enumerate(layers)}
    found = layer_sparsities(shapes, wanted, sparsity)
    removed = {name: int(shapes[name][1] * share) for name, share in found.items()}
    assert all(0 <= count < shapes[name][1] for name, count in removed.items())
    budget = sum(rows * int(cols * sparsity) for rows, cols in shapes.values())
    difference = budget - sum(shapes[name][0] * count for name, count in removed.items())
    assert abs(difference) < max(rows for rows, _ in shapes.values())


def test_layers_are_rounded_where_the_most_would_be_lost() -> None:
    shapes = {"a": (4, 10), "b": (4, 10), "c": (4, 10), "d": (4, 10)}
    wanted = {"a": 0.43, "b": 0.47, "c": 0.54, "d": 0.56}
    found = layer_sparsities(shapes, wanted, 0.5)
    assert {name: int(10 * share) for name, share in found.items()} == {"a": 4, "b": 5, "c": 5, "d": 6}
    assert layer_sparsities(shapes, dict.fromkeys(shapes, 0.5), 0.5) == dict.fromkeys(shapes, 0.5)


def _uneven() -> nn.Module:
    """The last block has outliers, as real models have: a few strong columns."""
    model = FAMILIES["llama"]()
    with torch.no_grad():
        last = model.model.layers[1]
        for linear in (last.self_attn.q_proj, last.mlp.gate_proj, last.mlp.up_proj):
            linear.weight[:, :3] *= 30
    return model


@pytest.mark.parametrize("method", METHODS)
def test_owl_takes_less_from_the_block_with_outliers_and_as_much_in_all(method: str) -> None:
    tokens, counts = random_tokens(4, 20), {}
    for allocation in ("uniform", "owl"):
        model = _uneven()
        report = prune_model(model, tokens, PruneRecipe(method=method, sparsity=0.6, allocation=allocation))
        zeros = [
            sum(int((model.get_submodule(name).weight == 0).sum()) for name in report.layers if f".{block}." in name)
            for block in (0, 1)
        ]
        counts[allocation] = zeros
    shapes = [model.get_submodule(name).weight.shape for name in report.layers]
    size = sum(shape.numel() for shape in shapes) / 2
    assert counts["uniform"][0] == counts["uniform"][1]
    assert counts["owl"][0] / size == pytest.approx(0.68, abs=0.01)
    assert counts["owl"][1] / size == pytest.approx(0.52, abs=0.01)
    budget = sum(rows * int(cols * 0.6) for rows, cols in shapes)
    assert sum(counts["owl"]) == pytest.approx(budget, abs=160)


def test_owl_measures_the_dense_model_first() -> None:
    seen: list[tuple[str, int, int]] = []
    recipe = PruneRecipe(method="magnitude", allocation="owl")
    report = prune_model(
        _uneven(), random_tokens(4, 20), recipe, lambda what, done, total: seen.append((what, done, total))
    )
    assert [what for what, done, total in seen if done == total] == ["measuring blocks", "pruning blocks"]
    assert report.nsamples == 4
    assert len(set(report.layers.values())) > 1


def test_owl_spreads_over_the_chosen_layers_alone() -> None:
    model = _uneven()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipe = PruneRecipe(allocation="owl", targets=("layers.1.mlp.*",))
    report = prune_model(model, random_tokens(4, 20), recipe)
    assert set(report.layers.values()) == {0.5}  # one block has nothing to share with
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name.removesuffix(".weight") not in report.layers)


NAMES = [f"model.layers.{block}.{part}_proj" for block in (0, 1) for part in ("mlp.up", "mlp.down", "self_attn.q")]


def test_of_several_patterns_that_fit_a_layer_the_last_counts() -> None:
    recipe = PruneRecipe(layers=(("*.down_proj", 0.4), ("layers.0.*", 0.0), ("layers.1.mlp.*", 0.7)))
    assert overrides(NAMES, recipe) == {
        "model.layers.0.mlp.up_proj": Amount(0.0),
        "model.layers.0.mlp.down_proj": Amount(0.0),
        "model.layers.0.self_attn.q_proj": Amount(0.0),
        "model.layers.1.mlp.up_proj": Amount(0.7),
        "model.layers.1.mlp.down_proj": Amount(0.7),
    }
    assert overrides(NAMES, PruneRecipe()) == {}


def test_a_pattern_that_fits_no_layer_is_named() -> None:
    with pytest.raises(UsageError, match=r"layers has 'o_proj', which fits no layer; write names such as"):
        overrides(NAMES, PruneRecipe(layers=(("up_proj", 0.4), ("o_proj", 0.4))))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("settings", [{"sparsity": 0.6}, {"sparsity": 0.0}, {"sparsity": 0.6, "allocation": "owl"}])
def test_layers_lose_what_the_recipe_says_of_them(method: str, settings: dict[str, Any]) -> None:
    model = _uneven()
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    recipe = PruneRecipe(method=method, layers={"*.down_proj": 0.25, "layers.0.self_attn.*": 0.0}, **settings)
    report = prune_model(model, random_tokens(4, 20), recipe)
    assert {share for name, share in report.layers.items() if name.endswith("down_proj")} == {0.25}
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, before)
    if settings == {"sparsity": 0.6}:
        assert report.layers["model.layers.1.mlp.up_proj"] == pytest.approx(0.6, abs=0.02)


def test_a_model_is_not_touched_where_a_pattern_of_layers_fits_nothing() -> None:
    model = _uneven()
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(UsageError, match="layers has 'fc1', which fits no layer"):
        prune_model(model, random_tokens(4, 20), PruneRecipe(layers={"fc1": 0.4}))
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
