"""The hook that registers the quantization method: whoever only looks for transformers' module must not disarm it.

The real modules run in processes of their own; what is about order and failure uses small modules in their place.
"""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import venv
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest
import torch
from families import save_model

from macko_llm import import_hook
from macko_llm.packing import pack_checkpoint
from macko_llm.pruning import prune_checkpoint
from macko_llm.recipe import PruneRecipe

PACKED_LAYERS = 14

STARTUP = Path(__file__).parents[1] / "build_backend" / "macko_llm.pth"

PROBE = """
import importlib.util, sys
import macko_llm
def probe():
    return importlib.util.find_spec("transformers.modeling_utils")
def packed_layers():
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    return sum(type(module).__name__ == "MackoLinear" for module in model.modules())
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_model(folder / "dense", "llama", torch.float16)
    prune_checkpoint(folder / "dense", folder / "pruned", PruneRecipe(method="magnitude"), device="cpu")
    pack_checkpoint(folder / "pruned", folder / "packed")
    return folder / "packed"


def _python(code: str, *arguments: object, probe: str = PROBE) -> list[str]:
    """The lines that a new process prints."""
    run = subprocess.run(
        [sys.executable, "-c", probe + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


# The real modules


@pytest.mark.parametrize(
    "before", ["probe()", "probe(), probe(), probe()", "probe(); importlib.reload(macko_llm); probe()"]
)
def test_a_model_loads_packed_after_any_number_of_probes(before: str, packed: Path) -> None:
    lines = _python(
        f"{before}\n"
        "print('macko_llm.transformers_integration' in sys.modules, 'transformers.modeling_utils' in sys.modules)\n"
        "print(packed_layers())\n",
        packed,
    )
    assert lines == ["False False", str(PACKED_LAYERS)]  # a probe runs nothing


def test_a_model_loads_packed_after_the_module_was_reloaded(packed: Path) -> None:
    lines = _python(
        "probe()\n"
        "import transformers.modeling_utils as module, inspect\n"
        "importlib.reload(module), importlib.reload(module)\n"
        "print(packed_layers())\n"
        "print(type(module.__loader__).__name__, type(module.__spec__.loader).__name__)\n"
        "print('class PreTrainedModel' in inspect.getsource(module))\n",
        packed,
    )
    assert lines == [str(PACKED_LAYERS), "SourceFileLoader SourceFileLoader", "True"]


def test_threads_that_probe_and_load_at_once_all_load_packed(packed: Path) -> None:
    lines = _python(
        "import threading, transformers\n"  # the package itself cannot be imported by several threads at once
        "def work():\n"
        "    probe()\n"
        "    counts.append(packed_layers())\n"
        "counts = []\n"
        "threads = [threading.Thread(target=work) for _ in range(4)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "print(*counts)\n",
        packed,
    )
    assert lines == [" ".join([str(PACKED_LAYERS)] * 4)]


def test_a_probes_loader_answers_other_tools_as_the_true_loader_does(packed: Path) -> None:
    lines = _python(
        "import copy, inspect\n"
        "spec = probe()\n"
        "loader, name, text = spec.loader, spec.name, open(spec.origin, encoding='utf-8').read()\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "print(loader.get_source(name) == text, inspect.getsource(module) == text)\n"
        "print(loader.get_code(name).co_filename == spec.origin == loader.get_filename(name) == loader.path)\n"
        "print(loader.is_package(name), loader.get_data(spec.origin).decode() == text)\n"
        "print('modeling_utils.py' in {f.name for f in loader.get_resource_reader(name).files().iterdir()})\n"
        "print(copy.copy(loader).path == spec.origin, hasattr(loader, 'no_such_attribute'))\n"
        "print(packed_layers())\n",
        packed,
    )
    assert lines == ["True True", "True", "False True", "True", "True False", str(PACKED_LAYERS)]


# Without `import macko_llm`


def test_plain_transformers_loads_packed_where_macko_is_installed(packed: Path) -> None:
    lines = _python(
        "import sys\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(sum(type(module).__name__ == 'MackoLinear' for module in model.modules()))\n",
        packed,
        probe="",
    )
    assert lines == [str(PACKED_LAYERS)], "install macko again with `make build`, which puts macko_llm.pth in place"


def _start(folder: Path, code: str = "") -> subprocess.CompletedProcess[str]:
    """A Python that begins with macko's line, and finds the package in `folder` alone."""
    start = f"import site, sys\nsys.path.insert(0, {str(folder)!r})\nsite.addsitedir({str(STARTUP.parent)!r})\n"
    # without PYTHONPATH, the packages of this environment, and its own such line
    command = [sys.executable, "-E", "-S", "-c", start + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=folder)


def test_every_python_begins_with_three_small_modules_and_none_of_others() -> None:
    run = _start(
        Path(import_hook.__file__).parents[1], "print(*sorted(name for name in sys.modules if 'macko' in name))"
    )
    assert (run.stdout.split(), run.stderr) == (["macko_llm", "macko_llm.import_hook", "macko_llm.version"], "")
    others = "print(*{name.partition('.')[0] for name in sys.modules} & {'typing', 'importlib', 'ctypes', 'json'})"
    assert _start(Path(import_hook.__file__).parents[1], others).stdout.split() == []


