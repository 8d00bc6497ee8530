"""`macko bench decode` on the CPU: what it says, that its figures agree with each other, what it builds, how it refuses."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import MAX_POSITIONS, save_model
from helpers import assert_plain, copy_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner, Result

from macko_llm import checkpoint, models
from macko_llm.benchmarks import decode, machine
from macko_llm.benchmarks.parts import part_of
from macko_llm.benchmarks.shapes import SHAPES, shape_config
from macko_llm.benchmarks.subjects import Subject, make_subject, packed_layers, packed_sparsity
from macko_llm.cli.main import app
from macko_llm.layouts import canonical
from macko_llm.linear import MackoLinear
from macko_llm.loading import load

CPU = torch.device("cpu")
TASK = decode.Task(context=3, new_tokens=2, batch=1)
NAMES = ["transformers, dense", "macko, dense", "macko, packed"]


def macko(*arguments: object, exit_code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["bench", "decode", *map(str, arguments), "--device", "cpu"])
    assert result.exit_code == exit_code, result.output
    return result


def subject_of(model: Path | None = None, config: str | None = None, **options: Any) -> Subject:
    settings = {"sparsities": (), "random_weights": False, "dtype": "auto", **options}
    return make_subject(model and str(model), config, device=CPU, **settings)


@pytest.fixture(scope="module", autouse=True)
def _small_reads() -> Iterator[None]:
    """The read bandwidth of this machine is not what these tests are about, and takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(machine.READ_BYTES, "cpu", 2**20)
        yield


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    arguments = ["--config", "tiny", "--sparsity", "0.5", "--sparsity", "0.25,0.9", "--batch", "2", "--context", "5"]
    content = json.loads(macko(*arguments, "--new-tokens", "3", "--json").stdout)
    assert isinstance(content, dict)
    return content


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("decode") / "dense", "llama", torch.float16)


@pytest.fixture(scope="module")
def packed(dense: Path) -> Path:
    """The dense model pruned and packed."""
    pruned = dense.parent / "pruned"
    model = load(dense, device="cpu")
    with torch.no_grad():
        for linear in models.prunable_linears(model).values():
            linear.weight[:, ::3] = 0
    model.save_pretrained(pruned)
    target = dense.parent / "packed"
    result = CliRunner().invoke(app, ["pack", str(pruned), "-o", str(target)])
    assert result.exit_code == 0, result.output
    return target


# What it says


def test_rows(report: dict[str, Any]) -> None:
    """Transformers is first, and what asks for less than a whole column is rounded down, as Wanda does it."""
    assert [row["name"] for row in report["rows"]] == [*NAMES, NAMES[2], NAMES[2]]
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 2 * 172 * 64) + 2 * 64 * 172
    zeros = [
        2 * ((64 * 2 + 32 * 2 + 172 * 2) * int(64 * share) + 64 * int(172 * share)) / weights
        for share in (0.5, 0.25, 0.9)
    ]
    assert [row["sparsity"] for row in report["rows"]] == pytest.approx([0, 0, *zeros], abs=1e-12)
    assert report["task"] == {"context": 5, "new_tokens": 3, "batch": 2}
    assert (report["model"], report["runs"]) == ("tiny", decode.RUNS)
    assert "GPUs only" in report["rows"][0]["note"]


def test_figures_agree_with_each_other(report: dict[str, Any]) -> None:
    baseline = report["rows"][0]["measured"]
    for row in report["rows"]:
        measured = row["measured"]
        assert measured["tokens_per_second"] == pytest.approx(1e3 / measured["milliseconds_per_token"])
        assert measured["total_tokens_per_second"] == pytest.approx(2 * measured["tokens_per_second"])
        assert row["speedup"] == pytest.approx(measured["tokens_per_second"] / baseline["tokens_per_second"])
        parts = measured["parts"]
        assert sum(parts.values()) == pytest.approx(measured["milliseconds_per_token"])
        assert parts["linears"] > 0
        assert parts["attention"] > 0
        assert measured["first_token_seconds"] > 0
        assert (measured["peak_memory_bytes"], measured["dtype"]) == (None, "float16")


