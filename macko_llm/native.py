"""Finds, loads and calls the native library; with `native_decode.py` all that knows its C interface (csrc/macko.h)."""

import ctypes
import importlib.util
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NoReturn, Protocol

import torch
from torch.nn import functional as F

from macko_llm.defaults import NO_KERNELS_REMEDY
from macko_llm.dtypes import CODES, VALUE_DTYPES
from macko_llm.errors import MackoWarning, NativeError
from macko_llm.format import MackoMatrix, check_entries, check_finite, padded_count

ABI_VERSION = 7

_INT32, _INT64, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
_SIGNATURES: dict[str, list[type]] = {
    "macko_cpu_row_offsets": [_POINTER, _INT64, _INT64, _POINTER, _POINTER, _INT32, _INT32],
    "macko_cpu_pack": [_POINTER, _INT64, _INT64, _POINTER, _POINTER, _POINTER, _INT32, _INT32],
    "macko_cpu_unpack": [_POINTER, _POINTER, _POINTER, _INT64, _INT64, _POINTER, _INT32],
    "macko_cpu_row_spans": [_POINTER, _POINTER, _INT64, _POINTER],
    "macko_cpu_spmv": [
        _POINTER, _INT32, _POINTER, _POINTER, _INT64, _INT64, _POINTER, _POINTER, _POINTER, _INT32, _INT64, _INT32,
    ],
    "macko_cpu_bitmap_starts": [_POINTER, _POINTER, _INT64, _POINTER, _INT32],
    "macko_cpu_bitmap_fill": [_POINTER, _POINTER, _POINTER, _POINTER, _INT32, _INT32],
    "macko_cpu_bitmap_unpack": [_POINTER, _POINTER, _INT32, _INT32],
    "macko_cpu_bitmap_spmv": [_POINTER, _POINTER, _POINTER, _POINTER, _INT32, _INT64, _INT32, _INT32],
    "macko_cpu_strips_plan": [_POINTER, _POINTER, _INT32],
    "macko_cpu_strips_fill": [_POINTER, _POINTER, _INT32],
    "macko_cpu_strips_unpack": [_POINTER, _INT64, _INT64, _POINTER, _INT32],
    "macko_cpu_strips_spmv": [_POINTER, _POINTER, _POINTER, _POINTER, _INT32, _INT64, _INT32, _INT32],
}  # fmt: skip
_CUDA_SIGNATURES: dict[str, list[type]] = {
    "macko_cuda_row_entries": [_POINTER, _INT64, _INT64, _POINTER, _INT32, _POINTER],
    "macko_cuda_pack": [_POINTER, _INT64, _INT64, _POINTER, _POINTER, _POINTER, _INT32, _POINTER],
    "macko_cuda_unpack": [_POINTER, _POINTER, _POINTER, _INT64, _INT64, _POINTER, _INT32, _POINTER],
    "macko_cuda_row_spans": [_POINTER, _POINTER, _INT64, _POINTER, _INT32, _POINTER],
    "macko_cuda_spmv_rows": [
        _POINTER, _INT32, _POINTER, _POINTER, _INT64, _INT64, _POINTER, _POINTER, _POINTER, _INT32, _INT64,
        _INT32, _POINTER,
    ],
    "macko_cuda_sliced_entries": [_POINTER, _INT64, _INT64, _INT32, _POINTER, _INT32, _POINTER],
    "macko_cuda_sliced_pack": [_POINTER, _POINTER, _INT32, _POINTER],
    "macko_cuda_sliced_unpack": [_POINTER, _POINTER, _INT32, _POINTER],
    "macko_cuda_sliced_spmv": [
        _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _INT32, _INT64, _INT32, _POINTER,
    ],
    "macko_cuda_tiled_count": [_POINTER, _INT64, _INT64, _INT32, _POINTER, _INT32, _POINTER],
    "macko_cuda_tiled_pack": [_POINTER, _POINTER, _INT32, _POINTER],
    "macko_cuda_tiled_unpack": [_POINTER, _POINTER, _INT32, _POINTER],
    "macko_cuda_tiled_spmm": [
        _POINTER, _INT32, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _INT64, _INT64, _INT32, _POINTER,
    ],
    "macko_cuda_tiled_workspace": [_POINTER, _INT32, _INT64, _INT32, _POINTER],
    "macko_cuda_dense_gemv": [_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _INT32, _POINTER],
    "macko_cuda_transform": [_POINTER, _POINTER, _POINTER, _INT64, _INT64, _INT32, _INT32, _POINTER],
    "macko_cuda_begin_token": [
        _POINTER, _POINTER, _POINTER, _POINTER, _INT64, _INT64, _INT64, _INT32, _POINTER,
    ],
    "macko_cuda_decode_attention": [_POINTER, _INT32, _POINTER],
    "macko_cuda_argmax": [_POINTER, _POINTER, _POINTER, _INT64, _INT64, _INT32, _INT32, _POINTER],
}  # fmt: skip
CPU_VARIABLE = "MACKO_CPU"
"""The environment variable that holds the CPU to a lesser set of instructions than it has, for measurements."""
INSTRUCTIONS = ("portable", "neon") if platform.machine() in ("aarch64", "arm64") else ("portable", "avx2", "avx512")
"""Those sets that this architecture may have, by their macko_instructions."""
TILED_FEW_TOKENS = 16
"""MACKO_TILED_FEW_TOKENS: with more, the product on tiles may want a workspace."""
TILED_MEMBERS = 4
"""MACKO_TILED_MEMBERS: tiled matrices that one product takes at most."""
_COLUMNS_OF_X = 8  # each row of x for tiles has a multiple of these
_CUDA_FAILED = 4
_STATUS = {
    1: "it refused its arguments; report this with the output of `macko doctor`",
    2: "the matrix has too many entries for int32 row offsets; keep it dense",
    3: "memory or threads ran out; close other programs or use a smaller model",
}


