"""Settings of every test, and a fixture of those that ask each set of instructions."""

import gc
import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

from macko_llm import native

# The models of the tests are so small that a second thread costs more than it saves.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test marked lm_eval is skipped, saying so, where lm-eval is missing."""
    if item.get_closest_marker("lm_eval") and importlib.util.find_spec("lm_eval") is None:
        pytest.skip("needs lm-eval: make test-eval")


def pytest_collection_finish() -> None:
    """What is imported by now stays: benchmarks collect garbage before each run, and would look through it every time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=native.INSTRUCTIONS)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every set of instructions of this architecture in turn, which work on the CPU is held to; skips what this CPU lacks."""
    if native.INSTRUCTIONS.index(request.param) > native.library().macko_cpu_instructions():
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setenv(native.CPU_VARIABLE, request.param)
    native.cpu_instructions.cache_clear()
    yield request.param
    native.cpu_instructions.cache_clear()
