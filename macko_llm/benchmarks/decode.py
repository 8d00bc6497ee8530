"""Whole models, token by token: transformers' forward, compiled, and this package's engine, dense and packed.

The rows are measured one after the other, and what one leaves in memory is freed before the next. transformers comes last,
because compiled code and a profiler stay in the process and could slow down what follows.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from macko_llm import models
from macko_llm.benchmarks.machine import Machine, describe_machine, is_out_of_memory, synchronize
from macko_llm.benchmarks.parts import Parts, PartsProfile, split
from macko_llm.benchmarks.subjects import Subject, packed_sparsity
from macko_llm.benchmarks.transformers_loop import TransformersLoop
from macko_llm.dtypes import MODEL_DTYPES, dtype_name
from macko_llm.engine import Engine, make_engine
from macko_llm.errors import UsageError
from macko_llm.progress import Progress, no_progress
from macko_llm.refusals import check_counts
from macko_llm.sampling import GREEDY

RUNS = 3
"""Whole generations that are timed; each figure is the median of theirs."""
WARMUP_TOKENS = 8
"""Decoded in every run before the clock starts: a graph that is captured late is captured here."""
PROFILED_TOKENS = 16
_REASON_LENGTH = 160


class Decodes(Protocol):
    """An engine, or what decodes like one."""

    def decode(self, token: Tensor) -> Tensor:
        """See `Engine.decode`."""

    def parts(self) -> dict[str, float] | None:
        """See `Engine.parts`."""


@dataclass(frozen=True)
class Task:
    """What every row does.

    Attributes:
        context: tokens of each prompt, random ones.
        new_tokens: timed tokens, after the first one and WARMUP_TOKENS.
        batch: prompts at a time.
    """

    context: int
    new_tokens: int
    batch: int

    @property
    def untimed_tokens(self) -> int:
        """New tokens before the clock starts."""
        return 1 + WARMUP_TOKENS

    @property
    def all_new_tokens(self) -> int:
        """Timed or not."""
        return self.untimed_tokens + self.new_tokens

    @property
    def positions(self) -> int:
        """Of the prompt and all that follows it."""
        return self.context + self.all_new_tokens

    @property
    def profiled_tokens(self) -> int:
        """Decoded once more, with a profiler."""
        return min(PROFILED_TOKENS, self.new_tokens)


@dataclass(frozen=True)
class Measured:
    """One way to decode, measured.

    Attributes:
        tokens_per_second: of one text.
        total_tokens_per_second: of the batch.
        milliseconds_per_token: from one token of a text to its next.
        parts: of that time; None where nothing tells them apart.
        peak_memory_bytes: most that torch had allocated on the GPU while it generated, weights included; None on a CPU.
        first_token_seconds: from the prompt to its first new token on the host, with the model loaded and the making of the
            engine included.
        engine: the class that ran the model.
        dtype: of the model.
    """

    tokens_per_second: float
    total_tokens_per_second: float
    milliseconds_per_token: float
    parts: Parts | None
    peak_memory_bytes: int | None
    first_token_seconds: float
    engine: str
    dtype: str


@dataclass(frozen=True)
class Row:
    """A line of the report.

    Attributes:
        name: "transformers, dense, compiled", "macko, dense", "macko, packed".
        sparsity: share of zeros in the linears of the blocks, 0 if dense; None if there is no such model.
        measured: None if it failed.
        speedup: tokens per second over those of transformers' row; None without one of them.
        note: why it failed, or what a reader must know of it.
    """

    name: str
    sparsity: float | None
    measured: Measured | None
    speedup: float | None = None
    note: str | None = None


@dataclass(frozen=True)
class DecodeReport:
    """All rows of one run, and the conditions under which they hold.

    Attributes:
        machine: where and when.
        transformers: version.
        model: name of the shape or the checkpoint.
        task: what every row did.
        runs: that the figures are medians of.
        dense_bytes: of the weights that a token passes in the dense model: the blocks' linears and the lm_head.
        dense_limit_tokens_per_second: of one text, if reading those at the measured bandwidth were all there is to do.
        rows: transformers first.
    """

    machine: Machine
    transformers: str
    model: str
    task: Task
    runs: int
    dense_bytes: int | None
    dense_limit_tokens_per_second: float | None
    rows: tuple[Row, ...]


def measure_decode(
    subject: Subject, task: Task, *, device: torch.device, progress: Progress = no_progress
) -> DecodeReport:
    """Decode with transformers, with this package's engine, and with its packed layers at each sparsity.

    Args:
        subject: the model.
        task: what to decode.
        device: where the subject builds its models.
        progress: told of each row.

    Raises:
        UsageError: the model has too few positions, or a count is below 1.
        MackoError: what building the models raises.
    """
    _check_task(task, models.max_positions(subject.skeleton.config))
    total = 3 + len(subject.sparsities)
    done = 0

    def step(what: str) -> None:
        nonlocal done
        progress(f"measuring {what}", done, total)
        done += 1

    step("read bandwidth")
    machine = describe_machine(device)
    packed = []
    for sparsity in subject.sparsities:
        step("packed layers")
        packed.append(_row("macko, packed", sparsity, partial(subject.packed, sparsity, task.batch), task, device))
    step("dense layers")
    dense = _row("macko, dense", 0.0, subject.dense, task, device)
    step("transformers")
    baseline = _transformers_row(subject, task, device)
    rows = [baseline, dense, *packed]
    itemsize = next((MODEL_DTYPES[row.measured.dtype].itemsize for row in rows if row.measured), None)
    dense_bytes = itemsize and subject.linear_weights * itemsize
    return DecodeReport(
        machine=machine,
        transformers=transformers.__version__,
        model=subject.name,
        task=task,
        runs=RUNS,
        dense_bytes=dense_bytes,
        dense_limit_tokens_per_second=dense_bytes and machine.read_gigabytes_per_second * 1e9 / dense_bytes,
        rows=tuple(_with_speedup(row, baseline) for row in rows),
    )


def _row(
    name: str, sparsity: float | None, build: Callable[[], PreTrainedModel], task: Task, device: torch.device
) -> Row:
    """What this package's engine makes of a model; a row without figures if the model does not fit on the device."""
    _free(device)
    try:
        model = build()
        return Row(name, packed_sparsity(model), _measure_engine(model, task))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return Row(name, sparsity, None, note=_reason(error))


