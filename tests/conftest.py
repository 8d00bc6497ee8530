"""Settings of every test."""

import os

import torch

# The models of the tests are so small that a second thread costs more than it saves.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
