"""Packed matrices on a GPU: the CPU's bytes, float64's products, and a packed Llama that says what the dense one says."""

from pathlib import Path

import pytest
import torch
from families import FAMILIES, make_tokenizer, random_tokens
from torch import Tensor
from transformers import PreTrainedModel

import macko_llm
from macko_llm import generation, models
from macko_llm.errors import FormatError
from macko_llm.format import MackoMatrix
from macko_llm.layouts import canonical
from macko_llm.linear import ARRAY_NAMES, MackoLinear
from macko_llm.packing import pack_checkpoint
from macko_llm.text import encode_prompt

HALVES = [torch.float16, torch.bfloat16]
SHAPES = [(0, 5), (1, 1), (1, 172), (7, 1), (33, 172), (64, 300), (257, 2048), (1024, 4096)]
NEW_TOKENS = 24


def sparse(rows: int, cols: int, dtype: torch.dtype, sparsity: float = 0.5) -> Tensor:
    """Random [rows, cols] on the CPU; the last row is empty, the first full."""
    generator = torch.Generator().manual_seed(rows * cols)
    weight = torch.randn(rows, cols, generator=generator)
    weight[1:] *= torch.rand(max(rows - 1, 0), cols, generator=generator) >= sparsity
    weight[1:][-1:] = 0
    return weight.to(dtype)


def moved(matrix: MackoMatrix, device: torch.device | str) -> canonical.Canonical:
    arrays = (matrix.values.to(device), matrix.deltas.to(device), matrix.row_offsets.to(device))
    return canonical.Canonical(*arrays, matrix.shape)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", HALVES)
def test_pack_and_unpack_give_the_bytes_of_the_cpu(
    cuda: torch.device, dtype: torch.dtype, shape: tuple[int, int], sparsity: float
) -> None:
    weight = sparse(*shape, dtype, sparsity)
    on_cpu, on_gpu = canonical.pack(weight), canonical.pack(weight.to(cuda))
    for name in ("values", "deltas", "row_offsets"):
        expected, actual = getattr(on_cpu, name), getattr(on_gpu, name)
        assert actual.device == cuda
        assert actual.dtype == expected.dtype
        assert torch.equal(actual.cpu(), expected)
    canonical.validate(on_gpu, "layer")
    assert torch.equal(canonical.unpack(on_gpu).cpu(), weight)


def test_validate_sees_on_the_gpu_what_it_sees_on_the_cpu(cuda: torch.device) -> None:
    valid = canonical.pack(sparse(9, 40, torch.float16))
    lies = {"shape": (9, 30), "values": valid.values + torch.nan, "deltas": valid.deltas | 1, "row_offsets": None}
    lies["row_offsets"] = valid.row_offsets.flip(0)
    for name, lie in lies.items():
        matrix = MackoMatrix(**{**vars(valid), name: lie})
        with pytest.raises(FormatError) as on_cpu:
            canonical.validate(matrix, "layer")
        with pytest.raises(FormatError) as on_gpu:
            canonical.validate(moved(matrix, cuda), "layer")
        assert str(on_gpu.value) == str(on_cpu.value)


@pytest.mark.parametrize("tokens", [0, 1, 2, 4, 5, 33])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", HALVES)
def test_whole_numbers_multiply_exactly(
    cuda: torch.device, dtype: torch.dtype, shape: tuple[int, int], tokens: int
) -> None:
    """Weights -1, 0, 1 and such activations: every partial sum is a small whole number, exact in every dtype and any order."""
    rows, cols = shape
    weight = sparse(rows, cols, dtype).sign()
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randint(-1, 2, (tokens, cols), generator=generator)
    bias = torch.randint(-9, 10, (rows,), generator=generator)
    exact = x.double() @ weight.double().T
    assert not (exact.abs() > 240).any()
    matrix = moved(canonical.pack(weight), cuda)
    for x_dtype in (dtype, torch.float32):
        y = matrix.linear(x.to(cuda, x_dtype), None)
        assert (y.dtype, y.device) == (x_dtype, cuda)
        assert torch.equal(y.double().cpu(), exact)
        y = matrix.linear(x.to(cuda, x_dtype), bias.to(cuda, x_dtype))
        assert torch.equal(y.double().cpu(), exact + bias)


@pytest.mark.usefixtures("full_precision_sums")
@pytest.mark.parametrize("tokens", [1, 3, 16])
@pytest.mark.parametrize("shape", [(1, 1), (33, 172), (257, 2048)])
@pytest.mark.parametrize("dtype", HALVES)
def test_linear_is_within_rounding_of_float64(
    cuda: torch.device, dtype: torch.dtype, shape: tuple[int, int], tokens: int
) -> None:
    """The bound of tests/test_ops.py, twice as wide: tensor cores cut off where others round."""
    rows, cols = shape
    weight = sparse(rows, cols, dtype)
    layer = MackoLinear.from_matrix(moved(canonical.pack(weight), cuda), torch.randn(rows).to(cuda, dtype))
    for x_dtype in (dtype, torch.float32):
        x = torch.randn(tokens, cols).to(x_dtype)
        with torch.inference_mode():
            y = layer(x.to(cuda))
        bias = layer.bias.double().cpu()
        exact = x.double() @ weight.double().T + bias
        magnitude = x.double().abs() @ weight.double().abs().T + bias.abs()
        accumulated = ((weight != 0).sum(dim=1) + 2) * 2**-23 * magnitude
        # A bias may be added to a product that is rounded already.
        stored = (exact.abs() + (exact - bias).abs() + accumulated) * torch.finfo(x_dtype).eps
        assert (y.dtype, y.device) == (x_dtype, cuda)
        assert ((y.double().cpu() - exact).abs() <= accumulated + stored).all()


