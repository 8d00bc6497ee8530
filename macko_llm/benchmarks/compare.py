"""Several checkpoints on one text: what each weighs, how well it predicts, how fast it writes."""

import functools
import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from macko_llm import calibration, checkpoint, generation, models, perplexity
from macko_llm.benchmarks.machine import device_name
from macko_llm.benchmarks.quality import decode_speed
from macko_llm.defaults import BENCHMARK_PROMPT
from macko_llm.errors import UsageError
from macko_llm.loading import load
from macko_llm.perplexity import TextWindows
from macko_llm.progress import Progress, no_progress
from macko_llm.refusals import check_batch_size
from macko_llm.text import encode_prompt

METRICS = ("bytes_on_disk", "bytes_in_memory", "perplexity", "tokens_per_second")
"""What models are compared by."""


@dataclass(frozen=True)
class Compared:
    """One model, measured.

    Attributes:
        model: as it was named.
        packed: whether it is.
        dtype: of its weights once loaded.
        bytes_on_disk: of the weight files.
        bytes_in_memory: of all parameters and buffers once loaded.
        perplexity: on the text.
        tokens_per_second: median decode speed of a few greedy runs, one text at a time.
        ratios: each of METRICS over the first model's; None over nothing.
    """

    model: str
    packed: bool
    dtype: str
    bytes_on_disk: int
    bytes_in_memory: int
    perplexity: float
    tokens_per_second: float
    ratios: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class CompareReport:
    """Models side by side, and the conditions under which the figures hold.

    Attributes:
        dataset: the text's name.
        split: of the dataset, None for a text that has none.
        seqlen: tokens in a window.
        stride: tokens from one window's start to the next.
        same_tokens: whether all models read the same tokens; perplexities of different ones do not compare.
        new_tokens: of each run that was timed.
        device: the GPU's name, or "cpu".
        threads: of torch, on the CPU.
        models: in the order in which they were named.
    """

    dataset: str
    split: str | None
    seqlen: int
    stride: int
    same_tokens: bool
    new_tokens: int
    device: str
    threads: int
    models: tuple[Compared, ...]


@dataclass(frozen=True)
class _Subject:
    name: str
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    windows: TextWindows
    prompt: list[int]


def compare(
    folders: Sequence[tuple[str, Path]],
    *,
    dataset: str,
    split: str | None = None,
    text_column: str | None = None,
    seqlen: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    new_tokens: int,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> CompareReport:
    """Measure models one after the other; one is in memory at a time.

    Args:
        folders: name and folder of each, dense or packed; the first is what the others are compared to.
        dataset: evaluation text, as for `macko eval-perplexity`.
        split: of the dataset; None is "test".
        text_column: of the dataset, or the field of .json, .jsonl and .parquet files; None is "text".
        seqlen: tokens in a window; None is 2048, or the shortest of the models' longest contexts where that is less.
        stride: from one window's start to the next; None is seqlen.
        limit: at most this many windows.
        batch_size: windows evaluated together.
        new_tokens: of each run that is timed, 2 or more.
        dtype: as in `macko_llm.load`.
        device: where to compute.
        trust_remote_code: run Python code that lies in the folders.
        progress: told of each step.

    Raises:
        MackoError: what loading, `perplexity` and `generation` raise; of what needs no weights, before any are read.
    """
    check_batch_size(batch_size)
    configs = [models.load_config(folder, trust_remote_code=trust_remote_code) for _, folder in folders]
    if seqlen is None:
        seqlen = min(perplexity.window_shape(config)[0] for config in configs)
    for config in configs:
        perplexity.window_shape(config, seqlen=seqlen, stride=stride, limit=limit)
    tokenizers = [models.load_tokenizer(folder, trust_remote_code=trust_remote_code) for _, folder in folders]
    prompts = [encode_prompt(tokenizer, BENCHMARK_PROMPT)[0].tolist() for tokenizer in tokenizers]
    for (name, _), prompt, config in zip(folders, prompts, configs, strict=True):
        room = (models.max_positions(config) or math.inf) - len(prompt)
        if new_tokens > room:
            raise UsageError(
                f"The model {name} has no room for {new_tokens} new tokens; use --new-tokens {room} or less."
            )
        generation.check_prompts([prompt], new_tokens, config)
    text = calibration.evaluation_text(dataset, split, text_column)
    cut = calibration.evaluation_windows(dataset)
    subjects = [
        _Subject(
            name,
            folder,
            tokenizer,
            perplexity.cut_text(tokenizer, text, config, seqlen=seqlen, stride=stride, limit=limit, cut=cut),
            prompt,
        )
        for (name, folder), config, tokenizer, prompt in zip(folders, configs, tokenizers, prompts, strict=True)
    ]
    load_as = functools.partial(load, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    measured = [_measure(subject, load_as, dataset, batch_size, new_tokens, progress) for subject in subjects]
    windows = subjects[0].windows
    return CompareReport(
        dataset=dataset,
        split=calibration.used_split(dataset, "test", split),
        seqlen=windows.seqlen,
        stride=windows.stride,
        same_tokens=all(torch.equal(windows.batches, subject.windows.batches) for subject in subjects),
        new_tokens=new_tokens,
        device=device_name(models.resolve_device(device)),
        threads=torch.get_num_threads(),
        models=tuple(_with_ratios(one, measured[0]) for one in measured),
    )


def _measure(
    subject: _Subject,
    load_as: Callable[[Path], PreTrainedModel],
    dataset: str,
    batch_size: int,
    new_tokens: int,
    progress: Progress,
) -> Compared:
    _free()  # the model before
    loaded = load_as(subject.folder)
    scored = perplexity.evaluate(
        loaded, subject.windows, dataset=f"{dataset} of {subject.name}", batch_size=batch_size, progress=progress
    )
    return Compared(
        model=subject.name,
        packed=checkpoint.is_packed(subject.folder),
        dtype=scored.dtype,
        bytes_on_disk=checkpoint.folder_bytes(subject.folder),
        bytes_in_memory=models.memory_bytes(loaded),
        perplexity=scored.perplexity,
        tokens_per_second=decode_speed(
            loaded, subject.tokenizer, subject.prompt, new_tokens, name=subject.name, progress=progress
        ),
    )


def _with_ratios(one: Compared, first: Compared) -> Compared:
    pairs = {name: (getattr(one, name), getattr(first, name)) for name in METRICS}
    ratios = {name: own / base if base else None for name, (own, base) in pairs.items()}
    return replace(one, ratios=ratios)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
