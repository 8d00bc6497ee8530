"""What tensors become on their way into a packed checkpoint: rounding, values that are not finite, and going on."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import assert_plain, copy_model, edit_weights, weights
from packing_helpers import UP, bits, folder_bytes, names, packed_llama, pruned_family
from torch import Tensor

from macko_llm import checkpoint, models, outputs, packed_writer
from macko_llm.errors import NonFiniteError
from macko_llm.pack_report import Rounding
from macko_llm.packed_writer import PackedWriter
from macko_llm.packing import pack_checkpoint
from macko_llm.shards import ShardWriter
from macko_llm.unpacking import unpack_checkpoint


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_llama(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(
    ("stored", "asked", "rounds"),
    [
        (torch.float32, None, True),
        (torch.bfloat16, "float16", True),
        (torch.float16, "bfloat16", True),
        (torch.float16, None, False),
        (torch.bfloat16, None, False),
    ],
)
def test_what_was_rounded_is_reported(
    stored: torch.dtype, asked: str | None, rounds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_writer, "_ROUNDED_AT_ONCE", 1000)
    pruned = pruned_family(tmp_path, "llama", stored)
    tiny = weights(pruned)[f"{UP}.weight"]
    # In float16 nothing is left of three of them, and little precision of the fourth.
    tiny[0, tiny[0].nonzero()[:4, 0]] = torch.tensor([1e-9, -2e-9, 3e-9, 1.3e-6]).to(stored)
    edit_weights(pruned, {f"{UP}.weight": tiny})
    report = pack_checkpoint(pruned, tmp_path / "packed", dtype=asked)
    target = getattr(torch, report.value_dtype)
    smallest = {torch.float16: 2.0**-14, torch.bfloat16: 2.0**-126}[target]
    changed, zeros, largest, subnormal, tensors = 0, 0, 0.0, 0, 0
    for tensor in weights(pruned).values():
        before, after = tensor.double().numpy(), tensor.to(target).double().numpy()
        changed += int((before != after).sum())
        zeros += int(((before != after) & (after == 0)).sum())
        subnormal += int(((before != after) & (after != 0) & (abs(after) < smallest)).sum())
        tensors += int((before != after).any())
        kept = after != 0
        largest = max(largest, abs(after[kept] / before[kept] - 1).max())
    assert report.rounding == Rounding(changed, zeros, pytest.approx(largest, rel=1e-6), subnormal, tensors)
    assert (subnormal > 0) == (rounds and target == torch.float16)
    assert (changed > 0) == rounds
    assert checkpoint.read_provenance(tmp_path / "packed")["pack"]["rounding"]["weights"] == changed
    unpack_checkpoint(tmp_path / "packed", tmp_path / "unpacked")
    assert bits(weights(tmp_path / "unpacked")) == bits({k: v.to(target) + 0.0 for k, v in weights(pruned).items()})


@pytest.mark.parametrize("done", [0, 1, 7, 20])
def test_a_packed_writer_that_was_cut_off_goes_on_to_the_same_files(done: int, llama: Path, tmp_path: Path) -> None:
    """One process adds some tensors, and one more of which no state is kept; another goes on from what JSON kept."""
    source = llama / "pruned"
    tensors = weights(source)
    names = list(tensors)
    skeleton = models.skeleton(source)
    linears = list(models.prunable_linears(skeleton))
    with outputs.new_folder(tmp_path / "packed", overwrite=False) as target:
        shards = ShardWriter(target, 20_000)
        first = PackedWriter(linears, "bfloat16", shards)
        for name in names[:done]:
            first.add(name, tensors[name])
        kept = json.dumps([shards.state(), first.state()])
        first.add(names[done], tensors[names[done]])
        shards_state, state = json.loads(kept)
        second = PackedWriter(linears, "bfloat16", ShardWriter(target, 20_000, shards_state), state)
        for name in names[done:]:
            second.add(name, tensors[name])
        report = second.finish(source, target, skeleton)
    whole = pack_checkpoint(source, tmp_path / "whole", dtype="bfloat16", max_shard_size="20KB")
    assert report == replace(whole, seconds=0.0)
    assert whole.rounding.weights > 0
    assert folder_bytes(tmp_path / "packed") == folder_bytes(tmp_path / "whole")


@pytest.mark.parametrize("place", [UP, "model.embed_tokens"])
def test_values_that_overflow_float16(place: str, tmp_path: Path) -> None:
    pruned = pruned_family(tmp_path, "llama", torch.float32)
    weight = weights(pruned)[f"{place}.weight"]
    weight[3, 5] = -70_000.0
    edit_weights(pruned, {f"{place}.weight": weight})
    with pytest.raises(NonFiniteError, match=rf"{place}\.weight holds 7e\+04, .*pack with --dtype bfloat16") as caught:
        pack_checkpoint(pruned, tmp_path / "packed")
    assert_plain(str(caught.value))
    assert not (tmp_path / "packed").exists()
    assert pack_checkpoint(pruned, tmp_path / "packed", dtype="bfloat16").value_dtype == "bfloat16"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [f"{UP}.weight", "model.norm.weight"])
def test_weights_that_are_not_finite(name: str, value: float, llama: Path, tmp_path: Path) -> None:
    folder = copy_model(llama / "pruned", tmp_path / "pruned")
    weight = weights(folder)[name]
    weight.view(-1)[7] = value
    edit_weights(folder, {name: weight})
    with pytest.raises(NonFiniteError, match=f"{name} holds NaN or infinity") as caught:
        pack_checkpoint(folder, tmp_path / "packed")
    assert_plain(str(caught.value))
    assert names(tmp_path) == ["pruned"]


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("asked", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", [f"{UP}.weight", "model.norm.weight"])
def test_what_is_not_finite_is_told_from_what_overflows(
    name: str, asked: str, stored: torch.dtype, llama: Path, tmp_path: Path
) -> None:
    """Whatever the dtypes, at the first place and at the last, and where both are there NaN and infinity are named."""
    folder = copy_model(llama / "pruned", tmp_path / "pruned")
    edit_weights(folder, {key: tensor.to(stored) for key, tensor in weights(folder).items()})
    whole = weights(folder)[name]
    overflow = 1e5 if asked == "float16" else 3.4e38
    for place in (0, -1):
        for value in (float("nan"), float("inf"), float("-inf"), overflow, -overflow):
            weight = whole.clone()
            weight.view(-1)[place] = value
            kept = float(weight.view(-1)[place])  # infinite where the stored dtype overflows already
            words = f"{name} holds {abs(kept):.4g}, which overflows {asked}; pack with --dtype bfloat16."
            if not math.isfinite(kept):
                weight.view(-1)[3] = overflow
                words = f"{name} holds NaN or infinity; repair the checkpoint before packing it."
            edit_weights(folder, {name: weight})
            if math.isfinite(float(torch.tensor(kept).to(getattr(torch, asked)))):
                pack_checkpoint(folder, None, dtype=asked)
                continue
            with pytest.raises(NonFiniteError) as caught:
                pack_checkpoint(folder, None, dtype=asked)
            assert str(caught.value) == words


def test_each_tensor_is_looked_through_once(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For NaN and infinity, by whatever of torch's finds them, which is most of the work of packing on a CPU."""
    looked: list[int] = []
    for finder in ("isfinite", "isnan", "isinf", "aminmax"):
        original = getattr(torch, finder)

        def find(tensor: Tensor, original: Callable[..., object] = original) -> object:
            if tensor.ndim:
                looked.append(tensor.numel())
            return original(tensor)

        monkeypatch.setattr(torch, finder, find)
    pack_checkpoint(llama / "pruned", None)
    assert sorted(looked) == sorted(tensor.numel() for tensor in weights(llama / "pruned").values())
