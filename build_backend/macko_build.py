"""The build backend: scikit-build-core, and before it the decision whether the library gets CUDA kernels.

`MACKO_CUDA` in the environment decides: `auto` (the default) compiles them wherever an nvcc is to be had, `on` fails without
one, `off` builds for the CPU alone. Where the machine has no nvcc, a Linux build fetches NVIDIA's compiler wheels into its
isolated environment; nothing of them is left after the build, because the CUDA runtime is linked statically.

On Linux, auditwheel then names the wheel for the oldest systems that the library runs on.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import scikit_build_core
from scikit_build_core import build as scikit
from scikit_build_core.build import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

ConfigSettings = dict[str, list[str] | str]

# The compiler, its headers and libraries, and what the kernels include; all of one release.
COMPILER_WHEELS = tuple(
    f"{name}==13.0.*"
    for name in ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-cuda-cccl", "nvidia-cuda-runtime", "nvidia-nvvm")
)
TAGGER = "auditwheel>=6.8"  # whose repair, where it has nothing to repair, needs no patchelf
OLDEST_CUDA = (12, 8)  # the first release that knows every architecture in csrc/CMakeLists.txt
USUAL_TOOLKIT = Path("/usr/local/cuda")


def get_requires_for_build_wheel(config_settings: ConfigSettings | None = None) -> list[str]:
    """What pip installs before `build_wheel`: scikit-build-core's own needs, auditwheel on Linux, perhaps a CUDA compiler."""
    tagger = (TAGGER,) if sys.platform == "linux" else ()
    return [*scikit.get_requires_for_build_wheel(config_settings), *tagger, *required_compiler()]


def get_requires_for_build_editable(config_settings: ConfigSettings | None = None) -> list[str]:
    """What pip installs before `build_editable`: as before `build_wheel`, but for auditwheel."""
    return [*scikit.get_requires_for_build_editable(config_settings), *required_compiler()]


def build_wheel(
    wheel_directory: str, config_settings: ConfigSettings | None = None, metadata_directory: str | None = None
) -> str:
    """Build a wheel into `wheel_directory` and return its name."""
    with _cuda_decided(config_settings) as settings:
        name = scikit.build_wheel(wheel_directory, settings, metadata_directory)
    return name_for_linux(Path(wheel_directory, name)) if sys.platform == "linux" else name


def build_editable(
    wheel_directory: str, config_settings: ConfigSettings | None = None, metadata_directory: str | None = None
) -> str:
    """Build an editable wheel into `wheel_directory` and return its name."""
    with _cuda_decided(config_settings) as settings:
        return scikit.build_editable(wheel_directory, settings, metadata_directory)


def switch() -> str:
    """The value of `MACKO_CUDA`: auto, on or off.

    Raises:
        SystemExit: it has another value. pip shows the sentence as the reason of the failed build.
    """
    value = os.environ.get("MACKO_CUDA", "auto")
    if value not in ("auto", "on", "off"):
        raise SystemExit(f"MACKO_CUDA is {value!r}; set it to auto, on or off.")
    return value


def required_compiler() -> tuple[str, ...]:
    """The compiler wheels that this build must fetch; none if it needs no CUDA or the machine has a compiler.

    Raises:
        SystemExit: `MACKO_CUDA=on`, and there is neither a compiler nor a wheel of one for this platform.
    """
    if switch() == "off" or system_nvcc() is not None:
        return ()
    if wheels_exist(sys.platform, platform.machine()):
        return COMPILER_WHEELS
    if switch() == "on":
        raise SystemExit(_no_compiler())
    return ()


def wheels_exist(system: str, machine: str) -> bool:
    """Whether NVIDIA publishes compiler wheels for `sys.platform` and `platform.machine()`."""
    return system == "linux" and machine in ("x86_64", "aarch64")


def system_nvcc() -> Path | None:
    """The machine's nvcc, if it is new enough: what `CUDACXX` names, or the toolkit at `CUDA_HOME` or `CUDA_PATH`, or PATH's.

    A place that the environment names is the only one looked at, so that a build never takes another compiler by accident.
    """
    named = os.environ.get("CUDACXX")
    toolkit = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        found = [shutil.which(named)]
    elif toolkit:
        found = [_nvcc_of(Path(toolkit))]
    else:
        found = [shutil.which("nvcc"), _nvcc_of(USUAL_TOOLKIT)]
    return next((Path(nvcc) for nvcc in found if nvcc is not None and _is_new_enough(nvcc)), None)


def wheel_nvcc() -> Path | None:
    """The nvcc of NVIDIA's compiler wheels in the environment that runs this build."""
    try:
        wheel = metadata.distribution("nvidia-cuda-nvcc")
    except metadata.PackageNotFoundError:
        return None
    nvcc = Path(str(wheel.locate_file("nvidia/cu13/bin/nvcc")))
    return nvcc if nvcc.is_file() else None


