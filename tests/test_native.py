"""The native library and its wrapper: a library that cannot serve, and calls that it refuses, each end in a plain sentence."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import macko_llm
from macko_llm import native
from macko_llm.errors import MackoWarning, NativeError
from macko_llm.format import MackoMatrix
from macko_llm.layouts import canonical, layout

HALF = torch.ones(4, 6, dtype=torch.float16)


@pytest.fixture(autouse=True)
def fresh_library() -> Iterator[None]:
    """Load the library anew in each test, and again after them."""
    for cached in (native.library, native.cpu_instructions):
        cached.cache_clear()
    yield
    for cached in (native.library, native.cpu_instructions):
        cached.cache_clear()


@pytest.fixture
def package_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder in which the wrapper looks for the library; no other package of this name is there."""
    monkeypatch.setattr(macko_llm.__spec__, "submodule_search_locations", [str(tmp_path)])
    monkeypatch.setattr(sys, "path", [place for place in sys.path if not Path(place, "macko_llm").is_dir()])
    return tmp_path


def test_the_library_has_the_version_of_this_package() -> None:
    assert native.library_path().is_file()
    assert native.library().macko_abi_version() == native.ABI_VERSION
    header = (Path(__file__).parents[1] / "csrc" / "macko.h").read_text()
    assert f"#define MACKO_ABI_VERSION {native.ABI_VERSION}\n" in header


def test_sources_that_hide_the_installed_package_are_named_with_it(
    package_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    name = native_library_name()
    installed = tmp_path_factory.mktemp("site-packages") / "macko_llm"
    (installed / "lib").mkdir(parents=True)
    (installed / "lib" / name).write_bytes(b"")
    monkeypatch.setattr(sys, "path", [*sys.path, str(installed.parent)])
    with pytest.raises(NativeError, match="is missing; build it"):  # a library without its package helps nobody
        native.library_path()
    (installed / "__init__.py").write_text("")
    with pytest.raises(NativeError) as error:
        native.library_path()
    assert str(error.value) == (
        f"The native library is missing from {package_folder}, which hides the package installed in {installed}; "
        f"start Python in another folder, and take {package_folder.parent} out of PYTHONPATH."
    )


def native_library_name() -> str:
    return {"win32": "macko.dll", "darwin": "libmacko.dylib"}.get(sys.platform, "libmacko.so")


def header_signatures() -> dict[str, list[type]]:
    """What csrc/macko.h says of each function that returns a status, as ctypes types."""
    header = re.sub(r"//.*", "", (Path(__file__).parents[1] / "csrc" / "macko.h").read_text())
    types = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64}
    return {
        name: [ctypes.c_void_p if "*" in text else types[text.split()[0]] for text in parameters.split(",")]
        for name, parameters in re.findall(r"MACKO_API macko_status (\w+)\(([^)]*)\)", header)
    }


def test_the_wrapper_calls_what_the_header_declares() -> None:
    """A parameter too many, or of another size, is nothing that ctypes notices."""
    declared = header_signatures()
    assert len(declared) >= 10
    assert native._SIGNATURES.items() <= declared.items()
    assert declared == {**native._SIGNATURES, **native._CUDA_SIGNATURES}


def test_a_missing_library(package_folder: Path) -> None:
    assert not list(package_folder.iterdir())
    with pytest.raises(NativeError, match=r"^The native library is missing; build it with `pip install \.` in"):
        native.cpu_pack(HALF)


def test_a_file_that_is_no_library(package_folder: Path) -> None:
    name = {"win32": "macko.dll", "darwin": "libmacko.dylib"}.get(sys.platform, "libmacko.so")
    (package_folder / "lib").mkdir()
    (package_folder / "lib" / name).write_bytes(b"not a library")
    with pytest.raises(NativeError, match=r"cannot be loaded \(.*\); run `pip install \.` again\.$") as caught:
        native.cpu_pack(HALF)
    assert str(package_folder / "lib" / name) in str(caught.value)


