"""MackoLinear against nn.Linear: values, shapes, gradients, compilation, state."""

import copy
import io
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from accelerate.utils import set_module_tensor_to_device
from sliced_reference import make as sliced_group
from torch import Tensor, nn
from torch.nn import functional as F

from macko_llm import native
from macko_llm.errors import FormatError
from macko_llm.layouts import canonical, sliced
from macko_llm.layouts.canonical import SPMV_MAX_TOKENS
from macko_llm.linear import ARRAY_NAMES, MackoLinear, arrange_group, group_of

ROWS, COLS = 24, 172
HALVES = [torch.float16, torch.bfloat16]


def make(dtype: torch.dtype = torch.float16, *, bias: bool = True, seed: int = 0) -> tuple[MackoLinear, Tensor]:
    """A layer with half of its weights zero, and its dense weight [ROWS, COLS]."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLS, generator=generator) * (torch.rand(ROWS, COLS, generator=generator) < 0.5)
    weight[3] = 0
    weight = weight.to(dtype)
    values = torch.randn(ROWS, generator=generator).to(dtype) if bias else None
    return MackoLinear.from_matrix(canonical.pack(weight), values), weight


def reference(x: Tensor, layer: MackoLinear, weight: Tensor) -> Tensor:
    """nn.Linear in float64."""
    return F.linear(x.double(), weight.double(), None if layer.bias is None else layer.bias.double())


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal to float64 but for a few roundings of numbers below 64: how few is for test_ops.py to say."""
    assert actual.shape == expected.shape
    eps = torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.double(), expected, rtol=2 * eps, atol=32 * eps + COLS * 2**-24)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 0), (4,), (5,), (2, 2), (3, 7), (1, 1, 1), (2, 1, 3, 2)])
def test_any_leading_shape(leading: tuple[int, ...], bias: bool) -> None:
    for dtype in HALVES:
        layer, weight = make(dtype, bias=bias)
        for x_dtype in (dtype, torch.float32):
            x = torch.randn(*leading, COLS).to(x_dtype)
            y = layer(x)
            assert y.dtype == x_dtype
            assert y.shape == (*leading, ROWS)
            assert_close(y, reference(x, layer, weight))


@pytest.mark.parametrize("x_dtype", [torch.float16, torch.float32])
def test_many_tokens_give_what_one_at_a_time_give(x_dtype: torch.dtype) -> None:
    layer, _ = make()
    x = torch.randn(3 * SPMV_MAX_TOKENS, COLS).to(x_dtype)
    one_by_one = torch.cat([layer(token[None]) for token in x])
    few_by_few = torch.cat([layer(tokens) for tokens in x.split(SPMV_MAX_TOKENS)])
    assert torch.equal(one_by_one, few_by_few)
    assert_close(layer(x), one_by_one.double())


@pytest.mark.parametrize("tokens", [2, 9])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
        lambda x: x.t().contiguous().t(),
        lambda x: F.pad(x, (3, 5))[:, 3:-5],
        lambda x: x[:1].expand(len(x), COLS),
        lambda x: x[None].expand(2, *x.shape).transpose(0, 1),
    ],
    ids=["strided", "transposed", "sliced", "repeated", "expanded"],
)
def test_inputs_that_are_not_contiguous(view: Callable[[Tensor], Tensor], tokens: int) -> None:
    layer, weight = make()
    x = view(torch.randn(tokens, COLS).half())
    assert not x.is_contiguous()
    # Torch's own product of many tokens may round otherwise on another layout, and so may this one.
    few = x.numel() // COLS <= SPMV_MAX_TOKENS  # the expanded view doubles them
    expected = layer(x.contiguous()) if few else F.linear(x, weight, layer.bias)
    assert torch.equal(layer(x), expected)


