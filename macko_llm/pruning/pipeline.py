"""Pruning a model, block by block, and a checkpoint, folder to folder."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
import transformers
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

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
from macko_llm.errors import CalibrationError, CheckpointError, NonFiniteError, UsageError
from macko_llm.progress import Progress, no_progress
from macko_llm.pruning.allocation import block_sparsities, layer_sparsities, outlier_ratio
from macko_llm.pruning.methods import Amount, method_maker
from macko_llm.pruning.methods.norms import InputNorms
from macko_llm.pruning.observing import observed_blocks
from macko_llm.pruning.scores import removed_per_row
from macko_llm.pruning.selection import chosen_linears
from macko_llm.recipe import UNIFORM, PruneRecipe


@dataclass(frozen=True)
class PruneReport:
    """What pruning did.

    Attributes:
        method: the recipe's.
        pattern: "unstructured" or "n:m".
        sparsity: share of zeros over all pruned linears.
        layers: qualified name of each pruned linear -> its share of zeros.
        seconds: wall-clock time of the pruning, without loading and saving.
        calibration_sha256: hash of the calibration tokens, None for a recipe that needs none.
        nsamples: calibration sequences, 0 for a recipe that needs none.
        seqlen: tokens in each of them.
    """

    method: str
    pattern: str
    sparsity: float
    layers: dict[str, float]
    seconds: float
    calibration_sha256: str | None
    nsamples: int
    seqlen: int


@dataclass(frozen=True)
class PrunePlan:
    """What a pruning run would do.

    Attributes:
        recipe: the settings, with nsamples, seqlen and a dataset's split and column as they would be used.
        layers: qualified name of each linear that would be pruned -> (rows, cols).
        sparsity: share of the weights of these linears that would be removed.
    """

    recipe: PruneRecipe
    layers: dict[str, tuple[int, int]]
    sparsity: float


def plan(
    model: str | Path,
    target: Path,
    recipe: PruneRecipe,
    *,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> PrunePlan:
    """What `prune_checkpoint` would do, without weights in memory and without reading calibration text.

    Raises:
        UsageError, CheckpointError, CalibrationError: as `prune_checkpoint`, for what shows without weights and text.
    """
    _, skeleton, recipe = _prepare(model, Path(target), recipe, trust_remote_code, overwrite)
    layers = _shapes(chosen_linears(skeleton, recipe))
    removed = sum(rows * removed_per_row(cols, recipe.sparsity, recipe.group) for rows, cols in layers.values())
    return PrunePlan(recipe, layers, removed / sum(rows * cols for rows, cols in layers.values()))


def prune_checkpoint(
    model: str | Path,
    target: Path,
    recipe: PruneRecipe,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> PruneReport:
    """Prune a dense checkpoint into a new folder: an ordinary dense checkpoint with zeros, and macko.json.

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
        UsageError: a packed or quantized model, an unusable target, sizes that do not fit the pattern or the model.
        CheckpointError: the model is missing, damaged, too large, or of an unsupported kind.
        CalibrationError: the calibration source is missing, too short, or from another vocabulary.
        NonFiniteError: NaN or infinity in weights or activations.
    """
    models.resolve_device(device)
    folder, skeleton, recipe = _prepare(model, Path(target), recipe, trust_remote_code, overwrite)
    tokens = None
    if recipe.needs_calibration:
        progress("drawing calibration tokens", 0, 1)
        tokens = _calibrate(folder, recipe, trust_remote_code)
        _check_tokens(skeleton, tokens)
        progress("drawing calibration tokens", 1, 1)

    with outputs.new_folder(Path(target), overwrite=overwrite) as partial:
        progress("loading the model", 0, 1)
        loaded = models.load_model(folder, dtype=recipe.dtype, device=device, trust_remote_code=trust_remote_code)
        progress("loading the model", 1, 1)
        try:
            report = prune_model(loaded, tokens, recipe, progress)
        except torch.OutOfMemoryError as error:
            raise CheckpointError(f"Pruning {folder} does not fit on {loaded.device}; use --device cpu.") from error
        progress("saving", 0, 1)
        _save(loaded, folder, partial)
        checkpoint.write_provenance(partial, {"prune": _provenance(model, recipe, report)})
        progress("saving", 1, 1)
    return report


@torch.no_grad()
def prune_model(
    model: PreTrainedModel, tokens: torch.Tensor | None, recipe: PruneRecipe, progress: Progress = no_progress
) -> PruneReport:
    """Prune the linears inside the decoder blocks of a model, in place.

    It goes block by block: statistics on the still dense block, pruning, and a second run, so that the next block sees what
    the pruned one computes; without calibration, pruning alone. A weight shared by several linears is pruned once, where it is
    first met, with the inputs of all linears of that block that share it.

    Args:
        model: on any device; evaluated in eval mode, whatever its mode.
        tokens: int64 [nsamples, seqlen], equally long sequences without padding; None will do where the recipe needs none.
        recipe: the settings of calibration and `dtype` are not looked at: the tokens and the model decide.
        progress: called with (what, done, total).

    Raises:
        UsageError: sizes that do not fit the pattern, layer names that fit nothing, sequences longer than the model takes, no
            tokens where the recipe needs some.
        CheckpointError: blocks of an unsupported kind.
        CalibrationError: token ids outside the vocabulary, or a linear that no token reaches.
        NonFiniteError: NaN or infinity in weights or activations.
    """
    started = time.perf_counter()
    layers = chosen_linears(model, recipe)
    _check_group(_shapes(layers), recipe)
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
    try:
        if recipe.sparsity > 0:
            _prune_blocks(model, layers, tokens, recipe, progress)
    finally:
        model.train(training)
    zeros = {name: int((linear.weight == 0).sum()) for name, linear in layers.items()}
    return PruneReport(
        method=recipe.method,
        pattern=recipe.pattern,
        sparsity=sum(zeros.values()) / sum(linear.weight.numel() for linear in layers.values()),
        layers={name: zeros[name] / linear.weight.numel() for name, linear in layers.items()},
        seconds=time.perf_counter() - started,
        calibration_sha256=None if tokens is None else tokens_sha256(tokens),
        nsamples=0 if tokens is None else tokens.shape[0],
        seqlen=0 if tokens is None else tokens.shape[1],
    )


def _prune_blocks(
    model: PreTrainedModel,
    layers: dict[str, nn.Linear],
    tokens: torch.Tensor | None,
    recipe: PruneRecipe,
    progress: Progress,
) -> None:
    amounts = _amounts(model, layers, tokens, recipe, progress)
    new = method_maker(recipe.method, recipe.update)
    for _, methods in observed_blocks(model, layers, tokens, new, progress, "pruning blocks"):
        for name in [*methods]:
            weight = layers[name].weight.data
            weight.copy_(methods.pop(name).prune(name, weight, amounts[name]))  # frees what has pruned its last weight


def _amounts(
    model: PreTrainedModel,
    layers: dict[str, nn.Linear],
    tokens: torch.Tensor | None,
    recipe: PruneRecipe,
    progress: Progress,
) -> dict[str, Amount]:
    """How much of each layer goes; what a spread over the blocks asks of the dense model takes a pass of its own."""
    if recipe.allocation == UNIFORM:
        return dict.fromkeys(layers, Amount(recipe.sparsity, recipe.group))
    names, ratios, sizes = [], [], []
    for _, norms in observed_blocks(model, layers, tokens, InputNorms, progress, "measuring blocks"):
        if norms:
            weights = [(layers[name].weight, seen.statistic(name)) for name, seen in norms.items()]
            names.append([*norms])
            ratios.append(outlier_ratio(weights))
            sizes.append(sum(weight.numel() for weight, _ in weights))
    wanted = {
        name: share
        for block, share in zip(names, block_sparsities(ratios, sizes, recipe.sparsity), strict=True)
        for name in block
    }
    shares = layer_sparsities(_shapes(layers), wanted, recipe.sparsity)
    return {name: Amount(share) for name, share in shares.items()}


def _shapes(layers: dict[str, nn.Linear]) -> dict[str, tuple[int, int]]:
    return {name: (linear.weight.shape[0], linear.weight.shape[1]) for name, linear in layers.items()}


def _prepare(
    model: str | Path, target: Path, recipe: PruneRecipe, trust_remote_code: bool, overwrite: bool
) -> tuple[Path, PreTrainedModel, PruneRecipe]:
    """Refuse what can be refused without weights; the model's folder, its skeleton, and the recipe with its gaps filled."""
    if recipe.needs_calibration:
        check_source(recipe.calibration, recipe.split, recipe.text_column)
    folder = refusals.check_prune(model, target, recipe, overwrite=overwrite)
    skeleton = models.skeleton(folder, trust_remote_code=trust_remote_code)
    _check_group(_shapes(chosen_linears(skeleton, recipe)), recipe)
    if recipe.needs_calibration:
        recipe = _fill_gaps(recipe, skeleton.config)
    return folder, skeleton, recipe


