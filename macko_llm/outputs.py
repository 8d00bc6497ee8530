"""Output folders: what may be written over, and results that appear when they are complete.

A job writes to a folder of its own, PARTIAL, which no other job can have at the same time. A target that does not exist yet
takes that folder by a rename. Into a target that exists (an empty folder, the current one, a link, a mount point, a model to
replace) the files are moved one by one, config.json last, so that what is half moved is no model.
"""

import errno
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from safetensors import SafetensorError

from macko_llm.checkpoint import CONFIG_FILE, PROVENANCE_FILE, read_json, read_provenance, write_json
from macko_llm.errors import CheckpointError, UsageError

if sys.platform != "win32":
    import fcntl

LIST_FILE = ".macko-outputs.json"
"""In a folder of several outputs: what has been written there, and may be replaced."""
FILES = "files"
"""In macko.json: the files of the folder."""

_PARTIAL = ".macko-partial"
_REPLACED = ".macko-replaced"
_OURS = (_PARTIAL, _REPLACED)
# What save_pretrained of models, tokenizers and processors writes.
_TRANSFORMERS_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "model-?????-of-?????.safetensors",
    "model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json", "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
_NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC)}
_SECONDS_TO_TAKE_OVER = 1.0


def check_output(target: Path, *, overwrite: bool, source: Path | None = None) -> None:
    """Refuse an output folder that would cost the user data, or cannot be written; called before any long work.

    Args:
        target: the folder to write.
        overwrite: it may hold a model, of which every file was written by macko (macko.json lists them) or transformers.
        source: the input, which is never written over.

    Raises:
        UsageError: it holds something else, or anything at all without `overwrite`, or the source, or it is no folder.
    """
    if target.exists() and not target.is_dir():
        raise UsageError(f"The output {target} is a file; choose another folder with -o.")
    if target.is_symlink() and not target.exists():
        raise UsageError(f"The output {target} is a link to nothing; choose another folder with -o.")
    if source is not None and target.exists():
        inner, outer = source.resolve(), target.resolve()
        if inner == outer or outer in inner.parents:
            raise UsageError(f"The output {target} holds the input model {source}; choose another folder with -o.")
    # After a job that was killed while it moved its files, the next one first brings that to an end.
    if target.is_dir() and not (target / _REPLACED).is_dir() and (present := _content(target)):
        if not overwrite:
            raise UsageError(f"The output folder {target} is not empty; choose another or add --overwrite.")
        if not (target / CONFIG_FILE).is_file():
            raise UsageError(
                f"The output folder {target} is not a model folder, so it is kept; choose another with -o."
            )
        foreign = sorted(set(present) - replaceable(target))
        if foreign:
            raise UsageError(
                f"The output folder {target} holds {foreign[0]}, which neither macko nor transformers wrote, so it is kept; "
                "move that elsewhere, or choose another folder with -o."
            )
    _check_writable(target)


def _never(_error: BaseException, _folder: Path) -> bool:
    return False


@contextmanager
def new_folder(
    target: Path,
    *,
    overwrite: bool = False,
    fresh: bool = True,
    journal: str | None = None,
    keep: Callable[[BaseException, Path], bool] = _never,
) -> Iterator[Path]:
    """A folder to write to, whose files are in `target` when the block ends without an error.

    An interrupted job leaves `target` as it was; one that was killed leaves its folder behind, and the next job with the same
    target removes what is in there.

    Args:
        target: the folder to write.
        overwrite: it may hold a model.
        fresh: False leaves what an earlier job with the same target left behind, if its journal is there.
        journal: a file that a job keeps in its folder until it is done; it never comes into the target.
        keep: (what ends the job, its folder) -> whether the folder is left behind.

    Raises:
        UsageError: see `check_output`; or another job is writing there.
        CheckpointError: the disk is full or not writable.
    """
    target = Path(target)
    check_output(target, overwrite=overwrite)
    inside = target.is_dir()
    partial = target / _PARTIAL if inside else target.parent / f"{_PARTIAL}-{target.name}"
    with _claimed(partial, target, keep), _write_errors(target, partial):
        if (target / _REPLACED).is_dir():
            _recover(partial, target)
            check_output(target, overwrite=overwrite)
        if fresh or journal is None or not (partial / journal).is_file():
            empty(partial)
        yield partial
        _list_files(partial, journal)
        _open_to_readers(partial)
        if journal is not None:  # not sooner: with it goes what the job could go on from
            (partial / journal).unlink(missing_ok=True)
        if not inside:
            _rename(partial, target)
            return
        old = replaceable(target) if overwrite else set()
        if any((target / path.name).exists() and path.name not in old for path in partial.iterdir()):
            raise _appeared(partial, target)
        _move_in(partial, target, old)