def test_a_bias_of_another_dtype() -> None:
    layer, weight = make(bias=False)
    bias = torch.randn(ROWS)
    layer = MackoLinear.from_matrix(layer.matrix, bias)
    for tokens in (1, 9):
        for x_dtype in (torch.float16, torch.float32):
            x = torch.randn(tokens, COLS).to(x_dtype)
            expected = F.linear(x.double(), weight.double(), bias.to(x_dtype).double())
            assert_close(layer(x), expected)


@pytest.mark.parametrize("tokens", [1, 9])
def test_refuses_another_width_or_kind(tokens: int) -> None:
    layer, _ = make()
    with pytest.raises(FormatError, match="171 features and the matrix 172 columns"):
        layer(torch.ones(tokens, COLS - 1).half())
    with pytest.raises(
        FormatError, match=r"input is torch\.int64; convert it to float16, bfloat16, float32 or float64"
    ):
        layer(torch.ones(tokens, COLS, dtype=torch.int64))


@pytest.mark.parametrize("leading", [(1,), (2, 2), (9,)])
def test_gradients_flow_to_the_input_as_through_a_dense_layer(leading: tuple[int, ...]) -> None:
    """As LoRA needs it: an adapter below this layer learns, the packed weight does not."""
    layer, weight = make()
    x = torch.randn(*leading, COLS, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    upstream = torch.randn(*leading, ROWS)
    layer(x).backward(upstream)
    F.linear(twin, weight.float(), layer.bias.float()).backward(upstream)
    assert torch.equal(x.grad, twin.grad)
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert not layer(x.detach()).requires_grad


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable, tokens: int) -> None:
    layer, weight = make()
    x = torch.randn(tokens, COLS, requires_grad=True)
    expected = layer(x).detach()
    with mode():
        y = layer(x)
        made_inside, _ = make()
        assert torch.equal(made_inside(x), y)
    assert not y.requires_grad
    assert_close(y, reference(x.detach(), layer, weight))
    assert_close(y, expected.double())


@pytest.mark.parametrize("bias", [False, True])
def test_compiles_into_one_graph(bias: bool) -> None:
    torch._dynamo.reset()
    layer, _ = make(bias=bias)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for leading in [(1,), (1, 1), (2, 3), (2, 11)]:
        x = torch.randn(*leading, COLS).half()
        with torch.inference_mode():
            assert torch.equal(compiled(x), layer(x))
    x = torch.randn(2, COLS, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    compiled(x).sum().backward()
    layer(twin).sum().backward()
    assert torch.equal(x.grad, twin.grad)


def test_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    layer, _ = make(bias=False)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(1, 1, COLS).half()
    with torch.inference_mode():
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("is_arranged", [False, True])
def test_state_dict_round_trip(is_arranged: bool) -> None:
    layer, weight = make()
    if is_arranged:
        layer.arrange()
    state = layer.state_dict()
    assert set(state) == {*ARRAY_NAMES, "bias"}
    assert (state["weight_values"].dtype, state["weight_deltas"].dtype) == (torch.float16, torch.uint8)
    assert state["weight_row_offsets"].dtype == torch.int32
    padded = len(state["weight_values"])
    filled = MackoLinear(COLS, ROWS, padded, bias=True)
    filled.load_state_dict(state)
    placeholder = MackoLinear(COLS, ROWS, padded, bias=True, device="meta")
    placeholder.load_state_dict(state, assign=True)
    x = torch.randn(1, COLS)
    for other in (filled, placeholder, copy.deepcopy(layer)):
        assert other.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
        assert list(other.state_dict()) == list(state)
        assert torch.equal(canonical.unpack(other.matrix), weight)
        assert_close(other(x), reference(x, layer, weight))


def test_a_new_layer_is_all_zeros() -> None:
    layer = MackoLinear(COLS, ROWS, 0, bias=True, dtype=torch.bfloat16)
    canonical.validate(MackoLinear(COLS, ROWS, 0).matrix, "empty")
    assert torch.equal(layer(torch.ones(2, COLS)), torch.zeros(2, ROWS))
    with pytest.raises(ValueError, match="padded is 12, not a multiple of 8"):
        MackoLinear(COLS, ROWS, 12)


def test_parameters_are_frozen_and_shared_with_the_matrix() -> None:
    layer, weight = make()
    matrix = layer.matrix
    assert MackoLinear.from_matrix(matrix).weight_values.data_ptr() == layer.weight_values.data_ptr()
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert sum(p.nbytes for p in layer.parameters()) == matrix.nbytes + ROWS * 2
    assert f"in_features={COLS}, out_features={ROWS}" in str(layer)
    assert torch.equal(canonical.unpack(matrix), weight)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_cpu_arranges_and_restores_the_same_bytes(dtype: torch.dtype) -> None:
    layer, weight = make(dtype)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(1, COLS)
    expected = reference(x, layer, weight)
    for change in (layer.arrange, layer.arrange, layer.cpu, layer.restore, layer.restore, layer.arrange, layer.restore):
        change()
        assert layer.is_arranged == (change != layer.restore)
        assert (layer.weight_layout is None) != layer.is_arranged
        assert len(list(layer.parameters())) == (1 if layer.is_arranged else 4)
        assert list(layer.state_dict()) == list(state)
        assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())
        assert_close(layer(x), expected)
    assert sliced.arrange(layer.matrix) is None


