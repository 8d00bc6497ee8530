"""LoRA of PEFT on packed layers: what it computes, what is trained, what is saved, and what cannot be done."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import random_tokens, save_model
from helpers import assert_plain
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from macko_llm.errors import UsageError
from macko_llm.linear import MackoLinear
from macko_llm.packing import pack_checkpoint
from macko_llm.pruning import prune_checkpoint
from macko_llm.recipe import PruneRecipe

peft: Any = pytest.importorskip("peft", reason="needs PEFT: pip install peft")

TOKENS = random_tokens(2, 11)
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module", params=["llama", "qwen2"])  # without and with biases
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as "pruned" and "packed"."""
    folder = tmp_path_factory.mktemp(request.param)
    save_model(folder / "dense", request.param, torch.float16)
    prune_checkpoint(folder / "dense", folder / "pruned", PruneRecipe(method="magnitude"), device="cpu")
    pack_checkpoint(folder / "pruned", folder / "packed")
    return folder


def _load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _adapted(folder: Path, **options: Any) -> nn.Module:
    """The model with adapters, the same for dense and packed weights."""
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{"target_modules": TARGETS, "r": 4, **options})
    return peft.get_peft_model(_load(folder), config)


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    return model(TOKENS).logits


def _adapters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.filterwarnings("error:Unsupported layer type")
def test_training_an_adapter_is_training_it_on_the_dense_model(folder: Path) -> None:
    models = [_adapted(folder / kind) for kind in ("packed", "pruned")]
    assert sum(isinstance(module, MackoLinear) for module in models[0].modules()) == 14
    assert torch.equal(_logits(models[0]), _logits(_load(folder / "packed")))  # an adapter begins as nothing
    for model in models:
        optimizer = torch.optim.SGD(_adapters(model).values(), lr=1.0)
        losses = []
        for _ in range(6):
            optimizer.zero_grad()
            loss = model(TOKENS, labels=TOKENS).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.95 * losses[0]
    packed, dense = (_adapters(model) for model in models)
    assert len(packed) == 2 * 2 * len(TARGETS)
    assert list(packed) == list(dense)
    assert all(".lora_" in name for name in packed)
    for name, parameter in packed.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter, dense[name], rtol=1e-3, atol=1e-5)
    assert not any(".lora_" not in name and each.grad is not None for name, each in models[0].named_parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"use_rslora": True},
        {"lora_bias": True},
    ],
    ids=str,
)
def test_each_kind_of_plain_adapter_computes_what_it_does_on_the_dense_model(
    options: dict[str, Any], folder: Path
) -> None:
    models = [_adapted(folder / kind, **options) for kind in ("packed", "pruned")]
    for model in models:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in _adapters(model).values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    packed, dense = (_adapters(model) for model in models)
    assert all(torch.equal(parameter, dense[name]) for name, parameter in packed.items())
    found, expected = (_logits(model) for model in models)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    with models[0].disable_adapter():
        assert not torch.allclose(_logits(models[0]), expected, rtol=1e-2, atol=1e-2)


def test_an_adapter_that_is_saved_comes_back_and_leaves_no_trace(folder: Path, tmp_path: Path) -> None:
    model = _adapted(folder / "packed")
    with torch.no_grad():
        for parameter in _adapters(model).values():
            parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    plain, adapted = _logits(_load(folder / "packed")), _logits(model)
    assert not torch.equal(plain, adapted)
    again = peft.PeftModel.from_pretrained(_load(folder / "packed"), tmp_path)
    assert torch.equal(_logits(again), adapted)
    dense = peft.PeftModel.from_pretrained(_load(folder / "pruned"), tmp_path)
    torch.testing.assert_close(_logits(dense), adapted, rtol=1e-3, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(_logits(model), plain)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(again.generate(TOKENS, **options), dense.generate(TOKENS, **options))
    assert torch.equal(_logits(model.unload()), plain)


def test_adapters_of_transformers_itself_are_saved_without_what_describes_the_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)  # it wants a newer one
    model = _load(folder / "packed")
    model.add_adapter(peft.LoraConfig(target_modules=TARGETS, r=4, init_lora_weights=False))
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert "adapter_model.safetensors" in names
    assert not {"macko.json", "README.md", "model.safetensors"} & names
    again = _load(folder / "packed")
    again.load_adapter(tmp_path)
    assert torch.equal(_logits(again), _logits(model))


def test_transformers_trainer_trains_an_adapter(folder: Path, tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in random_tokens(4, 11)]
    arguments = TrainingArguments(
        tmp_path, max_steps=2, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
    )
    model = _adapted(folder / "packed")
    before = {name: parameter.clone() for name, parameter in _adapters(model).items()}
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert any(not torch.equal(parameter, before[name]) for name, parameter in _adapters(model).items())
    with pytest.raises(ValueError, match="attach trainable adapters"):
        Trainer(model=_load(folder / "packed"), args=arguments, train_dataset=rows)


def test_merging_is_refused_and_changes_nothing(folder: Path) -> None:
    model = _adapted(folder / "packed", init_lora_weights=False)
    expected = _logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(UsageError, match="cannot be merged into packed weights") as caught:
            merge()
        assert_plain(str(caught.value))
    assert torch.equal(_logits(model), expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "plain LoRA, without DoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'; use True, False or 'gaussian'"),
        ({"init_lora_weights": "orthogonal"}, "init_lora_weights='orthogonal'; use True, False or 'gaussian'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'; use True, False or 'gaussian'"),
    ],
)
def test_what_needs_more_than_the_input_and_the_product_is_refused(
    options: dict[str, Any], words: str, folder: Path
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        _adapted(folder / "packed", **options)
    assert_plain(str(caught.value))


@pytest.mark.parametrize("imports", ["import peft, macko_llm", "import macko_llm, peft"])
def test_peft_may_be_imported_before_or_after_macko(imports: str) -> None:
    script = f"{imports}\nprint([layer.__name__ for layer in peft.LoraConfig()._custom_modules])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.stdout == "['MackoLinear']\n", run.stderr