def test_json_names_the_conditions(report: dict[str, Any]) -> None:
    assert report["command"] == (
        "macko bench decode --config tiny --sparsity 0.5,0.25,0.9 --context 5 --new-tokens 3 --batch 2 --dtype auto"
        " --device cpu"
    )
    machine = report["machine"]
    assert (machine["device"], machine["driver"], machine["torch"]) == ("cpu", None, torch.__version__)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", machine["date"])
    linears = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 172 * 64) + 320 * 64
    assert report["dense_bytes"] == 2 * linears
    limit = machine["read_gigabytes_per_second"] * 1e9 / report["dense_bytes"]
    assert report["dense_limit_tokens_per_second"] == pytest.approx(limit)


def test_table(packed: Path) -> None:
    """A packed model has one packed row, with its own sparsity."""
    said = macko(packed, "--new-tokens", "2", "--context", "4").stdout
    assert re.match(r"cpu, \d+ threads?, torch .*, transformers [\d.]+", said)
    assert "packed, float16, 1 text, context 4, 2 new tokens" in said
    for name, share in (*((name, "0.0%") for name in NAMES[:2]), (NAMES[2], r"3[34]\.\d%")):
        row = rf"{name} +{share}( +[\d.]+){{2}} +[\d.]+x( +[\d.]+){{4}} +- +\d+ ms +\w+"
        assert len(re.findall(row, said)) == 1, said
    assert "transformers, dense: it is compiled on GPUs only" in said
    assert "Dense limit: " in said


def test_a_dense_model_is_packed_only_if_asked(dense: Path) -> None:
    content = json.loads(macko(dense, "--new-tokens", "1", "--context", "2", "--json").stdout)
    assert [row["name"] for row in content["rows"]] == NAMES[:2]


# What is measured


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
def test_random_weights_have_exactly_their_zeros(sparsity: float) -> None:
    model = subject_of(config="tiny").packed(sparsity)
    layers = dict(packed_layers(model))
    assert len(layers) == 2 * 7
    for layer in layers.values():
        weight = canonical.unpack(layer.matrix)
        assert weight.shape == (layer.out_features, layer.in_features)
        assert ((weight == 0).sum(dim=1) == int(layer.in_features * sparsity)).all()
        assert weight[weight != 0].float().std() == pytest.approx(0.02, rel=0.1)


def test_random_models_lack_nothing() -> None:
    """All is real, of the dtype asked for, with the norms and the angles of RoPE as transformers makes them."""
    reference = AutoModelForCausalLM.from_config(shape_config("tiny"))
    subject = subject_of(config="tiny", dtype="bfloat16")
    for model in (subject.dense(), subject.packed(0.5)):
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        assert model.dtype == torch.bfloat16
        buffers = dict(reference.named_buffers())
        for name, buffer in model.named_buffers():
            assert name.endswith("weight_layout") or torch.equal(buffer, buffers[name])
        for name, parameter in model.named_parameters():
            if "norm" in name:
                assert (parameter == 1).all()
        ids = torch.tensor([[1, 2, 3]])
        assert model(ids).logits.float().std() > 0.01
    assert isinstance(subject.packed(0.5).model.layers[0].mlp.up_proj, MackoLinear)
    assert type(subject.dense().model.layers[0].mlp.up_proj) is nn.Linear


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama2-7b", 6.738), ("llama2-70b", 68.977), ("llama3-8b", 8.030), ("tinyllama-1.1b", 1.100)],
)
def test_named_shapes_are_those_of_the_models(name: str, parameters: float) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape_config(name))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(parameters, abs=1e-3)


