"""An lm_head is pruned where a recipe's `layers` asks for it, like one more block after the last."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, SENTENCES, build, make_tokenizer, random_tokens
from helpers import assert_plain, weights
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

import macko_llm
from macko_llm import models
from macko_llm.calibration import calibration_tokens
from macko_llm.errors import UsageError
from macko_llm.packing import pack_checkpoint
from macko_llm.pruned_packing import prune_packed
from macko_llm.pruning import pipeline, plan, prune_checkpoint, prune_model
from macko_llm.pruning.weights import StreamedWeights
from macko_llm.recipe import METHODS, PruneRecipe
from macko_llm.shards import ShardWriter

HEAD = {"lm_head": 0.5}
BLOCKS = 3


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    _save(folder)
    return folder


def _save(folder: Path, **settings: Any) -> Path:
    config = {
        "vocab_size": 320, "max_position_embeddings": 64, "num_hidden_layers": BLOCKS, "hidden_size": 32,
        "intermediate_size": 48, "num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    build(LlamaConfig(**{**config, **settings})).to(torch.float16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> PruneRecipe:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(" ".join(SENTENCES * 4), encoding="utf-8")
    return PruneRecipe(calibration=str(path), nsamples=4, seqlen=24, layers=HEAD)


def _with(recipe: PruneRecipe, **settings: Any) -> PruneRecipe:
    return PruneRecipe(**{**recipe.__dict__, **settings})


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _head_inputs(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """What the head of the whole model is given, [tokens, hidden size]."""
    seen: list[Tensor] = []
    head = model.get_output_embeddings()
    with head.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0])), torch.no_grad():
        for sequence in tokens:
            model.eval()(input_ids=sequence[None], use_cache=False)
    return torch.cat(seen).flatten(0, 1).float()


def _lowest_half(scores: Tensor) -> Tensor:
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for row, of_row in zip(mask, scores, strict=True):
        row[sorted(range(len(of_row)), key=lambda column: of_row[column].item())[: len(of_row) // 2]] = True
    return mask


@pytest.mark.parametrize("family", [*FAMILIES])
def test_the_head_loses_what_wanda_takes_of_it_behind_pruned_blocks_and_the_final_norm(family: str) -> None:
    model, tokens = FAMILIES[family](), random_tokens(4, 16)
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
    name = next(name for name, module in model.named_modules() if module is head)
    before = head.weight.detach().clone()
    report = prune_model(model, tokens, PruneRecipe(layers={name: 0.5}))
    assert [*report.layers][-1] == name
    assert report.layers[name] == 0.5
    # The blocks are pruned now, as they were when the head was.
    norms = _head_inputs(model, tokens).norm(dim=0)
    gone = _lowest_half(before.float().abs() * norms)
    assert torch.equal(head.weight, before.masked_fill(gone, 0.0))


def test_the_blocks_lose_the_same_with_and_without_the_head(llama: Path, tmp_path: Path, recipe: PruneRecipe) -> None:
    for allocation in ("uniform", "owl"):
        how = _with(recipe, allocation=allocation)
        prune_checkpoint(llama, tmp_path / allocation, how, device="cpu")
        prune_checkpoint(llama, tmp_path / f"{allocation}-blocks", _with(how, layers=()), device="cpu")
        pruned, blocks = weights(tmp_path / allocation), weights(tmp_path / f"{allocation}-blocks")
        assert {name for name in pruned if not torch.equal(pruned[name], blocks[name])} == {"lm_head.weight"}
        assert blocks["lm_head.weight"].count_nonzero() == blocks["lm_head.weight"].numel()


@pytest.mark.parametrize(
    "settings",
    [*({"method": method} for method in METHODS), {"update": "admm", "allocation": "owl"}, {"ignore": ("re:model",)}],
    ids=str,
)
def test_a_streamed_head_has_the_bytes_of_one_pruned_in_memory(
    settings: dict[str, Any], llama: Path, tmp_path: Path, recipe: PruneRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = _with(recipe, **settings)
    prune_checkpoint(llama, tmp_path / "streamed", how, device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "find_homes", lambda *_: None)
        prune_checkpoint(llama, tmp_path / "in-memory", how, device="cpu")
    assert _files(tmp_path / "streamed") == _files(tmp_path / "in-memory")
    assert (weights(tmp_path / "streamed")["lm_head.weight"] == 0).float().mean() == 0.5
    assert json.loads((tmp_path / "streamed" / "macko.json").read_text())["prune"]["layers"]["lm_head"] == 0.5


def test_a_head_in_shards_lies_where_transformers_puts_it(
    llama: Path, tmp_path: Path, recipe: PruneRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.load_model(llama, device="cpu")
    assert recipe.seqlen is not None
    prune_model(
        model, calibration_tokens(recipe.calibration, models.load_tokenizer(llama), 4, recipe.seqlen, 0), recipe
    )
    model.save_pretrained(tmp_path / "expected", max_shard_size="30KB")
    monkeypatch.setattr("macko_llm.pruning.sinks.MAX_SHARD_SIZE", "30KB")
    prune_checkpoint(llama, tmp_path / "out", recipe, device="cpu")
    expected, made = _files(tmp_path / "expected"), _files(tmp_path / "out")
    assert sum(name.endswith(".safetensors") for name in expected) > 3
    assert {name: made[name] for name in expected if name.startswith("model")} == {
        name: content for name, content in expected.items() if name.startswith("model")
    }


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"update": "admm", "allocation": "owl"}, {"method": "magnitude"}],
    ids=["wanda", "slow", "magnitude"],
)
def test_a_job_that_is_cut_off_around_the_head_ends_with_the_same_bytes(
    settings: dict[str, Any],
    packed: bool,
    llama: Path,
    tmp_path: Path,
    recipe: PruneRecipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    how, target = _with(recipe, **settings), tmp_path / "out"
    job = prune_packed if packed else prune_checkpoint
    job(llama, tmp_path / "whole", how, device="cpu")
    journal = tmp_path / ".macko-partial-out" / ".macko-journal.json"
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # nothing is cleaned up, as after a SIGKILL
    for done in (BLOCKS, BLOCKS + 1):

        def progress(what: str, number: int, _total: int, done: int = done) -> None:
            if (what, number) == ("pruning blocks", done):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            job(llama, target, how, device="cpu", resume=True, progress=progress)
        assert json.loads(journal.read_text())["blocks"] == done
        assert ("lm_head" in json.loads(journal.read_text())["zeros"]) == (done > BLOCKS)
    said: list[tuple[str, int]] = []
    job(llama, target, how, device="cpu", resume=True, progress=lambda what, number, _: said.append((what, number)))
    assert not [number for what, number in said if what == "pruning blocks"]
    assert _files(target) == _files(tmp_path / "whole")


def test_a_kill_while_the_head_is_written_leaves_a_job_that_goes_on(
    llama: Path, tmp_path: Path, recipe: PruneRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head's place is half written over."""
    prune_checkpoint(llama, tmp_path / "whole", recipe, device="cpu")

    def half(self: ShardWriter, name: str, tensor: Tensor) -> None:
        broken = tensor.clone()
        broken[len(broken) // 2 :] = 7.0
        replace(self, name, broken)
        raise KeyboardInterrupt

    replace = ShardWriter.replace
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(ShardWriter, "replace", half)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(llama, tmp_path / "out", recipe, device="cpu")
    prune_checkpoint(llama, tmp_path / "out", recipe, device="cpu", resume=True)
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")


def test_a_packed_checkpoint_keeps_the_head_dense_with_its_zeros(
    llama: Path, tmp_path: Path, recipe: PruneRecipe
) -> None:
    how = _with(recipe, dtype="float16")
    pruned, report = prune_packed(llama, tmp_path / "at-once", how, device="cpu")
    prune_checkpoint(llama, tmp_path / "pruned", how, device="cpu")
    pack_checkpoint(tmp_path / "pruned", tmp_path / "in-two", device="cpu")
    assert _files(tmp_path / "at-once") == _files(tmp_path / "in-two")
    assert pruned.layers["lm_head"] == 0.5
    assert "lm_head" not in report.layers
    stored = weights(tmp_path / "at-once")["lm_head.weight"]
    assert torch.equal(stored, weights(tmp_path / "pruned")["lm_head.weight"])
    tokens = random_tokens(1, 12)
    with torch.no_grad():
        packed = macko_llm.load(tmp_path / "at-once", device="cpu")
        dense = models.load_model(tmp_path / "pruned", device="cpu")
        assert torch.equal(packed.lm_head.weight, dense.lm_head.weight)
        torch.testing.assert_close(packed(tokens).logits, dense(tokens).logits, rtol=2e-2, atol=2e-2)
        assert packed.generate(tokens, max_new_tokens=4, do_sample=False).shape == (1, 16)


@pytest.mark.parametrize(
    ("layers", "share"),
    [
        ({"*": 0.25}, None),
        ({"re:.*": 0.25}, None),
        ({"lm_head": 0.75, "*": 0.25}, 0.75),
        ({"*head": 0.75}, 0.75),
        ({"re:lm_": 0.75}, 0.75),
        ({"*": 0.25, "lm_head": 0.0}, 0.0),
    ],
)
@pytest.mark.parametrize("targets", [(), ("down_proj",)])
def test_only_a_pattern_that_fits_no_block_asks_for_the_head(
    layers: dict[str, float], share: float | None, targets: tuple[str, ...], llama: Path, tmp_path: Path
) -> None:
    recipe = PruneRecipe(method="magnitude", layers=layers, targets=targets)
    planned = plan(llama, tmp_path / "out", recipe)
    assert planned.layer_sparsities.get("lm_head") == share
    assert ("lm_head" in planned.layers) == (share is not None)
    prune_checkpoint(llama, tmp_path / "out", recipe, device="cpu")
    assert (weights(tmp_path / "out")["lm_head.weight"] == 0).float().mean() == (share or 0.0)


@pytest.mark.parametrize(
    ("tied", "layers", "words"),
    [
        (
            True,
            HEAD,
            "layers asks for lm_head, whose weights are the embeddings' too (tie_word_embeddings); leave it out",
        ),
        (False, {"embed_tokens": 0.5}, "layers asks for model.embed_tokens, an embedding, which multiplies nothing"),
        (True, {"re:.*embed": 0.5}, "layers asks for model.embed_tokens, an embedding"),
    ],
)
def test_what_cannot_be_pruned_is_refused_in_a_sentence(
    tied: bool, layers: dict[str, float], words: str, tmp_path: Path, recipe: PruneRecipe
) -> None:
    source = _save(tmp_path / "dense", tie_word_embeddings=tied)
    for job in (plan, prune_checkpoint, prune_packed):
        with pytest.raises(UsageError) as refused:
            job(source, tmp_path / "out", _with(recipe, layers=layers))
        assert words in str(refused.value)
        assert_plain(str(refused.value))
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    prune_model(models.load_model(source, device="cpu"), None, PruneRecipe(method="magnitude", layers={"*": 0.5}))


def test_no_block_is_in_memory_beside_the_head(
    llama: Path, tmp_path: Path, recipe: PruneRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    skeletons: list[nn.Module] = []
    load_empty, behind = models.load_empty, StreamedWeights.behind
    real: list[set[str]] = []

    def remembered(*args: Any, **options: Any) -> Any:
        skeletons.append(load_empty(*args, **options))
        return skeletons[-1]

    @contextmanager
    def watched(self: StreamedWeights) -> Iterator[None]:
        with behind(self):
            real.append({name for name, weight in skeletons[0].named_parameters() if not weight.is_meta})
            yield

    monkeypatch.setattr(models, "load_empty", remembered)
    monkeypatch.setattr(StreamedWeights, "behind", watched)
    prune_checkpoint(llama, tmp_path / "out", recipe, device="cpu")
    assert real == [{"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}]
    assert all(weight.is_meta for weight in skeletons[0].parameters())


def test_an_ignored_head_stays_dense(llama: Path, tmp_path: Path) -> None:
    recipe = PruneRecipe(method="magnitude", ignore=("lm_head",), layers={"*": 0.25})
    assert "lm_head" not in plan(llama, tmp_path / "out", recipe).layers
