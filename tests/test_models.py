"""Loading models and finding their linear layers: the names in every family, and a plain sentence for what cannot be used."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, MAX_POSITIONS, make_tokenizer, random_tokens, save_model
from helpers import assert_plain, copy_model, edit_weights, truncate, weights
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    DynamicCache,
    GPT2Config,
    LlamaForCausalLM,
    MambaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from macko_llm import models
from macko_llm.dtypes import MODEL_DTYPES
from macko_llm.errors import CheckpointError, UsageError

_TINY = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2}
_ATTENTION = {**_TINY, "num_attention_heads": 2, "intermediate_size": 16}
_EXPERTS = {**_ATTENTION, "num_key_value_heads": 2}
_GATED = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
NAMES = {
    "phi3": ("model.layers", ["self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"]),
    "opt": ("model.decoder.layers", [*(f"self_attn.{part}_proj" for part in ("k", "v", "q", "out")), "fc1", "fc2"]),
    "gpt_neox": (
        "gpt_neox.layers",
        ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    ),
}


GROUPS = {
    "phi3": [],  # its projections are fused on disk
    "gpt_neox": [],
    "opt": [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]],
}
"""Layers of a block that read the same input."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama", "llama", torch.float16)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_and_linears_of_every_family(family: str) -> None:
    model = FAMILIES[family]()
    prefix, inside = NAMES.get(family, ("model.layers", _GATED))
    blocks = models.decoder_blocks(model)
    assert list(blocks) == [f"{prefix}.{index}" for index in range(model.config.num_hidden_layers)]
    assert all(model.get_submodule(name) is block for name, block in blocks.items())
    linears = models.prunable_linears(model)
    assert sorted(linears) == sorted(f"{block}.{name}" for block in blocks for name in inside)
    for name, linear in linears.items():
        assert type(linear) is nn.Linear
        assert model.get_submodule(name) is linear
    firsts = [name.removeprefix(f"{prefix}.").split(".")[0] for name in linears]
    assert firsts == sorted(firsts), "linears come in the order of the blocks"


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_that_read_the_same_input(family: str) -> None:
    model = FAMILIES[family]()
    groups = models.projection_groups(model)
    inside = GROUPS.get(family, [_GATED[:3], _GATED[4:6]])
    assert groups == [
        [f"{block}.{name}" for name in names] for block in models.decoder_blocks(model) for names in inside
    ]
    inputs: dict[str, int] = {}
    for name in itertools.chain(*groups):
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, name=name: inputs.update({name: id(arguments[0])})
        )
    model(random_tokens(1, 4))
    for group in groups:
        assert len({inputs[name] for name in group}) == 1, "they are multiplied with one tensor"


def test_other_names_and_widths_of_projections() -> None:
    block = nn.Module()
    for name, width in {"w1": 8, "w2": 4, "w3": 8, "query": 8, "key": 8, "value": 7, "gate_proj": 8}.items():
        block.add_module(name, nn.Linear(width, 4))
    block.q_proj = block.k_proj = block.v_proj = nn.Identity()
    assert models.projection_groups(block) == [["w1", "w3"]]
    assert models.projection_groups(nn.ModuleList([block])) == [["0.w1", "0.w3"]]
    block.value = nn.Linear(8, 2)
    assert models.projection_groups(block) == [["query", "key", "value"], ["w1", "w3"]]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_skeleton_has_the_linears_without_weights(family: str, tmp_path: Path) -> None:
    FAMILIES[family]().config.save_pretrained(tmp_path)
    skeleton = models.skeleton(tmp_path)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    shapes = {name: linear.weight.shape for name, linear in models.prunable_linears(skeleton).items()}
    assert shapes == {name: linear.weight.shape for name, linear in models.prunable_linears(FAMILIES[family]()).items()}


def test_a_loaded_model_is_the_saved_one(llama: Path) -> None:
    model = models.load_model(llama, device="cpu")
    assert not model.training
    assert model.dtype == torch.float16
    stored = weights(llama)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())
    assert models.max_positions(model.config) == MAX_POSITIONS


