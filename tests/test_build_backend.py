"""The build backend: which compiler it takes, what it fetches, and what the library that it builds holds."""

import ctypes
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from macko_llm import native

PROJECT = Path(__file__).parents[1]
FETCHED = ["nvidia-cuda-cccl", "nvidia-cuda-crt", "nvidia-cuda-nvcc", "nvidia-cuda-runtime", "nvidia-nvvm"]
MACHINES_PATH = os.environ["PATH"]
LINUX_WITH_WHEELS = sys.platform == "linux" and os.uname().machine in ("x86_64", "aarch64")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the compilers of these tests are shell scripts")
sys.path.insert(0, str(PROJECT / "build_backend"))
import macko_build  # noqa: E402  it lies outside the package


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No CUDA anywhere, as far as the backend can see: a test puts down the compiler that it wants."""
    for name in ("MACKO_CUDA", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "CUDAARCHS", "NVCC_PREPEND_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(macko_build, "USUAL_TOOLKIT", tmp_path / "usual")
    monkeypatch.chdir(PROJECT)


def put_nvcc(folder: Path, release: str = "13.0") -> Path:
    """A program that calls itself nvcc of a release and can do nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    nvcc = folder / "nvcc"
    nvcc.write_text(
        f'#!/bin/sh\n[ "$*" = --version ] || exit 3\necho "Cuda compilation tools, release {release}, V{release}.88"\n'
    )
    nvcc.chmod(0o755)
    return nvcc


def put_wheel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """NVIDIA's compiler wheel as pip lays it out, in the environment that runs this test."""
    information = folder / "nvidia_cuda_nvcc-13.0.88.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-cuda-nvcc\nVersion: 13.0.88\n")
    monkeypatch.syspath_prepend(str(folder))
    return put_nvcc(folder / "nvidia" / "cu13" / "bin")


def fetched() -> list[str]:
    """The NVIDIA wheels among what the backend asks pip for, without their versions."""
    wheel, editable = macko_build.get_requires_for_build_wheel(), macko_build.get_requires_for_build_editable()
    assert [name for name in wheel if "nvidia" in name] == [name for name in editable if "nvidia" in name]
    return sorted(name.removesuffix("==13.0.*") for name in wheel if "nvidia" in name)


@pytest.mark.parametrize("value", ["", "ON", "yes", "12.8"])
def test_any_other_value_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str) -> None:
    monkeypatch.setenv("MACKO_CUDA", value)
    sentence = f"^MACKO_CUDA is '{value}'; set it to auto, on or off\\.$"
    with pytest.raises(SystemExit, match=sentence):
        macko_build.get_requires_for_build_wheel()
    with pytest.raises(SystemExit, match=sentence):
        macko_build.build_wheel(str(tmp_path))


@pytest.mark.skipif(not LINUX_WITH_WHEELS, reason="NVIDIA publishes compiler wheels for Linux alone")
@pytest.mark.parametrize("value", [None, "auto", "on"])
def test_a_compiler_is_fetched_where_there_is_none(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is not None:
        monkeypatch.setenv("MACKO_CUDA", value)
    assert fetched() == FETCHED


def test_off_fetches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACKO_CUDA", "off")
    assert fetched() == []


@pytest.mark.parametrize(
    ("system", "machine", "published"),
    [
        ("linux", "x86_64", True),
        ("linux", "aarch64", True),
        ("linux", "ppc64le", False),
        ("darwin", "arm64", False),
        ("win32", "AMD64", False),
    ],
)
def test_platforms_with_compiler_wheels(system: str, machine: str, published: bool) -> None:
    assert macko_build.wheels_exist(system, machine) is published


def test_auditwheel_is_fetched_for_what_is_given_to_others() -> None:
    fetched_for_wheels = [name for name in macko_build.get_requires_for_build_wheel() if "auditwheel" in name]
    assert len(fetched_for_wheels) == (sys.platform == "linux")
    assert not [name for name in macko_build.get_requires_for_build_editable() if "auditwheel" in name]


def test_without_wheels_auto_builds_for_the_cpu_and_on_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(macko_build, "wheels_exist", lambda *_: False)
    assert fetched() == []
    monkeypatch.setenv("MACKO_CUDA", "on")
    with pytest.raises(
        SystemExit, match=r"^MACKO_CUDA=on needs nvcc .*; install .* CUDA_HOME .*, or build with .*=off\.$"
    ):
        macko_build.get_requires_for_build_wheel()


def test_where_the_compiler_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Each place is looked at before those that were there already.
    assert macko_build.system_nvcc() is None
    assert put_nvcc(tmp_path / "usual" / "bin") == macko_build.system_nvcc()
    assert put_nvcc(tmp_path / "path") == macko_build.system_nvcc()
    for variable in ("CUDA_PATH", "CUDA_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
        assert put_nvcc(tmp_path / variable / "bin") == macko_build.system_nvcc()
    named = put_nvcc(tmp_path / "named")
    monkeypatch.setenv("CUDACXX", str(named))
    assert named == macko_build.system_nvcc()
    assert fetched() == []


@pytest.mark.parametrize("variable", ["CUDACXX", "CUDA_HOME", "CUDA_PATH"])
def test_a_place_that_is_named_is_the_only_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str) -> None:
    put_nvcc(tmp_path / "path")
    monkeypatch.setenv(variable, str(tmp_path / "nowhere"))
    assert macko_build.system_nvcc() is None


@pytest.mark.parametrize(("release", "taken"), [("11.8", False), ("12.7", False), ("12.8", True), ("13.10", True)])
def test_an_old_compiler_is_passed_over(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], release: str, taken: bool
) -> None:
    old = put_nvcc(tmp_path / "path", release)
    newer = put_nvcc(tmp_path / "usual" / "bin")
    assert macko_build.system_nvcc() == (old if taken else newer)
    assert (f"passing over {old}: it is not nvcc of CUDA 12.8 or newer" in capfd.readouterr().out) is not taken


