"""Work in a process of its own: what comes back from it, how it ends, what its peak of memory is."""

import os
import time
import warnings

import pytest

from macko_llm.benchmarks.processes import in_fresh_process, peak_host_bytes
from macko_llm.errors import MackoError, MackoWarning, UsageError
from macko_llm.progress import Progress, no_progress

BALLAST = 200 * 2**20


def _told(count: int, progress: Progress) -> int:
    for done in range(count):
        progress("counting", done, count)
    return os.getpid()


def _refused(**_: Progress) -> None:
    raise UsageError("Use something else.")


def _broken(**_: Progress) -> None:
    raise KeyError("gone")


def _ended(**_: Progress) -> None:
    os._exit(3)


def _warned(fails: bool, **_: Progress) -> str:
    warnings.warn("of a library", stacklevel=1)
    warnings.warn("Something works, but slowly.", MackoWarning, stacklevel=1)
    if fails:
        raise UsageError("Use something else.")
    return "done"


def _interrupted(progress: Progress) -> None:
    progress(str(os.getpid()), 0, 1)
    time.sleep(600)


def _peak(ballast: int, **_: Progress) -> int:
    kept = b"\1" * ballast
    peak = peak_host_bytes()
    assert peak is not None
    return peak + 0 * len(kept)


def test_a_process_says_how_far_it_is() -> None:
    told: list[tuple[str, int, int]] = []
    pid = in_fresh_process(_told, 2, progress=lambda *what: told.append(what))
    assert told == [("counting", 0, 2), ("counting", 1, 2)]
    assert pid != os.getpid()


def test_what_a_process_raises_is_raised_here() -> None:
    with pytest.raises(UsageError, match="Use something else"):
        in_fresh_process(_refused, progress=no_progress)
    with pytest.raises(RuntimeError, match="KeyError: 'gone'"):
        in_fresh_process(_broken, progress=no_progress)
    with pytest.raises(MackoError, match=r"was ended \(exit code 3\)"):
        in_fresh_process(_ended, progress=no_progress)


def test_warnings_of_ours_come_with_the_result_alone() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert in_fresh_process(_warned, False, progress=no_progress) == "done"
        with pytest.raises(UsageError):
            in_fresh_process(_warned, True, progress=no_progress)
    assert [(warning.category, str(warning.message)) for warning in said] == [
        (MackoWarning, "Something works, but slowly.")
    ]


def test_a_process_ends_with_who_waits_for_it() -> None:
    pids = []

    def interrupt(what: str, *_: int) -> None:
        pids.append(int(what))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_fresh_process(_interrupted, progress=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_the_peak_is_that_of_the_process_alone() -> None:
    alone = in_fresh_process(_peak, 0, progress=no_progress)
    heavy = in_fresh_process(_peak, BALLAST, progress=no_progress)
    assert heavy - alone > 0.9 * BALLAST
    ours = b"\1" * (2 * BALLAST)
    beside = in_fresh_process(_peak, 0, progress=no_progress)
    assert beside < alone + 0.5 * BALLAST
    assert len(ours) == 2 * BALLAST
