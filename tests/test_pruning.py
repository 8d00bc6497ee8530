"""Pruning a model in memory, against a naive Wanda in float64 that shares no code with the real one.

The reference runs the whole model on each sequence, collects the inputs of one block's linears with hooks, and sorts each row
in Python. Where two float64 scores at the border of a selection agree within 1e-5, fp32 may order them either way; elsewhere
the removed weights must be the same.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from families import FAMILIES, MAX_POSITIONS, VOCABULARY, random_tokens
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from macko_llm.errors import CalibrationError, CheckpointError, NonFiniteError, UsageError
from macko_llm.models import cache_argument
from macko_llm.pruning import prune_model
from macko_llm.pruning.methods import base
from macko_llm.pruning.replay import record_block_arguments
from macko_llm.recipe import PruneRecipe

SEQLEN = 20
TOKENS = random_tokens(3, SEQLEN)


def _blocks_by_hand(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    prefix = {"opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers"}.get(model.config.model_type, "model.layers")
    return [(f"{prefix}.{index}", block) for index, block in enumerate(model.get_submodule(prefix))]


def _naive_scores(model: PreTrainedModel, block: nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Float64 scores [rows, cols] of the linears of one block, from full forward passes."""
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    totals: dict[str, Any] = dict.fromkeys(linears, 0.0)

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
            for row in args[0].detach().double().reshape(-1, args[0].shape[-1]):
                totals[name] = totals[name] + row**2

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in linears.items()]
    with torch.no_grad():
        for sequence in tokens:
            model(input_ids=sequence[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {
        name: linears[name].weight.detach().double().abs() * (totals[name] / len(tokens)) ** 0.5 for name in linears
    }


def _check_selection(scores: list[float], removed: list[bool], count: int) -> None:
    """The `count` lowest of these scores are removed, ties from the left."""
    order = sorted(range(len(scores)), key=lambda column: (scores[column], column))
    expected = set(order[:count])
    actual = {column for column, gone in enumerate(removed) if gone}
    assert len(actual) == count
    if actual != expected:
        border = scores[order[count - 1]]
        for column in actual ^ expected:
            assert scores[column] == pytest.approx(border, rel=1e-5, abs=0)


def _check_linear(scores: torch.Tensor, dense: torch.Tensor, pruned: torch.Tensor, recipe: PruneRecipe) -> None:
    assert torch.equal(pruned[pruned != 0], dense[pruned != 0])
    assert not pruned[pruned == 0].signbit().any()
    size, count = scores.shape[1], int(scores.shape[1] * recipe.sparsity)
    if recipe.pattern != "unstructured":
        count, size = map(int, recipe.pattern.split(":"))
    for row_scores, row in zip(scores.tolist(), (pruned == 0).tolist(), strict=True):
        for at in range(0, len(row), size):
            _check_selection(row_scores[at : at + size], row[at : at + size], count)


def _check_wanda(dense: PreTrainedModel, tokens: torch.Tensor, recipe: PruneRecipe) -> PreTrainedModel:
    """Prune a copy of a model and hold every removed weight against the reference; the pruned copy."""
    pruned = copy.deepcopy(dense)
    report = prune_model(pruned, tokens, recipe)
    reference = copy.deepcopy(dense)
    checked = {}
    for name, block in _blocks_by_hand(reference):
        scores = _naive_scores(reference, block, tokens)
        for inner, score in scores.items():
            linear = pruned.get_submodule(f"{name}.{inner}")
            _check_linear(score, block.get_submodule(inner).weight, linear.weight, recipe)
            checked[f"{name}.{inner}"] = (linear.weight == 0).double().mean().item()
        # The next block sees what was just verified, so that a tie broken the other way does not add up.
        block.load_state_dict(pruned.get_submodule(name).state_dict())
    assert report.layers == pytest.approx(checked)
    for (name, before), after in zip(dense.state_dict().items(), pruned.state_dict().values(), strict=True):
        if name.removesuffix(".weight") not in checked:
            assert torch.equal(before, after), name
    return pruned


@pytest.mark.parametrize("family", FAMILIES)
def test_wanda_on_every_family(family: str) -> None:
    pruned = _check_wanda(FAMILIES[family](), TOKENS, PruneRecipe(sparsity=0.5))
    assert pruned(TOKENS).logits.isfinite().all()


@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_wanda_at_other_sparsities(sparsity: float) -> None:
    _check_wanda(FAMILIES["qwen2"](), TOKENS, PruneRecipe(sparsity=sparsity))


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_wanda_in_groups(family: str, pattern: str) -> None:
    _check_wanda(FAMILIES[family](), TOKENS, PruneRecipe(pattern=pattern))


def test_rows_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "WEIGHTS_AT_ONCE", 500)  # 7 rows of 64 columns, and a last piece that is smaller
    _check_wanda(FAMILIES["llama"](), TOKENS, PruneRecipe())


def test_columns_that_do_not_divide_into_groups_are_named() -> None:
    model = FAMILIES["qwen2"]()
    with pytest.raises(UsageError, match=r"model\.layers\.0\.mlp\.down_proj has 172 columns, not a multiple of 8"):
        prune_model(model, TOKENS, PruneRecipe(pattern="4:8"))
    prune_model(model, TOKENS, PruneRecipe(pattern="2:4"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wanda_in_half_precision(dtype: torch.dtype) -> None:
    _check_wanda(FAMILIES["llama"]().to(dtype), TOKENS, PruneRecipe())


def test_dead_input_channels_go_first_and_from_the_left() -> None:
    model = FAMILIES["llama"]()
    dead = list(range(1, 64, 4)) + list(range(2, 64, 4)) + [60]  # 33 of 64 columns
    with torch.no_grad():
        for _, block in _blocks_by_hand(model):
            block.input_layernorm.weight[dead] = 0
    pruned = _check_wanda(model, TOKENS, PruneRecipe(sparsity=0.5))
    gone = sorted(dead)[:32]
    for _, block in _blocks_by_hand(pruned):
        for row in block.self_attn.q_proj.weight:
            assert (row == 0).nonzero().flatten().tolist() == gone


def test_equal_scores_go_from_the_left() -> None:
    """Channels whose embeddings and weights repeat have scores that are equal to the last bit."""
    model = FAMILIES["llama"]()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 32:] = model.model.embed_tokens.weight[:, :32]
        block = model.model.layers[0]
        block.input_layernorm.weight.fill_(1)
        for linear in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
            linear.weight[:, 32:] = linear.weight[:, :32]
    odd = PruneRecipe(sparsity=33 / 64)  # 33 of 64: one pair loses its left half only
    pruned = _check_wanda(model, TOKENS, odd)
    for row in pruned.model.layers[0].self_attn.q_proj.weight == 0:
        left, right = row[:32], row[32:]
        assert (left.sum(), right.sum()) == (17, 16)
        assert (left | ~right).all()


class _Routed(nn.Module):
    """Linears that see inputs of different shapes and numbers of tokens, as experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Linear(64, 64)
        self.some = nn.Linear(64, 64)
        self.nested = nn.Linear(16, 16)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.reshape(-1, 64)
        chosen = flat[:, 0] > 0  # another number of tokens in each sequence
        update = self.flat(flat)
        update[chosen] = update[chosen] + self.some(input=flat[chosen])
        return (update + self.nested(flat.reshape(2, -1, 4, 16)).reshape(-1, 64)).reshape(hidden.shape)


def test_inputs_of_any_leading_shape_and_length() -> None:
    model = FAMILIES["llama"]()
    torch.manual_seed(0)
    for block in model.model.layers:
        block.mlp = _Routed()
        block.mlp.some.register_forward_pre_hook(lambda _m, _args, kwargs: ((kwargs["input"],), {}), with_kwargs=True)
    counts = [int((model.model.embed_tokens(row)[:, 0] > 0).sum()) for row in TOKENS]
    assert len(set(counts)) > 1
    _check_wanda(model, TOKENS, PruneRecipe())


def test_a_linear_that_no_token_reaches_is_named() -> None:
    model = FAMILIES["llama"]()
    model.model.layers[1].mlp.extra = nn.Linear(64, 64)
    with pytest.raises(CalibrationError, match=r"No calibration token reached model\.layers\.1\.mlp\.extra"):
        prune_model(model, TOKENS, PruneRecipe())
    assert prune_model(model, None, PruneRecipe(method="magnitude")).sparsity == 0.5


def test_shared_weights_are_pruned_once() -> None:
    model = FAMILIES["llama"]()
    first, second = model.model.layers
    first.mlp.up_proj.weight = first.mlp.gate_proj.weight
    second.mlp.gate_proj.weight = first.mlp.gate_proj.weight
    with torch.no_grad():  # dead channels, whose weights a second pruning would remove on top
        second.post_attention_layernorm.weight[:20] = 0
    report = prune_model(model, TOKENS, PruneRecipe())
    assert "model.layers.0.mlp.gate_proj" in report.layers
    assert "model.layers.0.mlp.up_proj" not in report.layers
    assert "model.layers.1.mlp.gate_proj" not in report.layers
    assert set(report.layers.values()) == {0.5}


def test_a_block_that_is_used_twice_is_pruned_once() -> None:
    model = FAMILIES["llama"]()
    model.model.layers[1] = model.model.layers[0]
    assert len(model.model.layers) == 2
    report = prune_model(model, TOKENS, PruneRecipe())
    assert len(report.layers) == 7
    assert set(report.layers.values()) == {0.5}


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_magnitude_goes_by_row(pattern: str) -> None:
    model = FAMILIES["llama"]()
    with torch.no_grad():
        for _, block in _blocks_by_hand(model):  # coarse values: ties in every row
            block.mlp.up_proj.weight.copy_((block.mlp.up_proj.weight * 8).round() / 8)
    dense = copy.deepcopy(model)
    recipe = PruneRecipe(method="magnitude", pattern=pattern)
    report = prune_model(model, None, recipe)
    assert (report.calibration_sha256, report.nsamples, report.seqlen) == (None, 0, 0)
    for name in report.layers:
        before, after = dense.get_submodule(name).weight, model.get_submodule(name).weight
        if "up_proj" in name:  # rows may have held more zeros than go
            size, count = (4, 2) if pattern == "2:4" else (64, 32)
            for row, kept in zip(before.tolist(), after.tolist(), strict=True):
                for at in range(0, 64, size):
                    group = range(at, at + size)
                    gone = sorted(group, key=lambda column, row=row: (abs(row[column]), column))[:count]
                    assert kept[at : at + size] == [0 if column in gone else row[column] for column in group]
        else:
            _check_linear(before.double().abs(), before, after, recipe)


def test_remaining_negative_zeros_become_positive() -> None:
    model = FAMILIES["llama"]()
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[0] = -0.0
    prune_model(model, None, PruneRecipe(method="magnitude"))
    assert not weight[0].signbit().any()


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_sparsity_zero_changes_nothing(method: str) -> None:
    model = FAMILIES["gpt_neox"]()
    before = copy.deepcopy(model.state_dict())
    report = prune_model(model, TOKENS, PruneRecipe(method=method, sparsity=0))
    assert report.sparsity == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_report_and_the_progress() -> None:
    model = FAMILIES["qwen2"]().train()
    seen: list[tuple[str, int, int]] = []
    report = prune_model(
        model, TOKENS, PruneRecipe(sparsity=0.6), lambda what, done, total: seen.append((what, done, total))
    )
    zeros = {name: int((model.get_submodule(name).weight == 0).sum()) for name in report.layers}
    sizes = {name: model.get_submodule(name).weight.numel() for name in report.layers}
    assert report.sparsity == sum(zeros.values()) / sum(sizes.values())
    assert report.layers["model.layers.0.mlp.down_proj"] == 103 / 172
    assert (report.method, report.pattern, report.nsamples, report.seqlen) == ("wanda", "unstructured", 3, SEQLEN)
    assert seen == [("pruning blocks", 0, 2), ("pruning blocks", 1, 2), ("pruning blocks", 2, 2)]
    assert model.training
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_weights_name_the_layer(bad: float) -> None:
    model = FAMILIES["llama"]()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = bad
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteError, match=r"weights of model\.layers\.1\.mlp\.down_proj hold NaN or infinity"):
        prune_model(model, TOKENS, PruneRecipe())
    assert all(torch.equal(before[name].nan_to_num(), now.nan_to_num()) for name, now in model.state_dict().items())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_activations_name_the_layer(bad: float) -> None:
    model = FAMILIES["llama"]()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[7] = bad
    with pytest.raises(NonFiniteError, match=r"inputs of model\.layers\.1\.mlp\.gate_proj hold NaN or infinity"):
        prune_model(model, TOKENS, PruneRecipe())


def test_activations_that_overflow_fp16_name_the_layer() -> None:
    model = FAMILIES["llama"]()
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight.mul_(1e3)
        model.model.layers[0].mlp.up_proj.weight.mul_(1e3)
    prune_model(copy.deepcopy(model), TOKENS, PruneRecipe())
    with pytest.raises(NonFiniteError, match=r"model\.layers\.0\.mlp\.down_proj .*--dtype float32"):
        prune_model(model.half(), TOKENS, PruneRecipe())


def test_tokens_must_fit_the_model() -> None:
    model = FAMILIES["llama"]()
    with pytest.raises(UsageError, match="needs calibration tokens"):
        prune_model(model, None, PruneRecipe())
    with pytest.raises(UsageError, match=f"seqlen is {MAX_POSITIONS + 1}, but the model takes at most {MAX_POSITIONS}"):
        prune_model(model, random_tokens(1, MAX_POSITIONS + 1), PruneRecipe())
    for outside in (-1, VOCABULARY):
        tokens = TOKENS.clone()
        tokens[1, 2] = outside
        with pytest.raises(CalibrationError, match=f"the model knows 0 to {VOCABULARY - 1}"):
            prune_model(model, tokens, PruneRecipe())


def _extra(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "per_layer_inputs": (args[0].mean(),)}


def _scaled(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return (args[0] * 2, *args[1:]), kwargs


def _cached(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, cache_argument(block): DynamicCache()}


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        (_cached, r"block model\.layers\.1 keeps a cache"),
        (_extra, r"block model\.layers\.1 gets other arguments for another text"),
        (_scaled, r"block model\.layers\.1 does not run on the output of the block before"),
    ],
)
def test_blocks_that_cannot_run_on_their_own_are_named(hook: Callable[..., Any], words: str) -> None:
    model = FAMILIES["llama"]()
    model.model.layers[1].register_forward_pre_hook(hook, with_kwargs=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=words):
        prune_model(model, torch.cat([TOKENS[:1], TOKENS]), PruneRecipe())  # the first two sequences are equal
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class _OnlyTheFirst(nn.ModuleList):
    """Blocks of which the model's loop sees one."""

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([next(super().__iter__())])

    def __getitem__(self, index: Any) -> Any:
        return [super().__getitem__(0)] if isinstance(index, slice) else super().__getitem__(index)


def test_blocks_that_do_not_run_are_told() -> None:
    model = FAMILIES["llama"]()
    model.model.layers.__class__ = _OnlyTheFirst
    blocks = {f"model.layers.{index}": model.model.layers[index] for index in range(2)}
    with pytest.raises(CheckpointError, match="LlamaForCausalLM runs only 1 of its 2 blocks"):
        record_block_arguments(model, blocks, TOKENS, torch.device("cpu"))
