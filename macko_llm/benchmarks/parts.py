"""Which part of a token's time the linears and the attention take, by the names of the kernels in a profile."""

import re
import time
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from macko_llm.benchmarks.machine import synchronize

ATTENTION = re.compile(r"attention|flash|fmha|cudnn|sdpa|softmax", re.IGNORECASE)
LINEARS = re.compile(
    r"gemm|gemv|nvjet|cublas|cutlass|splitk|_mm_|::(add)?mm$|::linear$|mkldnn_linear|macko|spmv|multiply_rows|unpack_",
    re.IGNORECASE,
)
"""Kernels of cuBLAS and of this package on a GPU, ops on a CPU. Attention is looked for first: its kernels multiply too."""
FUSED = re.compile(r"triton_(?!tem_)")
"""torch.compile names a fused pointwise kernel after everything around it, products that it does not compute included."""


@dataclass(frozen=True)
class Parts:
    """Milliseconds of one token; they add up to its whole time.

    Attributes:
        linears: products with weights, the lm_head included.
        attention: over the cache.
        rest: norms, rotary embedding, cache update, sampling, and gaps in which nothing runs.
    """

    linears: float
    attention: float
    rest: float


def split(total: float, linears: float, attention: float) -> Parts:
    """Parts of `total`; all in milliseconds of one token."""
    return Parts(linears, attention, total - linears - attention)


class PartsProfile:
    """Times of kernels by part, from `start` to `stop`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        on_gpu = device.type == "cuda"
        self._milliseconds = 0.0
        self._profile = profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU])

    def start(self) -> None:
        """Begin, with nothing left to do on the device."""
        synchronize(self._device)
        self._profile.start()
        self._milliseconds = -time.perf_counter() * 1e3

    def stop(self) -> None:
        """End, with everything done."""
        synchronize(self._device)
        self._milliseconds += time.perf_counter() * 1e3
        self._profile.stop()

    def parts(self, total: float, tokens: int) -> Parts | None:
        """What was profiled for this many tokens, as parts of a token's time without the profiler.

        Args:
            total: milliseconds that a token takes when nobody looks.
            tokens: that were decoded between start and stop.

        Returns:
            None if the profiler saw neither, as where it may not read a GPU's counters.
        """
        on_gpu = self._device.type == "cuda"
        found = dict.fromkeys(("linears", "attention", "rest"), 0.0)
        for event in self._profile.key_averages():
            microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            found[part_of(event.key)] += microseconds / 1e3 / tokens
        linears, attention = found["linears"], found["attention"]
        if not linears + attention:
            return None
        # A profiler slows a CPU down, Python and ops alike. Kernels on a GPU take as long as ever, but may overlap.
        scale = min(1.0, total / (linears + attention)) if on_gpu else total * tokens / self._milliseconds
        return split(total, linears * scale, attention * scale)


def part_of(kernel: str) -> str:
    """Where a kernel or op belongs, by its name: linears, attention or rest."""
    if FUSED.match(kernel):
        return "rest"
    if ATTENTION.search(kernel):
        return "attention"
    return "linears" if LINEARS.search(kernel) else "rest"
