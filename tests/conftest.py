"""Settings of every test."""

import gc
import os

import torch

# The models of the tests are so small that a second thread costs more than it saves.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What is imported by now stays: benchmarks collect garbage before each run, and would look through it every time."""
    gc.collect()
    gc.freeze()