def test_python_in_the_folder_of_the_sources_takes_the_package_that_is_installed(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", symlinks=sys.platform != "win32")
    python = tmp_path / "venv" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    for folder in ("sources", "site"):
        (tmp_path / folder / "macko_llm").mkdir(parents=True)
        (tmp_path / folder / "macko_llm" / "__init__.py").write_text(f"place = {folder!r}")

    def taken() -> str:
        command = [str(python), "-c", "import macko_llm; print(macko_llm.place)"]
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path / "sources", env=clean)
        return run.stdout.strip()

    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site_packages = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
    shutil.copytree(tmp_path / "site" / "macko_llm", site_packages / "macko_llm")
    assert taken() == "sources"
    shutil.copy(STARTUP, site_packages)
    assert taken() == "site"


@pytest.mark.parametrize("left", [None, "", "import macko_llm.import_hook", "1 / 0", "not Python"])
def test_a_package_that_is_half_gone_leaves_python_silent(left: str | None, tmp_path: Path) -> None:
    (tmp_path / "macko_llm" / "lib").mkdir(parents=True)
    if left is not None:
        (tmp_path / "macko_llm" / "__init__.py").write_text(left)
    run = _start(tmp_path, "print('started')")
    assert (run.returncode, run.stdout, run.stderr) == (0, "started\n", "")


def test_no_package_at_all_leaves_python_silent(tmp_path: Path) -> None:
    run = _start(tmp_path, "print('started', 'macko_llm' in sys.modules)")
    assert (run.returncode, run.stdout, run.stderr) == (0, "started False\n", "")


# Small modules in their place


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A hook that waits for the module macko_test_trigger; the folder that holds it."""
    names = ("macko_test_trigger", "macko_test_integration")
    for name in names:
        (tmp_path / f"{name}.py").write_text("")
    monkeypatch.setattr(import_hook, "INTEGRATIONS", {names[0]: names[1]})
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    import_hook.register_with_transformers()
    yield tmp_path
    for name in names:
        sys.modules.pop(name, None)


def test_it_registers_when_the_module_has_run_and_not_before(small: Path) -> None:
    (small / "macko_test_trigger.py").write_text("import sys\nearly = 'macko_test_integration' in sys.modules\n")
    assert importlib.util.find_spec("macko_test_trigger") is not None
    assert "macko_test_integration" not in sys.modules
    trigger = importlib.import_module("macko_test_trigger")
    assert "macko_test_integration" in sys.modules
    assert not trigger.early
    assert type(trigger.__loader__) is type(trigger.__spec__.loader) is SourceFileLoader


def test_an_import_that_fails_leaves_the_hook_for_the_next(small: Path) -> None:
    source = small / "macko_test_trigger.py"
    source.write_text("raise ImportError('not yet')")
    with pytest.raises(ImportError, match="not yet"):
        importlib.import_module("macko_test_trigger")
    assert "macko_test_integration" not in sys.modules
    source.write_text("ready = True  # of another length, so that no cache takes it for the first")
    assert importlib.import_module("macko_test_trigger").ready
    assert "macko_test_integration" in sys.modules


def test_a_transformers_that_macko_does_not_suit_still_loads_and_a_warning_says_why(small: Path) -> None:
    (small / "macko_test_trigger.py").write_text("ready = True")
    (small / "macko_test_integration.py").write_text("raise ImportError('no register_quantizer')")
    with pytest.warns(
        UserWarning, match=r"packed models \(ImportError: no register_quantizer\), .*; update or uninstall"
    ):
        assert importlib.import_module("macko_test_trigger").ready


def test_a_module_that_cannot_be_found_is_an_ordinary_import_error(small: Path) -> None:
    (small / "macko_test_trigger.py").unlink()
    importlib.invalidate_caches()
    assert importlib.util.find_spec("macko_test_trigger") is None
    with pytest.raises(ModuleNotFoundError, match="macko_test_trigger"):
        importlib.import_module("macko_test_trigger")


@pytest.mark.usefixtures("small")
def test_another_hook_that_asks_all_finders_does_not_recurse() -> None:
    class Asking:
        """Asks everyone but itself, as a hook of this kind must; two of them must not ask each other for ever."""

        def find_spec(self, name: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
            found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
            return next((spec for spec in found if spec is not None), None)

    sys.meta_path.insert(0, Asking())
    for _ in range(2):
        assert importlib.util.find_spec("macko_test_trigger") is not None
    importlib.import_module("macko_test_trigger")
    assert "macko_test_integration" in sys.modules


def test_every_thread_that_has_imported_the_module_finds_it_registered(small: Path) -> None:
    (small / "macko_test_integration.py").write_text("import time\ntime.sleep(0.2)\ndone = True\n")
    done = []

    def work() -> None:
        importlib.util.find_spec("macko_test_trigger")
        importlib.import_module("macko_test_trigger")
        done.append(hasattr(sys.modules.get("macko_test_integration"), "done"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [True] * 4