def _measure(model: PreTrainedModel, task: Task, start: Callable[[], tuple[Decodes, Tensor]]) -> Measured:
    """What a way to decode makes of a model.

    Args:
        model: with nothing else on the device.
        task: what to decode.
        start: begins new texts, and gives what decodes them and their first tokens; nothing is compiled by it any more.
    """
    _free(model.device)
    runs = [_time(model, task, start) for _ in range(RUNS)]
    peak = _peak_memory(model.device)
    milliseconds = statistics.median(decode for _, decode in runs) / task.new_tokens * 1e3
    engine, token = start()
    return _measured(
        model,
        task,
        milliseconds,
        parts=_parts(engine, token, milliseconds, task),
        peak_memory_bytes=peak,
        first_token_seconds=statistics.median(first_token for first_token, _ in runs),
        engine=type(engine).__name__,
    )


def _time(model: PreTrainedModel, task: Task, start: Callable[[], tuple[Decodes, Tensor]]) -> tuple[float, float]:
    """Seconds to the first token, and of all timed tokens, each fed back without a look at it."""
    gc.collect()  # the engine before
    synchronize(model.device)
    began = time.perf_counter()
    engine, token = start()
    token.tolist()
    first_token = time.perf_counter() - began
    token = _decode(engine, token, WARMUP_TOKENS)
    synchronize(model.device)
    began = time.perf_counter()
    _decode(engine, token, task.new_tokens)
    synchronize(model.device)
    return first_token, time.perf_counter() - began


