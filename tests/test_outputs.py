"""Output folders: results that appear whole, and nothing of a user's that is lost for them."""

import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import assert_plain
from transformers import GenerationConfig

from macko_llm import checkpoint, outputs
from macko_llm.errors import CheckpointError, UsageError


def _model_folder(path: Path, content: str = "{}") -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(content)
    return path


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _write(target: Path, content: str, error: BaseException | None = None, *, overwrite: bool = False) -> None:
    """Write a new folder, up to an error if there is one."""
    with outputs.new_folder(target, overwrite=overwrite) as partial:
        (partial / "config.json").write_text(content)
        (partial / "model.safetensors").write_text("weights " + content)
        if error is not None:
            raise error


def _written(content: str) -> dict[str, bytes]:
    return {"config.json": content.encode(), "model.safetensors": f"weights {content}".encode()}


# new_folder


def test_a_new_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with outputs.new_folder(target) as partial:
        (partial / "config.json").write_text("{}")
        (partial / "config.json").chmod(0o600)  # as safetensors makes its files
        assert not target.exists()
        assert partial.parent == target.parent
    assert _files(tmp_path) == {"deep/out/config.json": b"{}"}
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").touch()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (target / "config.json").stat().st_mode == (tmp_path / "plain" / "file").stat().st_mode


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt(), SystemExit()])
@pytest.mark.parametrize("there", [False, True])
def test_a_failed_job_leaves_nothing(error: BaseException, there: bool, tmp_path: Path) -> None:
    if there:
        (tmp_path / "out").mkdir()
    with pytest.raises(type(error)):
        _write(tmp_path / "out", "{}", error)
    assert [path.name for path in tmp_path.rglob("*")] == (["out"] if there else [])


def test_a_failed_job_keeps_the_model_that_was_there(tmp_path: Path) -> None:
    target = _model_folder(tmp_path / "out", "old")
    with pytest.raises(KeyboardInterrupt):
        _write(target, "new", KeyboardInterrupt(), overwrite=True)
    assert _files(tmp_path) == {"out/config.json": b"old"}


def test_overwrite_replaces_the_whole_model(tmp_path: Path) -> None:
    target = _model_folder(tmp_path / "out", "old")
    (target / "model-00001-of-00002.safetensors").touch()
    _write(target, "new", overwrite=True)
    assert _files(target) == _written("new")


def test_folders_that_are_there_are_filled_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link, the current folder, and one that cannot be renamed, as a container's volume cannot."""
    real = tmp_path / "disk" / "real"
    real.mkdir(parents=True)
    (tmp_path / "link").symlink_to(real)
    rename = Path.rename

    def refuse_mount_point(self: Path, other: Path) -> Path:
        if real in (self.resolve(), Path(other).resolve()):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(self))
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", refuse_mount_point)
    monkeypatch.setattr(Path, "replace", refuse_mount_point)
    _write(tmp_path / "link", "through a link")
    assert _files(real) == _written("through a link")
    assert (tmp_path / "link").is_symlink()
    monkeypatch.chdir(real)
    _write(Path(), "in place", overwrite=True)
    assert _files(real) == _files(Path()) == _written("in place")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "config.json",
        "disk",
        "link",
        "model.safetensors",
        "real",
    ]