def test_a_compiler_that_does_not_run_is_passed_over(tmp_path: Path) -> None:
    nvcc = put_nvcc(tmp_path / "path")
    nvcc.write_text("#!/nowhere/sh\n")
    assert macko_build.system_nvcc() is None


def test_the_compiler_of_the_wheels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcc = put_wheel(tmp_path / "site", monkeypatch)
    assert macko_build.wheel_nvcc() == nvcc
    monkeypatch.setenv("NVCC_PREPEND_FLAGS", "-Xcompiler=-g")
    with macko_build._cuda_decided({"build-dir": "elsewhere"}) as settings:
        # Without the folder of the libraries CMake finds no working compiler, and says nothing.
        assert os.environ["NVCC_PREPEND_FLAGS"] == f"-L{nvcc.parents[1] / 'lib'} -Xcompiler=-g"
        assert settings == {
            "cmake.define.MACKO_CUDA": "ON",
            "cmake.define.CMAKE_CUDA_COMPILER": str(nvcc),
            "build-dir": "elsewhere",
        }
    assert os.environ["NVCC_PREPEND_FLAGS"] == "-Xcompiler=-g"


def test_the_machines_compiler_needs_no_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    put_wheel(tmp_path / "site", monkeypatch)
    nvcc = put_nvcc(tmp_path / "path")
    monkeypatch.chdir(tmp_path)
    with macko_build._cuda_decided(None) as settings:
        assert "NVCC_PREPEND_FLAGS" not in os.environ
        assert settings["cmake.define.CMAKE_CUDA_COMPILER"] == str(nvcc)


def test_what_another_compiler_left_is_forgotten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Otherwise CMake starts over by itself, without the settings that it was given, and builds for the CPU alone.
    nvcc = put_nvcc(tmp_path / "path")
    for folder, compiler in (("other", "/old/nvcc"), ("same", str(nvcc)), ("cpu", None)):
        (tmp_path / "build" / folder / "CMakeFiles").mkdir(parents=True)
        line = f"CMAKE_CUDA_COMPILER:STRING={compiler}\n" if compiler else ""
        (tmp_path / "build" / folder / "CMakeCache.txt").write_text(f"CMAKE_BUILD_TYPE:STRING=Release\n{line}")
    monkeypatch.chdir(tmp_path)
    with macko_build._cuda_decided({"build-dir": "build/cpu"}):
        assert len(list(tmp_path.glob("build/*/*"))) == 6
    with macko_build._cuda_decided(None):
        left = sorted(str(path.relative_to(tmp_path / "build")) for path in tmp_path.glob("build/*/*"))
    assert left == ["cpu/CMakeCache.txt", "cpu/CMakeFiles", "same/CMakeCache.txt", "same/CMakeFiles"]


def test_on_without_any_compiler_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if macko_build.wheel_nvcc() is not None:
        pytest.skip("NVIDIA's compiler wheel is installed beside these tests")
    monkeypatch.setenv("MACKO_CUDA", "on")
    with pytest.raises(
        SystemExit, match=r"^MACKO_CUDA=on needs nvcc of CUDA 12\.8 or newer, and there is none; install"
    ):
        macko_build.build_wheel(str(tmp_path))