def _measure_engine(model: PreTrainedModel, task: Task) -> Measured:
    prompts = _prompts(model, task).tolist()

    def start() -> tuple[Engine, Tensor]:
        engine = make_engine(model, max_tokens=task.positions, sampling=GREEDY)
        return engine, engine.prefill(prompts)

    return _measure(model, task, start)


def _measure_transformers(model: PreTrainedModel, task: Task) -> Measured:
    prompts = _prompts(model, task).to(model.device)
    loop = TransformersLoop(model, task.positions)
    _decode(loop, loop.prefill(prompts), WARMUP_TOKENS)  # compiles, and records the graphs
    return _measure(model, task, lambda: (loop, loop.prefill(prompts)))


def _decode(engine: Decodes, token: Tensor, count: int) -> Tensor:
    for _ in range(count):
        token = engine.decode(token)
    return token


def _parts(engine: Decodes, token: Tensor, milliseconds: float, task: Task) -> Parts | None:
    """What the engine itself measures, if it does; else from a profile of a few tokens."""
    token = _decode(engine, token, WARMUP_TOKENS)
    found = engine.parts()
    if found is not None:
        return split(milliseconds, found["linears"], found["attention"])
    profile = PartsProfile(token.device)
    profile.start()
    _decode(engine, token, task.profiled_tokens)
    profile.stop()
    return profile.parts(milliseconds, task.profiled_tokens)


def _transformers_row(subject: Subject, task: Task, device: torch.device) -> Row:
    """The dense model's own forward with a static cache, compiled on GPUs."""
    name = "transformers, dense"
    _free(device)
    try:
        measured = _measure_transformers(subject.dense(), task)
    except Exception as error:  # a compiler that is missing or fails is no reason to lose the other rows
        return Row(name, 0.0, None, note=_reason(error))
    if device.type == "cuda":
        return Row(f"{name}, compiled", 0.0, measured)
    return Row(name, 0.0, measured, note="it is compiled on GPUs only, so its row is a static cache alone")


def _prompts(model: PreTrainedModel, task: Task) -> Tensor:
    """Random tokens, always the same, [batch, context] int64 on the CPU."""
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (task.batch, task.context), generator=torch.Generator().manual_seed(0))


def _measured(model: PreTrainedModel, task: Task, milliseconds: float, **rest: Any) -> Measured:
    speed = 1e3 / milliseconds
    return Measured(
        tokens_per_second=speed,
        total_tokens_per_second=speed * task.batch,
        milliseconds_per_token=milliseconds,
        dtype=dtype_name(model.dtype),
        **rest,
    )


def _with_speedup(row: Row, baseline: Row) -> Row:
    if row.measured is None or baseline.measured is None:
        return row
    return replace(row, speedup=row.measured.tokens_per_second / baseline.measured.tokens_per_second)


def _check_task(task: Task, limit: int | None) -> None:
    check_counts(task.context, task.new_tokens, task.batch)
    if limit is None or task.positions <= limit:
        return
    room = limit - task.all_new_tokens
    fix = f"--context {room} or less" if room > 0 else "fewer --new-tokens"
    raise UsageError(
        f"The context's {task.context} tokens, {task.untimed_tokens} to warm up and {task.new_tokens} timed ones are more "
        f"than the model's {limit} positions; use {fix}."
    )


def _free(device: torch.device) -> None:
    """Give back what nobody holds, and count the peak from here."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _reason(error: Exception) -> str:
    """Why a row has no figures, on one short line."""
    if is_out_of_memory(error):
        return "does not fit in the device's memory"
    text = " ".join([f"{type(error).__name__}:", *str(error).split()])
    return text if len(text) <= _REASON_LENGTH else text[:_REASON_LENGTH].rsplit(" ", 1)[0] + " ..."