def test_only_the_shape_of_a_model(dense: Path, tmp_path: Path) -> None:
    """The weights are drawn, tied ones stay tied, and no weight file is read."""
    folder = copy_model(dense, tmp_path / "shape", tie_word_embeddings=True)
    (folder / "model.safetensors").write_bytes(b"no weights")
    model = subject_of(folder, random_weights=True).dense()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.lm_head.weight.is_meta
    assert model.config.hidden_size == 64


def test_a_dense_model_is_pruned_by_magnitude(dense: Path) -> None:
    subject = subject_of(dense, sparsities=(0.3,))
    whole = models.prunable_linears(subject.dense())
    for name, layer in packed_layers(subject.packed(0.3)):
        weight, pruned = whole[name].weight, canonical.unpack(layer.matrix)
        kept = pruned != 0
        assert ((~kept).sum(dim=1) == int(weight.shape[1] * 0.3)).all()
        assert torch.equal(pruned[kept], weight[kept])
        largest_gone = weight.abs().masked_fill(kept, 0).amax(dim=1)
        smallest_kept = weight.abs().masked_fill(~kept, torch.inf).amin(dim=1)
        assert (largest_gone <= smallest_kept).all()


def test_a_packed_model_and_what_it_unpacks_to(packed: Path) -> None:
    assert checkpoint.is_packed(packed)
    subject = subject_of(packed)
    one, other = subject.packed(None), subject.dense()
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(one(ids).logits, other(ids).logits, rtol=1e-2, atol=1e-2)
    assert not dict(packed_layers(other))
    assert packed_sparsity(one) == pytest.approx(1 / 3, abs=0.01)


