"""CUDA graphs of work that Python queues."""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def captured(run: Callable[[], object], *, rehearse: Callable[[], object] | None = None) -> torch.cuda.CUDAGraph:
    """What `run` queues on the current device, as a graph.

    Args:
        run: queues the work, without waiting for the device.
        rehearse: runs the same work and undoes it: what libraries do at their first call must not meet a capture, and
            work that waits shows before it breaks one. None if it has run before.

    Raises:
        RuntimeError: the work waits for the device, or cannot be captured for another reason.
    """
    here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    aside.wait_stream(here)
    try:
        # On one stream, because cuBLAS has a workspace for each and may choose other kernels without one.
        with torch.cuda.stream(aside), _nothing_collected():
            if rehearse is not None:
                rehearse()
                with no_waits():
                    rehearse()
            with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                run()
    finally:
        here.wait_stream(aside)  # whoever goes on without a graph does so behind the rehearsals
    return graph


@contextmanager
def no_waits() -> Iterator[None]:
    """Turn waits of torch for the device into errors, as far as torch knows of them.

    A wait during a capture would break it, and with it random numbers and later captures of the process.
    """
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode")  # calls itself a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Keep Python from freeing what lies about in cycles: a graph that is destroyed meanwhile breaks the capture.

    torch collects before a capture up to 2.8 only, see its pull request 161037.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