@pytest.mark.parametrize("tokens", [1, 16])
def test_work_follows_the_current_stream(cuda: torch.device, tokens: int) -> None:
    """The input is written late on a side stream: work on another stream would read what was there before."""
    weight = sparse(64, 300, torch.float16).sign()
    matrix = moved(canonical.pack(weight), cuda)
    x = torch.randint(-1, 2, (tokens, 300)).to(cuda, torch.float16)
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.inference_mode():
        torch.cuda._sleep(100_000_000)
        late.copy_(x)
        y = matrix.linear(late, None)
        late.zero_()
    stream.synchronize()
    assert torch.equal(y.double().cpu(), x.double().cpu() @ weight.double().T)


def test_another_gpu_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    weight = sparse(33, 172, torch.float16).sign()
    matrix = canonical.pack(weight.to("cuda:1"))
    y = matrix.linear(torch.ones(1, 172, device="cuda:1"), None)
    assert y.device == torch.device("cuda:1")
    assert torch.equal(y.double().cpu(), torch.ones(1, 172).double() @ weight.double().T)


@pytest.fixture(scope="module", params=HALVES, ids=["float16", "bfloat16"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Llama, half of its weights zero: dense, and packed."""
    folder = tmp_path_factory.mktemp("llama")
    model = FAMILIES["llama"]()
    for linear in models.prunable_linears(model).values():
        small = linear.weight.abs() < linear.weight.abs().median(dim=1, keepdim=True).values
        linear.weight.data.masked_fill_(small, 0)
    dense, packed = folder / "dense", folder / "packed"
    model.to(request.param).save_pretrained(dense)
    make_tokenizer().save_pretrained(dense)
    report = pack_checkpoint(dense, packed)
    assert not report.kept_dense
    return dense, packed


def load(folder: Path, dtype: str) -> PreTrainedModel:
    model = macko_llm.load(folder, dtype=dtype, device="cuda")
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    return model


def logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(tokens.to(model.device)).logits.double().cpu()


def test_a_packed_llama_gives_the_logits_of_the_dense_one(folders: tuple[Path, Path]) -> None:
    dense, packed = (load(folder, "float32") for folder in folders)
    dense_half, packed_half = (load(folder, "auto") for folder in folders)
    for tokens in (random_tokens(1, 1), random_tokens(1, 4), random_tokens(3, 40)):
        expected = logits(dense, tokens)
        assert (logits(packed, tokens) - expected).abs().max() < 1e-3
        rounding = (logits(dense_half, tokens) - expected).abs().max()
        assert (logits(packed_half, tokens) - expected).abs().max() < 2 * rounding + 1e-3


def test_a_packed_llama_keeps_its_arrays_on_the_gpu(folders: tuple[Path, Path]) -> None:
    model = load(folders[1], "auto")
    weights = models.load_model(folders[0], device="cpu").state_dict()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MackoLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        stored = canonical.pack(weights[f"{name}.weight"])
        arrays = (stored.values, stored.deltas, stored.row_offsets)
        for array, expected in zip(ARRAY_NAMES, arrays, strict=True):
            assert torch.equal(layer.state_dict()[array].cpu(), expected)


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_greedy_generation_gives_the_tokens_of_the_dense_llama(folders: tuple[Path, Path], dtype: str) -> None:
    """Where 16-bit rounding chooses another token, float32 must say that the two are as good as tied."""
    dense, packed = (load(folder, dtype) for folder in folders)
    tokenizer = models.load_tokenizer(folders[0])
    for prompt in ("Once upon a time", "The fox found a red ball"):
        ids = encode_prompt(tokenizer, prompt)
        expected, actual = (
            [step.token_id for step in generation.stream(model, tokenizer, ids, max_new_tokens=NEW_TOKENS, stop_ids=())]
            for model in (dense, packed)
        )
        assert len(expected) == len(actual) == NEW_TOKENS
        if expected != actual:
            assert dtype == "auto"
            split = next(i for i, pair in enumerate(zip(expected, actual, strict=True)) if pair[0] != pair[1])
            text = torch.cat([ids, torch.tensor([expected[:split]], dtype=torch.int64)], dim=1)
            candidates = logits(load(folders[0], "float32"), text)[0, -1, [expected[split], actual[split]]]
            assert candidates.diff().abs() < 1e-3