def test_a_model_that_was_arranged_stays_so_through_casts() -> None:
    layer, weight = make()
    state = layer.state_dict()
    layer.arrange()
    layer.float()
    assert layer.is_arranged
    assert layer.bias.dtype == torch.float32
    assert all(torch.equal(layer.state_dict()[name], state[name]) for name in ARRAY_NAMES)
    x = torch.randn(1, COLS)
    assert_close(layer(x), reference(x, layer, weight))


def test_a_placeholder_has_nothing_to_arrange() -> None:
    placeholder = MackoLinear(COLS, ROWS, 8, device="meta")
    placeholder.arrange()
    placeholder.restore()
    assert not placeholder.is_arranged
    assert placeholder.weight_values.is_meta


def test_a_cpu_has_no_groups() -> None:
    layers = [make(seed=seed)[0] for seed in range(3)]
    states = [{name: tensor.clone() for name, tensor in layer.state_dict().items()} for layer in layers]
    arrange_group(layers)
    assert group_of(layers) is None
    assert sliced.arrange_group([layer.matrix for layer in layers]) is None
    for layer, state in zip(layers, states, strict=True):
        assert layer.is_arranged
        assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())
    layers[0].restore()
    arrange_group([MackoLinear(COLS, ROWS, 8, device="meta"), layers[0]])
    assert not layers[0].is_arranged


