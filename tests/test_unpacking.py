"""Checkpoint to packed checkpoint and back: every family, bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES, random_tokens
from helpers import copy_model, weights
from packing_helpers import bits, logits, names, packed_llama, pruned_family
from safetensors.torch import load_file

import macko_llm
from macko_llm import checkpoint, generation, models
from macko_llm.inspecting import inspect_checkpoint
from macko_llm.linear import MackoLinear
from macko_llm.packing import pack_checkpoint
from macko_llm.unpacking import unpack_checkpoint


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_llama(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_there_and_back(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pruned = pruned_family(tmp_path, family, dtype)
    packed, unpacked = tmp_path / "packed", tmp_path / "unpacked"
    report = pack_checkpoint(pruned, packed)
    assert report.kept_dense == []
    assert set(report.layers) == set(models.prunable_linears(FAMILIES[family]()))
    model = macko_llm.load(packed, device="cpu")
    assert {name for name, module in model.named_modules() if isinstance(module, MackoLinear)} == set(report.layers)
    assert model.dtype == dtype

    # Many tokens: the same dense product on the same weights, so the same bits.
    tokens = random_tokens(2, 20)
    assert torch.equal(logits(packed, tokens), logits(pruned, tokens))
    # Few tokens: sums in another order. Both are as far from fp32 as 16 bits are; in fp32 they agree.
    few = tokens[:1, :3]
    exact = logits(pruned, few, "float32")
    assert (logits(packed, few, "float32") - exact).abs().max() < 1e-3
    rounding = (logits(pruned, few).float() - exact).abs().max()
    assert (logits(packed, few).float() - exact).abs().max() <= 2 * rounding + 1e-3

    unpack_checkpoint(packed, unpacked)
    assert bits(weights(unpacked)) == bits(weights(pruned))
    assert names(unpacked) == names(pruned)
    for name in names(pruned):
        if name.endswith(".json"):
            assert json.loads((unpacked / name).read_text()) == json.loads((pruned / name).read_text()), name


def test_a_generation_config_that_transformers_may_not_write_is_kept(llama: Path, tmp_path: Path) -> None:
    pruned = copy_model(llama / "pruned", tmp_path / "pruned")
    odd = '{"temperature": 0.6, "do_sample": false,\n"top_p": 0.9, "eos_token_id": [1, 2]}'  # as Llama 2 was published
    (pruned / "generation_config.json").write_text(odd)
    pack_checkpoint(pruned, tmp_path / "packed")
    unpack_checkpoint(tmp_path / "packed", tmp_path / "unpacked")
    for folder in ("packed", "unpacked"):
        assert (tmp_path / folder / "generation_config.json").read_text() == odd
        model = macko_llm.load(tmp_path / folder, device="cpu")
        assert generation.stop_token_ids(model, models.load_tokenizer(pruned)) == {1, 2}


def test_shards(llama: Path, tmp_path: Path) -> None:
    packed, unpacked = tmp_path / "packed", tmp_path / "unpacked"
    pack_checkpoint(llama / "pruned", packed, max_shard_size="20KB")
    files = checkpoint.weight_files(packed)
    assert len(files) > 3
    for file in files:
        sizes = [tensor.nbytes for tensor in load_file(file).values()]
        assert sum(sizes) <= max(20_000, *sizes)
    assert bits(weights(packed)) == bits(weights(llama / "packed"))
    inspect_checkpoint(packed)
    tokens = random_tokens(1, 9)
    assert torch.equal(logits(packed, tokens), logits(llama / "packed", tokens))
    unpack_checkpoint(packed, unpacked, max_shard_size="30KB")
    assert len(checkpoint.weight_files(unpacked)) > 3
    assert bits(weights(unpacked)) == bits(weights(llama / "pruned"))
    assert torch.equal(logits(unpacked, tokens), logits(llama / "pruned", tokens))