class SlicedStruct(ctypes.Structure):
    """`macko_sliced` of csrc/macko.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "deltas", "starts", "unit_offsets", "row_order")),
        *(
            (name, ctypes.c_int32)
            for name in ("rows", "cols", "slices", "first_row", "value_dtype", "delta_bits", "height", "warps")
        ),
    )


class TiledStruct(ctypes.Structure):
    """`macko_tiled` of csrc/macko.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("records", "starts")),
        *((name, ctypes.c_int32) for name in ("rows", "cols", "strips", "record_bytes", "value_dtype")),
    )


class BitmapStruct(ctypes.Structure):
    """`macko_bitmap` of csrc/macko.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "masks", "row_starts")),
        *((name, ctypes.c_int32) for name in ("rows", "cols", "value_dtype", "smallest")),
    )


class StripsStruct(ctypes.Structure):
    """`macko_strips` of csrc/macko.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("groups", "lengths", "row_ids", "chunk_starts")),
        *((name, ctypes.c_int32) for name in ("rows", "cols", "value_dtype", "smallest")),
    )


TiledStructs = ctypes.Array[TiledStruct]


def tiled_structs(structs: Sequence[TiledStruct]) -> TiledStructs:
    """Copies of them, one behind the other."""
    return (TiledStruct * len(structs))(*structs)


def address_of(struct: ctypes.Structure | TiledStructs) -> int:
    """Where a struct or several lie in memory; they must outlive whoever is told."""
    return ctypes.addressof(struct)


def library_path() -> Path:
    """Where the library that belongs to this package lies.

    Raises:
        NativeError: it was not built, or a folder of sources hides the package that was.
    """
    name = {"win32": "macko.dll", "darwin": "libmacko.dylib"}.get(sys.platform, "libmacko.so")
    # An editable install keeps the Python files and the library in two folders; both are on the package's path.
    spec = importlib.util.find_spec("macko_llm")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        path = Path(folder) / "lib" / name
        if path.is_file():
            return path
    for place in sys.path:
        hidden = Path(place) / "macko_llm"
        if folders and (hidden / "__init__.py").is_file() and (hidden / "lib" / name).is_file():
            raise NativeError(
                f"The native library is missing from {folders[0]}, which hides the package installed in {hidden}; "
                f"start Python in another folder, and take {Path(folders[0]).parent} out of PYTHONPATH."
            )
    raise NativeError("The native library is missing; build it with `pip install .` in the project's folder.")


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """Load the library, once.

    Raises:
        NativeError: it is missing, cannot be loaded, or is of another version than this package.
    """
    path = library_path()
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeError(
            f"The native library {path} cannot be loaded ({error}); run `pip install .` again."
        ) from error
    version = int(loaded.macko_abi_version())
    if version != ABI_VERSION:
        raise NativeError(
            f"The native library {path} has interface version {version}, not {ABI_VERSION}; run `pip install .` again."
        )
    signatures = dict(_SIGNATURES)
    if hasattr(loaded, "macko_cuda_error"):
        loaded.macko_cuda_error.restype = ctypes.c_char_p
        loaded.macko_cuda_sliced_max_cols.restype = _INT64
        signatures.update(_CUDA_SIGNATURES)
    for name, arguments in signatures.items():
        function = getattr(loaded, name)
        function.argtypes = arguments
        function.restype = ctypes.c_int32
    loaded.macko_cpu_use_openmp.argtypes, loaded.macko_cpu_use_openmp.restype = [_POINTER], None
    loaded.macko_cpu_use_openmp(_threads_of_torch())
    return loaded


