"""What needs neither torch nor transformers to be refused.

Importing those takes seconds, so commands ask here before they do. The library asks here too, for who calls it from Python.
"""

import importlib.util
import math
import re
from collections.abc import Sequence
from pathlib import Path

from macko_llm import checkpoint, outputs
from macko_llm.defaults import (
    EVALUATION_SEQLEN,
    HIDDEN_STATE_PLACES,
    LAYOUT,
    LAYOUTS,
    MODEL_DTYPE_NAMES,
    VALUE_DTYPE_NAMES,
)
from macko_llm.errors import UsageError
from macko_llm.recipe import PruneRecipe


def find_model(model: str | Path) -> Path:
    """The folder of a model, dense or packed, whose config.json can be read.

    Raises:
        CheckpointError: there is no such model, or its config.json is missing or broken.
    """
    folder = checkpoint.locate(model)
    checkpoint.read_config(folder)
    return folder


def check_pack(source: Path, target: Path | None, *, dtype: str | None, max_shard_size: str, overwrite: bool) -> int:
    """The bytes of a shard, for `packing.pack_checkpoint`.

    Raises:
        UsageError: `source` is packed or quantized, `target` would cost data, no such dtype, no such size.
        CheckpointError: config.json is broken.
    """
    _require_dense(
        source,
        if_packed="give `macko pack` a dense checkpoint.",
        if_quantized="pack a pruned model whose weights are 16-bit or float32.",
    )
    shard_bytes = checkpoint.parse_size(max_shard_size)
    if target is not None:
        outputs.check_output(target, overwrite=overwrite, source=source)
    if dtype is not None:
        check_value_dtype(dtype)
    return shard_bytes


def check_unpack(source: Path, target: Path, *, max_shard_size: str, overwrite: bool) -> int:
    """The bytes of a shard, for `unpacking.unpack_checkpoint`.

    Raises:
        UsageError: `source` is not packed, `target` would cost data, no such size.
        CheckpointError: config.json is broken.
    """
    require_packed(source)
    shard_bytes = checkpoint.parse_size(max_shard_size)
    outputs.check_output(target, overwrite=overwrite, source=source)
    return shard_bytes


def check_prune(model: str | Path, target: Path, recipe: PruneRecipe, *, overwrite: bool, weights: bool = True) -> Path:
    """The model's folder, for `pruning.prune_checkpoint`; for `plan` a hub id's without its weights.

    Raises:
        UsageError: the model is packed or quantized, `target` would cost data, no such dtype.
        CheckpointError: there is no such model, or its config.json is missing or broken.
    """
    outputs.check_output(target, overwrite=overwrite)
    check_dtype(recipe.dtype)
    folder = checkpoint.locate(model, weights=weights)
    outputs.check_output(target, overwrite=overwrite, source=folder)
    require_prunable(folder)
    return folder


def require_prunable(folder: Path) -> None:
    """Raise UsageError unless `folder` holds dense weights."""
    _require_dense(
        folder,
        if_packed="unpack it first with `macko unpack`, or prune the dense model.",
        if_quantized="prune the model it was made from.",
    )


def _require_dense(folder: Path, *, if_packed: str, if_quantized: str) -> None:
    """Raise UsageError unless `folder` holds dense weights; the ends of its sentences name the fix."""
    method = checkpoint.quantization_method(folder)
    if method == checkpoint.QUANT_METHOD:
        raise UsageError(f"{folder} is packed; {if_packed}")
    if method is not None:
        raise UsageError(f"{folder} is quantized with {method}; {if_quantized}")


def check_tune(model: str | Path, target: Path, *, dtype: str, overwrite: bool) -> Path:
    """The model's folder, for `tuning.pipeline.tune_checkpoint`.

    Raises:
        UsageError: the model is packed or quantized, `target` would cost data, no such dtype.
        CheckpointError: there is no such model, or its config.json is missing or broken.
    """
    outputs.check_output(target, overwrite=overwrite)
    check_dtype(dtype)
    folder = checkpoint.locate(model)
    outputs.check_output(target, overwrite=overwrite, source=folder)
    _require_dense(
        folder,
        if_packed="unpack it first with `macko unpack`.",
        if_quantized="tune a pruned model whose weights are dense.",
    )
    return folder