@pytest.mark.skipif(sys.platform == "win32" or shutil.which("c++") is None, reason="needs a C++ compiler named c++")
def test_a_library_of_another_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "newer.cpp"
    source.write_text('extern "C" int macko_abi_version() { return 1234; }\n')
    library = tmp_path / "newer.so"
    subprocess.run(["c++", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    monkeypatch.setattr(native, "library_path", lambda: library)
    with pytest.raises(NativeError, match=rf"has interface version 1234, not {native.ABI_VERSION}; run `pip install"):
        native.library()


def test_refuses_tensors_that_are_not_contiguous() -> None:
    matrix = native.cpu_pack(HALF)
    sentence = r"not contiguous; call \.contiguous\(\) on it first\.$"
    with pytest.raises(NativeError, match=sentence):
        native.cpu_pack(HALF.t())
    with pytest.raises(NativeError, match=sentence):
        native.cpu_spmv(matrix, torch.ones(6, 2).t(), None)
    with pytest.raises(NativeError, match=sentence):
        native.cpu_spmv(matrix, torch.ones(2, 6), torch.ones(8)[::2])
    scattered = MackoMatrix(matrix.values.repeat_interleave(2)[::2], matrix.deltas, matrix.row_offsets, matrix.shape)
    with pytest.raises(NativeError, match=sentence):
        native.cpu_unpack(scattered)


@pytest.mark.parametrize("bias", [torch.ones(4), torch.ones(3).half(), torch.ones(4, 1).half()])
def test_refuses_a_bias_that_it_would_misread(bias: torch.Tensor) -> None:
    with pytest.raises(NativeError, match=r"^The bias is .*, not torch\.float16 \[4\]; convert it"):
        native.cpu_spmv(native.cpu_pack(HALF), HALF[:1].contiguous(), bias)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("macko_cpu_row_offsets", (None, 1, 1, "offsets", "data", 0, 1)),
        ("macko_cpu_row_offsets", ("data", -1, 1, "offsets", "data", 0, 1)),
        ("macko_cpu_row_offsets", ("data", 1, 0, "offsets", "data", 0, 1)),
        ("macko_cpu_row_offsets", ("data", 1, 1, None, "data", 0, 1)),
        ("macko_cpu_row_offsets", ("data", 1, 1, "offsets", None, 0, 1)),
        ("macko_cpu_row_offsets", ("data", 1, 1, "offsets", "data", 3, 1)),
        ("macko_cpu_pack", ("data", 1, 1, "offsets", None, "data", 0, 1)),
        ("macko_cpu_pack", ("data", 1, 1, "offsets", "data", None, 0, 1)),
        ("macko_cpu_pack", ("data", 1, 1, "offsets", "data", "data", -1, 1)),
        ("macko_cpu_unpack", (None, "data", "offsets", 1, 1, "data", 1)),
        ("macko_cpu_unpack", ("data", None, "offsets", 1, 1, "data", 1)),
        ("macko_cpu_unpack", ("data", "data", "offsets", 1, 0, "data", 1)),
        ("macko_cpu_unpack", ("data", "data", "offsets", 1, 1, None, 1)),
        ("macko_cpu_row_spans", (None, "offsets", 1, "data")),
        ("macko_cpu_row_spans", ("data", "offsets", -1, "data")),
        ("macko_cpu_spmv", ("data", 2, "data", "offsets", 1, 1, "data", None, "data", 2, 1, 1)),
        ("macko_cpu_spmv", ("data", 0, "data", "offsets", 1, 1, "data", None, "data", 3, 1, 1)),
        ("macko_cpu_spmv", ("data", 0, "data", "offsets", 1, 1, "data", None, "data", 2, -1, 1)),
        ("macko_cpu_spmv", ("data", 0, "data", "offsets", 1, 1, None, None, "data", 2, 1, 1)),
        ("macko_cpu_spmv", (None, 0, "data", "offsets", 1, 1, "data", None, "data", 2, 1, 1)),
    ],
)
def test_the_library_refuses_arguments(function: str, arguments: tuple[object, ...]) -> None:
    memory = {"data": (ctypes.c_int64 * 8)(), "offsets": (ctypes.c_int32 * 2)(0, 1)}
    pointers = [ctypes.addressof(memory[argument]) if isinstance(argument, str) else argument for argument in arguments]
    with pytest.raises(
        NativeError,
        match=f"^{function} failed: it refused its arguments; report this .*`macko doctor`\\.$",
    ):
        native._call(function, *pointers)


