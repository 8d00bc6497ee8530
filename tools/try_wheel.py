"""Try a wheel as whoever is given it would: in a new environment and another folder. `make wheel` runs it.

The new environment borrows torch and the other dependencies from the Python that is named, which saves gigabytes; all of macko
comes from the wheel. In other Pythons of this machine, for which nothing can be borrowed, the library is only loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PROMPT = "Once upon a time"
DEPENDENCIES = (
    "import importlib.util, pathlib; print(pathlib.Path(importlib.util.find_spec('torch').origin).parents[1])"
)
VERSION = "import sys; print('%d.%d' % sys.version_info[:2])"
PURE = "import sysconfig; print(sysconfig.get_path('purelib'))"
LOAD = """
import ctypes, pathlib, macko_llm
library = ctypes.CDLL(str(pathlib.Path(macko_llm.__file__).parent / "lib" / "libmacko.so"))
print("interface", library.macko_abi_version(), "with" if hasattr(library, "macko_cuda_pack") else "without", "CUDA kernels")
"""
SAME_WEIGHTS = """
from pathlib import Path
from safetensors.torch import load_file
first, second = ({name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}
                 for folder in ("pruned", "unpacked"))
assert first.keys() == second.keys() and first
assert all(first[name].equal(second[name]) for name in first)
print(f"all {len(first)} tensors of the pruned model came back from the packed one")
"""


def main() -> None:
    """Try the wheel that the command line names; ends with an exception where it does not do what it should."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("python", nargs="?", default=sys.executable, help="has the dependencies; default: this one")
    arguments = parser.parse_args()
    wheel = arguments.wheel.resolve()
    print(f"== {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
    subprocess.run([sys.executable, "-m", "auditwheel", "show", wheel], check=True)
    with tempfile.TemporaryDirectory() as folder:
        try_all(wheel, arguments.python, Path(folder))
        for python in other_pythons(ask(arguments.python, VERSION)):
            print(f"== the library alone in Python {ask(python, VERSION)}: {python}", flush=True)
            environment = install(wheel, python, Path(folder))
            print(ask(environment, LOAD))


def try_all(wheel: Path, python: str, folder: Path) -> None:
    """Prune, pack, unpack and generate with what the wheel holds."""
    print(f"== the main chain in Python {ask(python, VERSION)}, with the dependencies of {python}", flush=True)
    environment = install(wheel, python, folder)
    site_packages = Path(ask(environment, PURE))
    (site_packages / "borrowed.pth").write_text(ask(python, DEPENDENCIES) + "\n")
    facts = json.loads(macko(environment, folder, "doctor", "--json"))
    library = Path(facts["native_library"])
    assert library.is_relative_to(site_packages), f"{library} is not of the wheel"
    with zipfile.ZipFile(wheel) as content:
        assert library.read_bytes() == content.read("macko_llm/lib/libmacko.so")
    assert "cuda" in facts["kernels"] or os.environ.get("MACKO_CUDA") != "on", "the library has no CUDA kernels"
    print(macko(environment, folder, "doctor"), flush=True)
    model = site_packages / "macko_llm" / "demo" / "model"
    macko(environment, folder, "prune", str(model), "-o", "pruned", "--method", "magnitude")
    macko(environment, folder, "pack", "pruned", "-o", "packed")
    macko(environment, folder, "unpack", "packed", "-o", "unpacked")
    print(ask(environment, SAME_WEIGHTS, folder))
    story = macko(environment, folder, "generate", "packed", "-p", PROMPT, "--max-new-tokens", "12")
    assert len(story.strip()) > len(PROMPT), story
    print(story, flush=True)


def install(wheel: Path, python: str, folder: Path) -> str:
    """The Python of a new environment that holds the wheel and nothing else."""
    environment = folder / f"python{ask(python, VERSION)}"
    subprocess.run([python, "-m", "venv", "--without-pip", environment], check=True, env=clean())
    installed = str(environment / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", installed, "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True, env=clean())
    return installed


def other_pythons(tried: str) -> list[str]:
    """A Python of each version that macko supports, but for one, as far as pyenv or PATH has it."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    places = os.pathsep.join([*map(str, pyenv.glob("versions/*/bin")), os.environ["PATH"]])  # not pyenv's shims
    versions = [f"3.{minor}" for minor in range(10, 15)]
    found = [shutil.which(f"python{version}", path=places) for version in versions if version != tried]
    return [python for python in found if python is not None]


def macko(python: str, folder: Path, *arguments: str) -> str:
    """What a command of the environment's macko prints."""
    return output_of([str(Path(python).with_name("macko")), *arguments], folder)


def ask(python: str, program: str, folder: Path | None = None) -> str:
    """What a Python program prints."""
    return output_of([python, "-c", program], folder).strip()


def output_of(command: list[str], folder: Path | None) -> str:
    """What a command prints that ends well."""
    return subprocess.run(command, cwd=folder, env=clean(), check=True, stdout=subprocess.PIPE, text=True).stdout


def clean() -> dict[str, str]:
    """The environment variables, without those that would lead Python to other packages."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


if __name__ == "__main__":
    main()
