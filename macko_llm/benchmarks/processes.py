"""Work in a process of its own, so that its peak of memory is its own, too."""

import multiprocessing
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from macko_llm.errors import MackoError, MackoWarning
from macko_llm.progress import Progress

T = TypeVar("T")


def in_fresh_process(work: Callable[..., T], *args: Any, progress: Progress) -> T:
    """Call `work(*args, progress=...)` in a new process, which ends with it, or with this one.

    Our own warnings come with the result; of a call that fails they would tell what to do with files that are not kept.

    Args:
        work: a function of a module; it, its arguments and its result are pickled.
        args: for it.
        progress: is told what the function tells its own.

    Raises:
        MackoError: what the function raised, or that the process was ended from outside.
        RuntimeError: what else the function raised, in words.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(theirs, work, args), daemon=True)
    process.start()
    theirs.close()
    try:
        while True:
            kind, content = ours.recv()
            if kind == "error":
                raise content
            if kind == "result":
                process.join()
                result, said = content
                for sentence in said:
                    warnings.warn(sentence, MackoWarning, stacklevel=2)
                return result
            progress(*content)
    except EOFError:
        process.join()
        raise MackoError(
            f"The process that was measured was ended (exit code {process.exitcode}), perhaps for want of memory; "
            "free some, or measure less."
        ) from None
    finally:
        process.terminate()
        process.join()


def peak_host_bytes() -> int | None:
    """The most memory that this process has had in RAM so far, None where the system does not tell."""
    with suppress(OSError, StopIteration, ValueError):  # Linux; what getrusage gives there may be the parent's
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def _run(pipe: Connection, work: Callable[..., object], args: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who waits for this process ends it

    def progress(what: str, done: int, total: int) -> None:
        pipe.send(("progress", (what, done, total)))

    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", MackoWarning)
            result = work(*args, progress=progress)
        pipe.send(("result", (result, [str(warning.message) for warning in said])))
    except (MackoError, OSError) as error:
        pipe.send(("error", error))
    except Exception as error:
        pipe.send(("error", RuntimeError(f"{type(error).__name__}: {error}")))
