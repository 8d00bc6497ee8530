"""What a pruning job has done so far, written after each block, so that another process can go on."""

import hashlib
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from macko_llm import checkpoint
from macko_llm.checkpoint import CONFIG_FILE
from macko_llm.errors import CheckpointError, MackoWarning, UsageError
from macko_llm.stages import stage

JOURNAL_FILE = ".macko-journal.json"
NEW_JOURNAL_FILE = f"{JOURNAL_FILE}.new"
_SAMPLE_BYTES = 1024  # of each tensor, which tell a model from another of its shape


@dataclass(frozen=True)
class Job:
    """What decides the result of a pruning job.

    Attributes:
        recipe: its settings.
        output: "dense" or another kind of checkpoint.
        model: `fingerprint` of the source.
        calibration: hash of the tokens, None where there are none.
        versions: of the libraries, and the kind of device: with others, the result may differ in its last bits.
    """

    recipe: Mapping[str, Any]
    output: str
    model: str
    calibration: str | None
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Journal:
    """How far a job is.

    Attributes:
        job: what it is about.
        amounts: sparsity of each layer, where it took a pass over the model to find that out.
        blocks: how many are written.
        zeros: in each linear of these that was pruned.
        sink: state of the sink.
        seconds: that it took so far.
    """

    job: Job
    amounts: Mapping[str, float] | None = None
    blocks: int = 0
    zeros: Mapping[str, int] = field(default_factory=dict)
    sink: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @stage("writing")
    def write(self, folder: Path) -> None:
        """Replace the journal in `folder` by this one, at once or not at all."""
        new = folder / NEW_JOURNAL_FILE
        checkpoint.write_json(new, asdict(self))
        os.replace(new, folder / JOURNAL_FILE)  # noqa: PTH105


def read_journal(folder: Path, job: Job) -> Journal | None:
    """The journal in `folder`, None where there is none.

    Raises:
        UsageError: it is of another job.
        CheckpointError: it is damaged.
    """
    if not (folder / JOURNAL_FILE).is_file():
        return None
    try:
        content = checkpoint.read_json(folder / JOURNAL_FILE)
        journal = Journal(**{**content, "job": Job(**content["job"])})
        _check_kinds(journal)
    except (CheckpointError, KeyError, TypeError) as error:
        raise damaged(folder) from error
    _check_same(journal.job, job, folder)
    return journal


def damaged(folder: Path) -> CheckpointError:
    """The error for a journal that is none, or that does not fit what else is there."""
    return CheckpointError(f"The unfinished job in {folder} is damaged; drop --resume to begin again.")


def _check_kinds(journal: Journal) -> None:
    """Raise TypeError unless all values are of the kinds that `Journal.write` writes."""
    amounts = {} if journal.amounts is None else journal.amounts
    objects = (journal.job.recipe, journal.job.versions, amounts, journal.zeros, journal.sink)
    if (
        not all(isinstance(value, dict) for value in objects)
        or not all(type(value) is int for value in (journal.blocks, *journal.zeros.values()))
        or not all(type(value) in (int, float) for value in (journal.seconds, *amounts.values()))
        or journal.blocks < 0
    ):
        raise TypeError("a value of another kind")


def _check_same(old: Job, new: Job, folder: Path) -> None:
    change = None
    changed = [name for name in {**old.recipe, **new.recipe} if old.recipe.get(name) != new.recipe.get(name)]
    if old.output != new.output:  # which may be why the recipe's dtype is another
        change = f"to write a {old.output} checkpoint, not a {new.output} one"
    elif changed:
        change = f"with {changed[0]} = {old.recipe.get(changed[0])}, not {new.recipe.get(changed[0])}"
    elif old.model != new.model:
        change = "with another model"
    elif old.calibration != new.calibration:
        change = "with other calibration tokens"
    if change is not None:
        raise UsageError(
            f"The unfinished job in {folder} was begun {change}; give what it was begun with to go on, or drop --resume to "
            "begin again."
        )
    for name in {**old.versions, **new.versions}:
        if old.versions.get(name) != new.versions.get(name):
            warnings.warn(
                f"The job was begun with {name} {old.versions.get(name)} and goes on with {new.versions.get(name)}: the result "
                "may differ in its last bits from that of one run.",
                MackoWarning,
                stacklevel=2,
            )


def fingerprint(folder: Path, files: list[Path]) -> str:
    """SHA-256 (hex) of a checkpoint's config, the headers of its files, and the beginning of every tensor."""
    digest = hashlib.sha256((folder / CONFIG_FILE).read_bytes())
    for name, info in sorted(checkpoint.tensor_infos(files).items()):
        digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
        with info.file.open("rb") as stream:
            stream.seek(info.offset)
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
