"""Pruning jobs that are cut off, and what they leave, for the tests of resuming."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SENTENCES, build, make_tokenizer
from transformers import LlamaConfig

from macko_llm.pruned_packing import prune_packed
from macko_llm.pruning import prune_checkpoint
from macko_llm.pruning.journal import JOURNAL_FILE
from macko_llm.recipe import PruneRecipe

BLOCKS = 6
SLOW = {"method": "sparsegpt", "update": "admm", "allocation": "owl"}


def write_model_and_text(folder: Path) -> Path:
    """Put a model of six blocks and calibration text into a folder, and return it."""
    config = LlamaConfig(
        vocab_size=320, max_position_embeddings=64, num_hidden_layers=BLOCKS, hidden_size=32, intermediate_size=48,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    build(config).to(torch.float16).save_pretrained(folder / "dense")
    make_tokenizer().save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(" ".join(SENTENCES * 4), encoding="utf-8")
    return folder


def quick_recipe(here: Path) -> PruneRecipe:
    return PruneRecipe(calibration=str(here / "text.txt"), nsamples=4, seqlen=24)


def with_settings(recipe: PruneRecipe, **settings: Any) -> PruneRecipe:
    return PruneRecipe(**{**recipe.__dict__, **settings})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def partial_folder(target: Path) -> Path:
    return target.parent / f".macko-partial-{target.name}"


def journal(target: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((partial_folder(target) / JOURNAL_FILE).read_text())
    return content


class Stop(BaseException):
    """Stands for the end of the process: nobody catches it."""


def run_job(here: Path, target: Path, recipe: PruneRecipe, packed: bool = False, **options: Any) -> None:
    job = prune_packed if packed else prune_checkpoint
    job(here / "dense", target, recipe, device="cpu", **options)


def cut_off(here: Path, target: Path, recipe: PruneRecipe, done: int = 3, **options: Any) -> None:
    """A job that ends when so many blocks are done."""

    def progress(what: str, number: int, _total: int) -> None:
        if (what, number) == ("pruning blocks", done):
            raise Stop

    with pytest.raises(Stop):
        run_job(here, target, recipe, progress=progress, **options)
    assert journal(target)["blocks"] == done
