"""Where the time of long work goes: stages, by a clock that only the tests turn."""

import threading
from types import SimpleNamespace

import pytest

from macko_llm import stages
from macko_llm.stages import listening, stage


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.now = 0.0

    def work(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stages, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def nothing() -> None:
    """Settled at once."""


def test_a_stage_inside_another_is_not_counted_twice(clock: Clock) -> None:
    with listening(nothing) as watch:
        clock.work(1)
        with stage("writing"):
            clock.work(2)
            with stage("packing"):
                clock.work(4)
            clock.work(8)
        clock.work(16)
        with stage("packing"):
            clock.work(32)
    assert watch.seconds == {"other": 17, "writing": 10, "packing": 36}


def test_what_a_device_still_does_belongs_to_the_stage_that_gave_it_to_it(clock: Clock) -> None:
    queued = []

    def settle() -> None:
        while queued:
            clock.work(queued.pop())

    with listening(settle) as watch:
        queued.append(1)
        with stage("observing"):
            queued.append(2)
        queued.append(4)
    assert watch.seconds == {"other": 5, "observing": 2}


def test_a_decorated_function_is_a_stage_each_time(clock: Clock) -> None:
    @stage("reading")
    def read(seconds: float) -> float:
        clock.work(seconds)
        return seconds

    with listening(nothing) as watch:
        assert [read(1), read(2)] == [1, 2]
    assert watch.seconds["reading"] == 3


def test_a_stage_that_fails_ends(clock: Clock) -> None:
    @stage("saving")
    def save() -> None:
        clock.work(1)
        raise KeyError

    with listening(nothing) as watch:
        with pytest.raises(KeyError):
            save()
        clock.work(2)
    assert watch.seconds == {"saving": 1, "other": 2}


def test_where_nobody_listens_nothing_is_waited_for(clock: Clock) -> None:
    waits: list[float] = []
    with listening(lambda: waits.append(clock.now)) as watch:
        pass
    before = len(waits)
    with stage("running"):
        clock.work(1)
    assert len(waits) == before
    assert "running" not in watch.seconds


def test_threads_that_help_are_not_listened_to(clock: Clock) -> None:
    @stage("writing")
    def write() -> None:
        clock.work(1)

    with listening(nothing) as watch, stage("saving"):
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
    assert watch.seconds == {"other": 0, "saving": 1}
