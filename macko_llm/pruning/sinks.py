"""Where pruned tensors go, as soon as their block is done."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from macko_llm import checkpoint
from macko_llm.defaults import MAX_SHARD_SIZE
from macko_llm.shards import ShardWriter
from macko_llm.streaming import TensorReader, wait


class Sink(Protocol):
    """Writes a checkpoint, tensor by tensor; one that was cut off goes on from its state."""

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, on any device, under its name in the files."""

    def replace(self, name: str, tensor: Tensor) -> None:
        """Write over a tensor outside the blocks that was added under this name, with one of its shape and dtype."""

    def __contains__(self, name: object) -> bool:
        """Whether a tensor of this name has been written."""

    def load(self, name: str, target: Tensor, reader: TensorReader) -> None:
        """Fill a tensor of its shape and dtype, on the reader's device, with the one that was written under this name."""

    def state(self) -> dict[str, Any]:
        """What has been written, as JSON has it."""

    def finish(self, model: PreTrainedModel, source: Path, provenance: dict[str, Any]) -> None:
        """Complete the folder.

        Args:
            model: on the meta device.
            source: folder of the checkpoint that was pruned.
            provenance: what macko.json says of the pruning.
        """


SinkMaker = Callable[[Path, Mapping[str, Any]], Sink]
"""(folder to write to, state of a sink that was cut off there, which may be empty) -> a sink."""


class DenseSink:
    """Writes what `save_pretrained` of transformers writes."""

    def __init__(self, folder: Path, state: Mapping[str, Any]) -> None:
        self._folder = folder
        self._writer = ShardWriter(folder, checkpoint.parse_size(MAX_SHARD_SIZE), state)

    def add(self, name: str, tensor: Tensor) -> None:
        """See `Sink`."""
        self._writer.add(name, tensor)

    def replace(self, name: str, tensor: Tensor) -> None:
        """See `Sink`."""
        self._writer.replace(name, tensor)

    def __contains__(self, name: object) -> bool:
        return name in self._writer

    def load(self, name: str, target: Tensor, reader: TensorReader) -> None:
        """See `Sink`."""
        wait(reader.read(self._writer.info(name), target))

    def state(self) -> dict[str, Any]:
        """See `Sink`."""
        return self._writer.state()

    def finish(self, model: PreTrainedModel, source: Path, provenance: dict[str, Any]) -> None:
        """See `Sink`."""
        self._writer.close(total_parameters=model.num_parameters())
        write_surroundings(model, source, self._folder)
        checkpoint.write_provenance(self._folder, provenance)


def write_surroundings(model: PreTrainedModel, source: Path, folder: Path) -> None:
    """Write the configs of a dense model, and copy what else its folder has, such as the tokenizer."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    write_generation_config(model, source, folder)
    checkpoint.copy_side_files(source, folder)


def write_generation_config(model: PreTrainedModel, source: Path, folder: Path) -> None:
    """Write the generation config of a model whose folder has none, as `save_pretrained` does.

    One that is there is copied as it is: transformers refuses to write some that are published (Llama 2's).
    """
    generation = model.generation_config
    if not (source / "generation_config.json").is_file() and generation is not None and model.can_generate():
        generation.save_pretrained(folder)
