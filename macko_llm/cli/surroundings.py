"""Options that concern no command by itself: where models come from, and how many CPU threads work."""

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer

from macko_llm.cli.options import expanded_path
from macko_llm.errors import UsageError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_RevisionOption = Annotated[str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of a hub id.")]
_TokenOption = Annotated[
    str | None,
    typer.Option(
        "--token", metavar="TOKEN", help="For gated models; `hf auth login` and HF_TOKEN keep it out of histories."
    ),
]
_CacheDirOption = Annotated[
    Path | None, typer.Option(metavar="DIR", parser=expanded_path, help="Where downloaded models are kept.")
]
_ThreadsOption = Annotated[int | None, typer.Option(metavar="N", help="CPU threads. [default: as many as may run]")]
_SOURCES = ("model", "packed")
_SEVERAL = "models"
_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")


def with_hub(command: Callable[Arguments, Result]) -> Callable[..., Result]:
    """Give --revision, --token and --cache-dir to a command that takes a model; without the first to one that takes several."""
    options = {"revision": _RevisionOption, "token": _TokenOption, "cache_dir": _CacheDirOption}
    if _SEVERAL in inspect.signature(command).parameters:  # each may be of its own: MODEL@REVISION
        del options["revision"]

    @functools.wraps(command)
    def run(
        *args: Any, revision: str | None = None, token: str | None = None, cache_dir: Path | None = None, **kwargs: Any
    ) -> Result:
        if revision is not None:
            source = next(name for name in _SOURCES if name in kwargs)
            if kwargs[source] is None:
                raise UsageError("--revision is of a model on the hub; name one.")
            kwargs[source] = f"{kwargs[source]}@{revision}"
        changes = {} if token is None else {"HF_TOKEN": token}
        if cache_dir is not None:
            changes["HF_HUB_CACHE"] = str(cache_dir.absolute())
        with _environment(changes):
            return command(*args, **kwargs)

    return _extended(run, command, options)


def with_threads(command: Callable[Arguments, Result]) -> Callable[..., Result]:
    """Give --threads to a command that computes."""

    @functools.wraps(command)
    def run(*args: Any, threads: int | None = None, **kwargs: Any) -> Result:
        if threads is not None and threads < 1:
            raise UsageError(f"{threads} threads can do nothing; use --threads 1 or more.")
        with _environment(_thread_settings(threads)):
            if threads is not None and "torch" in sys.modules:  # which has read its settings already
                sys.modules["torch"].set_num_threads(threads)
            return command(*args, **kwargs)

    return _extended(run, command, {"threads": _ThreadsOption})


@contextmanager
def shared_threads(processes: int) -> Iterator[None]:
    """While this lasts, new processes have an equal share each of the CPU threads that this one has."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    count = int(threads) if threads.isdecimal() else usable_cpus()
    with _environment({"OMP_NUM_THREADS": str(max(1, count // processes))}):
        yield


def usable_cpus() -> int:
    """CPUs that this process may use: of its affinity and of its container's limit the fewer."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _CPU_LIMIT.read_text().split()
        return max(1, min(cpus, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such limit
        return cpus


def _thread_settings(threads: int | None) -> dict[str, str]:
    """What torch's threads are told before they begin; what the user has set stays, but for --threads."""
    settings = {"OMP_WAIT_POLICY": "passive"}  # threads that spin while they wait keep others from working
    if threads is not None:
        return {**settings, "OMP_NUM_THREADS": str(threads)}
    if "OMP_NUM_THREADS" not in os.environ:
        settings["OMP_NUM_THREADS"] = str(usable_cpus())
    return {name: value for name, value in settings.items() if name not in os.environ}


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _extended(
    run: Callable[..., Result], command: Callable[..., Result], options: dict[str, Any]
) -> Callable[..., Result]:
    """A function with the parameters of a command and of more options, as typer reads them."""
    signature = inspect.signature(command)
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in options.items()
    ]
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *more])  # type: ignore[attr-defined]
    run.__annotations__ = {**command.__annotations__, **options}
    return run
