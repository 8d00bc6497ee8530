"""What systems without POSIX and compilers other than gcc and clang lack, and macko does without."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from families import save_model

from macko_llm import generation

CSRC = Path(__file__).parents[1] / "csrc"
WITHOUT_POSIX = """
import builtins, pathlib, sys
import_module = builtins.__import__
def windows(name, globals=None, *rest, **named):  # for macko alone: on POSIX other packages rely on what they find there
    if name == "resource" and (globals or {}).get("__name__", "").startswith("macko_llm"):
        raise ModuleNotFoundError("No module named 'resource'")
    return import_module(name, globals, *rest, **named)
builtins.__import__ = windows
exists = pathlib.Path.exists
pathlib.Path.exists = lambda path, **options: not path.as_posix().startswith("/proc") and exists(path, **options)
from macko_llm.__main__ import main
sys.argv = ["macko", "generate", *sys.argv[1:], "--prompt", "The fox", "--max-new-tokens", "3", "--device", "cpu"]
main()
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama") / "dense", "llama")


def test_generates_where_python_has_no_resource_module_and_leaves_the_memory_out(llama: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_POSIX, str(llama)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert re.search(r"decode: \d+ tokens, .*$", run.stderr)
    assert "memory" not in run.stderr


def test_without_proc_the_system_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(generation, "Path", lambda _: tmp_path / "absent")
    peak = generation._peak_resident_bytes()
    assert peak is not None
    unit = 1 if sys.platform == "darwin" else 1024
    assert 0 < peak <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@pytest.mark.parametrize("file", sorted([*CSRC.glob("*.h"), *(CSRC / "cpu").iterdir()]), ids=lambda file: file.name)
def test_code_for_the_cpu_uses_no_builtin_of_one_compiler(file: Path) -> None:
    assert re.findall(r"__(?:atomic|sync|builtin)_\w+", file.read_text(encoding="utf-8")) == []
