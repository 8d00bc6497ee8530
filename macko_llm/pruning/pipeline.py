"""Pruning a model, block by block, and a checkpoint, folder to folder."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

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
from macko_llm.defaults import CALIBRATION_SEQLEN, HIDDEN_STATES, MAX_SHARD_SIZE
from macko_llm.errors import CalibrationError, CheckpointError, NonFiniteError, UsageError, add_note
from macko_llm.progress import Progress, no_progress
from macko_llm.pruning.allocation import overrides
from macko_llm.pruning.blocks import layer_amounts, prune_blocks, shapes_of
from macko_llm.pruning.journal import JOURNAL_FILE, Job, Journal, damaged, fingerprint, read_journal
from macko_llm.pruning.methods import Amount
from macko_llm.pruning.report import PruneReport, make_report
from macko_llm.pruning.scores import removed_per_row
from macko_llm.pruning.selection import asked_head, chosen_linears
from macko_llm.pruning.sinks import DenseSink, Sink, SinkMaker
from macko_llm.pruning.streamed import prune_streamed
from macko_llm.pruning.weights import WeightsInMemory, find_homes
from macko_llm.recipe import PruneRecipe
from macko_llm.refusals import check_place
from macko_llm.stages import stage
from macko_llm.version import __version__

DENSE = "dense"
"""The kind of checkpoint that `DenseSink` writes."""


@dataclass(frozen=True)
class PrunePlan:
    """What a pruning run would do.

    Attributes:
        recipe: the settings, with nsamples, seqlen and a dataset's split and column as they would be used; with a chat
            template the dataset decides on a column that is not named.
        layers: qualified name of each linear that would be pruned -> (rows, cols).
        sparsity: share of the weights of these linears that would be removed.
        layer_sparsities: of the linears that the recipe's `layers` name, their own sparsity.
    """

    recipe: PruneRecipe
    layers: dict[str, tuple[int, int]]
    sparsity: float
    layer_sparsities: dict[str, float]


def plan(
    model: str | Path,
    target: Path,
    recipe: PruneRecipe,
    *,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> PrunePlan:
    """What `prune_checkpoint` would do, without weights, which are not downloaded either, and without reading calibration text.

    Raises:
        UsageError, CheckpointError, CalibrationError: as `prune_checkpoint`, for what shows without weights and text.
    """
    _, skeleton, recipe = _prepare(model, Path(target), recipe, trust_remote_code, overwrite, weights=False)
    layers = shapes_of(chosen_linears(skeleton, recipe))
    own = overrides(layers, recipe, asked_head(skeleton, recipe))
    amounts = dict.fromkeys(layers, Amount(recipe.sparsity, recipe.group)) | own
    removed = sum(
        rows * removed_per_row(cols, amounts[name].sparsity, amounts[name].group)
        for name, (rows, cols) in layers.items()
    )
    share = removed / sum(rows * cols for rows, cols in layers.values())
    return PrunePlan(recipe, layers, share, {name: amount.sparsity for name, amount in own.items()})


def prune_checkpoint(
    model: str | Path,
    target: Path,
    recipe: PruneRecipe,
    *,
    device: str = "auto",
    hidden_states: str = HIDDEN_STATES,
    resume: bool = False,
    resumable: bool = True,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    progress: Progress = no_progress,
    output: str = DENSE,
    new_sink: SinkMaker = DenseSink,
) -> PruneReport:
    """Prune a dense checkpoint into a new folder: an ordinary dense checkpoint with zeros, and macko.json.

    Only one block is in memory at a time, unless the model's files are such that transformers has to load them. Whatever can
    be refused without reading the weights is refused before that. `target` appears only when it is complete.

    Args:
        model: a folder or a hub id.
        target: the new folder.
        recipe: the settings.
        device: where to compute: "auto", "cpu", "cuda", ...
        hidden_states: where those of the calibration text are between blocks: "device", "host", "disk", or "auto", the first
            with room for them.
        resume: go on with a job of the same target that was cut off, if there is one; without it, that begins again.
        resumable: keep the blocks that are done when the job is cut off, in a hidden folder that the error names.
        trust_remote_code: run Python code that lies in the model's folder.
        overwrite: replace `target` when it holds a model.
        progress: called with (what, done, total).
        output: what kind of checkpoint `new_sink` writes.
        new_sink: makes what writes it.

    Raises:
        UsageError: a packed or quantized model, an unusable target, sizes that do not fit the pattern or the model, or a job
            to resume that was begun with other settings.
        CheckpointError: the model is missing, damaged, too large, or of an unsupported kind, or the job to resume is damaged.
        CalibrationError: the calibration source is missing, too short, or from another vocabulary.
        NonFiniteError: NaN or infinity in weights or activations.
    """
    models.resolve_device(device)
    check_place(hidden_states)
    folder, skeleton, recipe = _prepare(model, Path(target), recipe, trust_remote_code, overwrite)
    tokens = None
    if recipe.needs_calibration:
        progress("drawing calibration tokens", 0, 1)
        tokens, recipe = _calibrate(folder, recipe, trust_remote_code)
        _check_tokens(skeleton, tokens)
        progress("drawing calibration tokens", 1, 1)

    torch_device = models.resolve_device(device)
    with (
        _unfinished() as begun,
        outputs.new_folder(
            Path(target), overwrite=overwrite, fresh=not resume, journal=JOURNAL_FILE,
            keep=lambda error, folder: resumable and _would_go_on(error, folder),
        ) as partial,
    ):  # fmt: skip
        progress("loading the model", 0, 1)
        empty = models.load_empty(folder, dtype=recipe.dtype, trust_remote_code=trust_remote_code)
        homes = find_homes(empty, folder) if torch_device.type in ("cpu", "cuda") else None
        progress("loading the model", 1, 1)
        job = _job(folder, empty, recipe, tokens, torch_device, output)
        journal = read_journal(partial, job) or Journal(job)
        begun.append(partial)
        try:
            if homes is not None:
                sink = _make_sink(new_sink, partial, journal.sink)
                report = prune_streamed(
                    empty, homes, tokens, recipe, journal, sink, partial,
                    device=torch_device, place=hidden_states, progress=progress,
                )  # fmt: skip
                progress("saving", 0, 1)
                with stage("saving"):
                    sink.finish(empty, folder, {"prune": _provenance(model, recipe, report)})
            elif output != DENSE:
                raise CheckpointError(
                    f"{folder} does not store its tensors as they are, so that it cannot be packed as it is pruned; "
                    "prune it without --pack, and pack the result with `macko pack`."
                )
            else:
                outputs.empty(partial)  # of what was begun where it could be resumed
                loaded = models.load_model(
                    folder, dtype=recipe.dtype, device=device, trust_remote_code=trust_remote_code
                )
                report = prune_model(loaded, tokens, recipe, progress, hidden_states=hidden_states)
                progress("saving", 0, 1)
                models.save_model(loaded, folder, partial, MAX_SHARD_SIZE)
                checkpoint.write_provenance(partial, {"prune": _provenance(model, recipe, report)})
            progress("saving", 1, 1)
        except torch.OutOfMemoryError as error:
            raise CheckpointError(
                f"Pruning {folder} does not fit on {torch_device}; use --hidden-states host, or --device cpu."
            ) from error
    return report


@contextmanager
def _unfinished() -> Iterator[list[Path]]:
    """Says of a job that is cut off, in the folder which the caller puts into the list, that it may go on."""
    begun: list[Path] = []
    try:
        yield begun
    except BaseException as error:
        if any((folder / JOURNAL_FILE).is_file() for folder in begun):
            add_note(
                error, f"the same command with --resume goes on after the blocks that are done, kept in {begun[0]}."
            )
        raise


def _make_sink(new: SinkMaker, folder: Path, state: Mapping[str, Any]) -> Sink:
    try:
        return new(folder, state)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise damaged(folder) from error


def _would_go_on(error: BaseException, folder: Path) -> bool:
    """Whether a job that ends with this error may end otherwise when it goes on."""
    once_more = not isinstance(error, (CalibrationError, NonFiniteError))
    return once_more and (folder / JOURNAL_FILE).is_file()


def _job(
    folder: Path,
    model: PreTrainedModel,
    recipe: PruneRecipe,
    tokens: torch.Tensor | None,
    device: torch.device,
    output: str,
) -> Job:
    files = checkpoint.weight_files(folder, getattr(model.config, "transformers_weights", None))
    return Job(
        recipe=recipe.settings(),
        output=output,
        model=fingerprint(folder, files),
        calibration=None if tokens is None else tokens_sha256(tokens),
        versions={
            "macko": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        },
    )


@torch.no_grad()
def prune_model(
    model: PreTrainedModel,
    tokens: torch.Tensor | None,
    recipe: PruneRecipe,
    progress: Progress = no_progress,
    *,
    hidden_states: str = "device",
) -> PruneReport:
    """Prune the linears inside the decoder blocks of a model, and its lm_head if the recipe asks for it, in place.

    It goes block by block: statistics on the still dense block, pruning, and a second run, so that the next block sees what
    the pruned one computes; without calibration, pruning alone. A weight shared by several linears is pruned once, where it is
    first met, with the inputs of all linears of that block that share it.

    Args:
        model: on any device; evaluated in eval mode, whatever its mode.
        tokens: int64 [nsamples, seqlen], equally long sequences without padding; None will do where the recipe needs none.
        recipe: the settings of calibration and `dtype` are not looked at: the tokens and the model decide.
        progress: called with (what, done, total).
        hidden_states: where those of the calibration text are: "device", or "host" to keep them out of a GPU's memory.

    Raises:
        UsageError: sizes that do not fit the pattern, layer names that fit nothing, sequences longer than the model takes, no
            tokens where the recipe needs some.
        CheckpointError: blocks of an unsupported kind.
        CalibrationError: token ids outside the vocabulary, or a linear that no token reaches.
        NonFiniteError: NaN or infinity in weights or activations.
    """
    started = time.perf_counter()
    layers = chosen_linears(model, recipe)
    _check_group(shapes_of(layers), recipe)
    overrides(layers, recipe)  # refuses patterns that fit nothing
    for name, linear in layers.items():
        if not linear.weight.isfinite().all():
            raise NonFiniteError(f"The weights of {name} hold NaN or infinity; use an undamaged checkpoint.")
    if not recipe.needs_calibration:
        tokens = None
    elif tokens is None:
        raise UsageError("The recipe needs calibration tokens; give some, or use a method that needs none.")
    else:
        _check_tokens(model, tokens)

    training = model.training
    model.eval()
    weights = WeightsInMemory(model, hidden_states)
    zeros: dict[str, int] = {}
    try:
        amounts = layer_amounts(model, layers, tokens, recipe, weights, progress)
        for _, of_block in prune_blocks(model, layers, tokens, recipe, amounts, weights, progress):
            zeros.update(of_block)
    finally:
        model.train(training)
    return make_report(recipe, tokens, shapes_of(layers), zeros, time.perf_counter() - started)


def _prepare(
    model: str | Path,
    target: Path,
    recipe: PruneRecipe,
    trust_remote_code: bool,
    overwrite: bool,
    *,
    weights: bool = True,
) -> tuple[Path, PreTrainedModel, PruneRecipe]:
    """Refuse what can be refused without weights; the model's folder, its skeleton, and the recipe with its gaps filled."""
    if recipe.needs_calibration:
        check_source(recipe.calibration, recipe.split, recipe.text_column)
    folder = refusals.check_prune(model, target, recipe, overwrite=overwrite, weights=weights)
    skeleton = models.skeleton(folder, trust_remote_code=trust_remote_code)
    layers = chosen_linears(skeleton, recipe)
    _check_group(shapes_of(layers), recipe)
    overrides(layers, recipe)  # refuses patterns that fit nothing
    if recipe.needs_calibration:
        recipe = _fill_gaps(recipe, skeleton.config)
    return folder, skeleton, recipe


