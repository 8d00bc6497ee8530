"""Settings of every test."""

import gc
import importlib.util
import os

import pytest
import torch

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