@pytest.mark.parametrize("fails", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("into", [outputs._REPLACED, "out"])
def test_an_interrupt_while_files_are_moved_keeps_the_old_model(
    fails: str, into: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    _write(target, "old")
    rename = Path.rename
    hits = []

    def interrupted(self: Path, other: Path) -> Path:
        if not hits and self.name == fails and Path(other).parent.name == into:
            hits.append(self)
            raise KeyboardInterrupt
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _write(target, "new", overwrite=True)
    assert hits
    assert _files(tmp_path) == {f"out/{name}": content for name, content in _written("old").items()}


@pytest.mark.parametrize("moves", range(6))
def test_the_next_job_ends_what_a_kill_cut_off_between_two_files(moves: int, tmp_path: Path) -> None:
    """Killed after some of the moves, without any chance to clean up; then a job that fails, which must cost nothing."""
    target = tmp_path / "out"
    _write(target, "old")

    def killed() -> None:
        rename, left = Path.rename, [moves]

        def counted(self: Path, other: Path) -> Path:
            if not left[0]:
                os._exit(9)
            left[0] -= 1
            return rename(self, other)

        Path.rename = counted  # type: ignore[method-assign]
        _write(target, "new", overwrite=True)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    with pytest.raises(ValueError, match="fails"):
        _write(target, "later", ValueError("fails"), overwrite=True)
    assert _files(tmp_path) in [
        {f"out/{name}": content for name, content in _written(which).items()} for which in ("old", "new")
    ]
    _write(target, "latest", overwrite=True)
    assert _files(target) == _written("latest")


def _overtaken(target: Path, name: str, *, overwrite: bool = False) -> None:
    """Write a new folder, while somebody else puts a file there."""
    with outputs.new_folder(target, overwrite=overwrite) as partial:
        (partial / "config.json").write_text("mine")
        (partial / "LICENSE").write_text("mine")
        target.mkdir(exist_ok=True)
        (target / name).write_text("theirs")


def test_what_appears_meanwhile_stays(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        _overtaken(tmp_path / "out", "config.json")
    assert_plain(str(caught.value))
    assert f"the result is in {tmp_path / 'out-2'}" in str(caught.value)
    mine = {"config.json": b"mine", "LICENSE": b"mine"}
    assert _files(tmp_path / "out") == {"config.json": b"theirs"}
    assert _files(tmp_path / "out-2") == mine

    empty = tmp_path / "empty"
    empty.mkdir()
    _overtaken(empty, "thesis.tex")
    assert _files(empty) == {**mine, "thesis.tex": b"theirs"}
    model = _model_folder(tmp_path / "model")
    with pytest.raises(CheckpointError, match="model-2"):
        _overtaken(model, "LICENSE", overwrite=True)
    assert _files(model) == {"config.json": b"{}", "LICENSE": b"theirs"} | {
        f"model-2/{name}": content for name, content in mine.items()
    }


@pytest.mark.parametrize("there", [False, True])
def test_of_two_jobs_with_one_target_the_second_fails_at_its_start(there: bool, tmp_path: Path) -> None:
    target = tmp_path / "out"
    if there:
        target.mkdir()
    with outputs.new_folder(target) as partial:
        (partial / "config.json").write_text("first")
        began = False
        with pytest.raises(UsageError, match="Another job is writing") as caught, outputs.new_folder(target):
            began = True
        assert_plain(str(caught.value))
        assert not began
        with outputs.new_folder(tmp_path / "other") as other:
            (other / "config.json").write_text("of another target")
    assert _files(tmp_path) == {"out/config.json": b"first", "other/config.json": b"of another target"}


@pytest.mark.parametrize("there", [False, True])
def test_the_next_job_removes_what_a_killed_one_left(there: bool, tmp_path: Path) -> None:
    target = tmp_path / "out"
    if there:
        target.mkdir()
    script = (
        "import pathlib, sys, time\nfrom macko_llm import outputs\n"
        "with outputs.new_folder(pathlib.Path(sys.argv[1])) as partial:\n"
        "    (partial / 'half').write_text('half')\n    (partial / 'deep').mkdir()\n    print('ready', flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(UsageError, match="Another job is writing"):
            _write(target, "too early")
        process.send_signal(signal.SIGKILL)
    assert any(name.endswith("half") for name in _files(tmp_path))
    _write(target, "new")
    assert _files(tmp_path) == {f"out/{name}": content for name, content in _written("new").items()}


def test_a_full_disk_and_a_damaged_library_call_are_plain_errors(tmp_path: Path) -> None:
    def too_large() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            with outputs.new_folder(tmp_path / "out") as partial:
                (partial / "model.safetensors").write_bytes(bytes(10_000))
        except CheckpointError as error:
            os._exit(0 if "free some space" in str(error) else 1)
        os._exit(2)

    process = multiprocessing.get_context("fork").Process(target=too_large)
    process.start()
    process.join()
    assert process.exitcode == 0
    for error in (OSError(errno.ENOSPC, "No space left on device"),):
        with pytest.raises(CheckpointError, match="free some space") as caught:
            _write(tmp_path / "out", "{}", error)
        assert_plain(str(caught.value))
    assert _files(tmp_path) == {}


def test_an_error_in_reading_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), outputs.new_folder(tmp_path / "out"):
        (tmp_path / "input").read_text()


# check_output


def test_outputs_that_would_cost_data_are_refused(tmp_path: Path) -> None:
    source = _model_folder(tmp_path / "models" / "dense")
    other = _model_folder(tmp_path / "models" / "other")
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "thesis.tex").touch()
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    project = _model_folder(tmp_path / "project")
    (project / "thesis.tex").touch()
    nested = _model_folder(tmp_path / "nested")
    (nested / "checkpoint-500").mkdir()
    cases = {
        "is a file": (file, True),
        "is not empty": (other, False),
        "is not a model folder": (notes, True),
        "holds the input model": (source, True),
        "holds the input": (source.parent, True),
        "models/../models/dense holds": (source.parent / ".." / "models" / "dense", True),
        "holds thesis.tex, which neither macko nor transformers wrote": (project, True),
        "holds checkpoint-500, which neither": (nested, True),
        "because .*file is a file": (file / "deep" / "out", True),
        "is a link to nothing": (tmp_path / "dangling", True),
    }
    before = _files(tmp_path)
    for words, (target, overwrite) in cases.items():
        with pytest.raises(UsageError, match=words) as caught:
            outputs.check_output(target, overwrite=overwrite, source=source)
        assert_plain(str(caught.value))
        with pytest.raises(UsageError), outputs.new_folder(target, overwrite=overwrite and "input" not in words):
            raise UsageError("only the input is not looked for here")
    assert _files(tmp_path) == before
    outputs.check_output(other, overwrite=True, source=source)
    outputs.check_output(source / "packed", overwrite=False, source=source)
    outputs.check_output(tmp_path / "new", overwrite=False, source=source)


def test_a_link_to_the_input_is_the_input(tmp_path: Path) -> None:
    source = _model_folder(tmp_path / "dense")
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(UsageError, match="holds the input model"):
        outputs.check_output(tmp_path / "link", overwrite=True, source=source)


def test_what_a_job_wrote_may_be_replaced_and_nothing_else(tmp_path: Path) -> None:
    """macko.json lists what came with a model: a licence, code of its own; what a user added is not in the list."""
    target = tmp_path / "out"
    with outputs.new_folder(target) as partial:
        (partial / "config.json").write_text("{}")
        checkpoint.write_provenance(partial, {"prune": {"method": "wanda"}})
        for name in ("USE_POLICY.md", "modeling_own.py", "README.md"):
            (partial / name).touch()
    assert checkpoint.read_provenance(target)["prune"] == {"method": "wanda"}
    outputs.check_output(target, overwrite=True)
    (target / "results.csv").touch()
    with pytest.raises(UsageError, match=r"holds results\.csv"):
        outputs.check_output(target, overwrite=True)
    (target / "results.csv").unlink()
    _write(target, "new", overwrite=True)
    assert _files(target) == _written("new")


def test_whatever_transformers_writes_may_be_replaced(tmp_path: Path) -> None:
    from families import make_tokenizer, save_model

    folder = save_model(tmp_path / "model", "llama")
    GenerationConfig().save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)
    outputs.check_output(folder, overwrite=True)


# several_outputs


def test_only_the_outputs_of_an_earlier_run_are_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    for content in ("first", "second"):
        with outputs.several_outputs(folder, ["dense", "text"]):
            (folder / "text").write_text(content)
            (folder / "unrelated").write_text("a user's own")
    with outputs.several_outputs(folder, ["packed"]):
        (folder / "packed").touch()
    with outputs.several_outputs(folder, ["dense", "packed", "text"]):
        pass
    with (
        pytest.raises(UsageError, match="holds unrelated, which this command did not write") as caught,
        outputs.several_outputs(folder, ["dense", "unrelated"]),
    ):
        raise AssertionError
    assert_plain(str(caught.value))
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"), outputs.several_outputs(tmp_path / "file", ["text"]):
        raise AssertionError
    with (
        outputs.several_outputs(folder, ["dense"]),
        pytest.raises(UsageError, match="Another job"),
        outputs.several_outputs(folder, ["text"]),
    ):
        raise AssertionError
    assert set(_files(folder)) == {outputs.LIST_FILE, "packed", "text", "unrelated"}
