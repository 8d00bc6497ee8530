"""Running the decoder blocks of a model one at a time, with the arguments that the whole model gives them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from macko_llm.errors import CheckpointError
from macko_llm.pruning.hidden_states import HiddenStates, Maker

_HIDDEN = "hidden_states"


class _StopForwardError(Exception):
    """Ends a forward pass early: what was wanted of it has been seen."""


@dataclass(frozen=True)
class BlockArguments:
    """Everything but the hidden states that a block was called with: masks, position embeddings, ..."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def run_block(block: nn.Module, hidden: torch.Tensor, arguments: BlockArguments) -> torch.Tensor:
    """The hidden states [1, seqlen, hidden size] that a block makes of others."""
    return _first_tensor(block(hidden, *arguments.args, **arguments.kwargs))


def record_block_arguments(
    model: PreTrainedModel, blocks: dict[str, nn.Module], tokens: torch.Tensor, device: torch.device
) -> list[BlockArguments]:
    """What the model passes to each block: it may differ between blocks (sliding, full attention), not between sequences.

    The blocks themselves do not run, and need no weights: stand-ins pass the hidden states on.

    Args:
        model: in eval mode; what lies in front of the blocks is on `device`.
        blocks: its decoder blocks, first to last.
        tokens: int64 [nsamples, seqlen], sequences without padding.
        device: where the model computes.

    Raises:
        CheckpointError: the blocks cannot be run one after another on hidden states alone.
    """
    others = (tokens != tokens[:1]).any(dim=1).nonzero()
    with _standing_in(model, blocks, tokens[:1].to(device)):
        recorded = _record(model, blocks, tokens[:1].to(device))
        another = _record(model, blocks, tokens[others[0]].to(device)) if len(others) else recorded
    for name, mine, theirs in zip(blocks, recorded, another, strict=True):
        if not _same(mine.args, theirs.args) or not _same(mine.kwargs, theirs.kwargs):
            raise CheckpointError(
                f"The block {name} gets other arguments for another text, which is not supported; "
                "use a model whose blocks pass on hidden states only."
            )
    return recorded


def first_hidden_states(
    model: PreTrainedModel, block: nn.Module, tokens: torch.Tensor, device: torch.device, new: Maker
) -> HiddenStates:
    """The hidden states entering the first block.

    Args:
        model: in eval mode; what lies in front of the blocks is on `device`.
        block: the first.
        tokens: int64 [nsamples, seqlen].
        device: where the model computes.
        new: makes room for them.
    """
    made: HiddenStates | None = None
    for index, sequence in enumerate(tokens):
        seen: list[torch.Tensor] = []

        def stop(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seen: Any = seen) -> None:
            seen.append(_split(args, kwargs)[0])
            raise _StopForwardError

        with _hooked([block.register_forward_pre_hook(stop, with_kwargs=True)]):
            _forward(model, sequence[None].to(device))
        made = made or new(len(tokens), seen[0])
        made[index] = seen[0]
    assert made is not None  # there are sequences
    return made


def gives_tuple(block: nn.Module, hidden: torch.Tensor, arguments: BlockArguments) -> bool:
    """Whether a block gives its hidden states in a tuple, and not as they are."""
    return not isinstance(block(hidden, *arguments.args, **arguments.kwargs), torch.Tensor)


def head_inputs(
    model: PreTrainedModel,
    blocks: dict[str, nn.Module],
    head: nn.Linear,
    tokens: torch.Tensor,
    states: HiddenStates,
    in_tuple: bool,
    device: torch.device,
) -> Iterator[torch.Tensor]:
    """What the lm_head multiplies [1, seqlen, hidden size], of each sequence.

    The model's own forward makes it of what the last block gave, which stand-ins for the blocks pass on.

    Args:
        model: in eval mode; all but its blocks is on `device`.
        blocks: its decoder blocks, first to last.
        head: its lm_head.
        tokens: int64 [nsamples, seqlen].
        states: what the last block made of each sequence.
        in_tuple: `gives_tuple` of the last block.
        device: where the model computes.

    Raises:
        CheckpointError: the lm_head does not run on the hidden states that the last block gives.
    """
    distinct = list(dict.fromkeys(blocks.values()))  # a block may be used more than once
    for sequence, hidden in zip(tokens, states, strict=True):
        given = (hidden,) if in_tuple else hidden
        seen: list[torch.Tensor] = []

        def stop(
            _head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seen: list[torch.Tensor] = seen
        ) -> None:
            seen.append(args[0] if args else kwargs["input"])
            raise _StopForwardError

        hook = head.register_forward_pre_hook(stop, with_kwargs=True)
        with _own_forwards_kept(distinct), _hooked([hook]):
            for block in distinct:
                block.forward = lambda *_, given=given, **__: given
            _forward(model, sequence[None].to(device))
        if not seen or seen[0].shape[:-1] != hidden.shape[:-1]:
            raise CheckpointError(
                "The lm_head does not read all that the last block gives, and cannot be pruned; leave it out of layers."
            )
        yield seen[0]