def _fill_gaps(recipe: PruneRecipe, config: PretrainedConfig) -> PruneRecipe:
    """The recipe with the number and length of sequences, and the split and column of a dataset, that will be used."""
    if not is_token_file(recipe.calibration):
        default = min(CALIBRATION_SEQLEN, models.max_positions(config) or CALIBRATION_SEQLEN)
        recipe = replace(recipe, seqlen=recipe.seqlen or default)
        if is_dataset(recipe.calibration, recipe.split):
            # With a chat template, what the dataset has decides between two columns (`_calibrate`).
            column = recipe.text_column or (None if recipe.chat_template else TEXT_COLUMN)
            recipe = replace(recipe, split=recipe.split or "train", text_column=column)
    else:
        nsamples, seqlen = load_tokens(Path(recipe.calibration).expanduser()).shape
        # A file's tokens are used as they are; a setting that says otherwise is a mistake, a default is not.
        if recipe.nsamples not in (nsamples, PruneRecipe.nsamples) or recipe.seqlen not in (seqlen, None):
            raise UsageError(
                f"{recipe.calibration} holds {nsamples} sequences of {seqlen} tokens, which are used as they are; "
                "leave nsamples and seqlen out."
            )
        recipe = replace(recipe, nsamples=nsamples, seqlen=seqlen)
    assert recipe.seqlen is not None
    models.check_seqlen(recipe.seqlen, config)
    return recipe


