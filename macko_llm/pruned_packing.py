"""Pruning straight into a packed checkpoint: no dense copy is written."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from macko_llm import checkpoint, models, refusals
from macko_llm.checkpoint_contents import tensor_infos
from macko_llm.defaults import HIDDEN_STATES, MAX_SHARD_SIZE
from macko_llm.dtypes import HEADERS
from macko_llm.format import MackoMatrix
from macko_llm.layouts import canonical
from macko_llm.pack_report import PackReport
from macko_llm.packed_checkpoint import array_keys
from macko_llm.packed_writer import PackedWriter
from macko_llm.packing import own_value_dtype
from macko_llm.progress import Progress, no_progress
from macko_llm.pruning import PruneReport, prune_checkpoint
from macko_llm.pruning.sinks import write_generation_config
from macko_llm.recipe import PruneRecipe
from macko_llm.shards import ShardWriter
from macko_llm.streaming import TensorReader, wait


def prune_packed(
    model: str | Path,
    target: Path,
    recipe: PruneRecipe,
    *,
    device: str = "auto",
    hidden_states: str = HIDDEN_STATES,
    resume: bool = False,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> tuple[PruneReport, PackReport]:
    """What `prune_checkpoint` and then `pack_checkpoint` make of a dense checkpoint.

    Args:
        model: a folder or a hub id.
        target: the new folder.
        recipe: the settings; its dtype is that of the packed values, "auto" the one that packing the checkpoint would give.
        device: as for `prune_checkpoint`, and the others too.
        hidden_states: where those of the calibration text are.
        resume: go on with a job that was cut off.
        trust_remote_code: run Python code that lies in the model's folder.
        overwrite: replace `target` when it holds a model.
        progress: called with (what, done, total).

    Raises:
        UsageError: as `prune_checkpoint`, or values of more than 16 bits.
        CheckpointError: as `prune_checkpoint`, or the files do not store the model's tensors as they are.
        CalibrationError, NonFiniteError: as `prune_checkpoint`.
    """
    refusals.check_value_dtype(recipe.dtype)
    folder = refusals.check_prune(model, target, recipe, overwrite=overwrite)
    skeleton = models.skeleton(folder, trust_remote_code=trust_remote_code)
    linears = [*models.prunable_linears(skeleton)]
    if recipe.dtype == "auto":
        infos = tensor_infos(folder, skeleton)
        stored = {infos[key].dtype for name in linears if (key := f"{name}.weight") in infos}
        recipe = replace(recipe, dtype=own_value_dtype(stored, checkpoint.read_config(folder)))
    sinks: list[PackedSink] = []

    def new_sink(partial: Path, state: Mapping[str, Any]) -> PackedSink:
        sinks.append(PackedSink(linears, recipe.dtype, partial, state))
        return sinks[-1]

    pruned = prune_checkpoint(
        model,
        target,
        recipe,
        device=device,
        hidden_states=hidden_states,
        resume=resume,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
        progress=progress,
        output="packed",
        new_sink=new_sink,
    )
    return pruned, replace(sinks[-1].report(), seconds=pruned.seconds)


class PackedSink:
    """Writes a packed checkpoint (a `macko_llm.pruning.sinks.Sink`).

    Raises:
        AttributeError, KeyError, TypeError, ValueError: `state` is none, or lacks its files.
    """

    def __init__(self, linears: list[str], value_dtype: str, folder: Path, state: Mapping[str, Any]) -> None:
        self._folder = folder
        self._shards = ShardWriter(folder, checkpoint.parse_size(MAX_SHARD_SIZE), state.get("shards"))
        self._packed = PackedWriter(linears, value_dtype, self._shards, state.get("packed"))
        reported = self._packed.state()["layers"]
        if any(f"{name}.weight" in self and name not in reported for name in linears):
            raise ValueError("a layer without its report")

    def add(self, name: str, tensor: Tensor) -> None:
        """Pack and write a tensor."""
        self._packed.add(name, tensor)

    def replace(self, name: str, tensor: Tensor) -> None:
        """Write over a tensor that stays dense, as the lm_head does."""
        self._shards.replace(name, tensor)

    def __contains__(self, name: object) -> bool:
        return name in self._shards or (isinstance(name, str) and _array_keys(name)[0] in self._shards)

    def load(self, name: str, target: Tensor, reader: TensorReader) -> None:
        """Fill a dense tensor with the one that was written."""
        if name in self._shards:
            wait(reader.read(self._shards.info(name), target))
            return
        infos = [self._shards.info(key) for key in _array_keys(name)]
        arrays = [torch.empty(info.shape, dtype=HEADERS[info.dtype], device=target.device) for info in infos]
        for info, array in zip(infos, arrays, strict=True):
            wait(reader.read(info, array))
        values, deltas, row_offsets = arrays
        matrix = MackoMatrix(values, deltas, row_offsets, (target.shape[0], target.shape[1]))
        canonical.validate(matrix, name)
        target.copy_(canonical.unpack(matrix))

    def state(self) -> dict[str, Any]:
        """What has been written, as JSON has it."""
        return {"shards": self._shards.state(), "packed": self._packed.state()}

    def finish(self, model: PreTrainedModel, source: Path, provenance: dict[str, Any]) -> None:
        """Complete the folder."""
        write_generation_config(model, source, self._folder)
        self._packed.finish(source, self._folder, model, provenance)

    def report(self) -> PackReport:
        """What has been packed."""
        return self._packed.report()


def _array_keys(name: str) -> list[str]:
    return list(array_keys(name.removesuffix(".weight")))
