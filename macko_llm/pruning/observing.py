"""Going through a model block by block, with an observer for every distinct input of the linears."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from macko_llm import models
from macko_llm.errors import CalibrationError, CheckpointError
from macko_llm.progress import Progress
from macko_llm.pruning.hidden_states import HiddenStates
from macko_llm.pruning.methods import Observer
from macko_llm.pruning.replay import (
    BlockArguments,
    first_hidden_states,
    gives_tuple,
    head_inputs,
    record_block_arguments,
    run_block,
    watched_inputs,
)
from macko_llm.pruning.selection import Head
from macko_llm.pruning.weights import Weights
from macko_llm.stages import stage

T = TypeVar("T", bound=Observer)
_Identity = tuple[Any, ...]


def observed_blocks(
    model: PreTrainedModel,
    layers: dict[str, nn.Linear],
    tokens: Tensor | None,
    new: Callable[[int, torch.device], T],
    progress: Progress,
    what: str,
    weights: Weights,
    *,
    head: Head | None = None,
    finished: int = 0,
) -> Iterator[tuple[str, dict[str, T]]]:
    """The decoder blocks in turn, each with the observers of its layers, which saw all that its linears multiplied.

    An lm_head comes after them, as if it were one more block.

    What is done to the layers before the next block is asked for is what that block's inputs are computed with. A weight that
    several blocks share comes with the first of them.

    Args:
        model: in eval mode.
        layers: qualified name -> linear, one for each weight.
        tokens: int64 [nsamples, seqlen]; None for observers that need to see nothing.
        new: (cols, device) -> an observer.
        progress: called with (what, done, total).
        what: is done to the blocks, for progress.
        weights: has a block's weights in memory as long as they are wanted.
        head: the lm_head, where it is to be observed.
        finished: so many blocks are only run, and not given.

    Raises:
        CheckpointError: blocks of an unsupported kind.
        CalibrationError: a linear that no token reaches.
    """
    blocks = models.decoder_blocks(model)
    left = dict(layers)
    total = len(blocks) + (head is not None)
    arguments: list[BlockArguments] = []
    states: HiddenStates | None = None
    in_tuple = False  # how the last block gives them
    if tokens is not None:
        with weights.in_front(), stage("recording"):
            arguments = record_block_arguments(model, blocks, tokens, weights.device)
            first = next(iter(blocks.values()))
            states = first_hidden_states(model, first, tokens, weights.device, weights.new_states)
    for done, (block_name, block) in enumerate(blocks.items()):
        progress(what, done, total)
        with weights.block(block_name):
            known = {id(linear.weight): name for name, linear in left.items()}
            linears = [part for part in block.modules() if isinstance(part, nn.Linear) and id(part.weight) in known]
            names = {id(linear.weight): known[id(linear.weight)] for linear in linears}
            for name in names.values():
                del left[name]
            if done >= finished:
                if states is None:
                    observers = {id(linear.weight): new(linear.weight.shape[1], weights.device) for linear in linears}
                else:
                    observers = _observe(block_name, block, arguments[done], states, linears, new)
                by_name = {name: observers.get(key) for key, name in names.items()}
                for name in by_name:
                    if by_name[name] is None:
                        raise CalibrationError(
                            f"No calibration token reached {name}; use more text, or leave it out with --ignore."
                        )
                del observers, linears  # the caller may free them one by one
                yield block_name, cast(dict[str, T], by_name)
                by_name.clear()  # before the next block's take their memory
            if states is not None and done + 1 < total:  # nothing else sees what the last block computes
                with stage("running"):
                    in_tuple = done + 1 == len(blocks) and gives_tuple(block, states[0], arguments[done])
                    for index, hidden in enumerate(states):
                        states[index] = run_block(block, hidden, arguments[done])
    if head is not None:
        progress(what, len(blocks), total)
        with weights.behind():
            observer = new(head.linear.weight.shape[1], weights.device)
            if tokens is not None and states is not None:
                with stage("observing"):
                    for inputs in head_inputs(model, blocks, head.linear, tokens, states, in_tuple, weights.device):
                        observer.observe(inputs, 1)
            of_head = {head.name: observer}
            del observer
            yield head.name, of_head
    progress(what, total, total)


@stage("observing")
def _observe(
    name: str,
    block: nn.Module,
    arguments: BlockArguments,
    states: HiddenStates,
    linears: Sequence[nn.Linear],
    new: Callable[[int, torch.device], T],
) -> dict[int, T]:
    """The observer of each weight, by its id; weights share one as long as their linears see the same tensors."""
    observers: dict[int, T] = {}
    for hidden in states:
        seen: dict[int, list[_Identity]] = {}  # of each weight
        inputs: dict[_Identity, Tensor] = {}  # kept alive, so that no two of them have the same storage

        def see(
            linear: nn.Linear,
            tensor: Tensor,
            seen: dict[int, list[_Identity]] = seen,
            inputs: dict[_Identity, Tensor] = inputs,
        ) -> None:
            identity = _identity(tensor)
            seen.setdefault(id(linear.weight), []).append(identity)
            inputs[identity] = tensor

        with watched_inputs(linears, see):
            run_block(block, hidden, arguments)
        for identity, tensor in inputs.items():
            if _identity(tensor) != identity:
                raise CheckpointError(
                    f"The block {name} writes over the input of a linear layer, which is not supported; use another model."
                )
        alike: dict[tuple[int, tuple[_Identity, ...]], list[int]] = {}
        for weight, identities in seen.items():
            alike.setdefault((id(observers.get(weight)), tuple(identities)), []).append(weight)
        for (_, sequence), members in alike.items():
            observer = observers.get(members[0])
            if observer is None:
                tensor = inputs[sequence[0]]
                observer = new(tensor.shape[-1], tensor.device)
            elif any(other is observer for weight, other in observers.items() if weight not in members):
                observer = copy.deepcopy(observer)  # here their ways part
            observers.update(dict.fromkeys(members, observer))
            for index, identity in enumerate(sequence):
                observer.observe(inputs[identity], 0 if index else 1)
    return observers


def _identity(tensor: Tensor) -> _Identity:
    """Equal for tensors that are alive together and hold the same numbers because they are the same memory."""
    version = 0 if tensor.is_inference() else tensor._version
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, version
