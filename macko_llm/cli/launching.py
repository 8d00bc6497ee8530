"""Commands in several processes: starting them, hearing from them, and being one of those that torchrun starts."""

import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from macko_llm.cli.console import wants_traceback
from macko_llm.cli.surroundings import shared_threads
from macko_llm.errors import MackoError, MackoWarning

if TYPE_CHECKING:
    from macko_llm.ranks import Place

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
OnText = Callable[[str], object]

SECONDS_TO_SPEAK = 30
"""For which torchrun's other processes wait after a failure: it ends all with the first to fail, which must be who speaks."""
SECONDS_TO_END = 2
"""In which the pipe of a process that is ended is closed, too, after others have lost their connections to it."""


def processes_of_torchrun() -> int:
    """How many processes torchrun has started, of which this is one; 0 where it has not."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def place_of_torchrun() -> "Place":
    """Which of torchrun's processes this is."""
    from macko_llm.ranks import Place

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, size, local_rank, local_size = (int(os.environ[name]) for name in names)
    return Place(rank, size, local_rank, local_size=local_size)


def first_process_speaks(command: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Have a command say nothing in torchrun's other processes, but for failures that may be theirs alone."""

    @functools.wraps(command)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if not processes_of_torchrun() or os.environ["RANK"] == "0":
            return command(*args, **kwargs)
        for number in (signal.SIGTERM, signal.SIGINT):  # torchrun sends them to all, and one speaks of it
            signal.signal(number, signal.SIG_DFL)
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
        warnings.simplefilter("ignore")
        try:
            return command(*args, **kwargs)
        except MackoError:  # which the first process raises, too, and all end
            time.sleep(SECONDS_TO_SPEAK)
            raise  # it has not

    return run


def in_processes(count: int, work: Callable[..., Result], *args: Any, on_text: OnText | None) -> Result:
    """Call `work(place, *args, on_text)` in new processes, which end with it, or with this one.

    Args:
        count: how many.
        work: a function of a module; it, its arguments and its result are pickled.
        args: for it.
        on_text: told what the first process tells its own; the others have none.

    Returns:
        The first one's result.

    Raises:
        MackoError: what the function raised in the first process to fail, or that a process was ended from outside.
        RuntimeError: what else it raised, in words.
    """
    from macko_llm.ranks import Place

    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    processes = []
    with tempfile.TemporaryDirectory(prefix="macko-", ignore_cleanup_errors=True) as folder, shared_threads(count):
        try:
            for rank in range(count):
                ours, theirs = context.Pipe()
                place = Place(rank, count, rank, Path(folder) / "meeting")
                process = context.Process(target=_run, args=(theirs, place, work, args), daemon=True)
                with _deaf_to_interrupts():
                    process.start()
                theirs.close()
                pipes.append(ours)
                processes.append(process)
            import macko_llm.generation  # noqa: F401 - of which the result is; takes seconds, as the others' work begins

            return _listen(pipes, on_text)
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.join()


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Have processes that are started inside not hear Ctrl-C, not even while Python starts; this one hears it afterwards."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    resource_tracker.ensure_running()  # else it would start with the first process, and clear the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _listen(pipes: list[Connection], on_text: OnText | None) -> Any:
    """Hear all processes out."""
    talking, result = list(pipes), None
    while talking:
        for ready in multiprocessing.connection.wait(talking):
            pipe = cast("Connection", ready)
            rank = pipes.index(pipe)
            try:
                kind, content = pipe.recv()
            except EOFError:
                raise _ended(rank, len(pipes)) from None
            if kind == "text" and on_text is not None:
                on_text(content)
            elif kind == "warning":
                warnings.warn(content, MackoWarning, stacklevel=2)
            elif kind == "error":
                if not isinstance(content, MackoError):  # perhaps of a connection to a process that is there no more
                    _require_alive(pipes)
                raise content
            elif kind == "result":
                talking.remove(pipe)
                result = content if rank == 0 else result
    return result


def _require_alive(pipes: list[Connection]) -> None:
    """Raise MackoError if a process has ended; all others keep their pipes open until they are told to end."""
    time.sleep(SECONDS_TO_END)
    for rank, pipe in enumerate(pipes):
        try:
            while pipe.poll():
                pipe.recv()
        except (EOFError, OSError):
            raise _ended(rank, len(pipes)) from None


def _ended(rank: int, count: int) -> MackoError:
    return MackoError(
        f"Process {rank} of {count} was ended from outside, perhaps for want of memory; free some, or use more processes."
    )


def _run(pipe: Connection, place: "Place", work: Callable[..., object], args: tuple[Any, ...]) -> None:
    """Work in a process of `in_processes`; it prints nothing, and ends when it is told to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    if not wants_traceback():
        os.dup2(silence, 2)
    first = place.rank == 0

    def tell(message: Warning | str, *_: object, **__: object) -> None:
        if first:
            pipe.send(("warning", str(message)))

    warnings.simplefilter("ignore")
    warnings.simplefilter("always", MackoWarning)
    warnings.showwarning = tell
    try:
        answer: tuple[str, object] = (
            "result",
            work(place, *args, (lambda text: pipe.send(("text", text))) if first else None),
        )
    except (MackoError, OSError) as error:
        answer = "error", error
    except Exception as error:
        if wants_traceback():
            traceback.print_exc()
        answer = "error", RuntimeError(f"{type(error).__name__}: {error}")
    try:
        pipe.send(answer)
        pipe.recv()  # to end now would look like a failure to the others, who would tell of it
    except (EOFError, OSError):
        pass