@pytest.mark.parametrize("dtype", MODEL_DTYPES)
def test_the_dtype_is_the_one_asked_for(dtype: str, llama: Path) -> None:
    model = models.load_model(llama, dtype=dtype, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {MODEL_DTYPES[dtype]}
    assert model(random_tokens(1, 4)).logits.isfinite().all()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_memory_counts_shared_tensors_once(family: str) -> None:
    model = FAMILIES[family]()
    distinct = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    assert models.memory_bytes(model) == sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (family == "gemma2")


def test_the_tokenizer_is_loaded(llama: Path) -> None:
    text = "Once upon a time"
    assert models.load_tokenizer(llama)(text).input_ids == make_tokenizer()(text).input_ids


# What is refused


def _refused(call: Callable[[], object], words: str, error: type[Exception] = CheckpointError) -> None:
    with pytest.raises(error, match=words) as caught:
        call()
    assert type(caught.value) is error
    assert_plain(str(caught.value))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2), r"h\.0\.attn\.c_attn is a Conv1D layer"),
        (MixtralConfig(**_EXPERTS, num_local_experts=2), r"experts\.gate_up_proj is \[2, 32, 16\], several experts"),
        (
            Qwen2MoeConfig(**_EXPERTS, num_experts=2, moe_intermediate_size=16),
            r"experts\.gate_up_proj is \[2, 32, 16\], several experts",
        ),
        (MambaConfig(**_TINY), "or a convolution in one tensor"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_blocks_that_cannot_be_pruned(config: PretrainedConfig, words: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    _refused(lambda: models.prunable_linears(models.skeleton(tmp_path)), words)


def test_blocks_that_cannot_be_found_or_hold_no_linears() -> None:
    scattered = FAMILIES["llama"]()
    scattered.config.num_hidden_layers = 7
    _refused(lambda: models.decoder_blocks(scattered), "does not keep its decoder blocks in one nn.ModuleList")
    bare = FAMILIES["llama"]()
    bare.model.layers = nn.ModuleList([nn.Identity(), nn.Identity()])
    _refused(lambda: models.prunable_linears(bare), "hold no nn.Linear")


def test_models_that_do_not_continue_text(tmp_path: Path) -> None:
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    bert = BertForMaskedLM(BertConfig(**_ATTENTION))
    for model in (t5, bert):  # AutoModelForCausalLM would refuse T5, but load BERT
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        words = f"holds a {type(model).__name__}, which is not a causal language model"
        _refused(lambda folder=folder: models.load_model(folder, device="cpu"), words)
        _refused(lambda folder=folder: models.skeleton(folder), words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "banana"}, "is not understood .*banana"),
        ({"model_type": None, "architectures": None}, "is not understood"),
        ({"model_type": "banana", "auto_map": {"AutoConfig": "own.Config"}}, "add --trust-remote-code"),
        ({"hidden_size": "wide"}, "makes no sense .*hidden_size"),
        ({"num_attention_heads": 7}, "makes no sense .*7"),
        ({"quantization_config": "macko"}, "makes no sense"),
        ({"hidden_act": "nope"}, "cannot be built .*nope"),
    ],
)
def test_configs_that_cannot_be_used(changes: dict[str, object], words: str, llama: Path, tmp_path: Path) -> None:
    folder = copy_model(llama, tmp_path / "model", **changes)
    _refused(lambda: models.load_model(folder, device="cpu"), words)


def test_a_config_that_is_no_json(llama: Path, tmp_path: Path) -> None:
    folder = copy_model(llama, tmp_path / "model")
    (folder / "config.json").write_text("{")
    _refused(lambda: models.load_model(folder, device="cpu"), r"config\.json cannot be read as JSON")


def test_a_model_quantized_with_a_missing_package(llama: Path, tmp_path: Path) -> None:
    folder = copy_model(llama, tmp_path / "model", quantization_config={"quant_method": "gptq", "bits": 4})
    _refused(lambda: models.load_model(folder, device="cpu"), "cannot be built .*install")


