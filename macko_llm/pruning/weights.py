"""Where a model's weights are while it is pruned: all in memory, or only those of the block that is at work."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from macko_llm import checkpoint, models
from macko_llm.errors import NonFiniteError
from macko_llm.gaps import Gap, find_gaps, move_buffers
from macko_llm.pruning.hidden_states import HiddenStates
from macko_llm.stages import stage
from macko_llm.streaming import TensorReader, wait

Loader = Callable[[str, Tensor, TensorReader], bool]
"""(name of a tensor, an empty one, reader for its device) -> whether it was filled: what is pruned already comes from there."""


class Weights(Protocol):
    """Has weights in memory while they are wanted."""

    device: torch.device
    """Where the model computes."""

    def in_front(self) -> AbstractContextManager[None]:
        """While this lasts, what lies in front of the blocks is there."""

    def block(self, name: str) -> AbstractContextManager[None]:
        """While this lasts, the block of this qualified name is there."""

    def behind(self) -> AbstractContextManager[None]:
        """While this lasts, all that is no block is there: what lies in front of the blocks, and behind them."""

    def new_states(self, count: int, first: Tensor) -> HiddenStates:
        """Room for hidden states (`hidden_states.Maker`)."""


class WeightsInMemory:
    """Of a model that is in memory as a whole."""

    def __init__(self, model: PreTrainedModel, place: str = "device") -> None:
        self.device = next(model.parameters()).device
        self._place = place

    def in_front(self) -> AbstractContextManager[None]:
        """Nothing to do."""
        return nullcontext()

    def block(self, name: str) -> AbstractContextManager[None]:  # noqa: ARG002
        """Nothing to do."""
        return nullcontext()

    def behind(self) -> AbstractContextManager[None]:
        """Nothing to do."""
        return nullcontext()

    def new_states(self, count: int, first: Tensor) -> HiddenStates:
        """Room for hidden states."""
        return HiddenStates(count, first, self._place, None)


@dataclass(frozen=True)
class Homes:
    """Where the tensors of a model belong, each by its name in the files.

    Attributes:
        order: all names, as transformers puts them into shards.
        blocks: qualified name of each block -> its tensors.
        in_front: all others but the lm_head, which no block needs; a tied lm_head is here.
        heads: what is left.
    """

    order: list[str]
    blocks: dict[str, dict[str, Gap]]
    in_front: dict[str, Gap]
    heads: dict[str, Gap]

    @property
    def outside(self) -> dict[str, Gap]:
        """What belongs to no block, in the order."""
        gaps = {**self.in_front, **self.heads}
        return {key: gaps[key] for key in self.order if key in gaps}

    @property
    def before(self) -> dict[str, Gap]:
        """What comes before the first block, in the order."""
        outside = self.outside
        return {key: outside[key] for key in takewhile(outside.__contains__, self.order)}


def find_homes(model: PreTrainedModel, folder: Path) -> Homes | None:
    """Where everything belongs that a model from `models.load_empty` lacks.

    Returns:
        None where only the whole model can be loaded: its files hold something else than its tensors, or a tensor is shared
        between two blocks, or between a block and what is outside.
    """
    gaps = find_gaps(model, folder)
    if gaps is None:
        return None
    block_of = {id(part): name for name, block in models.decoder_blocks(model).items() for part in block.modules()}
    head = model.get_output_embeddings()
    names = sorted(gaps, key=checkpoint.natural_order)
    homes = Homes(names, {name: {} for name in models.decoder_blocks(model)}, {}, {})
    for key in names:
        blocks = {block_of.get(id(module)) for module, _ in gaps[key].places}
        if len(blocks) > 1:
            return None
        block = blocks.pop()
        if block is not None:
            homes.blocks[block][key] = gaps[key]
        elif all(module is head for module, _ in gaps[key].places):
            homes.heads[key] = gaps[key]
        else:
            homes.in_front[key] = gaps[key]
    return homes


class StreamedWeights:
    """Of a model whose files simply hold each tensor: read for as long as they are wanted.

    A context manager, whose end waits for whatever is still being read.

    Args:
        model: from `models.load_empty`.
        homes: of all that it lacks.
        device: where the model computes.
        place: of the hidden states (`HiddenStates`).
        folder: for hidden states on disk.
        loader: asked for each tensor of a block before its file is.
    """

    def __init__(
        self, model: PreTrainedModel, homes: Homes, device: torch.device, place: str, folder: Path, loader: Loader
    ) -> None:
        self.device = device
        self._homes, self._place, self._folder, self._loader = homes, place, folder, loader
        self._reader = TensorReader(device)
        move_buffers(model, device)

    def __enter__(self) -> "StreamedWeights":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.__exit__(kind, error, trace)

    def in_front(self) -> AbstractContextManager[None]:
        """While this lasts, all is there but the blocks and the lm_head."""
        return self._present(self._homes.in_front)

    def block(self, name: str) -> AbstractContextManager[None]:
        """While this lasts, the block of this qualified name is there.

        Raises:
            NonFiniteError: NaN or infinity in its weights.
            CheckpointError: a file cannot be read.
        """
        return self._present(self._homes.blocks[name])

    def behind(self) -> AbstractContextManager[None]:
        """While this lasts, all is there but the blocks.

        Raises:
            NonFiniteError, CheckpointError: as `block`.
        """
        return self._present(self._homes.outside)

    def new_states(self, count: int, first: Tensor) -> HiddenStates:
        """Room for hidden states."""
        return HiddenStates(count, first, self._place, self._folder)

    def read(self, gap: Gap) -> Tensor:
        """A tensor that is not there now, in the dtype that the model has it in."""
        tensor = torch.empty_like(gap.empty, device=self.device)
        wait(self._reader.read(gap.info, tensor))
        return tensor

    @contextmanager
    def _present(self, gaps: dict[str, Gap]) -> Iterator[None]:
        reading: list[tuple[str, Tensor, list[Future[None]]]] = []
        try:
            with stage("reading"):
                for key, gap in gaps.items():
                    tensor = torch.empty_like(gap.empty, device=self.device)
                    if self._loader(key, tensor, self._reader):
                        gap.put(tensor)
                    else:
                        reading.append((key, tensor, gap.close(tensor, self._reader)))
                for key, tensor, futures in reading:
                    wait(futures)
                    if tensor.is_floating_point() and not tensor.isfinite().all():
                        raise NonFiniteError(
                            f"The weights of {key.removesuffix('.weight')} hold NaN or infinity; use an undamaged checkpoint."
                        )
            reading.clear()
            yield
        finally:
            for gap in gaps.values():
                gap.open()
