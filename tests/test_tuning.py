"""Tuning: what is zero stays zero, the rest learns as AdamW says, and the result is an ordinary checkpoint."""

import copy
import itertools
import json
import lzma
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, MAX_POSITIONS, SENTENCES, VOCABULARY, random_tokens, save_model
from helpers import assert_plain, weights
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from macko_llm.demo.run import FOLDER, MODEL_FOLDER
from macko_llm.errors import CheckpointError, MackoError, NonFiniteError, UsageError
from macko_llm.models import prunable_linears
from macko_llm.packing import pack_checkpoint
from macko_llm.pruning import prune_checkpoint
from macko_llm.recipe import PruneRecipe
from macko_llm.tuning import training
from macko_llm.tuning.masking import KeptZeros
from macko_llm.tuning.pipeline import tune_checkpoint
from macko_llm.tuning.settings import RATE_OF_WIDTH, TuneRecipe
from macko_llm.tuning.training import rate_at, tune_model

TEXT = " ".join(SENTENCES * 4)


def _pruned(family: str, sparsity: float = 0.5, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of which a random share of each linear is zero, some of it as -0."""
    model = FAMILIES[family]().to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for linear in prunable_linears(model).values():
            gone = torch.rand(linear.weight.shape, generator=generator) < sparsity
            linear.weight.masked_fill_(gone, 0)
            linear.weight[0].masked_fill_(gone[0], -0.0)
    return model


def _recipe(**settings: Any) -> TuneRecipe:
    return TuneRecipe(**{"dataset": "unused.txt", "steps": 5, "batch_size": 2, "learning_rate": 1e-2, **settings})


def _zeros(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: linear.weight.detach() == 0 for name, linear in prunable_linears(model).items()}


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_not_one_zero_comes_back(family: str, dtype: torch.dtype, weight_decay: float) -> None:
    model = _pruned(family, dtype=dtype)
    before, zeros = copy.deepcopy(model.state_dict()), _zeros(model)
    report = tune_model(model, random_tokens(4, 24), _recipe(weight_decay=weight_decay))
    after = model.state_dict()
    for name, was_zero in zeros.items():
        weight = after[f"{name}.weight"]
        assert weight.dtype == dtype
        assert (weight[was_zero] == 0).all(), name
        assert not torch.signbit(weight[weight == 0]).any(), name
        moved = weight[~was_zero] != before[f"{name}.weight"][~was_zero]
        assert moved.float().mean() > 0.5, name  # or it would prove nothing
        assert report.layers[name] == (weight == 0).double().mean()
    assert report.sparsity >= report.sparsity_before == torch.cat([z.flatten() for z in zeros.values()]).double().mean()
    untouched = set(before) - {f"{name}.weight" for name in zeros}
    assert all(torch.equal(before[name], after[name]) for name in untouched)


def test_a_weight_that_is_rounded_to_zero_is_a_zero_without_a_sign() -> None:
    model = _pruned("llama", dtype=torch.float16)
    weight = next(iter(prunable_linears(model).values())).weight
    weight.data[weight != 0] = -(2.0**-24)  # the smallest of float16, which decay takes to four tenths of itself
    report = tune_model(model, random_tokens(2, 16), _recipe(steps=1, learning_rate=1e-12, weight_decay=6e11, warmup=0))
    assert (weight == 0).all()
    assert not torch.signbit(weight).any()
    assert report.sparsity > report.sparsity_before


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.AdamW])
def test_zeros_are_kept_whatever_the_optimizer_and_however_it_begins(optimizer: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 8).masked_fill(torch.rand(8, 8) < 0.5, 0))
    was_zero = weight == 0
    steps = optimizer([weight], lr=0.1)  # type: ignore[call-arg]
    (weight.sum() * 3).backward()
    steps.step()  # gives the optimizer's moments a past in which zeros had gradients
    with torch.no_grad():
        weight.masked_fill_(was_zero, 0)
    with KeptZeros([weight]) as zeros:
        for _ in range(3):
            steps.zero_grad()
            (weight.sum() * 3).backward()
            assert weight.grad is not None
            assert (weight.grad[was_zero] == 0).all()
            assert (weight.grad[~was_zero] == 3).all()
            steps.step()
            zeros.restore()
            assert (weight[was_zero] == 0).all()
    steps.zero_grad()
    weight.sum().backward()
    assert (weight.grad == 1).all()


def _naive(model: PreTrainedModel, tokens: torch.Tensor, rates: list[float], recipe: TuneRecipe) -> None:
    """AdamW (Loshchilov and Hutter, 2019) on the weights that are not zero, word for word, in float64."""
    linears = prunable_linears(model)
    masks = {name: (linear.weight != 0).double() for name, linear in linears.items()}
    values = {name: linear.weight.detach().double() for name, linear in linears.items()}
    first = {name: torch.zeros_like(value) for name, value in values.items()}
    second = copy.deepcopy(first)
    size = recipe.batch_size * recipe.accumulation
    for step, rate in enumerate(rates):
        batch = tokens[step * size : (step + 1) * size]
        model.zero_grad()
        logits = model(input_ids=batch).logits
        nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), batch[:, 1:].reshape(-1)).backward()
        gradients = {name: linears[name].weight.grad.double() * masks[name] for name in linears}
        norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients.values()))
        for name, gradient in gradients.items():
            gradient = gradient * min(1.0, training.MAX_GRADIENT_NORM / norm)
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            mean, square = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
            values[name] -= rate * recipe.weight_decay * values[name]
            values[name] -= rate * mean / (square.sqrt() + 1e-8)
            linears[name].weight.data.copy_(values[name] * masks[name])


@pytest.mark.parametrize("accumulation", [1, 3])
def test_steps_are_those_of_adamw_on_the_weights_that_are_left(accumulation: int) -> None:
    recipe = _recipe(steps=4, accumulation=accumulation, weight_decay=0.1, warmup=0.5)
    tokens = random_tokens(4 * 2 * accumulation, 16)
    tuned, expected = _pruned("llama"), _pruned("llama")
    untrained = copy.deepcopy(tuned.state_dict())
    tune_model(tuned, tokens, recipe)
    _naive(expected, tokens, [0.005, 0.01, 0.01, 0.005], recipe)
    for (name, weight), other in zip(tuned.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(weight, other, atol=1e-4, rtol=0, msg=name)
    moved = (tuned.state_dict()[name] - weight for name, weight in untrained.items())
    assert max(float(change.abs().max()) for change in moved) > 0.02


def test_the_rate_rises_and_falls() -> None:
    rates = [rate_at(step, 100, 0.1) for step in range(100)]
    assert rates[:11] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0])
    assert rates[55] == pytest.approx(0.5)
    assert all(before > after > 0 for before, after in itertools.pairwise(rates[10:]))
    assert [rate_at(step, 2, 0) for step in range(2)] == pytest.approx([1, 0.5])


def test_a_model_is_as_it_was_but_for_its_weights() -> None:
    model = _pruned("qwen2", dtype=torch.bfloat16)
    model.train()
    frozen = next(iter(model.parameters()))
    frozen.requires_grad_(False)
    tune_model(model, random_tokens(4, 24), _recipe())
    assert model.training
    assert not frozen.requires_grad
    others = [parameter for parameter in model.parameters() if parameter is not frozen]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in others)
    model(input_ids=random_tokens(1, 8), labels=random_tokens(1, 8)).loss.backward()
    assert all(
        linear.weight.grad.count_nonzero() > 0.9 * linear.weight.numel() for linear in prunable_linears(model).values()
    )
    tune_model(model, random_tokens(4, 24), _recipe())


def test_a_weight_that_two_layers_share_is_tuned_as_one() -> None:
    model = _pruned("llama")
    gate, up = (model.get_submodule(f"model.layers.0.mlp.{name}_proj") for name in ("gate", "up"))
    up.weight = gate.weight
    was_zero = gate.weight.detach() == 0
    report = tune_model(model, random_tokens(4, 24), _recipe())
    assert up.weight is gate.weight
    assert torch.equal(gate.weight == 0, was_zero)
    assert len(report.layers) == len(prunable_linears(model)) - 1


def test_few_sequences_take_turns() -> None:
    tokens = random_tokens(3, 16)
    short, long = _pruned("llama"), _pruned("llama")
    report = tune_model(short, tokens, _recipe(steps=4))
    tune_model(long, tokens.repeat(3, 1)[:8], _recipe(steps=4))
    assert all(torch.equal(a, b) for a, b in zip(short.parameters(), long.parameters(), strict=True))
    assert report.tokens == 4 * 2 * 16


@pytest.mark.parametrize("kind", ["dense", "infinite", "token"])
def test_what_cannot_be_tuned_is_refused(kind: str) -> None:
    model, tokens = _pruned("llama"), random_tokens(2, 16)
    error: type[MackoError] = UsageError
    if kind == "dense":
        model = FAMILIES["llama"]()
    elif kind == "infinite":
        error = NonFiniteError
        next(iter(prunable_linears(model).values())).weight.data[0, 0] = math.inf
    else:
        error = CheckpointError
        tokens[0, 0] = VOCABULARY
    with pytest.raises(error) as caught:
        tune_model(model, tokens, _recipe())
    assert_plain(str(caught.value))
    assert ("macko prune" in str(caught.value)) == (kind == "dense")


# Folder to folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    (folder / "text.txt").write_text(TEXT)
    recipe = PruneRecipe(calibration=str(folder / "text.txt"), nsamples=4, seqlen=24)
    for name, dtype in (("float32", torch.float32), ("float16", torch.float16)):
        save_model(folder / f"dense-{name}", "llama", dtype)
        prune_checkpoint(folder / f"dense-{name}", folder / name, recipe, device="cpu")
    return folder


def _tune(folder: Path, target: Path, source: str = "float32", **settings: Any) -> training.TuneReport:
    recipe = _recipe(**{"dataset": str(folder / "text.txt"), **settings})
    return tune_checkpoint(folder / source, target, recipe, device="cpu")


@pytest.mark.parametrize(("source", "dtype"), [("float32", "auto"), ("float16", "auto"), ("float32", "bfloat16")])
def test_the_result_is_an_ordinary_checkpoint_with_the_same_zeros(
    folder: Path, tmp_path: Path, source: str, dtype: str
) -> None:
    report = _tune(folder, tmp_path / "out", source, dtype=dtype, weight_decay=0.1)
    before, after = weights(folder / source), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert {str(tensor.dtype) for tensor in after.values()} == {f"torch.{source if dtype == 'auto' else dtype}"}
    for name in report.layers:
        old, new = before[f"{name}.weight"], after[f"{name}.weight"]
        assert (new[old == 0] == 0).all()
        assert (new != old.to(new.dtype)).any()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == after["model.norm.weight"].dtype
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the fox").input_ids
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    pack_checkpoint(tmp_path / "out", tmp_path / "packed", dtype="float16")


def test_macko_json_keeps_its_history(folder: Path, tmp_path: Path) -> None:
    reports = [_tune(folder, tmp_path / "once", seed=3), None]
    recipe = _recipe(dataset=str(folder / "text.txt"), steps=2, learning_rate=None)
    reports[1] = tune_checkpoint(tmp_path / "once", tmp_path / "twice", recipe, device="cpu")
    old = json.loads((folder / "float32" / "macko.json").read_text())
    new = json.loads((tmp_path / "twice" / "macko.json").read_text())
    assert new["prune"] == old["prune"]
    assert [entry["model"] for entry in new["tune"]] == ["float32", "once"]
    assert [entry["steps"] for entry in new["tune"]] == [5, 2]
    assert [entry["learning_rate"] for entry in new["tune"]] == [1e-2, RATE_OF_WIDTH / 64]
    assert [entry["seed"] for entry in new["tune"]] == [3, 0]
    assert new["tune"][0]["seqlen"] == MAX_POSITIONS
    for entry, report in zip(new["tune"], reports, strict=True):
        assert report is not None
        assert (entry["loss_before"], entry["loss_after"]) == (report.loss_before, report.loss_after)
        assert (entry["measured_sparsity"], entry["layers"]) == (report.sparsity, report.layers)


def test_the_seed_decides(folder: Path, tmp_path: Path) -> None:
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        _tune(folder, tmp_path / name, seed=seed)
    first, again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "again", "other"))
    assert first == again
    assert first != other


def test_a_token_file_is_used_as_it_is(folder: Path, tmp_path: Path) -> None:
    tokens = random_tokens(3, 17)
    path = str(tmp_path / "tokens.safetensors")
    save_file({"tokens": tokens}, path)
    report = _tune(folder, tmp_path / "out", dataset=path)
    model = AutoModelForCausalLM.from_pretrained(folder / "float32")
    tune_model(model, tokens, _recipe())
    after = weights(tmp_path / "out")
    assert all(torch.equal(after[f"{name}.weight"], model.get_submodule(name).weight) for name in report.layers)
    with pytest.raises(UsageError, match="leave seqlen out"):
        _tune(folder, tmp_path / "other", dataset=path, seqlen=16)


def test_what_cannot_work_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="prune it first with `macko prune`"):
        _tune(folder, tmp_path / "out", "dense-float32")
    with pytest.raises(NonFiniteError, match="use a lower learning rate"):
        _tune(folder, tmp_path / "out", learning_rate=1e30, warmup=0)
    with pytest.raises(UsageError, match="at most 64 tokens"):
        _tune(folder, tmp_path / "out", seqlen=65)
    assert not [*tmp_path.iterdir()]


def test_weights_that_overflow_on_the_way_to_the_file_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="overflow float16; use a lower learning rate"):
        _tune(folder, tmp_path / "out", "float16", learning_rate=1e5, warmup=0, steps=1)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
        MemoryError(),
    ],
)
def test_lack_of_memory_is_said_plainly(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(training, "_train", fail)
    with pytest.raises(CheckpointError, match="use a smaller --batch-size") as caught:
        _tune(folder, tmp_path / "out")
    assert_plain(str(caught.value))
    assert not [*tmp_path.iterdir()]


def test_an_interruption_leaves_what_was_there(folder: Path, tmp_path: Path) -> None:
    _tune(folder, tmp_path / "out", steps=1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def interrupt(what: str, done: int, _total: int) -> None:
        if (what, done) == ("tuning", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_checkpoint(
            folder / "float32",
            tmp_path / "out",
            _recipe(dataset=str(folder / "text.txt")),
            device="cpu",
            overwrite=True,
            progress=interrupt,
        )
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_loss_of_a_real_model_falls(tmp_path: Path) -> None:
    text = tmp_path / "stories.txt"
    text.write_bytes(lzma.decompress((FOLDER / "calibration.txt.xz").read_bytes()))
    prune_checkpoint(MODEL_FOLDER, tmp_path / "pruned", PruneRecipe(method="magnitude", sparsity=0.6), device="cpu")
    recipe = TuneRecipe(dataset=str(text), steps=10, batch_size=2, seqlen=128)
    report = tune_checkpoint(tmp_path / "pruned", tmp_path / "out", recipe, device="cpu")
    assert report.loss_after < 0.7 * report.loss_before
    assert report.sparsity_before == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0}, {"batch_size": 0}, {"accumulation": 0}, {"seqlen": 1}, {"learning_rate": 0}, {"learning_rate": math.inf},
        {"warmup": 1.0}, {"warmup": -0.1}, {"weight_decay": -1}, {"dataset": ""}, {"split": ""}, {"text_column": ""},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        TuneRecipe(**settings)
    assert_plain(str(caught.value))