@pytest.mark.parametrize("kind", ["shape", "dense", "packed"])
def test_packed_layers_are_arranged_for_as_many_tokens_as_there_are_texts(
    kind: str, dense: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {"shape": (None, "tiny"), "dense": (dense, None), "packed": (packed, None)}[kind]
    subject = subject_of(*made, sparsities=() if kind == "packed" else (0.5,))
    told = []

    def stop(model: PreTrainedModel, task: decode.Task) -> Any:
        told.extend((layer.tokens, task.batch) for _, layer in packed_layers(model))
        raise torch.OutOfMemoryError

    monkeypatch.setattr(decode, "_measure_engine", stop)
    monkeypatch.setattr(decode, "_measure_transformers", stop)
    decode.measure_decode(subject, decode.Task(5, 3, 4), device=CPU)
    assert set(told) == {(4, 4)}


class Failing(Subject):
    """A subject whose dense model cannot be had."""

    def __init__(self, error: Exception) -> None:
        self._real, self._error = subject_of(config="tiny"), error
        super().__init__("failing", self._real.skeleton, (0.5,))

    def dense(self) -> Any:
        raise self._error

    def packed(self, sparsity: float | None, tokens: int = 1) -> Any:
        return self._real.packed(sparsity, tokens)


def test_what_does_not_fit_leaves_the_other_rows() -> None:
    subject = Failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB."))
    found = decode.measure_decode(subject, TASK, device=CPU)
    assert [row.note for row in found.rows] == ["does not fit in the device's memory"] * 2 + [None]
    assert [row.measured is None for row in found.rows] == [True, True, False]
    assert [row.speedup for row in found.rows] == [None] * 3


def test_a_compiler_that_fails_leaves_the_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("no\n C compiler")

    monkeypatch.setattr(decode.TransformersLoop, "decode", fail)
    found = decode.measure_decode(subject_of(config="tiny", sparsities=[0.5]), TASK, device=CPU)
    assert [row.note for row in found.rows] == ["ValueError: no C compiler", None, None]
    assert [row.measured is None for row in found.rows] == [True, False, False]


def test_other_errors_are_not_hidden() -> None:
    with pytest.raises(ValueError, match="a bug"):
        decode.measure_decode(Failing(ValueError("a bug")), TASK, device=CPU)


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("gemvNSP_kernel<__half, __half, __half, float, 1, 32, 4, 1024, cublasGemvParamsEx<...>>", "linears"),
        ("nvjet_hsh_64x8_64x16_4x1_v_bz_TNT", "linears"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_f16_s16816gemm_f16_64x64_32x6_tn_align8>", "linears"),
        ("void (anonymous namespace)::spmv_slice<__half, 4>(macko_sliced, ...)", "linears"),
        ("aten::mm", "linears"),
        ("aten::addmm", "linears"),
        ("macko::spmv", "linears"),
        ("fmha_cutlassF_f16_aligned_64x128_rf_sm80", "attention"),
        ("void pytorch_flash::flash_fwd_splitkv_kernel<...>", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("triton_poi_fused__scaled_dot_product_efficient_attention_cat_mm_5", "rest"),
        ("triton_tem_fused_mm_3", "linears"),
        ("aten::mul", "rest"),
        ("void at::native::vectorized_elementwise_kernel<...>", "rest"),
    ],
)
def test_parts_by_name(kernel: str, part: str) -> None:
    assert part_of(kernel) == part


def test_an_engine_may_know_its_parts() -> None:
    class Knowing:
        def __init__(self, found: dict[str, float] | None) -> None:
            self.found = found

        def decode(self, token: torch.Tensor) -> torch.Tensor:
            return token

        def parts(self) -> dict[str, float] | None:
            return self.found

    token = torch.zeros(1, dtype=torch.int64)
    known = decode._parts(Knowing({"linears": 2.0, "attention": 0.5}), token, 3.0, TASK)
    assert known is not None
    assert (known.linears, known.attention, known.rest) == (2.0, 0.5, 0.5)
    assert decode._parts(Knowing(None), token, 3.0, TASK) is None


# How it refuses


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "either a MODEL or the name of a shape"),
        (["./model", "--config", "tiny"], "either a MODEL or the name of a shape"),
        (["--config", "huge"], "no shape 'huge'"),
        (["--config", "tiny", "--sparsity", "1"], "outside [0, 1)"),
        (["--config", "tiny", "--sparsity", "half"], "'half' is not a sparsity"),
        (["--config", "tiny", "--context", "200"], "more than the model's 256 positions; use --context 119 or less"),
        (["--config", "tiny", "--new-tokens", "256"], "use fewer --new-tokens"),
        (["--config", "tiny", "--context", "0"], "--context 0"),
        (["--config", "tiny", "--batch=-1"], "--batch -1"),
        (["--config", "tiny", "--dtype", "float32"], "float32 cannot be packed"),
        (["--config", "tiny", "--dtype", "int8"], "int8"),
    ],
)
def test_wrong_calls_are_one_sentence(arguments: list[str], words: str) -> None:
    result = macko(*arguments, exit_code=2)
    sentence = result.stderr.splitlines()[-1]
    assert words in sentence
    assert_plain(sentence.removeprefix("macko: "))
    assert result.stdout == ""


def test_a_model_has_only_so_many_positions(dense: Path) -> None:
    result = macko(dense, "--new-tokens", "5", "--context", MAX_POSITIONS, exit_code=2)
    assert f"the model's {MAX_POSITIONS} positions; use --context 50 or less" in result.stderr


def test_a_packed_model_keeps_its_sparsity(packed: Path) -> None:
    result = macko(packed, "--sparsity", "0.5", exit_code=2)
    assert "is packed and keeps its sparsity; drop --sparsity" in result.stderr


def test_float32_is_not_packed(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    result = macko(folder, "--sparsity", "0.5", "--context", "4", "--new-tokens", "4", exit_code=2)
    assert "use --dtype float16" in result.stderr


def test_help_names_every_shape() -> None:
    said = macko("--help").stdout
    assert "macko bench decode" in said.split("Examples:")[1]
    for name in SHAPES:
        assert name in said
