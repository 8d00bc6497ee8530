"""Times of calls that a server would make over and over: medians, without launch gaps, with weights that no cache holds."""

import contextlib
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from macko_llm.engines.capture import no_waits

WARMUP_REPLAYS = 3
REPLAYS = 17
MIN_LAUNCHES = 200
"""Calls in one replay, so that what a replay itself costs is shared among many."""
REPLAY_SECONDS = 0.02
"""A replay that takes longer than this needs no more calls."""

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """How long one call takes.

    Attributes:
        microseconds: median over the replays of a replay's time divided by its calls.
        launches: calls in one replay.
        replays: timed, after WARMUP_REPLAYS that were not.
        cuda_graph: whether the replays were those of a CUDA graph; always false on the CPU.
        graph_failure: why there is no graph on a GPU; the time then includes what Python needs where the GPU waits for it.
    """

    microseconds: float
    launches: int
    replays: int
    cuda_graph: bool
    graph_failure: str | None = None


def measure(rotation: Sequence[Call], device: torch.device) -> Timing:
    """Time the calls of a rotation, one after the other again and again, and give the mean call of the median replay.

    Args:
        rotation: calls that do the same work on different data. Data that should come from memory must add up to several
            times the caches; what all calls share stays in them.
        device: where they work; on a GPU asynchronously, on the current stream.
    """
    if device.type == "cuda":
        return _measure_cuda(rotation, device)

    def run(repeats: int) -> float:
        start = time.perf_counter()
        _run(rotation, repeats)
        return time.perf_counter() - start

    run(1)
    repeats = _repeats(rotation, run(1))
    seconds = [run(repeats) for _ in range(WARMUP_REPLAYS + REPLAYS)]
    return _timing(seconds, repeats * len(rotation), cuda_graph=False)


def _measure_cuda(rotation: Sequence[Call], device: torch.device) -> Timing:
    # The inputs were made on another stream, and what is freed here may be used there.
    torch.cuda.synchronize(device)
    with torch.cuda.device(device), torch.cuda.stream(_side_stream(torch.cuda.current_device())):
        _run(rotation, 1)
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        _run(rotation, 1)
        torch.cuda.synchronize(device)
        repeats = _repeats(rotation, time.perf_counter() - start)
        graph, failure = _capture(rotation, repeats)
        seconds = _event_seconds(graph.replay if graph else lambda: _run(rotation, repeats))
        torch.cuda.synchronize(device)
    return _timing(seconds, repeats * len(rotation), cuda_graph=graph is not None, graph_failure=failure)


@functools.cache
def _side_stream(device_index: int) -> torch.cuda.Stream:
    """One for all measurements, because cuBLAS keeps a workspace for every stream it has seen; capturing needs one."""
    return torch.cuda.Stream(device_index)


def _capture(rotation: Sequence[Call], repeats: int) -> tuple[torch.cuda.CUDAGraph | None, str | None]:
    """A graph of the calls on the current stream, or None and the reason why they cannot be captured."""
    waits = _why_it_waits(rotation)
    if waits:
        return None, waits
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
            _run(rotation, repeats)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        # torch's allocator would go on believing in the broken capture, and refuse the next one.
        with contextlib.suppress(AttributeError, RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        # What ends a broken capture complains as well, after the call that broke it.
        return None, _first_line(error.__context__ or error)
    return graph, None


def _why_it_waits(rotation: Sequence[Call]) -> str | None:
    """What torch says of calls that make Python wait for the GPU, which no graph can hold; None if they do not."""
    try:
        with no_waits():
            _run(rotation, 1)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return _first_line(error)
    return None


def _event_seconds(replay: Call) -> list[float]:
    """Time between events around each replay; all are queued at once, so that the GPU never waits for the next."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(WARMUP_REPLAYS + REPLAYS + 1)]
    events[0].record()
    for event in events[1:]:
        replay()
        event.record()
    events[-1].synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)]


def _run(rotation: Sequence[Call], repeats: int) -> None:
    for _ in range(repeats):
        for call in rotation:
            call()


def _repeats(rotation: Sequence[Call], seconds: float) -> int:
    """Times that a rotation of this duration goes into one replay."""
    return max(1, min(math.ceil(MIN_LAUNCHES / len(rotation)), int(REPLAY_SECONDS / max(seconds, 1e-9))))


def _timing(seconds: list[float], launches: int, *, cuda_graph: bool, graph_failure: str | None = None) -> Timing:
    median = statistics.median(seconds[WARMUP_REPLAYS:])
    return Timing(median / launches * 1e6, launches, REPLAYS, cuda_graph, graph_failure)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