def _fill_gaps(recipe: PruneRecipe, config: PretrainedConfig) -> PruneRecipe:
    """The recipe with the number and length of sequences, and the split and column of a dataset, that will be used."""
    if not is_token_file(recipe.calibration):
        default = min(CALIBRATION_SEQLEN, models.max_positions(config) or CALIBRATION_SEQLEN)
        recipe = replace(recipe, seqlen=recipe.seqlen or default)
        if is_dataset(recipe.calibration, recipe.split):
            recipe = replace(recipe, split=recipe.split or "train", text_column=recipe.text_column or TEXT_COLUMN)
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


def _calibrate(folder: Path, recipe: PruneRecipe, trust_remote_code: bool) -> torch.Tensor:
    assert recipe.seqlen is not None  # _fill_gaps has seen to it
    tokenizer = None
    if not is_token_file(recipe.calibration):
        tokenizer = models.load_tokenizer(folder, trust_remote_code=trust_remote_code)
    return calibration_tokens(
        recipe.calibration,
        tokenizer,
        recipe.nsamples,
        recipe.seqlen,
        recipe.seed,
        split=recipe.split,
        text_column=recipe.text_column,
        chat_template=recipe.chat_template,
    )


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


def _save(model: PreTrainedModel, source: Path, folder: Path) -> None:
    if (source / "generation_config.json").is_file():
        # The model's own file is copied as it is; transformers refuses to write some that are published (Llama 2's).
        model.generation_config = GenerationConfig()
    model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    checkpoint.copy_side_files(source, folder)


def _provenance(model: str | Path, recipe: PruneRecipe, report: PruneReport) -> dict[str, object]:
    settings = recipe.settings()
    if report.calibration_sha256 is None:  # calibration settings that were not used would only mislead
        used = ("method", "sparsity", "pattern", "targets", "ignore", "dtype")
        settings = {name: value for name, value in settings.items() if name in used}
    return {
        **settings,
        "model": Path(model).resolve().name if Path(model).is_dir() else str(model),
        "calibration_sha256": report.calibration_sha256,
        "measured_sparsity": report.sparsity,
        "layers": report.layers,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