@contextmanager
def _standing_in(model: PreTrainedModel, blocks: dict[str, nn.Module], tokens: torch.Tensor) -> Iterator[None]:
    """While this lasts, blocks do nothing but pass on hidden states, as the tensor or the tuple that the model expects."""
    distinct = list(dict.fromkeys(blocks.values()))  # a block may be used more than once
    with _own_forwards_kept(distinct):
        _stand_in(distinct, in_tuple=False)
        try:
            _record(model, blocks, tokens)
        except Exception as error:  # whatever a model's code makes of a tensor in place of a tuple
            try:
                _stand_in(distinct, in_tuple=True)
                _record(model, blocks, tokens)
            except Exception:
                raise error from None
        yield


@contextmanager
def _own_forwards_kept(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Afterwards, blocks whose forward was replaced have their own again."""
    own = [block.__dict__.get("forward") for block in blocks]
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward


def _stand_in(blocks: Sequence[nn.Module], in_tuple: bool) -> None:
    def forward(*args: Any, **kwargs: Any) -> Any:
        # Columns in another order: a block that does not run on what the one before it gives is found out.
        passed = _split(args, kwargs)[0].roll(1, -1)
        return (passed,) if in_tuple else passed

    for block in blocks:
        block.forward = forward


def _record(model: PreTrainedModel, blocks: dict[str, nn.Module], tokens: torch.Tensor) -> list[BlockArguments]:
    names, modules = list(blocks), list(blocks.values())
    recorded: list[BlockArguments] = []
    last_output: torch.Tensor | None = None

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = names[len(recorded)]
        hidden, arguments = _split(args, kwargs)
        if block is not modules[len(recorded)] or (last_output is not None and not _same(hidden, last_output)):
            raise CheckpointError(
                f"The block {name} does not run on the output of the block before it, which is not supported; "
                "use a model whose blocks follow one another."
            )
        if _holds_cache(arguments.args) or _holds_cache(arguments.kwargs):
            raise CheckpointError(
                f"The block {name} keeps a cache even where none is wanted, which is not supported; use another model."
            )
        recorded.append(arguments)
        if len(recorded) == len(modules):
            raise _StopForwardError

    def after(_block: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        nonlocal last_output
        last_output = _first_tensor(output)

    distinct = list(dict.fromkeys(modules))
    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in distinct]
    handles += [block.register_forward_hook(after) for block in distinct]
    with _hooked(handles):
        _forward(model, tokens)
    if len(recorded) < len(modules):
        raise CheckpointError(
            f"{type(model).__name__} runs only {len(recorded)} of its {len(modules)} blocks; use another model."
        )
    return recorded


def _forward(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    with suppress(_StopForwardError):
        model(input_ids=tokens, use_cache=False)


@contextmanager
def _hooked(handles: Sequence[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, BlockArguments]:
    if args:
        return args[0], BlockArguments(args[1:], kwargs)
    rest = {name: value for name, value in kwargs.items() if name != _HIDDEN}
    return kwargs[_HIDDEN], BlockArguments((), rest)


def _first_tensor(output: Any) -> torch.Tensor:
    # A tensor or a tuple that begins with it, depending on the family and the version of transformers.
    tensor: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return tensor


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one is other or (one.dtype == other.dtype and torch.equal(one, other.to(one.device)))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, (bool, int, float, str, type(None))):
        return bool(one == other)
    return type(one) is type(other)


def _holds_cache(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_cache, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_cache, value))
    return isinstance(value, Cache)


@contextmanager
def watched_inputs(linears: Sequence[nn.Linear], see: Callable[[nn.Linear, torch.Tensor], None]) -> Iterator[None]:
    """While this lasts, `see` gets every input [..., cols] of these linears."""

    def hook(linear: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(linear, nn.Linear)
        see(linear, args[0] if args else kwargs["input"])

    with _hooked([linear.register_forward_pre_hook(hook, with_kwargs=True) for linear in linears]):
        yield