def name_for_linux(wheel: Path) -> str:
    """Name a wheel for all systems that its library's symbols allow (manylinux, musllinux), and return the name.

    Where auditwheel is missing, or finds a library that other systems lack, the name stays that of this machine alone.
    """
    with tempfile.TemporaryDirectory(dir=wheel.parent) as folder:
        command = [sys.executable, "-m", "auditwheel", "repair", "--patcher", "none", "--wheel-dir", folder, str(wheel)]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        named = next(Path(folder).glob("*.whl"), None)
        if answer.returncode != 0 or named is None:
            reason = (answer.stderr.strip().splitlines() or ["no reason given"])[-1]
            _log(f"{wheel.name} is for this machine and its like alone: {reason}")
            return wheel.name
        wheel.unlink()
        return named.rename(wheel.parent / named.name).name


@contextmanager
def _cuda_decided(config_settings: ConfigSettings | None) -> Iterator[ConfigSettings]:
    """scikit-build-core's settings with the decision in them, and the environment that nvcc needs while it compiles."""
    theirs = config_settings or {}
    _keep_what_is_compiled(theirs.get("build-dir"))
    nvcc = None if switch() == "off" else system_nvcc() or wheel_nvcc()
    if nvcc is None:
        if switch() == "on":
            raise SystemExit(_no_compiler())
        _log("building for the CPU alone: " + ("MACKO_CUDA=off" if switch() == "off" else "no nvcc was found"))
        yield {"cmake.define.MACKO_CUDA": "OFF", **theirs}
        return
    _log(f"building with CUDA: {nvcc}")
    _forget_other_compilers(nvcc, theirs.get("build-dir"))
    try:
        with _libraries_found(nvcc):
            yield {"cmake.define.MACKO_CUDA": "ON", "cmake.define.CMAKE_CUDA_COMPILER": str(nvcc), **theirs}
    except SystemExit:
        _log("the build with CUDA failed; the reason stands above, and MACKO_CUDA=off builds without CUDA")
        raise


@contextmanager
def _libraries_found(nvcc: Path) -> Iterator[None]:
    # The wheels keep their libraries in lib/, nvcc looks in lib64/; without this CMake finds no working compiler.
    before = os.environ.get("NVCC_PREPEND_FLAGS")
    if nvcc == wheel_nvcc():
        os.environ["NVCC_PREPEND_FLAGS"] = " ".join(filter(None, [f"-L{nvcc.parents[1] / 'lib'}", before]))
    try:
        yield
    finally:
        os.environ.pop("NVCC_PREPEND_FLAGS", None)
        if before is not None:
            os.environ["NVCC_PREPEND_FLAGS"] = before


def _caches(build_dir: list[str] | str | None) -> list[Path]:
    usual = Path().glob("build/*/CMakeCache.txt")
    named = usual if build_dir is None else [Path(str(build_dir), "CMakeCache.txt")]
    return [cache for cache in named if cache.is_file()]


def _keep_what_is_compiled(build_dir: list[str] | str | None) -> None:
    # scikit-build-core starts over in each isolated environment, because the last one's tools are gone. Where they are the
    # machine's, they are not, and ninja knows what to compile again.
    for cache in _caches(build_dir):
        information = cache.with_name(".skbuild-info.json")
        tools = re.findall(r"^CMAKE_(?:COMMAND|MAKE_PROGRAM|\w+_COMPILER):\w+=(.+)$", cache.read_text(), re.MULTILINE)
        if information.is_file() and all(Path(tool).is_file() for tool in tools):
            here = os.fspath(Path(scikit_build_core.__file__).resolve().parent)
            with suppress(ValueError):  # a build that was interrupted
                information.write_text(json.dumps({**json.loads(information.read_text()), "skbuild_path": here}))


def _forget_other_compilers(nvcc: Path, build_dir: list[str] | str | None) -> None:
    # CMake answers a changed compiler by dropping every setting that it was given: the build would go on without CUDA.
    for cache in _caches(build_dir):
        named = re.search(r"^CMAKE_CUDA_COMPILER:\w+=(.*)$", cache.read_text(), re.MULTILINE)
        if named and named[1] != str(nvcc):
            shutil.rmtree(cache.parent / "CMakeFiles", ignore_errors=True)
            cache.unlink()


def _nvcc_of(toolkit: Path) -> str | None:
    return shutil.which("nvcc", path=str(toolkit / "bin"))


def _is_new_enough(nvcc: str) -> bool:
    release = _release(nvcc)
    if release is not None and release >= OLDEST_CUDA:
        return True
    _log(f"passing over {nvcc}: it is not nvcc of CUDA {_dotted(OLDEST_CUDA)} or newer")
    return False


def _release(nvcc: str) -> tuple[int, int] | None:
    try:
        answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return None
    match = re.search(r"Cuda compilation tools, release (\d+)\.(\d+)", answer)
    return (int(match[1]), int(match[2])) if match else None


def _no_compiler() -> str:
    fetch = "drop --no-build-isolation so that pip fetches a compiler, "
    return (
        f"MACKO_CUDA=on needs nvcc of CUDA {_dotted(OLDEST_CUDA)} or newer, and there is none; "
        "install NVIDIA's CUDA toolkit and set CUDA_HOME to its folder, "
        f"{fetch if wheels_exist(sys.platform, platform.machine()) else ''}or build with MACKO_CUDA=off."
    )


def _dotted(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))


def _log(sentence: str) -> None:
    print(f"*** macko: {sentence}", flush=True)
