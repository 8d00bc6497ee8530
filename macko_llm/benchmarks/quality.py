"""The whole chain on one model: what pruning costs in perplexity and what packing gives back in bytes and speed."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from macko_llm import calibration, checkpoint, generation, models, outputs, packing, perplexity
from macko_llm.benchmarks.machine import device_name
from macko_llm.defaults import BENCHMARK_PROMPT
from macko_llm.loading import load
from macko_llm.progress import Progress, no_progress
from macko_llm.pruning.pipeline import prune_checkpoint
from macko_llm.recipe import PruneRecipe
from macko_llm.text import encode_prompt, require_chat_template

SPEED_RUNS = 3
SPEED_TOKENS = 100


@dataclass(frozen=True)
class Measurement:
    """One checkpoint, measured.

    Attributes:
        name: "dense", "magnitude 50%", "wanda 50%", "packed 50%".
        sparsity: share of zeros in the linears of the blocks.
        bytes_on_disk: of the weight files.
        bytes_in_memory: of all parameters and buffers once loaded.
        perplexity: on the dataset.
        tokens_per_second: median decode speed of SPEED_RUNS greedy runs of SPEED_TOKENS tokens, batch 1.
    """

    name: str
    sparsity: float
    bytes_on_disk: int
    bytes_in_memory: int
    perplexity: float
    tokens_per_second: float


@dataclass(frozen=True)
class QualityReport:
    """Measurements of one model and the conditions under which they hold."""

    model: str
    recipe: PruneRecipe
    dataset: str
    split: str | None
    seqlen: int
    windows: int
    device: str
    threads: int
    measurements: list[Measurement]


def measure_chain(
    model: Path,
    workdir: Path,
    recipe: PruneRecipe,
    *,
    sparsities: list[float],
    dataset: str,
    split: str | None = None,
    text_column: str | None = None,
    seqlen: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    progress: Progress = no_progress,
) -> QualityReport:
    """Take a dense model through prune, pack, evaluate and generate, and keep every checkpoint in `workdir`.

    Args:
        model: folder of a dense checkpoint.
        workdir: gets a folder a checkpoint: dense, magnitude-50, wanda-50, packed-50, ...; an earlier run's are replaced.
        recipe: calibration settings; method and sparsity are set by this function, and "auto" dtype becomes float16, so
            that dense and packed values have the same width.
        sparsities: one magnitude, one Wanda and one packed (Wanda) checkpoint each.
        dataset: evaluation text, as for `macko eval-perplexity`.
        split: of the dataset; None is "test".
        text_column: of the dataset, or the field of .json, .jsonl and .parquet files; None is "text".
        seqlen: tokens in an evaluation window; None is 2048, or the model's longest context where that is shorter.
        limit: at most this many windows.
        device: where to compute.
        progress: told of each step.

    Raises:
        MackoError: whatever the steps raise.
    """
    if recipe.dtype == "auto":
        recipe = replace(recipe, dtype="float16")
    # What makes no sense is refused before any work.
    recipes = [replace(recipe, sparsity=sparsity) for sparsity in sparsities]
    calibration.check_source(recipe.calibration, recipe.split, recipe.text_column, chat_template=recipe.chat_template)
    calibration.check_source(dataset, split, text_column)
    config = models.load_config(model)
    if recipe.seqlen is not None:
        models.check_seqlen(recipe.seqlen, config)
    perplexity.window_shape(config, seqlen=seqlen, limit=limit)
    tokenizer = models.load_tokenizer(model)
    if recipe.chat_template:
        require_chat_template(tokenizer, "--chat-template")
    text = calibration.evaluation_text(dataset, split, text_column)
    cut = calibration.evaluation_windows(dataset)
    windows = perplexity.cut_text(tokenizer, text, config, seqlen=seqlen, limit=limit, cut=cut)
    ids = encode_prompt(tokenizer, BENCHMARK_PROMPT)
    measurements: list[Measurement] = []

    def measure(name: str, folder: Path, sparsity: float) -> None:
        loaded = load(folder, device=device)
        report = perplexity.evaluate(loaded, windows, dataset=dataset, progress=progress)
        speed = decode_speed(loaded, tokenizer, ids, SPEED_TOKENS, name=name, progress=progress)
        measurements.append(
            Measurement(
                name=name,
                sparsity=sparsity,
                bytes_on_disk=checkpoint.folder_bytes(folder),
                bytes_in_memory=models.memory_bytes(loaded),
                perplexity=report.perplexity,
                tokens_per_second=speed,
            )
        )

    def prune(name: str, how: PruneRecipe) -> Path:
        target = workdir / name
        prune_checkpoint(model, target, how, device=device, resumable=False, overwrite=True, progress=progress)
        return target

    names = [
        "dense",
        *(f"{kind}-{how.sparsity * 100:g}" for how in recipes for kind in ("magnitude", "wanda", "packed")),
    ]
    with outputs.several_outputs(workdir, names):
        # A sparsity of 0 removes nothing: the dense model, in the dtype of the others.
        measure("dense", prune("dense", replace(recipe, method="magnitude", sparsity=0.0)), 0.0)
        for how in recipes:
            percent = f"{how.sparsity * 100:g}"
            for method in ("magnitude", "wanda"):
                measure(f"{method} {percent}%", prune(f"{method}-{percent}", replace(how, method=method)), how.sparsity)
            packed = workdir / f"packed-{percent}"
            report = packing.pack_checkpoint(workdir / f"wanda-{percent}", packed, overwrite=True, progress=progress)
            measure(f"packed {percent}%", packed, report.sparsity)
    return QualityReport(
        model=str(model),
        recipe=recipe,
        dataset=dataset,
        split=calibration.used_split(dataset, "test", split),
        seqlen=windows.seqlen,
        windows=len(windows.batches),
        device=device_name(models.resolve_device(device)),
        threads=torch.get_num_threads(),
        measurements=measurements,
    )


def decode_speed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Tensor | Sequence[int],
    new_tokens: int,
    *,
    name: str,
    progress: Progress = no_progress,
) -> float:
    """Tokens per second after the first, the median of SPEED_RUNS greedy runs of `new_tokens` tokens, one text at a time."""
    what = f"generating with {name}"
    progress(what, 0, SPEED_RUNS)
    speeds = []
    for run in range(SPEED_RUNS):
        made = generation.generate(model, tokenizer, prompt_ids, max_new_tokens=new_tokens, stop_ids=())
        speeds.append(made.tokens_per_second or 0.0)
        progress(what, run + 1, SPEED_RUNS)
    return statistics.median(speeds)
