"""What pruning a model takes: seconds by stage, and the peaks of memory."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from macko_llm import checkpoint, models
from macko_llm.benchmarks.machine import Machine, describe_machine, synchronize
from macko_llm.benchmarks.processes import in_fresh_process, peak_host_bytes
from macko_llm.benchmarks.shapes import shape_config
from macko_llm.benchmarks.subjects import random_parameter
from macko_llm.defaults import CALIBRATION_SEQLEN, MAX_SHARD_SIZE
from macko_llm.packing import pack_checkpoint
from macko_llm.progress import Progress
from macko_llm.pruned_packing import prune_packed
from macko_llm.pruning import prune_checkpoint
from macko_llm.recipe import PruneRecipe
from macko_llm.refusals import check_subject
from macko_llm.shards import ShardWriter
from macko_llm.stages import Stage, listening

DTYPE = torch.float16
"""Of random weights."""


@dataclass(frozen=True)
class Cost:
    """What one job took, in a process of its own.

    Attributes:
        seconds: of the library's call.
        process_seconds: of the process, with all imports.
        stages: seconds of each, which add up to `seconds`.
        peak_gpu_bytes: that torch had allocated at most; None on the CPU.
        peak_gpu_reserved_bytes: that torch had taken from the GPU at most, of which the former are a part.
        host_bytes_before: the process's peak in RAM when the call began, libraries and all; None where the system does not
            tell.
        peak_host_bytes: at the end.
        all_stages: seconds of each for all blocks of the model, where only some were there.
        all_seconds: their sum.
    """

    seconds: float
    process_seconds: float
    stages: dict[Stage, float]
    peak_gpu_bytes: int | None
    peak_gpu_reserved_bytes: int | None
    host_bytes_before: int | None
    peak_host_bytes: int | None
    all_stages: dict[Stage, float] | None = None
    all_seconds: float | None = None


@dataclass(frozen=True)
class PruneCosts:
    """What `macko bench prune` measured.

    Attributes:
        machine: where and when.
        transformers: version.
        model: name of the shape or the checkpoint.
        recipe: the settings; calibration tokens are random.
        hidden_states: where they were asked to be.
        blocks: decoder blocks of the model.
        blocks_measured: of them that were there.
        weight_bytes: of the dense checkpoint that was pruned.
        prune: into a dense checkpoint, or into a packed one where `packed`.
        packed: whether pruning packed.
        pack: packing the dense result; None where pruning did it.
    """

    machine: Machine
    transformers: str
    model: str
    recipe: PruneRecipe
    hidden_states: str
    blocks: int
    blocks_measured: int
    weight_bytes: int
    prune: Cost
    packed: bool
    pack: Cost | None


def measure_pruning(
    model: str | None,
    config: str | None,
    recipe: PruneRecipe,
    *,
    random_weights: bool,
    blocks: int | None,
    packed: bool,
    hidden_states: str,
    device: str,
    folder: Path | None,
    progress: Progress,
) -> PruneCosts:
    """Prune a model with random calibration tokens, as a user would, and pack it.

    Args:
        model: a folder or hub id, dense.
        config: name of a shape, in place of a model; its weights are random.
        recipe: the settings; nothing of the source of calibration is looked at.
        random_weights: take only the shape of the model.
        blocks: leave all but so many of a shape's blocks out, and reckon what all would take.
        packed: prune into a packed checkpoint, instead of packing the dense one.
        hidden_states: as for `prune_checkpoint`.
        device: where to compute.
        folder: in which a temporary folder is made for everything that is written; None for the system's usual one.
        progress: called with (what, done, total).

    Raises:
        UsageError, CheckpointError, NonFiniteError: as `prune_checkpoint` and `check_subject`.
    """
    source = check_subject(model, config, (), random_weights)
    models.resolve_device(device)
    skeleton = models.skeleton(source) if source is not None else _skeleton(shape_config(config or ""))
    seqlen = recipe.seqlen or min(CALIBRATION_SEQLEN, models.max_positions(skeleton.config) or CALIBRATION_SEQLEN)
    models.check_seqlen(seqlen, skeleton.config)
    every = len(models.decoder_blocks(skeleton))
    if blocks is not None:
        skeleton.config.num_hidden_layers = blocks
        skeleton = _skeleton(skeleton.config)

    with tempfile.TemporaryDirectory(prefix="macko-bench-", dir=folder) as made:
        dense, pruned, packed_target = (Path(made) / name for name in ("dense", "pruned", "packed"))
        tokens = Path(made) / "tokens.safetensors"
        generator = torch.Generator().manual_seed(recipe.seed)
        vocabulary = skeleton.config.get_text_config().vocab_size
        save_file({"tokens": torch.randint(vocabulary, (recipe.nsamples, seqlen), generator=generator)}, tokens)
        recipe = replace(recipe, calibration=str(tokens), seqlen=seqlen)
        random_config = skeleton.config if source is None or random_weights else None
        if random_config is None:
            dense = source  # type: ignore[assignment]  # there is one
        machine = in_fresh_process(_prepare, random_config, dense, device, progress=progress)

        def cost(work: Callable[..., Cost], *args: Any) -> Cost:
            started = time.perf_counter()
            measured = in_fresh_process(work, *args, device, progress=progress)
            measured = replace(measured, process_seconds=time.perf_counter() - started)
            return measured if blocks in (None, every) else _of_all(measured, skeleton, every)

        return PruneCosts(
            machine=machine,
            transformers=transformers.__version__,
            model=config or str(model),
            recipe=replace(recipe, calibration="random tokens"),
            hidden_states=hidden_states,
            blocks=every,
            blocks_measured=blocks or every,
            weight_bytes=sum(file.stat().st_size for file in checkpoint.weight_files(dense)),
            prune=cost(_prune, dense, pruned, recipe, hidden_states, packed),
            packed=packed,
            pack=None if packed else cost(_pack, pruned, packed_target),
        )


def write_random_checkpoint(config: PretrainedConfig, folder: Path, device: torch.device, progress: Progress) -> None:
    """Write a dense checkpoint with weights as of `subjects.RandomShape`; no more than one of them is in memory."""
    model = _skeleton(config)
    folder.mkdir()
    generator = torch.Generator(device).manual_seed(0)
    writer = ShardWriter(folder, checkpoint.parse_size(MAX_SHARD_SIZE))
    parameters = dict(model.named_parameters())
    for number, (name, parameter) in enumerate(parameters.items()):
        progress("writing random weights", number, len(parameters))
        writer.add(name, random_parameter(name, parameter.shape, DTYPE, generator))
    writer.close()
    model.config.architectures = [type(model).__name__]
    model.config.dtype = DTYPE
    model.config.save_pretrained(folder)
    progress("writing random weights", len(parameters), len(parameters))


def _skeleton(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=DTYPE)


# Each of these has a process of its own.


def _prepare(config: PretrainedConfig | None, dense: Path, device: str, progress: Progress) -> Machine:
    where = models.resolve_device(device)
    if config is not None:
        write_random_checkpoint(config, dense, where, progress)
        if hasattr(os, "sync"):
            os.sync()  # or the disk would still be busy with it while something else is timed
    return describe_machine(where)


def _prune(
    dense: Path, target: Path, recipe: PruneRecipe, hidden_states: str, packed: bool, device: str, progress: Progress
) -> Cost:
    prune = prune_packed if packed else prune_checkpoint
    return _cost(
        partial(prune, dense, target, recipe, device=device, hidden_states=hidden_states, progress=progress), device
    )


def _pack(pruned: Path, target: Path, device: str, progress: Progress) -> Cost:
    return _cost(partial(pack_checkpoint, pruned, target, device=device, progress=progress), device)


def _cost(work: Callable[[], object], device: str) -> Cost:
    where = models.resolve_device(device)
    synchronize(where)  # which also makes the GPU ready
    host_bytes_before = peak_host_bytes()
    started = time.perf_counter()
    with listening(partial(synchronize, where)) as watch:
        work()
    seconds = time.perf_counter() - started
    on_gpu = where.type == "cuda"
    return Cost(
        seconds=seconds,
        process_seconds=seconds,
        stages=watch.seconds,
        peak_gpu_bytes=torch.cuda.max_memory_allocated(where) if on_gpu else None,
        peak_gpu_reserved_bytes=torch.cuda.max_memory_reserved(where) if on_gpu else None,
        host_bytes_before=host_bytes_before,
        peak_host_bytes=peak_host_bytes(),
    )


def _of_all(cost: Cost, model: PreTrainedModel, every: int) -> Cost:
    """The cost with what all blocks would take, reckoned from those that the model has, which are alike."""
    blocks = models.decoder_blocks(model)
    inside = sum(parameter.numel() for block in blocks.values() for parameter in block.parameters())
    weights = sum(parameter.numel() for parameter in model.parameters())
    by_blocks = every / len(blocks)
    by_runs = (every - 1) / (len(blocks) - 1)  # nothing needs what the last block computes
    by_weights = (weights + inside * (by_blocks - 1)) / weights
    growth: dict[Stage, float] = {
        "observing": by_blocks, "choosing": by_blocks, "running": by_runs,
        "reading": by_weights, "packing": by_weights, "writing": by_weights, "saving": by_weights,
    }  # fmt: skip
    stages = {name: seconds * growth.get(name, 1) for name, seconds in cost.stages.items()}
    return replace(cost, all_stages=stages, all_seconds=sum(stages.values()))
