"""One model on two GPUs, joined by NCCL."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from macko_llm.demo.run import MODEL_FOLDER
from macko_llm.packing import pack_checkpoint
from macko_llm.pruning import prune_checkpoint
from macko_llm.recipe import PruneRecipe

PROMPTS = ["Once upon a time", "The fox said"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    folder = tmp_path_factory.mktemp("models")
    prune_checkpoint(MODEL_FOLDER, folder / "pruned", PruneRecipe(method="magnitude", sparsity=0.5))
    pack_checkpoint(folder / "pruned", folder / "packed")
    return folder / "packed"


def _texts(packed: Path, prompts: list[str], *options: str) -> Any:
    asked = [word for prompt in prompts for word in ("-p", prompt)]
    command = [sys.executable, "-m", "macko_llm", "generate", str(packed), *asked, "-n", "40", "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    content = json.loads(done.stdout)
    return [one["text"] for one in (content if isinstance(content, list) else [content])]


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one text", "two texts"])
def test_two_gpus_write_what_one_does(packed: Path, prompts: list[str]) -> None:
    alone = _texts(packed, prompts, "--device", "cuda:0", "--dtype", "float32")
    assert all(alone)
    assert _texts(packed, prompts, "--tensor-parallel", "2", "--dtype", "float32") == alone


def test_two_gpus_write_in_float16(packed: Path) -> None:
    (text,) = _texts(packed, PROMPTS[:1], "--tensor-parallel", "2")
    assert len(text.split()) > 10