def needed_glibc(library: bytes) -> tuple[int, int]:
    """The newest glibc whose symbols a library asks for."""
    return max((int(major), int(minor)) for major, minor in re.findall(rb"\0GLIBC_(\d+)\.(\d+)", library))


@pytest.mark.skipif(
    not LINUX_WITH_WHEELS or platform.libc_ver()[0] != "glibc", reason="manylinux is for Linux with glibc"
)
@pytest.mark.skipif(find_spec("auditwheel") is None, reason="install the extra `dev`")
class TestNaming:
    """The platform in a wheel's name, of a wheel that holds a small library."""

    PLATFORM = f"linux_{platform.machine()}"

    def wheel(self, folder: Path, *link: str) -> Path:
        """A wheel as scikit-build-core makes it: for this platform, with a library that was linked so."""
        (folder / "small.c").write_text("double cos(double); double small(double x) { return cos(x); }\n")
        command = ["cc", "-shared", "-fPIC", "small.c", "-o", "small.so", *link, "-lm"]
        subprocess.run(command, cwd=folder, check=True, env={**os.environ, "PATH": MACHINES_PATH})
        path = folder / f"small-1-py3-none-{self.PLATFORM}.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.write(folder / "small.so", "small/small.so")
            wheel.writestr("small-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: small\nVersion: 1\n")
            tag = f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: py3-none-{self.PLATFORM}\n"
            wheel.writestr("small-1.dist-info/WHEEL", tag)
            wheel.writestr("small-1.dist-info/RECORD", "small/small.so,,\n")  # where auditwheel looks for libraries
        return path

    def test_a_wheel_is_named_for_the_glibc_that_its_library_needs(self, tmp_path: Path) -> None:
        name = macko_build.name_for_linux(self.wheel(tmp_path))
        (wheel,) = tmp_path.glob("*.whl")
        assert wheel.name == name
        with zipfile.ZipFile(wheel) as content:
            library = content.read("small/small.so")
            tags = re.findall(r"^Tag: py3-none-(.*)$", content.read("small-1.dist-info/WHEEL").decode(), re.MULTILINE)
        assert library == (tmp_path / "small.so").read_bytes()
        assert {*tags} == {*name.removeprefix("small-1-py3-none-").removesuffix(".whl").split(".")}
        named = [(int(major), int(minor)) for major, minor in re.findall(r"manylinux_(\d+)_(\d+)_", name)]
        assert min(named) >= needed_glibc(library)
        assert self.PLATFORM not in tags

    def test_a_library_of_this_machine_alone_keeps_the_wheel_to_it(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        source = tmp_path / "local.c"
        source.write_text("int local;\n")
        command = ["cc", "-shared", "-fPIC", str(source), "-o", str(tmp_path / "liblocal.so")]
        subprocess.run(command, check=True, env={**os.environ, "PATH": MACHINES_PATH})
        wheel = self.wheel(tmp_path, "-Wl,--no-as-needed", "-L.", "-llocal")
        before = wheel.read_bytes()
        assert macko_build.name_for_linux(wheel) == wheel.name
        assert [path.read_bytes() for path in tmp_path.glob("*.whl")] == [before]
        assert f"{wheel.name} is for this machine and its like alone: " in capfd.readouterr().out


@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("ninja") is None, reason="needs cmake and ninja")
class TestBuilding:
    """Builds of this project, in one folder, so that its sources are compiled once."""

    @pytest.fixture(scope="class")
    @staticmethod
    def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
        return {"build-dir": str(tmp_path_factory.mktemp("build"))}

    @pytest.fixture(autouse=True)
    def machine_without_nvcc(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """The machine and its tools, but for CUDA."""
        monkeypatch.setenv("PATH", MACHINES_PATH)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))

    @pytest.mark.parametrize("value", ["off", "auto"])
    def test_a_cpu_library(
        self,
        settings: dict[str, str],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        capfd: pytest.CaptureFixture[str],
        value: str,
    ) -> None:
        if value == "auto" and macko_build.wheel_nvcc() is not None:
            pytest.skip("NVIDIA's compiler wheel is installed beside these tests")
        monkeypatch.setenv("MACKO_CUDA", value)
        name = macko_build.build_wheel(str(tmp_path), settings)
        # One wheel for every Python: the library is loaded with ctypes.
        assert "-py3-none-" in name
        library = native.library_path().name
        with zipfile.ZipFile(tmp_path / name) as wheel:
            wheel.extract(f"macko_llm/lib/{library}", tmp_path)
        built = ctypes.CDLL(str(tmp_path / "macko_llm" / "lib" / library))
        assert built.macko_abi_version() == native.ABI_VERSION
        assert not hasattr(built, "macko_cuda_pack")
        reason = "MACKO_CUDA=off" if value == "off" else "no nvcc was found"
        assert f"building for the CPU alone: {reason}" in capfd.readouterr().out

    @pytest.mark.parametrize("build", ["build_wheel", "build_editable"])
    def test_the_line_that_python_starts_with_comes_and_goes_with_every_install(
        self, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, build: str
    ) -> None:
        monkeypatch.setenv("MACKO_CUDA", "off")
        name = getattr(macko_build, build)(str(tmp_path), settings)
        with zipfile.ZipFile(tmp_path / name) as wheel:
            line = wheel.read("macko_llm.pth").decode()
            record = next(entry for entry in wheel.namelist() if entry.endswith(".dist-info/RECORD"))
            assert "\nmacko_llm.pth," in f"\n{wheel.read(record).decode()}"  # what uninstalling removes
        assert line.count("\n") == 1
        assert line.startswith("import ")  # only such lines are run

    def test_a_new_isolated_environment_compiles_again_only_where_the_tools_are_gone(
        self,
        settings: dict[str, str],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setenv("MACKO_CUDA", "off")
        build = Path(settings["build-dir"])

        def compiled() -> int:
            macko_build.build_wheel(str(tmp_path), settings)
            return (build / "CMakeFiles" / "macko.dir" / "cpu" / "pack.cpp.o").stat().st_mtime_ns

        first = compiled()
        information = build / ".skbuild-info.json"
        elsewhere = {**json.loads(information.read_text()), "skbuild_path": "/nowhere/scikit_build_core"}
        information.write_text(json.dumps(elsewhere))
        monkeypatch.setenv("CXX", "/nowhere/c++")  # which CMake asks for only where it starts over
        assert compiled() == first
        information.write_text(json.dumps(elsewhere))
        cache = build / "CMakeCache.txt"
        cache.write_text(re.sub("(?m)^(CMAKE_MAKE_PROGRAM:.*)=.*$", r"\1=/nowhere/ninja", cache.read_text()))
        capfd.readouterr()
        with pytest.raises(SystemExit):
            compiled()
        assert "/nowhere/c++" in capfd.readouterr().err

    def test_a_broken_compiler_is_an_error_that_names_the_way_out(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("CUDACXX", str(put_nvcc(tmp_path)))
        with pytest.raises(SystemExit):
            macko_build.build_wheel(str(tmp_path), {"build-dir": str(tmp_path / "build")})
        output = capfd.readouterr()
        assert "CUDA" in output.err  # CMake's own words, which differ from version to version
        assert "MACKO_CUDA=off builds without CUDA" in output.out
        assert not list(tmp_path.glob("*.whl"))


@pytest.mark.skipif(
    os.environ.get("MACKO_CUDA") != "on", reason="only MACKO_CUDA=on, as in .ci/run, promises CUDA code"
)
def test_the_installed_library_holds_code_for_every_architecture() -> None:
    library = native.library_path()
    assert hasattr(ctypes.CDLL(str(library)), "macko_cuda_pack")
    wheels_tools = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"
    cuobjdump = shutil.which("cuobjdump", path=f"{wheels_tools}{os.pathsep}{MACHINES_PATH}")
    assert cuobjdump is not None, "install the extra `dev`"
    listed = subprocess.run([cuobjdump, "-lelf", "-lptx", library], capture_output=True, text=True, check=True).stdout
    # One line for each architecture of each .cu file, so that a file which CMakeLists.txt forgot is missed here.
    names = [file.name for file in (PROJECT / "csrc" / "cuda").glob("*.cu")]
    of_hopper = sum("wgmma" in name or "many" in name for name in names)  # compiled for sm_90 alone, as sm_90a
    files = len(names) - of_hopper
    code = Counter(re.findall(r"\.(sm_\w+\.(?:cubin|ptx))$", listed, re.MULTILINE))
    architectures = (75, 80, 86, 89, 90, 100, 120)
    everywhere = {f"sm_{name}.cubin": files for name in architectures}
    assert code == {**everywhere, "sm_90a.cubin": of_hopper, "sm_120.ptx": files}