def saved_and_loaded(layers: nn.ModuleList) -> nn.ModuleList:
    buffer = io.BytesIO()
    torch.save(layers, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("remake", [copy.deepcopy, saved_and_loaded])
def test_copies_of_a_group_are_a_group(remake: Callable[[nn.ModuleList], nn.ModuleList]) -> None:
    """In the CPU's memory, where nothing multiplies it."""
    group = sliced_group(member_rows=(ROWS, 7, ROWS))
    layers = nn.ModuleList(MackoLinear(COLS, member.rows, 8, device="meta") for member in group.members)
    for layer, member in zip(layers, group.members, strict=True):
        layer._hold(member)
    assert group_of(layers).data is group.data
    assert group_of(layers).member is None
    assert [buffer.data_ptr() for buffer in layers.buffers()] == [group.data.data_ptr()]  # once, though it is in all
    assert not list(layers.parameters())
    twins = remake(layers)
    twin = group_of(twins)
    assert twin.plan == group.plan
    assert torch.equal(twin.data, group.data)
    assert twin.data.data_ptr() != group.data.data_ptr()
    assert all(layer.weight_layout is twin.data for layer in twins)
    for others in (layers[:2], layers[::-1], [layers[0], twins[1], layers[2]], layers[1:2]):
        assert group_of(others) is None


# Arrays from outside


def damaged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Deltas that lead far out of every row."""
    return {**state, "weight_deltas": torch.full_like(state["weight_deltas"], 0xFF)}


def load_into(layer: MackoLinear, state: dict[str, Tensor], *, assign: bool) -> None:
    with pytest.raises(RuntimeError, match=r"not valid MACKO data \(.*\); download or pack it again"):
        layer.load_state_dict(state, assign=assign)


OUTSIDE: dict[str, Callable[[MackoLinear], object]] = {
    "load_state_dict": lambda layer: load_into(layer, damaged(layer.state_dict()), assign=False),
    "load_state_dict(assign=True)": lambda layer: load_into(layer, damaged(layer.state_dict()), assign=True),
    "in place": lambda layer: layer.weight_deltas.fill_(0xFF),
    "copy_": lambda layer: layer.weight_row_offsets.copy_(layer.weight_row_offsets.flip(0)),
    "assignment": lambda layer: setattr(
        layer, "weight_deltas", nn.Parameter(torch.full_like(layer.weight_deltas, 0xFF), requires_grad=False)
    ),
    "another layer's": lambda layer: setattr(layer, "weight_deltas", make(seed=1)[0].weight_deltas),
    "accelerate": lambda layer: set_module_tensor_to_device(
        layer, "weight_deltas", "cpu", value=torch.full_like(layer.weight_deltas, 0xFF)
    ),
    "to_empty": lambda layer: [layer.to_empty(device="cpu"), layer.weight_deltas.data.fill_(0xFF)],
    "apply": lambda layer: layer._apply(lambda tensor: torch.full_like(tensor, 0x7C)),
}


@pytest.mark.parametrize("change", OUTSIDE.values(), ids=OUTSIDE)
@pytest.mark.parametrize("tokens", [1, 9])
def test_arrays_that_are_not_valid_never_reach_a_kernel(
    change: Callable[[MackoLinear], object], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, _ = make()
    layer(torch.randn(tokens, COLS))
    change(layer)
    monkeypatch.setattr(native, "cpu_spmv", None)
    monkeypatch.setattr(native, "cpu_unpack", None)
    for _ in range(2):
        with pytest.raises(FormatError, match="is not valid MACKO data"):
            layer(torch.randn(tokens, COLS))


def test_valid_arrays_are_checked_once_however_they_came(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = make()
    other = MackoLinear.from_matrix(canonical.pack(-layer.packed.dense()), torch.randn(ROWS).half())
    calls = []
    spans = native.cpu_row_spans
    monkeypatch.setattr(native, "cpu_row_spans", lambda *arrays: [calls.append(1), spans(*arrays)][1])
    layer.load_state_dict(other.state_dict(), assign=True)
    assert len(calls) == 1
    layer.restore()
    x = torch.randn(1, COLS)
    for _ in range(3):
        assert torch.equal(layer(x), other(x))
    assert len(calls) == 1
    for name in ARRAY_NAMES:
        setattr(layer, name, nn.Parameter(getattr(layer, name).clone(), requires_grad=False))
    for _ in range(3):
        assert torch.equal(layer(x), other(x))
    assert len(calls) == 2


def test_a_layer_keeps_nothing_alive_that_was_offloaded() -> None:
    layer, _ = make()
    layer(torch.randn(1, COLS))
    gone = weakref.ref(layer.weight_values)
    for name in ARRAY_NAMES:
        set_module_tensor_to_device(layer, name, "meta")
    assert gone() is None


# Dtypes


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "float": nn.Module.float,
    "double": nn.Module.double,
    "half": nn.Module.half,
    "bfloat16": nn.Module.bfloat16,
    "to": lambda module: module.to(torch.bfloat16),
    "type": lambda module: module.type(torch.float32),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("dtype", HALVES)
def test_values_keep_their_dtype_when_a_model_is_cast(
    cast: Callable[[nn.Module], nn.Module], dtype: torch.dtype
) -> None:
    layer, weight = make(dtype)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    twin = cast(nn.Linear(COLS, ROWS))
    assert cast(layer) is layer
    for name in ARRAY_NAMES:
        assert layer.state_dict()[name].dtype == state[name].dtype
        assert torch.equal(layer.state_dict()[name], state[name])
    assert list(layer.state_dict()) == list(state)
    assert layer.bias.dtype == twin.weight.dtype
    for tokens in (1, 9):
        x = torch.randn(tokens, COLS).to(twin.weight.dtype)
        y = layer(x)
        assert y.dtype == twin(x).dtype
        # As precise as nn.Linear with weights that were rounded to x's dtype.
        eps = torch.finfo(y.dtype).eps
        slack = eps * (x.double().abs() @ weight.double().abs().T + 1) * (2 if eps > 1e-4 else 8)
        assert ((y.double() - reference(x, layer, weight)).abs() <= slack).all()


@pytest.mark.parametrize("autocast_to", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 9])
def test_autocast_casts_as_it_does_around_a_dense_layer(autocast_to: torch.dtype, tokens: int) -> None:
    for x_dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        layer, weight = make()
        layer.to(x_dtype)
        twin = nn.Linear(COLS, ROWS).to(x_dtype)
        x = torch.randn(tokens, COLS, dtype=x_dtype)
        with torch.autocast("cpu", autocast_to):
            y = layer(x)
            assert y.dtype == twin(x).dtype
        eps = torch.finfo(autocast_to).eps
        slack = 2 * eps * (x.double().abs() @ weight.double().abs().T + 1)
        assert ((y.double() - reference(x, layer, weight)).abs() <= slack).all()


# Gradients


@pytest.mark.parametrize("tokens", [1, 9])
def test_a_gradient_keeps_the_packed_arrays_and_not_the_dense_weight(tokens: int) -> None:
    layer, _ = make()
    held = {layer.weight_values.data_ptr(), layer.weight_deltas.data_ptr(), layer.weight_row_offsets.data_ptr()}
    x = torch.randn(tokens, COLS, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    assert held <= {tensor.data_ptr() for tensor in saved}
    assert all(tensor.shape != (ROWS, COLS) for tensor in saved)


def test_second_derivatives_and_a_bias_that_learns() -> None:
    layer, weight = make()
    bias = torch.randn(ROWS, requires_grad=True)
    twin_bias = bias.detach().clone().requires_grad_()
    x = torch.randn(3, 2, COLS, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    for inputs, own, product in (
        (x, bias, lambda x: layer.packed.linear(x, bias)),
        (twin, twin_bias, lambda x: F.linear(x, weight.float(), twin_bias)),
    ):
        (first,) = torch.autograd.grad(product(inputs).square().sum(), inputs, create_graph=True)
        first.square().sum().backward()
        product(inputs.detach()).square().sum().backward()
        assert own.grad is not None
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(bias.grad, twin_bias.grad)


def test_a_move_that_fails_loses_nothing() -> None:
    """As where memory runs out: before the first array, between two, at the bias."""
    for calls_that_work in range(4):
        layer, _ = make()
        left = iter(range(calls_that_work))

        def move(tensor: Tensor, left: Iterator[int] = left) -> Tensor:
            if next(left, None) is None:
                raise torch.OutOfMemoryError("no memory is left")
            return tensor.clone()

        x = torch.randn(1, COLS)
        expected = layer(x)
        state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        with pytest.raises(torch.OutOfMemoryError):
            layer._apply(move)
        assert list(layer.state_dict()) == list(state)
        assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())
        assert torch.equal(layer(x), expected)


def test_moves_on_a_cpu_check_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cast touches every layer of a model, and whether its arrays are valid matters when one is multiplied."""
    layer, _ = make()
    expected = layer(torch.ones(1, COLS))
    checked: list[Tensor] = []
    spans = native.cpu_row_spans
    monkeypatch.setattr(native, "cpu_row_spans", lambda *arrays: [checked.append(arrays[0]), spans(*arrays)][1])
    layer.float().half().cpu()
    assert not checked
    assert torch.equal(layer(torch.ones(1, COLS)), expected)
    assert len(checked) == 1