def _threads_of_torch() -> int | None:
    """GOMP_parallel of the OpenMP runtime that torch computes with, whose threads may as well do the library's work."""
    if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    try:
        function = ctypes.CDLL(torch._C.__file__).GOMP_parallel  # found among what torch is linked with
    except (OSError, AttributeError):
        return None
    return ctypes.cast(function, _POINTER).value


def has_cuda() -> bool:
    """Whether the library was built with CUDA kernels; raises NativeError like `library`."""
    return hasattr(library(), "macko_cuda_pack")


def runs_on(device: torch.device) -> bool:
    """Whether the CUDA kernels run on a device; warns once of a GPU on which they should and do not."""
    if device.type != "cuda":
        return False
    return _probe(_index(device))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@lru_cache
def _probe(index: int) -> bool:
    reason = why_not_on(index)
    if reason is not None and has_cuda():
        warnings.warn(
            f"The CUDA kernels do not run on GPU {index} ({reason}), so plain torch takes over, right but slow; "
            f"{NO_KERNELS_REMEDY}.",
            MackoWarning,
            stacklevel=3,
        )
    return reason is None


@lru_cache
def why_not_on(index: int) -> str | None:
    """Why the CUDA kernels do not run on a GPU, found out by running one; None if they do."""
    if not has_cuda():
        return "the native library was built without them"
    if torch.version.cuda is None:
        return "this torch is not built for CUDA"
    try:
        weight = torch.ones(1, 8, dtype=torch.float16, device=torch.device("cuda", index))
        counts = torch.zeros(1, dtype=torch.int32, device=weight.device)
        call_cuda("macko_cuda_row_entries", (weight, counts), _address(weight), *weight.shape, _address(counts))
        found = int(counts)
    except NativeError:
        text: str = library().macko_cuda_error().decode()
        return text
    except RuntimeError as error:  # torch itself cannot use the GPU, or the kernel broke
        return str(error).partition("\n")[0]
    return None if found == weight.numel() else "they compute nonsense there"


