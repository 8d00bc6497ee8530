"""How the command line talks: results on stdout, everything else on stderr, errors in one sentence."""

import errno
import functools
import json
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import typer

from macko_llm.errors import MackoError, MackoWarning, UsageError, notes
from macko_llm.progress import Progress

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

DEBUG_VARIABLE = "MACKO_DEBUG"
SIGNAL_EXIT_CODE = 128
"""What shells add to the number of the signal that ended a process."""
SECONDS_BETWEEN_LINES = 10.0
NAME_WIDTH = 20
"""Columns that the names in a table get at least."""
_OUTPUT_ERRORS = {errno.EPIPE, errno.ENOSPC, errno.EFBIG, errno.EBADF}
"""What writing to stdout may fail with; the library's own files raise errors that name them."""


def plain_errors(command: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Turn what a command raises into one sentence on stderr and an exit code; MACKO_DEBUG=1 shows the traceback."""

    @functools.wraps(command)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            _quiet_libraries()
            with _unwinding_signals(), written_output(), _plain_warnings():
                return command(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt as interrupt:
            number = interrupt.args[0] if isinstance(interrupt, _SignalReceivedError) else signal.SIGINT
            _say("; ".join(["Interrupted", *(notes(interrupt) or ["nothing unfinished was left behind."])]), kwargs)
            raise typer.Exit(SIGNAL_EXIT_CODE + number) from None
        except Exception as error:
            if wants_traceback():
                raise
            _say(_sentence(error), kwargs)
            for note in notes(error):
                print_error(f"{note[0].upper()}{note[1:]}")
            raise typer.Exit(error.exit_code if isinstance(error, MackoError) else 1) from None

    return run


def wants_traceback() -> bool:
    """Whether MACKO_DEBUG asks for more than a sentence."""
    return os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


def _say(sentence: str, options: Mapping[str, object]) -> None:
    """An error on stderr, and where JSON is wanted, on stdout too."""
    print_error(sentence)
    if options.get("as_json"):
        print_json({"error": sentence})


class _SignalReceivedError(KeyboardInterrupt):
    """A signal that ends the process, whose number is the argument: whatever cleans up after Ctrl-C does so after it."""


@contextmanager
def _unwinding_signals() -> Iterator[None]:
    """While this lasts, SIGTERM and SIGHUP are like Ctrl-C, unless they are ignored, as under nohup."""

    def unwind(number: int, _frame: object) -> None:
        raise _SignalReceivedError(number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        numbers = (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP"))  # Windows has no SIGHUP
        before = {number: signal.getsignal(number) for number in numbers if number is not None}
    for number, handler in before.items():
        if handler == signal.SIG_DFL:
            signal.signal(number, unwind)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler == signal.SIG_DFL:
                signal.signal(number, handler)


@contextmanager
def until_interrupted() -> Iterator[None]:
    """Ctrl-C ends what is done inside, and nothing more; other signals go on."""
    try:
        yield
    except _SignalReceivedError:
        raise
    except KeyboardInterrupt:
        pass


@contextmanager
def written_output() -> Iterator[None]:
    """Whatever is printed inside is written to stdout; where it cannot be, one sentence says so, and `typer.Exit` is raised.

    Where stdout is closed, nothing is run at all. A reader who has gone is no error to speak of.
    """
    if sys.stderr is None:  # print would write to stdout instead
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    if sys.stdout is None:
        print_error("Standard output is closed; leave it open, or redirect it to a file or to /dev/null.")
        raise typer.Exit(UsageError.exit_code)
    try:
        yield
        sys.stdout.flush()
    except Exception as error:
        lost = _lost_output(error)
        if lost is None:
            raise
        # Keep Python from complaining again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if lost.errno != errno.EPIPE:
            print_error(f"The output cannot be written ({lost.strerror}); free some space, or redirect it elsewhere.")
        raise typer.Exit(1) from None


def _lost_output(error: Exception) -> OSError | None:
    """Why something that was printed cannot be written, if that is so."""
    try:
        sys.stdout.flush()  # a command that fails may have printed something before
    except OSError as lost:
        return lost
    if isinstance(error, OSError) and error.filename is None and error.errno in _OUTPUT_ERRORS:
        return error
    return None


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Progress on stderr: bars that vanish when the work is done, or a few plain lines where it is not a terminal."""
    if not sys.stderr.isatty():
        yield _progress_lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=console, transient=True) as bars:
        current: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in current:
                for finished in current.values():
                    bars.remove_task(finished)
                current.clear()
                current[what] = bars.add_task(what, total=total)
            bars.update(current[what], completed=done, total=total)

        yield report