@stage("drawing")
def _calibrate(folder: Path, recipe: PruneRecipe, trust_remote_code: bool) -> tuple[torch.Tensor, PruneRecipe]:
    """The calibration tokens, and the recipe with the column of a dataset that they were read from."""
    assert recipe.seqlen is not None  # _fill_gaps has seen to it
    tokenizer = None
    if not is_token_file(recipe.calibration):
        tokenizer = models.load_tokenizer(folder, trust_remote_code=trust_remote_code)
    columns: set[str] = set()
    tokens = calibration_tokens(
        recipe.calibration,
        tokenizer,
        recipe.nsamples,
        recipe.seqlen,
        recipe.seed,
        split=recipe.split,
        text_column=recipe.text_column,
        chat_template=recipe.chat_template,
        columns_read=columns,
    )
    if len(columns) == 1:  # rows that differ are read as they were with the column that was asked for
        recipe = replace(recipe, text_column=columns.pop())
    return tokens, recipe


def _check_group(layers: dict[str, tuple[int, int]], recipe: PruneRecipe) -> None:
    if recipe.group is None:
        return
    for name, (_, cols) in layers.items():
        if cols % recipe.group[1]:
            raise UsageError(
                f"{name} has {cols} columns, not a multiple of {recipe.group[1]}; use another pattern than {recipe.pattern}."
            )


def _check_tokens(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    models.check_seqlen(tokens.shape[1], model.config)
    vocabulary = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise CalibrationError(
            f"The calibration tokens run from {low} to {high}, but the model knows 0 to {vocabulary - 1}; "
            "tokenize the text with the model's own tokenizer."
        )


def _provenance(model: str | Path, recipe: PruneRecipe, report: PruneReport) -> dict[str, object]:
    settings = recipe.settings()
    if report.calibration_sha256 is None:  # calibration settings that were not used would only mislead
        used = ("method", "sparsity", "pattern", "targets", "ignore", "dtype", "layers")
        settings = {name: value for name, value in settings.items() if name in used}
    own = settings.pop("layers", None)  # "layers" says what became of each
    return {
        **settings,
        **({"layer_sparsities": own} if own else {}),
        "model": Path(model).resolve().name if Path(model).is_dir() else str(model),
        "calibration_sha256": report.calibration_sha256,
        "measured_sparsity": report.sparsity,
        "layers": report.layers,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