def require_packed(folder: Path) -> None:
    """Raise UsageError unless `folder` holds a packed checkpoint."""
    if not checkpoint.is_packed(folder):
        raise UsageError(f"{folder} is not packed; make a packed checkpoint with `macko pack` first.")


def check_subject(
    model: str | None, config: str | None, sparsities: Sequence[float], random_weights: bool
) -> Path | None:
    """The folder of the model that a benchmark of whole models shall run, None for a shape.

    Raises:
        UsageError: not exactly one of model and config, or sparsities for a model that is packed.
        CheckpointError: there is no such model, or its config.json is missing or broken.
    """
    if (model is None) == (config is None):
        raise UsageError("Give either a MODEL or the name of a shape; for example --config llama2-7b.")
    if model is None:
        return None
    folder = find_model(model)
    if sparsities and not random_weights and checkpoint.is_packed(folder):
        raise UsageError(f"{folder} is packed and keeps its sparsity; drop --sparsity, or give the dense model.")
    return folder


def check_value_dtype(dtype: str) -> None:
    """Raise UsageError unless values are packed in this dtype, or it is "auto"."""
    if dtype not in ("auto", *VALUE_DTYPE_NAMES):
        raise UsageError(f"The dtype {dtype} cannot be packed; use {' or '.join(VALUE_DTYPE_NAMES)}.")


def check_place(place: str) -> None:
    """Raise UsageError unless hidden states can be kept there."""
    if place not in HIDDEN_STATE_PLACES:
        raise UsageError(f"There is no place {place!r} for hidden states; use {', '.join(HIDDEN_STATE_PLACES)}.")


def check_dtype(dtype: str) -> None:
    """Raise UsageError unless models are loaded in this dtype, or it is "auto"."""
    if dtype not in ("auto", *MODEL_DTYPE_NAMES):
        raise UsageError(f"The dtype {dtype} is not supported; use auto, {', '.join(MODEL_DTYPE_NAMES)}.")


def check_benchmark_dtype(dtype: str) -> None:
    """Raise UsageError unless single layers are timed in this dtype."""
    if dtype not in VALUE_DTYPE_NAMES:
        raise UsageError(f"There is no benchmark in {dtype}; use --dtype {' or '.join(VALUE_DTYPE_NAMES)}.")


def check_layout(layout: str, device_type: str | None = None) -> None:
    """Raise UsageError unless packed weights can be held in this layout, and, where a device is named, on it."""
    if layout not in LAYOUTS:
        raise UsageError(f"There is no layout {layout!r}; use {', '.join(LAYOUTS[:-1])} or {LAYOUTS[-1]}.")
    if device_type not in (None, "cuda") and layout != LAYOUT:
        raise UsageError(f"The layout {layout} is an NVIDIA GPU's, and this runs on {device_type}; leave --layout out.")


def check_tokens_at_a_time(tokens: int) -> None:
    """Raise UsageError unless packed weights can be laid out for so many tokens at a time."""
    if tokens < 1:
        raise UsageError(f"No layout is made for {tokens} tokens at a time; use tokens=1 or more.")


def check_device(device: str) -> None:
    """Raise UsageError if no device can have this name; whether there is one, torch knows (`models.resolve_device`)."""
    if not re.fullmatch(r"[a-z]+(:\d+)?", device, re.ASCII):
        raise no_device(device)


def check_processes(count: int, folder: Path) -> None:
    """Refuse a number of processes to share a model, by what its config.json says of its attention.

    Raises:
        UsageError: it is below 1, or the heads cannot be shared evenly.
        CheckpointError: config.json is broken.
    """
    if count < 1:
        raise UsageError(f"{count} processes can do nothing; use --tensor-parallel 1 or more.")
    config = checkpoint.read_config(folder)
    of_text = config.get("text_config")
    config = of_text if isinstance(of_text, dict) else config
    check_shares(count, [config.get("num_attention_heads"), config.get("num_key_value_heads")])


