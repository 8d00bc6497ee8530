"""Tuning a pruned checkpoint, folder to folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig

from macko_llm import checkpoint, models, outputs, refusals
from macko_llm.calibration import (
    TEXT_COLUMN,
    calibration_tokens,
    check_source,
    is_dataset,
    is_token_file,
    load_tokens,
    tokens_sha256,
)
from macko_llm.defaults import CALIBRATION_SEQLEN, MAX_SHARD_SIZE
from macko_llm.errors import CheckpointError, UsageError
from macko_llm.progress import Progress, no_progress
from macko_llm.tuning.settings import TuneRecipe
from macko_llm.tuning.training import TuneReport, pruned_linears, tune_model, usual_rate


def tune_checkpoint(
    model: str | Path,
    target: Path,
    recipe: TuneRecipe,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> TuneReport:
    """Tune a pruned dense checkpoint into a new folder: the same zeros, other weights, and macko.json.

    Whatever can be refused without loading the weights is refused before that. `target` appears only when it is complete.

    Args:
        model: a folder or a hub id.
        target: the new folder.
        recipe: the settings.
        device: where to compute: "auto", "cpu", "cuda", ...
        trust_remote_code: run Python code that lies in the model's folder.
        overwrite: replace `target` when it holds a model.
        progress: called with (what, done, total).

    Raises:
        UsageError: a packed or quantized model, one without zeros, an unusable target, settings that do not fit the model.
        CheckpointError: the model is missing, damaged, too large, or of an unsupported kind.
        CalibrationError: the text is missing, too short, or from another vocabulary.
        NonFiniteError: NaN or infinity in weights, or in a loss.
    """
    models.resolve_device(device)
    check_source(recipe.dataset, recipe.split, recipe.text_column)
    folder = refusals.check_tune(model, Path(target), dtype=recipe.dtype, overwrite=overwrite)
    recipe = _fill_gaps(recipe, models.load_config(folder, trust_remote_code=trust_remote_code))
    with outputs.new_folder(Path(target), overwrite=overwrite) as partial:
        progress("loading the model", 0, 1)
        loaded = models.load_model(folder, dtype=recipe.dtype, device=device, trust_remote_code=trust_remote_code)
        pruned_linears(loaded)  # a model that cannot be tuned is refused before any text is fetched
        progress("loading the model", 1, 1)
        progress("drawing tokens", 0, 1)
        tokens = _draw(folder, recipe, trust_remote_code)
        progress("drawing tokens", 1, 1)
        with _memory_errors(folder, loaded.device):
            report = tune_model(loaded, tokens, recipe, progress)
        progress("saving", 0, 1)
        models.save_model(loaded, folder, partial, MAX_SHARD_SIZE)
        history = checkpoint.read_provenance(folder)
        entry = _provenance(model, recipe, tokens, report)
        checkpoint.write_provenance(partial, {**history, "tune": [*history.get("tune", []), entry]})
        progress("saving", 1, 1)
    return report


def _fill_gaps(recipe: TuneRecipe, config: PretrainedConfig) -> TuneRecipe:
    """The recipe with the length of sequences, the learning rate, and the split and column of a dataset, that will be used."""
    if is_token_file(recipe.dataset):
        seqlen = load_tokens(Path(recipe.dataset).expanduser()).shape[1]
        if recipe.seqlen not in (seqlen, None):
            raise UsageError(
                f"{recipe.dataset} holds sequences of {seqlen} tokens, used as they are; leave seqlen out."
            )
    else:
        seqlen = recipe.seqlen or min(CALIBRATION_SEQLEN, models.max_positions(config) or CALIBRATION_SEQLEN)
    models.check_seqlen(seqlen, config)
    recipe = replace(recipe, seqlen=seqlen, learning_rate=recipe.learning_rate or usual_rate(config))
    if is_dataset(recipe.dataset, recipe.split):
        recipe = replace(recipe, split=recipe.split or "train", text_column=recipe.text_column or TEXT_COLUMN)
    return recipe


def _draw(folder: Path, recipe: TuneRecipe, trust_remote_code: bool) -> torch.Tensor:
    """As many sequences as the steps take; those of a file of tokens as they are."""
    assert recipe.seqlen is not None  # _fill_gaps has seen to it
    tokenizer = None
    if not is_token_file(recipe.dataset):
        tokenizer = models.load_tokenizer(folder, trust_remote_code=trust_remote_code)
    return calibration_tokens(
        recipe.dataset,
        tokenizer,
        recipe.steps * recipe.batch_size * recipe.accumulation,
        recipe.seqlen,
        recipe.seed,
        split=recipe.split,
        text_column=recipe.text_column,
    )


@contextmanager
def _memory_errors(folder: Path, device: torch.device) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not models.lacks_memory(error):
            raise
        fix = "" if device.type == "cpu" else ", or --device cpu"
        raise CheckpointError(
            f"Tuning {folder} does not fit in the memory of {device}, which it takes 16 bytes a weight of; "
            f"use a smaller --batch-size with more --accumulation, a smaller --seqlen{fix}."
        ) from error


def _provenance(model: str | Path, recipe: TuneRecipe, tokens: torch.Tensor, report: TuneReport) -> dict[str, Any]:
    return {
        **recipe.settings(),
        "model": Path(model).resolve().name if Path(model).is_dir() else str(model),
        "tokens_sha256": tokens_sha256(tokens),
        "sparsity_before": report.sparsity_before,
        "measured_sparsity": report.sparsity,
        "loss_before": report.loss_before,
        "loss_after": report.loss_after,
        "layers": report.layers,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
