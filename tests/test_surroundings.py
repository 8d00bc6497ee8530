"""Options that concern no command by itself: revisions and caches of hub ids, tokens, CPU threads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from families import save_model
from helpers import assert_plain, edit_config
from typer.testing import CliRunner

import macko_llm
from macko_llm import checkpoint
from macko_llm.cli import surroundings
from macko_llm.cli.main import app
from macko_llm.errors import CheckpointError, UsageError
from macko_llm.packing import pack_checkpoint


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of downloads as the hub's own tools lay it out, with two revisions of a packed model; and no network."""
    cache = tmp_path / "cache"
    repository = cache / "models--owner--name"
    for number, revision in enumerate(("main", "old")):
        commit = str(number) * 40
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        snapshot = repository / "snapshots" / commit
        dense = save_model(tmp_path / f"dense-{revision}", "llama")
        pack_checkpoint(dense, snapshot)
        edit_config(snapshot, note=revision)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    return cache


def test_a_revision_and_a_cache_choose_the_model(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = ["inspect", "owner/name", "--cache-dir", str(hub), "--json"]
    for revision, options in (("main", []), ("old", ["--revision", "old"]), ("old", ["--revision", "1" * 40])):
        seen: list[str] = []
        read = checkpoint.read_provenance

        def spy(folder: Path, seen: list[str] = seen, read=read) -> dict:  # type: ignore[type-arg, no-untyped-def]
            seen.append(checkpoint.read_config(folder)["note"])
            return read(folder)

        monkeypatch.setattr(checkpoint, "read_provenance", spy)
        result = CliRunner().invoke(app, [*call, *options])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["valid"]
        assert set(seen) == {revision}
        monkeypatch.setattr(checkpoint, "read_provenance", read)
    assert "HF_HUB_CACHE" not in os.environ
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    assert macko_llm.load("owner/name@old", device="cpu").config.note == "old"
    assert macko_llm.load("owner/name", device="cpu").config.note == "main"


def test_what_the_hub_has_not_is_said_plainly(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    with pytest.raises(CheckpointError, match="owner/name@absent, and the hub did not give") as caught:
        checkpoint.locate("owner/name@absent")
    assert_plain(str(caught.value))
    with pytest.raises(UsageError, match="is a folder, which has no revision old") as refused:
        checkpoint.locate(f"{tmp_path / 'dense-main'}@old")
    assert_plain(str(refused.value))
    result = CliRunner().invoke(app, ["pack", str(tmp_path / "dense-main"), "-o", "out", "--revision", "old"])
    assert (result.exit_code, "has no revision old" in result.stderr) == (2, True)


def test_a_token_is_what_the_hub_is_asked_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "of the environment")

    @surroundings.with_hub
    def command(model: str) -> tuple[str, str | None]:
        return model, huggingface_hub.get_token()

    assert command(model="owner/name") == ("owner/name", "of the environment")
    assert command(model="owner/name", token="of the call", revision="main") == ("owner/name@main", "of the call")
    assert huggingface_hub.get_token() == "of the environment"


PRINT_THREADS = """
import os, sys
from macko_llm.cli.surroundings import with_threads

@with_threads
def command():
    import torch
    print(torch.get_num_threads(), os.environ["OMP_WAIT_POLICY"])

command(**eval(sys.argv[1]))
"""


@pytest.mark.parametrize(
    ("options", "environment", "printed"),
    [
        ("{'threads': 1}", {}, "1 passive"),
        ("{'threads': 1}", {"OMP_NUM_THREADS": "2"}, "1 passive"),
        ("{}", {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "active"}, "1 active"),
        ("{}", {}, f"{surroundings.usable_cpus()} passive"),
    ],
)
def test_how_many_threads_work_and_how_they_wait(options: str, environment: dict[str, str], printed: str) -> None:
    settings = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    call = [sys.executable, "-c", PRINT_THREADS, options]
    said = subprocess.run(call, env={**settings, **environment}, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == printed


@pytest.mark.parametrize(
    ("limit", "cpus"), [("150000 100000", 2), ("400000 100000", 4), ("1000 100000", 1), ("max 100000", 8), (None, 8)]
)
def test_a_container_s_limit_counts(
    limit: str | None, cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(surroundings, "_CPU_LIMIT", tmp_path / "cpu.max")
    if limit is not None:
        (tmp_path / "cpu.max").write_text(f"{limit}\n")
    assert surroundings.usable_cpus() == cpus


def test_no_threads_are_refused() -> None:
    result = CliRunner().invoke(app, ["inspect", "packed", "--threads", "0"])
    assert result.exit_code == 2
    assert "use --threads 1 or more" in result.stderr
