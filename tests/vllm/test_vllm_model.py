"""Packed models in vLLM, found and loaded as vLLM does it, against the dense models that they were packed from."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("vllm.version", reason="needs vLLM: make test-vllm")

from families import FAMILIES, save_model
from helpers import copy_model, edit_weights, weights
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model

from macko_llm.errors import FormatError
from macko_llm.packing import pack_checkpoint
from macko_llm.pruning import prune_checkpoint
from macko_llm.recipe import PruneRecipe

MEMBERS = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A tensor-parallel group of this process alone."""
    with pytest.MonkeyPatch.context() as patch, set_current_vllm_config(VllmConfig()):
        if not torch.accelerator.is_available():  # as vLLM's worker on a CPU does
            patch.setattr(torch.accelerator, "empty_cache", lambda: None)
        meeting_place = f"file://{tmp_path_factory.mktemp('group') / 'meeting'}"
        init_distributed_environment(1, 0, meeting_place, 0, "gloo")
        initialize_model_parallel(1)
        yield
    cleanup_dist_env_and_memory()


def load(folder: Path) -> nn.Module:
    arguments = EngineArgs(model=str(folder), dtype="float32", max_model_len=32, enforce_eager=True)
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        return get_model(vllm_config=config)


def test_vllm_knows_the_method_without_an_import_of_macko(folders: tuple[Path, Path]) -> None:
    code = (
        "import sys; from vllm.engine.arg_utils import EngineArgs; "
        "config = EngineArgs(model=sys.argv[1], max_model_len=128).create_engine_config(); "
        "print('method', config.model_config.quantization, type(config.quant_config).__name__)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(folders[1])], capture_output=True, text=True, timeout=300, check=False
    )
    assert "method macko MackoVllmConfig" in run.stdout, run.stderr


@pytest.mark.usefixtures("alone")
def test_each_layer_multiplies_as_the_dense_model_s_and_all_else_is_vllm_s(folders: tuple[Path, Path]) -> None:
    dense, packed = folders
    stored = weights(dense)
    model = load(packed)
    methods: dict[str, list[str]] = {}
    for name, layer in model.named_modules():
        if not hasattr(layer, "quant_method"):
            continue
        method = type(layer.quant_method).__name__
        methods.setdefault(method, []).append(name)
        if method != "MackoLinearMethod":
            continue
        parent, _, last = name.rpartition(".")
        weight = torch.cat([stored[f"{parent}.{member}.weight"] for member in MEMBERS.get(last, [last])]).float()
        for tokens in (1, 4, 50):
            x = torch.randn(tokens, weight.shape[1])
            with torch.inference_mode():
                y = layer.quant_method.apply(layer, x)
            torch.testing.assert_close(y, F.linear(x, weight), rtol=1e-4, atol=1e-4)
        assert not hasattr(layer, "weight")
    assert len(methods["MackoLinearMethod"]) == 4 * 4 - 1  # one down_proj is stored dense
    assert methods["UnquantizedLinearMethod"] == ["model.layers.2.mlp.down_proj"]
    assert methods["UnquantizedEmbeddingMethod"] == ["model.embed_tokens", "lm_head"]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_layers_of_every_family_multiply_as_vllm_s_dense_ones(family: str, tmp_path: Path) -> None:
    save_model(tmp_path / "dense", family, torch.float16)
    prune_checkpoint(tmp_path / "dense", tmp_path / "pruned", PruneRecipe(method="magnitude"), device="cpu")
    pack_checkpoint(tmp_path / "pruned", tmp_path / "packed", device="cpu")
    of_dense = dict(load(tmp_path / "pruned").named_modules())
    packed = {
        name: layer
        for name, layer in load(tmp_path / "packed").named_modules()
        if type(getattr(layer, "quant_method", None)).__name__ == "MackoLinearMethod"
    }
    assert len(packed) == (12 if family == "gemma3" else 8)  # four a block: all that pruning touched
    for name, layer in packed.items():
        x, dense = torch.randn(5, layer.input_size), of_dense[name]
        with torch.inference_mode():
            y = layer.quant_method.apply(layer, x, layer.bias)
            expected = dense.quant_method.apply(dense, x, dense.bias)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("alone")
def test_a_checkpoint_without_an_array_is_refused_by_its_layer_s_name(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = copy_model(folders[1], tmp_path / "damaged")
    edit_weights(folder, {"model.layers.3.mlp.up_proj.weight_deltas": None})
    with pytest.raises(FormatError, match=r"each array of model\.layers\.3\.mlp\.gate_up_proj once"):
        load(folder)


@pytest.mark.usefixtures("alone")
def test_a_layer_that_is_stored_twice_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    dense, packed = folders
    name = "model.layers.1.self_attn.q_proj.weight"  # of the layer that has another member dense
    folder = copy_model(packed, tmp_path / "twice")
    edit_weights(folder, {name: weights(dense)[name]})
    with pytest.raises(FormatError, match=r"each array of model\.layers\.1\.self_attn\.qkv_proj once"):
        load(folder)