def _progress_lines() -> Progress:
    """A line when a kind of work begins, and one every SECONDS_BETWEEN_LINES while it lasts."""
    last_what, last_time = "", 0.0

    def report(what: str, done: int, total: int) -> None:
        nonlocal last_what, last_time
        now = time.monotonic()
        if what != last_what or now - last_time >= SECONDS_BETWEEN_LINES:
            print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)
            last_what, last_time = what, now

    return report


def print_json(content: dict[str, Any] | list[Any]) -> None:
    """Exactly one JSON object or list on stdout; JSON has no NaN and no infinity, so they become null."""
    print(json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, names: int = 1) -> None:
    """A table on stdout; the first column is text, the others are numbers. Nothing is cut.

    Where a terminal is too narrow for all columns, as many as fit come first, and the others below, behind the first `names`
    columns, which say what a row is about. What is no terminal gets plain text, a line a row, however wide.
    """
    if not sys.stdout.isatty():
        _print_plain_table(title, [columns, *rows])
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    widths = [max(len(row[i]) for row in [columns, *rows]) + 3 for i in range(len(columns))]
    terminal = Console().width
    widths[0] = min(widths[0], NAME_WIDTH + 3)  # longer names are folded where they must be
    for number, part in enumerate(_column_groups(widths, names, terminal)):
        table = Table(title=title or None if number == 0 else None, title_justify="left", box=box.SIMPLE_HEAD)
        for column in part:
            justify, fold = ("left", "fold") if column == 0 else ("right", "ellipsis")
            table.add_column(columns[column], justify=justify, overflow=fold, no_wrap=column > 0)  # type: ignore[arg-type]
        for row in rows:
            table.add_row(*(row[column] for column in part))
        Console(width=max(terminal, sum(widths[column] for column in part) + 1)).print(table)


def _print_plain_table(title: str, lines: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if title:
        print(title)
    for first, *numbers in lines:
        cells = [first.ljust(widths[0]), *map(str.rjust, numbers, widths[1:])]
        print("  ".join(cells).rstrip())


def _column_groups(widths: Sequence[int], names: int, limit: int) -> list[list[int]]:
    """The numbers of the columns of each table, of which all begin with the first ones."""
    first = list(range(names))
    groups = [[*first]]
    for column in range(names, len(widths)):
        if len(groups[-1]) > names and sum(widths[i] for i in [*groups[-1], column]) + 1 > limit:
            groups.append([*first])
        groups[-1].append(column)
    return groups


def bar(share: float, width: int) -> str:
    """A picture of a share in [0, 1], `width` characters; in eighths where the output's encoding has them."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8) if math.isfinite(share) else 0
    whole, rest = divmod(eighths, 8)
    drawn = "█" * whole + " ▏▎▍▌▋▊▉"[rest].strip()
    try:
        drawn.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        drawn = "#" * round(eighths / 8)
    return drawn.ljust(width)


def megabytes(count: int) -> str:
    """Bytes as people read them, decimal units."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit:
            return f"{count / limit:.2f} {unit}"
    return f"{count} B"


def gigabytes_per_second(speed: float) -> str:
    """A bandwidth with three digits or so."""
    return f"{speed:.{0 if speed >= 100 else 1}f}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sentence(error: Exception) -> str:
    if isinstance(error, MackoError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return f"The package {package} is missing; install it with `pip install {package}`."
    if isinstance(error, UnicodeEncodeError) and error.encoding != "utf-8":
        missing = error.object[error.start]
        return f"The output's encoding {error.encoding} has no {missing!r}; set PYTHONIOENCODING=utf-8."
    if isinstance(error, OSError) and error.strerror:
        what = "A file" if error.filename is None else os.fsdecode(error.filename)
        return f"{what} cannot be used ({error.strerror}); check the path, its rights and the disk."
    what = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
    return f"Unexpected {what}; set {DEBUG_VARIABLE}=1 for the traceback, and report it."


def print_error(sentence: str) -> None:
    """One sentence on stderr."""
    print(f"macko: {sentence}", file=sys.stderr)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Our own warnings as a sentence on stderr, those of libraries not at all; python -W and PYTHONWARNINGS show them."""
    if sys.warnoptions:
        yield
        return

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print_error(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", MackoWarning)
        warnings.showwarning = show
        yield


def _quiet_libraries() -> None:
    """Keep other libraries' bars and warnings out of our output; what matters in them is checked and raised instead."""
    # Read when the libraries are imported, which commands do only once they run.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if sys.stderr is None or not sys.stderr.isatty():  # who waits for a download at a terminal sees how far it is
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler: nothing
