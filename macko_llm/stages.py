"""Where the time of long work goes: stages, which cost nothing where nobody listens."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

Stage = Literal[
    "drawing", "recording", "reading", "observing", "choosing", "running", "packing", "writing", "saving", "other"
]
"""In the order of the work: drawing calibration tokens, recording what enters the blocks, reading weights, observing dense
blocks, choosing and setting weights, running pruned blocks, packing, writing tensors, closing and completing the output, and
what is none of these."""


class Stopwatch:
    """Seconds of each stage, less those of the stages inside it, so that they add up to the time that was listened for.

    Args:
        settle: waits until the work that was given to a device is done; called wherever a stage begins or ends.
    """

    def __init__(self, settle: Callable[[], None]) -> None:
        self.seconds: dict[Stage, float] = {}
        self._settle = settle
        self._running: list[Stage] = []
        self._since = 0.0

    def begin(self, stage: Stage) -> None:
        """Go on with a stage inside the one that is running."""
        self._account()
        self._running.append(stage)

    def end(self) -> None:
        """Go back to the stage around the one that is running."""
        self._account()
        self._running.pop()

    def _account(self) -> None:
        self._settle()
        now = time.perf_counter()
        if self._running:
            stage = self._running[-1]
            self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._since = now


# Threads that help see nobody listening: their work is waited for in a stage of the thread that wants it.
_listening: ContextVar[Stopwatch | None] = ContextVar("stopwatch", default=None)


@contextmanager
def listening(settle: Callable[[], None]) -> Iterator[Stopwatch]:
    """While this lasts, the stages of this thread are timed; see `Stopwatch`."""
    watch = Stopwatch(settle)
    token = _listening.set(watch)
    watch.begin("other")
    try:
        yield watch
    finally:
        watch.end()
        _listening.reset(token)


@contextmanager
def stage(name: Stage) -> Iterator[None]:
    """What happens inside belongs to this stage; as a decorator, all of a function, which must not be a generator."""
    watch = _listening.get()
    if watch is None:
        yield
        return
    watch.begin(name)
    try:
        yield
    finally:
        watch.end()
