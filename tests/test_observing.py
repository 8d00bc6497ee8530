"""Which linears share an observer, and what each observer sees."""

import copy
import weakref
from collections.abc import Callable

import pytest
import torch
from families import FAMILIES, random_tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

from macko_llm.errors import CheckpointError
from macko_llm.progress import no_progress
from macko_llm.pruning import prune_model
from macko_llm.pruning.methods import METHODS
from macko_llm.pruning.methods.wanda import Wanda
from macko_llm.pruning.observing import observed_blocks
from macko_llm.pruning.selection import chosen_linears
from macko_llm.pruning.weights import WeightsInMemory
from macko_llm.recipe import PruneRecipe

TOKENS = random_tokens(3, 12)


class Log:
    """Keeps everything."""

    def __init__(self, cols: int, device: torch.device) -> None:
        self.shape = (cols, device.type)
        self.inputs: list[Tensor] = []
        self.sequences: list[int] = []

    def observe(self, inputs: Tensor, sequences: int) -> None:
        self.inputs.append(inputs.clone())
        self.sequences.append(sequences)


@torch.no_grad()
def _first_block(model: PreTrainedModel) -> dict[str, Log]:
    layers = chosen_linears(model, PruneRecipe())
    blocks = observed_blocks(model, layers, TOKENS, Log, no_progress, "", WeightsInMemory(model))
    _, logs = next(blocks)
    return {name.split(".", 3)[-1]: log for name, log in logs.items()}


def _sharing(logs: dict[str, Log]) -> set[frozenset[str]]:
    return {frozenset(name for name, other in logs.items() if other is log) for log in logs.values()}


def test_linears_that_read_the_same_tensor_share_an_observer() -> None:
    logs = _first_block(FAMILIES["llama"]())
    assert _sharing(logs) == {
        frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}),
        frozenset({"self_attn.o_proj"}),
        frozenset({"mlp.gate_proj", "mlp.up_proj"}),
        frozenset({"mlp.down_proj"}),
    }
    for log in logs.values():
        assert log.sequences == [1, 1, 1]
        assert {tensor.shape for tensor in log.inputs} == {(1, 12, log.shape[0])}


class _Mlp(nn.Module):
    """Two linears, and what they are to read, of the hidden states [1, seqlen, 64] of the sequence of this number."""

    def __init__(self, inputs: Callable[[int, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)
        self.inputs = inputs
        self.calls = 0

    def forward(self, hidden: Tensor) -> Tensor:
        one, two = self.inputs(self.calls, hidden)
        self.calls += 1
        return self.one(one) + self.two(two)


def _logs_of(inputs: Callable[[int, Tensor], tuple[Tensor, Tensor]]) -> tuple[Log, Log]:
    """What is observed in the first block, which runs once for each sequence."""
    model = FAMILIES["llama"]()
    model.model.layers[0].mlp = _Mlp(lambda call, hidden: inputs(call, hidden))
    logs = _first_block(model)
    return logs["mlp.one"], logs["mlp.two"]


def test_equal_tensors_in_different_memory_are_not_the_same_input() -> None:
    one, two = _logs_of(lambda _, hidden: (hidden, hidden.clone()))
    assert one is not two
    one, two = _logs_of(lambda _, hidden: (hidden, hidden.view_as(hidden)))
    assert one is two


def test_memory_that_was_written_to_in_between_is_not_the_same_input() -> None:
    def write(_: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return hidden, hidden.mul_(2)

    one, two = _logs_of(write)  # both linears run after the writing, and read the same
    assert one is two

    class Between(_Mlp):
        def forward(self, hidden: Tensor) -> Tensor:
            return self.one(hidden) + self.two(hidden.mul_(2))

    model = FAMILIES["llama"]()
    model.model.layers[0].mlp = Between(lambda _, hidden: (hidden, hidden))
    with pytest.raises(CheckpointError, match=r"block model\.layers\.0 writes over the input of a linear layer"):
        _first_block(model)


def test_observers_part_where_inputs_do() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def part(call: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        pair = (hidden, hidden if call < 1 else hidden * 3)
        seen.append(copy.deepcopy(pair))
        return pair

    one, two = _logs_of(part)
    assert one is not two
    for log, index in ((one, 0), (two, 1)):
        assert len(log.inputs) == 3
        assert all(torch.equal(tensor, pair[index]) for tensor, pair in zip(log.inputs, seen, strict=False))
        assert log.sequences == [1, 1, 1]


def test_a_weight_that_is_used_twice_sees_both_inputs_of_a_sequence() -> None:
    model = FAMILIES["llama"]()
    mlp = _Mlp(lambda _, hidden: (hidden, hidden * 2))
    mlp.two.weight = mlp.one.weight
    model.model.layers[0].mlp = mlp
    log = _first_block(model)["mlp.one"]
    assert log.sequences == [1, 0] * 3
    assert all(torch.equal(log.inputs[at] * 2, log.inputs[at + 1]) for at in (0, 2, 4))


def test_no_two_blocks_have_observers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may hold half a gigabyte each."""
    alive: weakref.WeakSet[Wanda] = weakref.WeakSet()
    most = 0

    class Counted(Wanda):
        def __init__(self, cols: int, device: torch.device) -> None:
            nonlocal most
            super().__init__(cols, device)
            alive.add(self)
            most = max(most, len(alive))

    monkeypatch.setitem(METHODS, "wanda", Counted)
    prune_model(FAMILIES["llama"](), TOKENS, PruneRecipe())
    assert most == 4
    assert not alive
