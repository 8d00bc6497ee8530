"""Commands that are run in this process, and what they are run on."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from families import SENTENCES, save_model
from typer.testing import CliRunner, Result

from macko_llm.cli.main import app
from macko_llm.packing import pack_checkpoint
from macko_llm.pruning import prune_checkpoint
from macko_llm.recipe import PruneRecipe

PROGRESS_LINE = re.compile(r".+: \d+/\d+")


def write_models_and_texts(folder: Path) -> Path:
    """Put a tiny Llama, dense, pruned and packed, a text and a dataset into a folder, and return it."""
    save_model(folder / "dense", "llama", torch.float16)
    prune_checkpoint(folder / "dense", folder / "pruned", PruneRecipe(method="magnitude"), device="cpu")
    pack_checkpoint(folder / "pruned", folder / "packed")
    (folder / "text.txt").write_text(" ".join(SENTENCES * 4))
    data = folder / "dataset" / "data"
    data.mkdir(parents=True)
    for split, texts in (("train", SENTENCES), ("test", SENTENCES[::-1])):
        lines = [json.dumps({"body": text * 4, "id": 1}) for text in texts]
        (data / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


def macko(*arguments: object, stdin: str | None = None, exit_code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    assert result.exit_code == exit_code, result.output
    return result


def macko_json(*arguments: object) -> dict[str, Any]:
    """What a command prints on stdout with --json: nothing but one JSON object."""
    result = macko(*arguments, "--json")
    for line in result.stderr.splitlines():
        assert PROGRESS_LINE.fullmatch(line), line
    content = json.loads(result.stdout)
    assert isinstance(content, dict)
    return content


def calibrated(*more: object) -> list[object]:
    return ["--calibration", "text.txt", "--nsamples", 4, "--seqlen", 24, *more]