def cpu_pack(weight: torch.Tensor) -> MackoMatrix:
    """`format.pack` of a contiguous [rows, cols] float16 or bfloat16 matrix on the CPU.

    Raises:
        NonFiniteError: it holds NaN or infinity, which the library sees on its way.
    """
    rows, cols = weight.shape
    how = cpu_instructions(), torch.get_num_threads()
    row_offsets = torch.empty(rows + 1, dtype=torch.int32)
    largest = torch.empty(1, dtype=torch.int32)
    _call("macko_cpu_row_offsets", _address(weight), rows, cols, _address(row_offsets), _address(largest), *how)
    check_finite(bool(largest.to(torch.int16).view(weight.dtype).isfinite()))
    padded = padded_count(int(row_offsets[-1]))
    values = torch.empty(padded, dtype=weight.dtype)
    deltas = torch.empty(padded // 2, dtype=torch.uint8)
    addresses = _address(row_offsets), _address(values), _address(deltas)
    _call("macko_cpu_pack", _address(weight), rows, cols, *addresses, *how)
    return MackoMatrix(values, deltas, row_offsets, (rows, cols))


def cpu_unpack(matrix: MackoMatrix) -> torch.Tensor:
    """`format.unpack` of a valid matrix on the CPU."""
    _check_values(matrix.values)
    rows, cols = matrix.shape
    weight = torch.empty(rows, cols, dtype=matrix.values.dtype)
    arrays = _address(matrix.values), _address(matrix.deltas), _address(matrix.row_offsets)
    _call("macko_cpu_unpack", *arrays, rows, cols, _address(weight), torch.get_num_threads())
    return weight


def cpu_row_spans(deltas: torch.Tensor, row_offsets: torch.Tensor) -> torch.Tensor:
    """`format.row_spans` on the CPU, for offsets that rise and end within the deltas."""
    rows = len(row_offsets) - 1
    spans = torch.empty(rows, dtype=torch.int64)
    _call("macko_cpu_row_spans", _address(deltas), _address(row_offsets), rows, _address(spans))
    return spans


def cpu_spmv(matrix: MackoMatrix, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Y = x Wᵀ + bias on the CPU, accumulated in float32.

    Args:
        matrix: a valid [rows, cols] matrix.
        x: [tokens, cols] contiguous float16, bfloat16 or float32.
        bias: [rows] contiguous, of x's dtype.

    Returns:
        [tokens, rows] of x's dtype.

    Raises:
        NativeError: the bias has another shape or dtype, or an array is not contiguous.
    """
    _check_values(matrix.values)
    rows, cols = matrix.shape
    tokens = x.shape[0]
    _check_bias(bias, x, rows)
    y = torch.empty(tokens, rows, dtype=x.dtype)
    _call(
        "macko_cpu_spmv",
        *(_address(matrix.values), CODES[matrix.values.dtype]),
        *(_address(matrix.deltas), _address(matrix.row_offsets), rows, cols),
        *(_address(x), None if bias is None else _address(bias), _address(y), CODES[x.dtype], tokens),
        torch.get_num_threads(),
    )
    return y


@lru_cache(maxsize=1)
def cpu_instructions() -> int:
    """The macko_instructions of work on the CPU: the most that it has, unless the environment asks for others.

    Raises:
        NativeError: the environment asks for what this CPU or this build lacks.
    """
    best = int(library().macko_cpu_instructions())
    name = os.environ.get(CPU_VARIABLE, "")
    if not name:
        return best
    names = INSTRUCTIONS[: best + 1]
    if name not in names:
        raise NativeError(f"{CPU_VARIABLE} is {name!r}; here it can be {' or '.join(names)}, or unset.")
    return names.index(name)


def cpu_bitmap_starts(matrix: MackoMatrix) -> torch.Tensor:
    """Where each row's values other than zero begin, if they lie row after row: [rows + 1] int32, of a valid matrix."""
    rows = matrix.shape[0]
    starts = torch.empty(rows + 1, dtype=torch.int32)
    arrays = _address(matrix.values), _address(matrix.row_offsets)
    _call("macko_cpu_bitmap_starts", *arrays, rows, _address(starts), torch.get_num_threads())
    return starts


def cpu_bitmap_fill(matrix: MackoMatrix, bitmap: BitmapStruct) -> None:
    """Fill a bitmap that has its row starts from a valid matrix: its values, its masks and `smallest`."""
    arrays = _address(matrix.values), _address(matrix.deltas), _address(matrix.row_offsets)
    _call("macko_cpu_bitmap_fill", *arrays, address_of(bitmap), cpu_instructions(), torch.get_num_threads())


def cpu_bitmap_unpack(bitmap: BitmapStruct, weight: torch.Tensor) -> None:
    """Fill a contiguous [rows, cols] matrix of the values' dtype with what a bitmap of that shape holds."""
    threads = torch.get_num_threads()
    _call("macko_cpu_bitmap_unpack", address_of(bitmap), _address(weight), cpu_instructions(), threads)


def cpu_bitmap_spmv(bitmap: BitmapStruct, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Y = x Wᵀ + bias for a bitmap of a [rows, cols] matrix, accumulated in float32.

    Args:
        bitmap: its addresses.
        x: [..., cols] contiguous float16, bfloat16 or float32.
        bias: [rows] contiguous, of x's dtype, or None.

    Returns:
        [..., rows] of x's dtype.

    Raises:
        NativeError: the bias has another shape or dtype, or an array is not contiguous.
    """
    return _spmv_of("macko_cpu_bitmap_spmv", bitmap, x, bias)


def cpu_strips_plan(bitmap: BitmapStruct, strips: StripsStruct) -> None:
    """Plan the strips of a bitmap: all but their groups, where there is memory for it."""
    _call("macko_cpu_strips_plan", address_of(bitmap), address_of(strips), torch.get_num_threads())


def cpu_strips_fill(bitmap: BitmapStruct, strips: StripsStruct) -> None:
    """Fill the groups of strips that were planned for a bitmap."""
    _call("macko_cpu_strips_fill", address_of(bitmap), address_of(strips), torch.get_num_threads())


def cpu_strips_unpack(strips: StripsStruct, first_row: int, weight: torch.Tensor) -> None:
    """Fill a contiguous [some rows, cols] matrix of the values' dtype with what strips hold from `first_row` on.

    First and last row are multiples of a chunk's, or the last one is the matrix's.
    """
    rows = first_row, first_row + len(weight)
    _call("macko_cpu_strips_unpack", address_of(strips), *rows, _address(weight), torch.get_num_threads())


def cpu_strips_spmv(strips: StripsStruct, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As `cpu_bitmap_spmv`, for strips."""
    return _spmv_of("macko_cpu_strips_spmv", strips, x, bias)


def _spmv_of(
    name: str, matrix: BitmapStruct | StripsStruct, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    # Called for every layer of every token: nothing here that is not needed.
    _check_bias(bias, x, matrix.rows)
    y = x.new_empty((*x.shape[:-1], matrix.rows))
    status = getattr(library(), name)(
        address_of(matrix),
        _address(x),
        None if bias is None else _address(bias),
        y.data_ptr(),
        CODES[x.dtype],
        x.numel() // matrix.cols,
        cpu_instructions(),
        torch.get_num_threads(),
    )
    if status != 0:
        _raise(name, status)
    return y


def cuda_pack(weight: torch.Tensor) -> MackoMatrix:
    """`format.pack` of a contiguous [rows, cols] float16 or bfloat16 matrix on a GPU.

    Raises:
        FormatError: it has too many entries.
    """
    rows, cols = weight.shape
    device = weight.device
    counts = torch.empty(rows, dtype=torch.int32, device=device)
    call_cuda("macko_cuda_row_entries", (weight, counts), _address(weight), rows, cols, _address(counts))
    wide_offsets = torch.zeros(rows + 1, dtype=torch.int64, device=device)
    torch.cumsum(counts, dim=0, out=wide_offsets[1:])
    entries = int(wide_offsets[-1])
    check_entries(rows, cols, entries)
    row_offsets = wide_offsets.to(torch.int32)
    padded = padded_count(entries)
    values = torch.zeros(padded, dtype=weight.dtype, device=device)
    deltas = torch.zeros(padded // 2, dtype=torch.uint8, device=device)
    addresses = _address(row_offsets), _address(values), _address(deltas)
    call_cuda("macko_cuda_pack", (weight,), _address(weight), rows, cols, *addresses)
    return MackoMatrix(values, deltas, row_offsets, (rows, cols))


def cuda_unpack(matrix: MackoMatrix) -> torch.Tensor:
    """`format.unpack` of a valid matrix on a GPU."""
    _check_values(matrix.values)
    rows, cols = matrix.shape
    values, deltas, row_offsets = _aligned(matrix)
    weight = torch.empty(rows, cols, dtype=values.dtype, device=values.device)
    arrays = _address(values), _address(deltas), _address(row_offsets)
    call_cuda("macko_cuda_unpack", (values, deltas, row_offsets), *arrays, rows, cols, _address(weight))
    return weight


def cuda_row_spans(deltas: torch.Tensor, row_offsets: torch.Tensor) -> torch.Tensor:
    """`format.row_spans` on a GPU, for offsets that rise and end within the deltas."""
    rows = len(row_offsets) - 1
    deltas = _aligned_tensor(deltas)
    spans = torch.empty(rows, dtype=torch.int64, device=deltas.device)
    arrays = _address(deltas), _address(row_offsets)
    call_cuda("macko_cuda_row_spans", (deltas, row_offsets), *arrays, rows, _address(spans))
    return spans


def cuda_spmv_rows(matrix: MackoMatrix, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Y = x Wᵀ + bias on a GPU, accumulated in float32, straight from the canonical arrays.

    Args:
        matrix: a valid [rows, cols] matrix.
        x: [tokens, cols] contiguous, of the values' dtype or float32.
        bias: [rows] contiguous, of x's dtype.

    Returns:
        [tokens, rows] of x's dtype.

    Raises:
        NativeError: the bias has another shape or dtype, the tensors lie on different devices, or x has another dtype.
    """
    _check_values(matrix.values)
    rows, cols = matrix.shape
    tokens = x.shape[0]
    _check_bias(bias, x, rows)
    values, deltas, row_offsets = _aligned(matrix)
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    call_cuda(
        "macko_cuda_spmv_rows",
        (x, values, deltas, row_offsets) if bias is None else (x, values, deltas, row_offsets, bias),
        *(_address(values), CODES[values.dtype], _address(deltas), _address(row_offsets), rows, cols),
        *(_address(x), None if bias is None else _address(bias), _address(y), CODES[x.dtype], tokens),
    )
    return y


class OnGpu(Protocol):
    """A matrix whose struct the library reads."""

    @property
    def data(self) -> torch.Tensor:
        """The memory of its arrays."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""

    @property
    def address(self) -> int:
        """Of its struct."""


def sliced_max_cols(device: torch.device) -> int:
    """The most columns that a sliced matrix may have on a GPU, whose shared memory must hold x."""
    return int(library().macko_cuda_sliced_max_cols(_index(device)))


def cuda_sliced_entries(weight: torch.Tensor, counts: dict[int, torch.Tensor]) -> None:
    """Count the entries of each row of a dense [rows, cols] matrix: [rows] int32, by the bits of a delta."""
    for bits, of_rows in counts.items():
        addresses = _address(weight), *weight.shape, bits, _address(of_rows)
        call_cuda("macko_cuda_sliced_entries", (weight, of_rows), *addresses)


def cuda_sliced_pack(weight: torch.Tensor, matrix: OnGpu) -> None:
    """Fill a sliced matrix, whose values and deltas are zero, from a dense [rows, cols] one."""
    call_cuda("macko_cuda_sliced_pack", (weight, matrix.data), _address(weight), matrix.address)


def cuda_sliced_unpack(matrix: OnGpu) -> torch.Tensor:
    """The dense [rows, cols] matrix of a sliced one."""
    weight = torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.data.device)
    call_cuda("macko_cuda_sliced_unpack", (matrix.data,), matrix.address, _address(weight))
    return weight


def cuda_sliced_spmv(matrix: OnGpu, x: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> None:
    """Y = x Wᵀ + bias on the GPU that is all tensors', accumulated in float32.

    Args:
        matrix: [rows, cols].
        x: [tokens, cols] contiguous, of the values' dtype or float32, on the matrix's GPU.
        bias: [rows] contiguous, of x's dtype and on that GPU, or None.
        y: [tokens, rows] contiguous, of x's dtype and on that GPU; filled.
    """
    # Called for every layer of every token: nothing here that is not needed.
    device = x.get_device()
    status = library().macko_cuda_sliced_spmv(
        matrix.address,
        None,
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None,
        y.data_ptr(),
        CODES[x.dtype],
        x.numel() // x.shape[-1],
        device,
        _raw_stream(device),
    )
    if status != 0:
        _raise("macko_cuda_sliced_spmv", status)


def cuda_tiled_count(weight: torch.Tensor, strips: int, units: torch.Tensor) -> None:
    """Count the 16 bytes of each record of a dense [rows, cols] matrix: [strips * panels] int32, filled."""
    arguments = _address(weight), *weight.shape, strips, _address(units)
    call_cuda("macko_cuda_tiled_count", (weight, units), *arguments)


def cuda_tiled_pack(weight: torch.Tensor, matrix: OnGpu) -> None:
    """Fill the records of a tiled matrix, whose starts are there, from a dense [rows, cols] one."""
    call_cuda("macko_cuda_tiled_pack", (weight, matrix.data), _address(weight), matrix.address)


def cuda_tiled_unpack(matrix: OnGpu) -> torch.Tensor:
    """The dense [rows, cols] matrix of a tiled one."""
    weight = torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.data.device)
    call_cuda("macko_cuda_tiled_unpack", (matrix.data,), matrix.address, _address(weight))
    return weight


def cuda_tiled_spmm(
    structs: int,
    members: int,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    y: torch.Tensor,
) -> None:
    """Y = x Wᵀ + bias + residual on the GPU that is all tensors', of sm_80 or newer, accumulated in float32.

    Args:
        structs: address of the structs, one behind the other, of the matrices that are W, one below the other.
        members: how many they are, at most `TILED_MEMBERS`.
        x: [..., cols] contiguous, of the values' dtype, on the matrices' GPU.
        bias: [all rows] contiguous, of that dtype and on that GPU, or None.
        residual: [..., all rows] contiguous, of that dtype and on that GPU, or None.
        y: [..., all rows] contiguous, of that dtype and on that GPU; filled; may be the residual.

    Raises:
        NativeError: the library refuses the arguments, or CUDA fails.
    """
    # Called for every layer of every step: nothing here that is not needed.
    cols, device = x.shape[-1], x.get_device()
    tokens = x.numel() // cols
    if cols % _COLUMNS_OF_X:
        x = F.pad(x, (0, -cols % _COLUMNS_OF_X))
    x = _aligned_tensor(x)
    workspace = None
    if tokens > TILED_FEW_TOKENS:
        workspace = _tiled_workspace(structs, members, tokens, x.device)
    status = library().macko_cuda_tiled_spmm(
        structs,
        members,
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if residual is None else residual.data_ptr(),
        y.data_ptr(),
        None if workspace is None else workspace.data_ptr(),
        0 if workspace is None else workspace.numel(),
        tokens,
        device,
        _raw_stream(device),
    )
    if status != 0:
        _raise("macko_cuda_tiled_spmm", status)


def _tiled_workspace(structs: int, members: int, tokens: int, device: torch.device) -> torch.Tensor | None:
    """[bytes] uint8 in which the product of so many tokens is fastest; None where it wants none."""
    nbytes = _INT64()
    _call("macko_cuda_tiled_workspace", structs, members, tokens, device.index, ctypes.addressof(nbytes))
    return torch.empty(nbytes.value, dtype=torch.uint8, device=device) if nbytes.value else None


def check_spmv(x: torch.Tensor, data: torch.Tensor, bias: torch.Tensor | None, rows: int) -> None:
    """Refuse what the products of layouts on a GPU rely on.

    Raises:
        NativeError: the tensors lie on different devices, or the bias has another shape or dtype.
    """
    _check_bias(bias, x, rows)
    _one_device((x, data) if bias is None else (x, data, bias))


def _check_values(values: torch.Tensor) -> None:
    # The library would read other values' bytes as 16-bit ones.
    if values.dtype not in VALUE_DTYPES.values():
        raise NativeError(
            f"The packed values are {values.dtype}; they must stay float16 or bfloat16, as they were packed."
        )


def _check_bias(bias: torch.Tensor | None, x: torch.Tensor, rows: int) -> None:
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (rows,)):
        raise NativeError(
            f"The bias is {bias.dtype} {list(bias.shape)}, not {x.dtype} [{rows}]; convert it to the input's dtype."
        )


def _aligned(matrix: MackoMatrix) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _aligned_tensor(matrix.values), _aligned_tensor(matrix.deltas), matrix.row_offsets


def _aligned_tensor(tensor: torch.Tensor) -> torch.Tensor:
    # The kernels read 16 bytes at once. Only a slice of another tensor can begin elsewhere: torch aligns what it allocates.
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _address(tensor: torch.Tensor) -> int:
    # The library reads rows one after the other, whatever the strides say.
    if not tensor.is_contiguous():
        raise NativeError(
            "The native library was given a tensor that is not contiguous; call .contiguous() on it first."
        )
    return tensor.data_ptr()


def _call(name: str, *arguments: object) -> None:
    status = getattr(library(), name)(*arguments)
    if status != 0:
        _raise(name, status)


def _raise(name: str, status: int) -> NoReturn:
    if status == _CUDA_FAILED:
        text = library().macko_cuda_error().decode()
        raise NativeError(f'{name} failed: CUDA says "{text}"; `macko doctor` shows what this machine has.')
    raise NativeError(f"{name} failed: {_STATUS.get(status, f'unknown status {status}')}.")


def call_cuda(name: str, tensors: tuple[torch.Tensor, ...], *arguments: object) -> None:
    """Call a function on the GPU that holds these tensors, all that it reads, and on the current stream."""
    device = _one_device(tensors)
    _call(name, *arguments, device, _raw_stream(device))


def _one_device(tensors: tuple[torch.Tensor, ...]) -> int:
    device = tensors[0].get_device()
    for tensor in tensors:
        if tensor.get_device() != device:
            places = " and ".join(sorted({str(tensor.device) for tensor in tensors}))
            raise NativeError(f"The tensors lie on {places}; move them to one device.")
    return device


def _raw_stream(device: int) -> int:
    """The current stream of a GPU, by torch's short way where this release has it."""
    return int(_short_way(device)) if _short_way else int(torch.cuda.current_stream(device).cuda_stream)


_short_way = getattr(torch._C, "_cuda_getCurrentRawStream", None)