def test_running_out_of_memory_is_an_error_and_no_crash() -> None:
    data, offsets = (ctypes.c_int64 * 8)(), (ctypes.c_int32 * 2)(0, 1)
    address, cols = ctypes.addressof(data), 2**62
    arguments = (address, 0, address, ctypes.addressof(offsets), 1, cols, address, None, address, 2, 1, 1)
    with pytest.raises(NativeError, match="memory or threads ran out"):
        native._call("macko_cpu_spmv", *arguments)


@pytest.mark.parametrize("team", ["torch's", "own"])
@pytest.mark.parametrize("threads", [1, 2])
def test_running_out_of_memory_in_a_thread_is_an_error_and_no_crash(threads: int, team: str) -> None:
    """No weight is read: a thread first takes the memory that a row of 2^60 columns needs."""
    data, offsets = (ctypes.c_int64 * 8)(), (ctypes.c_int32 * 3)(0, 1, 2)
    address, rows, cols = ctypes.addressof(data), 2, 2**60
    if team == "own":
        native.library().macko_cpu_use_openmp(None)
    with pytest.raises(NativeError, match="memory or threads ran out"):
        native._call("macko_cpu_pack", address, rows, cols, ctypes.addressof(offsets), address, address, 0, threads)


def test_nothing_to_do_is_no_error() -> None:
    empty = native.cpu_pack(torch.zeros(0, 3, dtype=torch.float16))
    assert native.cpu_unpack(empty).shape == (0, 3)
    assert native.cpu_row_spans(empty.deltas, empty.row_offsets).shape == (0,)
    assert native.cpu_spmv(empty, torch.ones(2, 3), None).shape == (2, 0)
    assert native.cpu_spmv(native.cpu_pack(HALF), torch.ones(0, 6), None).shape == (0, 4)