@contextmanager
def several_outputs(folder: Path, names: Iterable[str]) -> Iterator[None]:
    """Claim names in a folder for the outputs of a job; what an earlier job with the same names wrote may be replaced.

    Raises:
        UsageError: something of such a name lies there that no such job wrote, or the folder cannot be written.
        CheckpointError: the disk is full or not writable.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"The output {folder} is a file; choose another folder with -o.")
    _check_writable(folder)
    file = folder / LIST_FILE
    known = set(read_json(file).get(FILES, ())) if file.is_file() else set()
    foreign = [name for name in names if name not in known and (folder / name).exists()]
    if foreign:
        raise UsageError(
            f"The output folder {folder} holds {foreign[0]}, which this command did not write, so it is kept; "
            "choose another folder with -o."
        )
    with _claimed(folder / _PARTIAL, folder), _write_errors(folder, folder):
        write_json(file, {FILES: sorted(known | set(names))})
        yield


def _content(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name not in _OURS]


def replaceable(folder: Path) -> set[str]:
    """The files of a folder that macko or transformers wrote, by name."""
    listed = read_provenance(folder).get(FILES)
    known = set(listed) if isinstance(listed, list) else {PROVENANCE_FILE}
    return {
        path.name
        for path in folder.iterdir()
        if path.is_file() and (path.name in known or any(fnmatchcase(path.name, name) for name in _TRANSFORMERS_FILES))
    }


def _check_writable(target: Path) -> None:
    place = target if target.is_dir() else target.absolute().parent
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UsageError(
            f"The output {target} cannot be made, because {place} is a file; choose another folder with -o."
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"The output {target} cannot be written: {place} is read-only; choose another folder with -o.")


@contextmanager
def _claimed(partial: Path, target: Path, keep: Callable[[BaseException, Path], bool] = _never) -> Iterator[None]:
    """Have the folder `partial` for a job alone, made anew or taken over from a job that is gone, and remove it at the end."""
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        lock = _claim(partial, target)
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written ({error.strerror}); choose another folder with -o."
        ) from error
    kept = False
    try:
        yield
    except BaseException as error:
        kept = keep(error, partial)
        raise
    finally:
        if not kept:
            shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _claim(partial: Path, target: Path) -> int | None:
    """A lock on the folder, which ends with its process, however that ends; None where the system has no such locks."""
    until = time.monotonic() + _SECONDS_TO_TAKE_OVER
    while time.monotonic() < until:
        made = True
        try:
            partial.mkdir()
        except FileExistsError:
            made = False
        if sys.platform == "win32":
            if made:
                return None
            break
        with suppress(FileNotFoundError):  # the job that had it has ended in between
            lock = os.open(partial, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                same = os.path.samestat(os.fstat(lock), partial.stat())
            except OSError as error:
                os.close(lock)
                if isinstance(error, BlockingIOError):
                    break
                if made and not isinstance(error, FileNotFoundError):  # a file system without locks
                    return None
                raise
            if same:
                return lock
            os.close(lock)
    raise _busy(target, partial)


def _busy(target: Path, partial: Path) -> UsageError:
    return UsageError(
        f"Another job is writing {target}; wait for it, or choose another folder with -o (its work is in {partial})."
    )


def empty(folder: Path) -> None:
    """Remove all that is in a folder."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _list_files(folder: Path, journal: str | None) -> None:
    """Name the folder's files in its macko.json, if it has one, so that all of it may be replaced one day."""
    if (folder / PROVENANCE_FILE).is_file():
        names = sorted(path.name for path in folder.iterdir() if path.name != journal)
        record = read_provenance(folder)
        record.pop(FILES, None)  # of the folder that this one was made of; the list comes last
        write_json(folder / PROVENANCE_FILE, {**record, FILES: names})


def _rename(partial: Path, target: Path) -> None:
    """Give the finished folder its name; what has come to have that name meanwhile stays."""
    try:
        if target.exists() or target.is_symlink():
            raise FileExistsError(errno.EEXIST, "something appeared there meanwhile", str(target))
        partial.rename(target)
    except FileExistsError as error:
        raise _appeared(partial, target) from error
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise _appeared(partial, target) from error
        raise


def _appeared(partial: Path, target: Path) -> CheckpointError:
    """The error for a target that is taken; the finished work is kept beside it, or in it where it was there all along."""
    numbers = (partial.with_name(f"{target.name or 'result'}-{number}") for number in range(2, 10_000))
    kept = next(path for path in numbers if not path.exists())
    partial.rename(kept)
    return CheckpointError(f"What came into {target} while the job ran is kept; the result is in {kept}.")


def _move_in(partial: Path, target: Path, old: set[str]) -> None:
    """Put the files of a finished folder in place of a model's `old` ones, or bring to its end what was cut off here."""
    replaced = target / _REPLACED
    new = sorted((path.name for path in partial.iterdir()), key=lambda name: name == CONFIG_FILE)
    try:
        if not replaced.exists():
            replaced.mkdir()
            for name in sorted(old, key=lambda name: name != CONFIG_FILE):
                (target / name).rename(replaced / name)
        for name in new:
            (partial / name).rename(target / name)
    except BaseException:  # an interrupt must not cost the user the model that was there
        for name in new:
            if not (partial / name).exists():
                (target / name).rename(partial / name)
        if replaced.exists():
            _restore(replaced, target)
        raise
    shutil.rmtree(replaced)


def _recover(partial: Path, target: Path) -> None:
    """Bring a model into order whose replacement was cut off between two files."""
    if any((folder / CONFIG_FILE).is_file() for folder in (partial, target)):
        _move_in(partial, target, set())
        return
    _restore(target / _REPLACED, target)  # the new files are gone


def _restore(replaced: Path, target: Path) -> None:
    for path in replaced.iterdir():
        path.rename(target / path.name)
    replaced.rmdir()


def _open_to_readers(folder: Path) -> None:
    """Give the permissions that new files get: some libraries make theirs for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


@contextmanager
def _write_errors(target: Path, partial: Path) -> Iterator[None]:
    """Says plainly what keeps files from being written."""
    try:
        yield
    except SafetensorError as error:  # whoever reads a file has its own word for its damage
        raise CheckpointError(
            f"{target} could not be written ({error}); free some space or choose another disk."
        ) from error
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise CheckpointError(
                f"{target} could not be written ({error.strerror}); free some space or choose another disk."
            ) from error
        file = Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else None
        if file is not None and (file == partial or partial in file.parents):
            raise CheckpointError(
                f"{target} cannot be written ({error.strerror}); choose another folder with -o."
            ) from error
        raise