def check_shares(processes: int, counts: Sequence[object]) -> None:
    """Raise UsageError unless so many processes can share each of these counts of heads or neurons evenly.

    Args:
        processes: at least 1.
        counts: numbers or lists of numbers; what a config says in another way is passed by.
    """
    numbers = [n for count in counts for n in (count if isinstance(count, list | tuple) else [count])]
    common = math.gcd(*(n for n in numbers if isinstance(n, int))) or processes
    if common % processes:
        *few, most = [n for n in range(1, common + 1) if common % n == 0]
        allowed = f"{', '.join(map(str, few))} or {most} processes" if few else "one process"
        raise UsageError(
            f"{processes} processes cannot share the model's attention heads and widths evenly; use {allowed}."
        )


def check_device_of_processes(device: str) -> None:
    """Raise UsageError unless processes that share a model can each take a device of this kind."""
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"Each process takes a device of its own, and {device} is one; use --device cuda or cpu.")


def no_device(device: str) -> UsageError:
    """What to raise of a device that is not there."""
    return UsageError(f"The device {device!r} is not available; use cpu, or see `macko doctor` for what is.")


def check_new_tokens(count: int) -> None:
    """Raise UsageError unless a generation of that many tokens makes one at least."""
    if count < 1:
        raise UsageError(f"{count} new tokens were asked for; use --max-new-tokens 1 or more.")


def check_counts(context: int, new_tokens: int, batch: int) -> None:
    """Raise UsageError unless `macko bench decode` has something to measure."""
    for option, count in (("--context", context), ("--new-tokens", new_tokens), ("--batch", batch)):
        if count < 1:
            raise UsageError(f"There is nothing to measure with {option} {count}; use 1 or more.")


def check_comparison(models: Sequence[str], new_tokens: int) -> None:
    """Raise UsageError unless there are models to compare, and tokens between which time passes."""
    if len(models) < 2:
        raise UsageError("One model compares to nothing; name two or more.")
    if new_tokens < 2:
        raise UsageError(f"The speed of one model takes two new tokens, not {new_tokens}; use --new-tokens 2 or more.")


def check_folder(folder: Path | None) -> None:
    """Raise UsageError unless a temporary folder can be made in this one, or in the system's usual one."""
    if folder is not None and not folder.is_dir():
        raise UsageError(f"There is no folder {folder}; make it, or leave --folder out.")


def check_batch_size(batch_size: int, what: str = "windows") -> None:
    """Raise UsageError unless that many windows, or whatever it is, can be evaluated together."""
    if batch_size < 1:
        raise UsageError(f"Batches of {batch_size} {what} evaluate nothing; use --batch-size 1 or more.")


def check_tasks(names: Sequence[str], include_path: Path | None) -> None:
    """Raise UsageError unless tasks can be looked up by these names, and in this folder; see `evaluation.find_tasks`."""
    if not (names and all(names)):
        raise UsageError(
            "A task has no name; use --tasks with names and commas between them, as in arc_easy,hellaswag."
        )
    if include_path is not None and not include_path.is_dir():
        raise UsageError(
            f"There is no folder {include_path}; name one with YAML files of tasks, or drop --include-path."
        )


def check_examples(num_fewshot: int | None, limit: float | None) -> None:
    """Raise UsageError unless tasks can have so many solved examples and others; see `evaluation.evaluate_tasks`."""
    if num_fewshot is not None and num_fewshot < 0:
        raise UsageError(f"There are no {num_fewshot} solved examples; use --num-fewshot 0 or more.")
    if limit is not None and (not limit > 0 or (limit > 1 and not float(limit).is_integer())):
        raise UsageError(f"A limit of {limit:g} is no number of examples; use --limit 1 or more, or a share below 1.")


def require_lm_eval() -> None:
    """Raise UsageError unless lm-eval is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("`macko eval` needs lm-eval; install it with `pip install lm-eval`.")


def check_windows(seqlen: int | None, stride: int | None, limit: int | None = None) -> None:
    """Raise UsageError unless a text can be cut into such windows; see `perplexity.cut_text`."""
    if limit is not None and limit < 1:
        raise UsageError(f"A limit of {limit} windows leaves nothing to evaluate; use --limit 1 or more.")
    seqlen = EVALUATION_SEQLEN if seqlen is None else seqlen
    if seqlen < 2:
        raise UsageError(f"Windows of length {seqlen} predict nothing; use --seqlen 2 or more.")
    if stride is not None and not 1 <= stride <= seqlen:
        raise UsageError(
            f"The stride {stride} does not suit windows of {seqlen} tokens; use --stride from 1 to {seqlen}."
        )