def call_in_host_memory(function: str, arguments: tuple[object, ...]) -> None:
    """Call a CUDA function with addresses that no GPU can use."""
    if not native.has_cuda():
        pytest.skip("the native library was built without CUDA")
    memory = {"data": (ctypes.c_int64 * 8)(), "offsets": (ctypes.c_int32 * 2)(0, 1)}
    start = ctypes.addressof(memory["data"])
    addresses = {"data": start, "offsets": ctypes.addressof(memory["offsets"]), "unaligned": start + 2}
    pointers = [addresses[argument] if isinstance(argument, str) else argument for argument in arguments]
    native._call(function, *pointers, 0, None)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("macko_cuda_row_entries", (None, 1, 1, "data")),
        ("macko_cuda_row_entries", ("data", 1, 1, None)),
        ("macko_cuda_row_entries", ("data", -1, 1, "data")),
        ("macko_cuda_row_entries", ("data", 1, 0, "data")),
        ("macko_cuda_row_entries", ("data", 2**30 + 1, 1, "data")),
        ("macko_cuda_row_entries", ("data", 1, 2**30 + 1, "data")),
        ("macko_cuda_pack", ("data", 1, 1, None, "data", "data")),
        ("macko_cuda_pack", (None, 1, 1, "offsets", "data", "data")),
        ("macko_cuda_pack", ("data", 1, 1, "offsets", "data", "unaligned")),
        ("macko_cuda_unpack", ("data", "data", None, 1, 1, "data")),
        ("macko_cuda_unpack", ("data", "data", "offsets", 1, 1, None)),
        ("macko_cuda_unpack", ("unaligned", "data", "offsets", 1, 1, "data")),
        ("macko_cuda_unpack", ("data", "unaligned", "offsets", 1, 1, "data")),
        ("macko_cuda_unpack", ("data", "data", "offsets", 1, 2**30 + 1, "data")),
        ("macko_cuda_row_spans", ("data", None, 1, "data")),
        ("macko_cuda_row_spans", ("data", "offsets", 1, None)),
        ("macko_cuda_row_spans", ("unaligned", "offsets", 1, "data")),
        ("macko_cuda_spmv_rows", ("data", 2, "data", "offsets", 1, 1, "data", None, "data", 2, 1)),
        ("macko_cuda_spmv_rows", ("data", 0, "data", "offsets", 1, 1, "data", None, "data", 1, 1)),
        ("macko_cuda_spmv_rows", ("data", 1, "data", "offsets", 1, 1, "data", None, "data", 0, 1)),
        ("macko_cuda_spmv_rows", ("data", 0, "data", "offsets", 1, 1, "data", None, "data", 0, -1)),
        ("macko_cuda_spmv_rows", ("data", 0, "data", "offsets", 1, 1, None, None, "data", 0, 1)),
        ("macko_cuda_spmv_rows", ("data", 0, "data", "offsets", 1, 1, "data", None, None, 0, 1)),
        ("macko_cuda_spmv_rows", ("data", 0, "data", None, 1, 1, "data", None, "data", 0, 1)),
        ("macko_cuda_spmv_rows", ("unaligned", 0, "data", "offsets", 1, 1, "data", None, "data", 0, 1)),
    ],
)
def test_cuda_functions_refuse_arguments(function: str, arguments: tuple[object, ...]) -> None:
    with pytest.raises(
        NativeError,
        match=f"^{function} failed: it refused its arguments; report this .*`macko doctor`\\.$",
    ):
        call_in_host_memory(function, arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA GPU")
@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("macko_cuda_row_entries", ("data", 1, 1, "data")),
        ("macko_cuda_pack", ("data", 1, 1, "offsets", "data", "data")),
        ("macko_cuda_unpack", ("data", "data", "offsets", 1, 1, "data")),
        ("macko_cuda_row_spans", ("data", "offsets", 1, "data")),
        ("macko_cuda_spmv_rows", ("data", 0, "data", "offsets", 1, 1, "data", None, "data", 0, 1)),
    ],
)
def test_cuda_functions_without_a_gpu(function: str, arguments: tuple[object, ...]) -> None:
    sentence = rf'^{function} failed: CUDA says "[^"]*CUDA[^"]*"; `macko doctor` shows what this machine has\.$'
    with pytest.raises(NativeError, match=sentence):
        call_in_host_memory(function, arguments)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("macko_cuda_row_entries", (None, 0, 1, None)),
        ("macko_cuda_pack", (None, 0, 1, "offsets", None, None)),
        ("macko_cuda_unpack", (None, None, "offsets", 0, 1, None)),
        ("macko_cuda_row_spans", (None, "offsets", 0, None)),
        ("macko_cuda_spmv_rows", (None, 0, None, "offsets", 0, 1, None, None, None, 0, 1)),
        ("macko_cuda_spmv_rows", (None, 0, None, "offsets", 1, 1, None, None, None, 0, 0)),
    ],
)
def test_cuda_functions_with_nothing_to_do(function: str, arguments: tuple[object, ...]) -> None:
    call_in_host_memory(function, arguments)


@pytest.mark.skipif(sys.platform == "win32" or shutil.which("c++") is None, reason="needs a C++ compiler named c++")
def test_a_library_without_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sources = Path(__file__).parents[1] / "csrc"
    library = tmp_path / "cpu_only.so"
    files = [str(path) for path in (sources / "cpu").glob("*.cpp")]
    command = ["c++", "-std=c++17", "-shared", "-fPIC", "-pthread", f"-I{sources}", *files, "-o", str(library)]
    subprocess.run(command, check=True)
    monkeypatch.setattr(native, "library_path", lambda: library)
    assert not native.has_cuda()
    assert torch.equal(native.cpu_unpack(native.cpu_pack(HALF)), HALF)


