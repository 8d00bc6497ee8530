"""What several tests do to checkpoints, and how they read errors."""

import json
import logging as stdlib_logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging


def assert_plain(message: str) -> None:
    """An error for a user: one sentence on one line that says what is wrong and, after a semicolon, how to mend it."""
    assert "\n" not in message, message
    assert "Traceback" not in message, message
    assert message.endswith("."), message
    assert ";" in message, message


def copy_model(source: Path, target: Path, **config: Any) -> Path:
    """A copy of a checkpoint with other entries in its config.json; None takes an entry out."""
    shutil.copytree(source, target)
    edit_config(target, **config)
    return target


def edit_config(folder: Path, **changes: Any) -> None:
    """Set entries of config.json; None takes an entry out."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whatever its shards are called."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def edit_weights(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Replace tensors of an unsharded checkpoint; None takes one out."""
    tensors = weights(folder)
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """What the commands' environment does to a new process that imports transformers, for a process that has it already."""
    environment, verbosity = dict(os.environ), logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        os.environ.clear()
        os.environ.update(environment)


def read_own_tasks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's own thousands of tasks are not read, which takes seconds: only those of --include-path."""
    from macko_llm import evaluation

    monkeypatch.setattr(evaluation, "TaskManager", partial(evaluation.TaskManager, include_defaults=False))


@contextmanager
def library_warnings() -> Iterator[list[str]]:
    """Collects whatever is said inside through `warnings` or transformers' logger, even what was said once before."""
    said: list[str] = []
    listener = stdlib_logging.Handler(stdlib_logging.WARNING)
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    stdlib_logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    verbosity = logging.get_verbosity()
    logging.set_verbosity_warning()
    logging.add_handler(listener)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield said
        said += [str(warning.message) for warning in caught]
    finally:
        logging.remove_handler(listener)
        logging.set_verbosity(verbosity)


def truncate(file: Path, count: int = 100) -> None:
    """Cut the last bytes off a file."""
    file.write_bytes(file.read_bytes()[:-count])