def test_weights_that_are_absent(llama: Path, tmp_path: Path) -> None:
    folder = copy_model(llama, tmp_path / "model")
    tensors = weights(folder)
    (folder / "model.safetensors").unlink()
    _refused(lambda: models.load_model(folder, device="cpu"), "has no safetensors weights")
    # A pickle can run code when it is read: it counts as no weights.
    torch.save(tensors, folder / "pytorch_model.bin")
    _refused(lambda: models.load_model(folder, device="cpu"), "has no safetensors weights")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_missing_tensor_is_never_random(name: str, llama: Path, tmp_path: Path) -> None:
    folder = copy_model(llama, tmp_path / "model")
    edit_weights(folder, {name: None})
    _refused(lambda: models.load_model(folder, device="cpu"), f"lacks 1 of the model's weights, {name} first")


def test_a_tensor_of_another_shape_is_never_random(llama: Path, tmp_path: Path) -> None:
    folder = copy_model(llama, tmp_path / "model", vocab_size=321)
    _refused(
        lambda: models.load_model(folder, device="cpu"), r"lm_head\.weight of .* is \[320, 64\], but .* \[321, 64\]"
    )


def test_damaged_weights(llama: Path, tmp_path: Path) -> None:
    folder = copy_model(llama, tmp_path / "model")
    truncate(folder / "model.safetensors")
    _refused(lambda: models.load_model(folder, device="cpu"), "missing, corrupt or truncated")


@pytest.mark.parametrize("device", ["cuda:99", "banana", "meta", ""])
def test_devices_that_are_not_there(device: str, llama: Path) -> None:
    _refused(lambda: models.load_model(llama, device=device), f"device '{device}' is not available", UsageError)


@pytest.mark.parametrize("dtype", ["int8", "float64", "fp16", ""])
def test_dtypes_that_are_not_supported(dtype: str, llama: Path) -> None:
    _refused(lambda: models.load_model(llama, dtype=dtype), "is not supported; use auto, float16", UsageError)


def test_a_tokenizer_that_is_missing_or_damaged(llama: Path, tmp_path: Path) -> None:
    folder = copy_model(llama, tmp_path / "model")
    for content, words in (
        ("{", r"tokenizer\.json cannot be read as JSON"),
        ("{}", "no usable tokenizer .*copy the tok"),
    ):
        (folder / "tokenizer.json").write_text(content)
        _refused(lambda: models.load_tokenizer(folder), words)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    _refused(lambda: models.load_tokenizer(folder), "has no tokenizer .*copy the tokenizer files")


def test_the_cache_goes_by_the_name_that_the_forward_knows(llama: Path) -> None:
    class Old(nn.Module):
        def forward(self, past_key_values: Any) -> Any:
            return past_key_values

    class New(nn.Module):
        def forward(self, cache: Any) -> Any:
            return cache

    assert models.cache_argument(Old()) == "past_key_values"
    assert models.cache_argument(New()) == "cache"
    model, tokens = models.load_model(llama, device="cpu"), random_tokens(1, 5)
    cache = DynamicCache(config=model.config)
    model(tokens, use_cache=True, **{models.cache_argument(model): cache})
    assert cache.get_seq_length() == 5


def test_custom_code_runs_only_when_trusted(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    own = {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnModel"}
    folder = copy_model(llama, tmp_path / "model", model_type="own", auto_map=own, architectures=["OwnModel"])
    (folder / "own_model.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    _refused(lambda: models.load_model(folder, device="cpu"), "trust-remote-code")
    model = models.load_model(folder, device="cpu", trust_remote_code=True)
    assert isinstance(model, LlamaForCausalLM)
    assert type(model).__name__ == "OwnModel"
    tokens = random_tokens(1, 5)
    plain = AutoModelForCausalLM.from_pretrained(llama)
    assert torch.equal(model(tokens).logits, plain(tokens).logits)
    assert len(models.prunable_linears(models.skeleton(folder, trust_remote_code=True))) == 14


def test_names_in_groups_keep_their_order_and_only_whole_groups_are_together() -> None:
    model = FAMILIES["llama"]()
    linears = list(models.prunable_linears(model))
    grouped = models.in_groups(linears, model)
    assert sorted(itertools.chain(*grouped)) == sorted(linears)
    assert [len(group) for group in grouped] == [3, 1, 2, 1] * 2
    lacking = [name for name in linears if not name.endswith("0.self_attn.k_proj")]
    assert [len(group) for group in models.in_groups(lacking, model)] == [1, 1, 1, 2, 1, 3, 1, 2, 1]