# Whether the CUDA kernels run


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler named cc"
)
def test_a_driver_that_is_too_old_is_told_with_both_releases(tmp_path: Path) -> None:
    """The library's own CUDA runtime asks the driver, which here is one that can only say that it is of CUDA 11.8."""
    if not native.has_cuda():
        pytest.skip("the library was built without CUDA kernels")
    (tmp_path / "driver.c").write_text("int cuDriverGetVersion(int *version) { *version = 11080; return 0; }\n")
    driver = tmp_path / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", str(tmp_path / "driver.c"), "-o", str(driver)], check=True)
    ask = (
        "import ctypes, sys; library = ctypes.CDLL(sys.argv[1]); library.macko_cuda_error.restype = ctypes.c_char_p; "
        "data = ctypes.create_string_buffer(16); one = ctypes.c_int64(1); "
        "print(library.macko_cuda_row_entries(data, one, one, data, 0, None), library.macko_cuda_error().decode())"
    )
    answer = subprocess.run(
        [sys.executable, "-c", ask, str(native.library_path())],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert re.fullmatch(r"4 its driver knows CUDA up to 11\.8, and macko was built with CUDA 1[2-9]\.\d+\n", answer)


@pytest.fixture
def gpu_0(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A GPU of which only the errors are known that its kernels will give; no errors, no GPU is touched."""
    failures: list[str] = []
    monkeypatch.setattr(native, "has_cuda", lambda: True)
    monkeypatch.setattr(native, "why_not_on", lambda _: failures[0] if failures else None)
    native._probe.cache_clear()
    yield failures
    native._probe.cache_clear()


def test_a_gpu_on_which_the_kernels_fail_gets_one_warning_and_plain_torch(gpu_0: list[str]) -> None:
    gpu_0.append("its driver knows CUDA up to 12.4, and macko was built with CUDA 13.0")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [native.runs_on(torch.device("cuda", 0)) for _ in range(2)]
    assert found == [False, False]
    (said,) = caught
    assert said.category is MackoWarning
    assert str(said.message) == (
        "The CUDA kernels do not run on GPU 0 (its driver knows CUDA up to 12.4, and macko was built with CUDA 13.0), so "
        "plain torch takes over, right but slow; update the GPU's driver, or build macko with a CUDA toolkit that suits "
        "driver and GPU: "
        "`CUDA_HOME=/usr/local/cuda-12.8 MACKO_CUDA=on pip install .` in the project's folder."
    )


@pytest.mark.usefixtures("gpu_0")
def test_a_gpu_on_which_the_kernels_run(recwarn: pytest.WarningsRecorder) -> None:
    assert native.runs_on(torch.device("cuda", 0))
    assert not native.runs_on(torch.device("cpu"))
    assert not recwarn.list


def test_a_torch_of_another_vendor_runs_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert native.why_not_on.__wrapped__(0) == "this torch is not built for CUDA"


def test_a_gpu_that_torch_itself_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nMore advice.")

    monkeypatch.setattr(native, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "ones", fail)
    reason = "CUDA error: no kernel image is available for execution on the device"
    assert native.why_not_on.__wrapped__(0) == reason


def test_values_that_have_been_cast_are_refused() -> None:
    matrix = canonical.pack(torch.eye(8, dtype=torch.float16))
    cast = MackoMatrix(matrix.values.float(), matrix.deltas, matrix.row_offsets, matrix.shape)
    for call in (lambda: native.cpu_unpack(cast), lambda: native.cpu_spmv(cast, torch.ones(1, 8), None)):
        with pytest.raises(NativeError, match=r"packed values are torch\.float32; they must stay float16 or bfloat16"):
            call()


def test_a_torch_without_its_private_names_counts_as_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    assert layout.modes_counter()() == 0
    with FakeTensorMode():
        assert layout.modes_counter()() == 1
    monkeypatch.delattr(torch._C, "_len_torch_dispatch_stack")
    assert layout.modes_counter()() == 1
