"""Pruning methods, each against definitions that share no code with it."""

import copy

import pytest
import torch
from families import FAMILIES, random_tokens
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from macko_llm import recipe
from macko_llm.errors import CalibrationError, NonFiniteError
from macko_llm.pruning import prune_model
from macko_llm.pruning.methods import METHODS, UPDATES, Amount, Method, base, method_maker, sparsegpt
from macko_llm.recipe import PruneRecipe

CPU = torch.device("cpu")


def test_recipes_know_the_methods_and_which_of_them_calibrate() -> None:
    assert tuple(METHODS) == recipe.METHODS
    assert {name for name, method in METHODS.items() if not method.needs_calibration} == {*recipe.WITHOUT_CALIBRATION}
    assert (recipe.NO_UPDATE, *UPDATES) == recipe.UPDATES


def test_a_recipe_needs_calibration_for_its_method_or_for_its_update() -> None:
    for method in METHODS:
        for update in recipe.UPDATES:
            made = method_maker(method, update)(4, CPU)
            assert PruneRecipe(method=method, update=update).needs_calibration == made.needs_calibration


def _inputs(cols: int, seed: int = 0, sequences: int = 3, tokens: int = 200) -> Tensor:
    """[sequences, tokens, cols], columns of different size that depend on one another."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(sequences, tokens, cols, generator=generator) @ torch.randn(cols, cols, generator=generator)
    return mixed / cols**0.5 * torch.rand(cols, generator=generator).add(0.1)


def _weight(rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed + 1000))


def _observed(method: Method, inputs: Tensor) -> Method:
    for sequence in inputs:
        method.observe(sequence[None], 1)
    return method


def _error(inputs: Tensor, weight: Tensor, other: Tensor) -> float:
    tokens = inputs.reshape(-1, inputs.shape[-1]).double()
    return (tokens @ (weight - other).double().T).square().sum().item()


ALL = [pytest.param(name, id=name) for name in METHODS]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("update", recipe.UPDATES)
@pytest.mark.parametrize("group", [None, (2, 4), (4, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_goes_is_a_positive_zero_and_so_are_zeros_that_stay(
    name: str, update: str, group: tuple[int, int] | None, dtype: torch.dtype
) -> None:
    weight = _weight(12, 144).to(dtype)
    weight[3, :100] = -0.0
    before = weight.clone()
    pruned = _observed(method_maker(name, update)(144, CPU), _inputs(144)).prune("layer", weight, Amount(0.5, group))
    assert pruned.dtype == dtype
    assert torch.equal(weight, before)
    assert not pruned[pruned == 0].signbit().any()
    removed = (pruned == 0).sum().item()
    assert removed >= 12 * 144 // 2
    if group is not None:
        n, m = group
        assert ((pruned == 0).reshape(12, -1, m).sum(dim=-1) >= n).all()


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.needs_calibration])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_name_the_layer(name: str, bad: float) -> None:
    inputs = _inputs(16)
    inputs[1, 5, 3] = bad
    with pytest.raises(NonFiniteError, match="The inputs of the_layer hold NaN or infinity"):
        _observed(METHODS[name](16, CPU), inputs).prune("the_layer", _weight(4, 16), Amount(0.5))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("update", recipe.UPDATES)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_a_model_of_grouped_heads_is_pruned(name: str, update: str, pattern: str) -> None:
    model = FAMILIES["qwen2"]()
    report = prune_model(model, random_tokens(4, 20), PruneRecipe(method=name, update=update, pattern=pattern))
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert model(random_tokens(1, 20)).logits.isfinite().all()


# RIA


@pytest.mark.parametrize("amount", [Amount(0.5), Amount(0.3), Amount(0.5, (2, 4))])
@pytest.mark.parametrize("at_once", [1 << 24, 100])
def test_ria_removes_what_its_formula_says(amount: Amount, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "WEIGHTS_AT_ONCE", at_once)
    inputs, weight = _inputs(24), _weight(9, 24)
    weight[:, 5] = 0
    weight[4] = 0
    pruned = _observed(METHODS["ria"](24, CPU), inputs).prune("layer", weight, amount)
    norms = inputs.double().square().sum(dim=(0, 1)).div(3).sqrt().tolist()
    values = weight.double().abs().tolist()
    row_sums, column_sums = [sum(row) for row in values], [sum(column) for column in zip(*values, strict=True)]
    scores = {
        (row, column): (value / (column_sums[column] or 1) + value / (row_sums[row] or 1)) * norms[column] ** 0.5
        for row, line in enumerate(values)
        for column, value in enumerate(line)
    }
    pools, count = [[*scores]], 9 * int(24 * amount.sparsity)  # of the whole matrix
    if amount.group is not None:
        count, m = amount.group
        pools = [[(row, at) for at in range(start, start + m)] for row in range(9) for start in range(0, 24, m)]
    gone = {place for pool in pools for place in sorted(pool, key=lambda place: (scores[place], place))[:count]}
    for row, column in scores:
        assert pruned[row, column] == (0.0 if (row, column) in gone else weight[row, column])


# SparseGPT


def _naive_sparsegpt(inputs: Tensor, weight: Tensor, amount: Amount) -> Tensor:
    """Optimal brain surgery column by column in float64, with the inverse of every remaining Hessian written out."""
    tokens = inputs.reshape(-1, inputs.shape[-1]).double()
    hessian = 2 / len(inputs) * sum(torch.outer(token, token) for token in tokens)
    cols = len(hessian)
    damping = 0.01 * sum(hessian[i, i] for i in range(cols)) / cols
    dead = [hessian[i, i] == 0 for i in range(cols)]
    for i in range(cols):
        hessian[i, i] += damping + (1 if dead[i] else 0)
    inverses = [torch.linalg.inv(hessian[i:, i:]) for i in range(cols)]
    values = weight.double().clone()
    gone = torch.zeros(weight.shape, dtype=torch.bool)

    def choose(rows: range, columns: range, count: int) -> None:
        places = [(row, column) for row in rows for column in columns]
        loss = {
            (row, column): 0.0 if dead[column] else (values[row, column] ** 2 / inverses[column][0, 0]).item()
            for row, column in places
        }
        for row, column in sorted(places, key=lambda place: (loss[place], place))[:count]:
            gone[row, column] = True

    for column in range(cols):
        if amount.group is None and column % 128 == 0:
            block = range(column, min(column + 128, cols))
            whole = len(values) * int(cols * amount.sparsity)  # shared out to the columns
            choose(range(len(values)), block, whole * block.stop // cols - whole * block.start // cols)
        if amount.group is not None and column % amount.group[1] == 0:
            for row in range(len(values)):
                choose(range(row, row + 1), range(column, column + amount.group[1]), amount.group[0])
        for row in range(len(values)):
            if gone[row, column]:
                values[row, column:] -= values[row, column] / inverses[column][0, 0] * inverses[column][0]
    return values.masked_fill(gone, 0.0)


@pytest.mark.parametrize(
    ("rows", "cols", "amount"),
    [
        (8, 172, Amount(0.5)),
        (5, 300, Amount(0.6)),
        (3, 20, Amount(0.3)),
        (1, 1, Amount(0.9)),
        (6, 136, Amount(0.5, (2, 4))),
        (4, 140, Amount(0.6, (3, 5))),  # 128 columns are no whole number of groups
        (3, 280, Amount(0.5, (70, 140))),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1e-12])
def test_sparsegpt_is_optimal_brain_surgery(rows: int, cols: int, amount: Amount, scale: float) -> None:
    inputs, weight = _inputs(cols) * scale, _weight(rows, cols)
    expected = _naive_sparsegpt(inputs * (1 / scale), weight, amount)  # a scale of the inputs changes nothing
    pruned = _observed(sparsegpt.SparseGPT(cols, CPU), inputs).prune("layer", weight, amount)
    assert torch.equal(pruned == 0, expected == 0)
    torch.testing.assert_close(pruned.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("update", recipe.UPDATES)
def test_a_sparsity_of_zero_leaves_a_weight_as_it_is(name: str, update: str) -> None:
    weight = _weight(4, 16)
    method = _observed(method_maker(name, update)(16, CPU), _inputs(16))
    assert torch.equal(method.prune("layer", weight, Amount(0.0)), weight)


def test_sparsegpt_takes_columns_that_no_input_reaches_first_and_no_more_than_asked() -> None:
    inputs, weight = _inputs(64), _weight(6, 64)
    inputs[..., 10:50] = 0
    pruned = _observed(sparsegpt.SparseGPT(64, CPU), inputs).prune("layer", weight, Amount(0.5))
    gone = pruned == 0
    assert gone.sum() == 6 * 32
    assert torch.equal(pruned[~gone], weight[~gone])  # there was nothing to make up for
    assert not gone[:, :10].any()
    assert not gone[:, 50:].any()
    expected = _naive_sparsegpt(inputs, weight, Amount(0.5))
    assert torch.equal(pruned == 0, expected == 0)
    some = _observed(sparsegpt.SparseGPT(64, CPU), inputs).prune("layer", weight, Amount(0.75))
    torch.testing.assert_close(some.double(), _naive_sparsegpt(inputs, weight, Amount(0.75)), atol=1e-4, rtol=1e-4)


@given(st.integers(1, 9), st.integers(1, 300), st.floats(0, 1, exclude_max=True))
def test_sparsegpt_takes_as_many_weights_as_other_methods_and_of_128_columns_their_share(
    rows: int, cols: int, sparsity: float
) -> None:
    gone = {}
    for name in ("sparsegpt", "wanda"):
        method = METHODS[name](cols, CPU)
        method.observe(torch.eye(cols)[None], 1)  # nothing depends on anything
        gone[name] = method.prune("layer", torch.ones(rows, cols), Amount(sparsity)) == 0
    assert gone["sparsegpt"].sum() == gone["wanda"].sum()
    for start in range(0, cols, 128):
        block = gone["sparsegpt"][:, start : start + 128]
        count = int(block.sum())
        assert abs(count - block.shape[1] * int(gone["wanda"].sum()) / cols) < 1
        assert block.flatten().tolist() == [True] * count + [False] * (block.numel() - count)  # ties go from the left


def test_weights_that_share_inputs_do_not_change_one_another() -> None:
    inputs, weights = _inputs(40), [_weight(5, 40, seed) for seed in range(3)]
    for new in [method_maker(name, update) for name in METHODS for update in recipe.UPDATES]:
        shared = _observed(new(40, CPU), inputs)
        for weight in weights:
            alone = _observed(new(40, CPU), inputs)
            assert torch.equal(shared.prune("a", weight, Amount(0.5)), alone.prune("a", weight, Amount(0.5)))


def test_damping_grows_until_a_hessian_can_be_factorised() -> None:
    hessian = torch.eye(8)
    hessian[0, 0] = -0.05  # not positive definite before 0.1 are added
    upper = sparsegpt._inverse_factor("layer", hessian, torch.tensor(0.01))
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(hessian + 0.1 * torch.eye(8)))
    with pytest.raises(CalibrationError, match=r"inputs of the_layer are too much alike .* calibrate with more text"):
        sparsegpt._inverse_factor("the_layer", -1e3 * torch.eye(8), torch.tensor(0.01))


def test_weights_that_overflow_name_the_layer() -> None:
    inputs = torch.ones(1, 4, 2) + torch.tensor([0.0, 1e-3]) * torch.randn(1, 4, 2)
    weight = torch.tensor([[60000.0, 60001.0]], dtype=torch.float16)
    with pytest.raises(NonFiniteError, match="The weights of the_layer overflow float16"):
        _observed(sparsegpt.SparseGPT(2, CPU), inputs).prune("the_layer", weight, Amount(0.5))


# ADMM


def _least_squares(inputs: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    """The best values for the kept weights of every row, solved densely in float64."""
    tokens = inputs.reshape(-1, inputs.shape[-1]).double()
    best = torch.zeros_like(weight, dtype=torch.float64)
    for row, columns in enumerate(kept):
        target = tokens @ weight[row].double()[:, None]
        best[row, columns] = torch.linalg.lstsq(tokens[:, columns], target, driver="gelsd").solution[:, 0]
    return best


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("amount", [Amount(0.5), Amount(0.8), Amount(0.5, (2, 4))])
def test_admm_comes_close_to_the_least_error_with_the_same_zeros(name: str, amount: Amount) -> None:
    inputs, weight = _inputs(96), _weight(12, 96)
    alone = _observed(METHODS[name](96, CPU), inputs).prune("layer", weight, amount)
    fitted = _observed(method_maker(name, "admm")(96, CPU), inputs).prune("layer", weight, amount)
    assert torch.equal(fitted == 0, alone == 0)
    least = _error(inputs, weight, _least_squares(inputs, weight, alone != 0))
    assert least * 1.1 < _error(inputs, weight, alone)
    assert _error(inputs, weight, fitted) < 1.02 * least


@given(
    st.sampled_from(["wanda", "magnitude"]),
    st.integers(1, 6),
    st.integers(2, 40),
    st.integers(1, 60),
    st.integers(0, 99),
)
def test_admm_never_does_harm_to_a_mask(name: str, rows: int, cols: int, tokens: int, seed: int) -> None:
    inputs, weight = _inputs(cols, seed, 1, tokens), _weight(rows, cols, seed)
    inputs[..., seed % cols] = 0
    alone = _observed(METHODS[name](cols, CPU), inputs).prune("layer", weight, Amount(0.5))
    fitted = _observed(method_maker(name, "admm")(cols, CPU), inputs).prune("layer", weight, Amount(0.5))
    assert (fitted[alone == 0] == 0).all()
    assert _error(inputs, weight, fitted) <= _error(inputs, weight, alone) * (1 + 1e-4) + 1e-9


def test_admm_lowers_the_error_of_a_layer_in_a_model() -> None:
    dense, tokens, errors = FAMILIES["llama"](), random_tokens(4, 30), {}
    before = dense(tokens).logits
    for update in recipe.UPDATES:
        pruned = copy.deepcopy(dense)
        prune_model(pruned, tokens, PruneRecipe(update=update))
        errors[update] = (pruned(tokens).logits - before).square().sum().item()
    assert errors["admm"] < 0.9 * errors["none"]


def test_admm_changes_nothing_where_nothing_goes() -> None:
    weight = _weight(4, 16)
    assert torch.equal(
        _observed(method_maker("wanda", "admm")(16, CPU), _inputs(16)).prune("a", weight, Amount(0.01)), weight
    )
