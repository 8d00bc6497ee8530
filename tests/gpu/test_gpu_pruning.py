"""Pruning and tuning on a GPU: the right weights go, wherever hidden states are, and a job that was cut off ends the same."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_tokenizer, random_tokens
from helpers import weights
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from macko_llm import models
from macko_llm.packing import pack_checkpoint
from macko_llm.pruned_packing import prune_packed
from macko_llm.pruning import prune_checkpoint, prune_model
from macko_llm.pruning.scores import lowest
from macko_llm.recipe import PruneRecipe
from macko_llm.tuning.settings import TuneRecipe
from macko_llm.tuning.training import tune_model

BLOCKS = 4
KINDS = [
    {"method": "wanda"},
    {"method": "ria"},
    {"method": "sparsegpt", "update": "admm", "allocation": "owl"},
    {"method": "magnitude", "pattern": "2:4"},
]


def _model() -> PreTrainedModel:
    config = LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=BLOCKS, num_attention_heads=8, vocab_size=320
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float16)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "dense"
    _model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file({"tokens": random_tokens(8, 64)}, path)
    return str(path)


def _bytes(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@torch.no_grad()
def test_wanda_takes_the_lowest_scores_of_each_row() -> None:
    """The model as a whole runs before each block is judged, with hooks where its linears read."""
    tokens = random_tokens(8, 64)
    dense, pruned = _model().cuda().eval(), _model().cuda()
    prune_model(pruned, tokens, PruneRecipe())
    linears = models.prunable_linears(dense)
    assert len(linears) == BLOCKS * 7
    for number in range(BLOCKS):
        mine = {name: linear for name, linear in linears.items() if f"layers.{number}." in name}
        squares = {name: torch.zeros(linear.in_features, device="cuda") for name, linear in mine.items()}

        def look(name: str, squares: dict[str, torch.Tensor] = squares) -> Any:
            def hook(_linear: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                squares[name] += args[0].float().square().sum(dim=(0, 1))

            return hook

        handles = [linear.register_forward_pre_hook(look(name)) for name, linear in mine.items()]
        for sequence in tokens:
            dense(sequence[None].cuda(), use_cache=False)
        for handle in handles:
            handle.remove()
        for name, linear in mine.items():
            scores = linear.weight.float().abs() * squares[name].sqrt()
            result = pruned.get_submodule(name).weight
            gone = result == 0
            assert (gone.sum(dim=1) == linear.in_features // 2).all(), name
            assert torch.equal(result[~gone], linear.weight[~gone])
            highest = scores.masked_fill(~gone, 0).amax(dim=1)
            assert (highest <= scores.masked_fill(gone, torch.inf).amin(dim=1) * (1 + 1e-5)).all(), name
            linear.weight.copy_(result)


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_those_of_the_model_in_memory(kind: dict[str, str], dense: Path, tokens: str, tmp_path: Path) -> None:
    recipe = PruneRecipe(calibration=tokens, **kind)  # type: ignore[arg-type]
    model = models.load_model(dense, device="cuda")
    prune_model(model, random_tokens(8, 64), recipe)
    model.save_pretrained(tmp_path / "memory")
    for place in ("device", "host", "disk"):
        prune_checkpoint(dense, tmp_path / place, recipe, device="cuda", hidden_states=place)
        assert _bytes(tmp_path / place) == _bytes(tmp_path / "memory"), place
    prune_packed(dense, tmp_path / "at once", recipe, device="cuda")
    pack_checkpoint(tmp_path / "device", tmp_path / "packed", device="cuda")
    assert weights(tmp_path / "at once").keys() == weights(tmp_path / "packed").keys()
    assert _bytes(tmp_path / "at once") == _bytes(tmp_path / "packed")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_job_that_was_cut_off_ends_the_same(
    kind: dict[str, str], packed: bool, dense: Path, tokens: str, tmp_path: Path
) -> None:
    recipe = PruneRecipe(calibration=tokens, **kind)  # type: ignore[arg-type]
    prune: Any = prune_packed if packed else prune_checkpoint
    prune(dense, tmp_path / "whole", recipe, device="cuda")
    for last in range(1, BLOCKS + 1):

        def stop(what: str, done: int, _total: int, last: int = last) -> None:
            if (what, done) == ("pruning blocks", last):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), pytest.warns(match="--resume"):
            prune(dense, tmp_path / "parts", recipe, device="cuda", resume=True, progress=stop)
    prune(dense, tmp_path / "parts", recipe, device="cuda", resume=True)
    assert _bytes(tmp_path / "parts") == _bytes(tmp_path / "whole")


@pytest.mark.parametrize(
    "kind", [{"method": "ria"}, {"method": "sparsegpt"}, {"update": "admm"}, {"method": "sparsegpt", "update": "admm"}]
)
@torch.no_grad()
def test_methods_do_what_they_do_on_the_cpu(kind: dict[str, str]) -> None:
    """In fp32 and the first block, as later ones read what differs already: few weights on the verge, and what they move."""
    tokens, recipe = random_tokens(8, 64), PruneRecipe(targets=("model.layers.0.*",), **kind)  # type: ignore[arg-type]
    here, there = _model().float(), _model().float().cuda()
    assert prune_model(here, tokens, recipe).sparsity == prune_model(there, tokens, recipe).sparsity
    dense = _model().float()
    for name, linear in models.prunable_linears(here).items():
        other = there.get_submodule(name).weight.cpu()
        assert torch.equal(linear.weight, dense.get_submodule(name).weight) != ("layers.0." in name), name
        alike = (linear.weight == 0) == (other == 0)
        assert alike.float().mean() > 0.99, name
        assert (linear.weight - other)[alike].norm() < 0.1 * linear.weight.norm(), name


@pytest.mark.parametrize("size", [(1 << 17) + 1, 3_000_001])
def test_the_lowest_of_a_long_row(size: int) -> None:
    """Ties everywhere."""
    scores = torch.randint(0, 1000, (1, size), generator=torch.Generator().manual_seed(0)).float()
    for count in (1, size // 2, size):
        order = scores[0].argsort(stable=True)[:count]
        expected = torch.zeros(size, dtype=torch.bool).index_fill_(0, order, True)
        assert torch.equal(lowest(scores.cuda(), count)[0].cpu(), expected)


def test_one_block_at_a_time_is_on_the_gpu(tokens: str, tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2752, num_hidden_layers=12, num_attention_heads=8, vocab_size=320
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    size = models.memory_bytes(model)
    model.save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    del model
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    prune_checkpoint(tmp_path / "dense", tmp_path / "out", PruneRecipe(calibration=tokens), device="cuda")
    # A block is a twelfth; what choosing among its weights takes in fp32 and int64 is a few times the largest of them.
    assert torch.cuda.max_memory_allocated() - before < size / 3


def test_not_one_zero_comes_back_in_tuning() -> None:
    model = _model().cuda()
    prune_model(model, None, PruneRecipe(method="magnitude"))
    zeros = {name: linear.weight == 0 for name, linear in models.prunable_linears(model).items()}
    before = {name: linear.weight.clone() for name, linear in models.prunable_linears(model).items()}
    tune_model(model, random_tokens(8, 64), TuneRecipe(dataset="unused.txt", steps=5, batch_size=4, learning_rate=1e-3))
    for name, linear in models.prunable_linears(model).items():
        assert (linear.weight[zeros[name]] == 0).all(), name
        assert (linear.weight != before[name]).float().mean() > 0.3, name
