"""Finds, loads and calls the native library; the only module that knows its C interface (csrc/macko.h)."""

import ctypes
import importlib.util
import sys
from functools import lru_cache
from pathlib import Path

import torch

from macko_llm.errors import NativeError
from macko_llm.format import MackoMatrix, padded_count

ABI_VERSION = 1

_INT32, _INT64, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
_SIGNATURES: dict[str, list[type]] = {
    "macko_cpu_row_offsets": [_POINTER, _INT64, _INT64, _POINTER, _INT32],
    "macko_cpu_pack": [_POINTER, _INT64, _INT64, _POINTER, _POINTER, _POINTER, _INT32],
    "macko_cpu_unpack": [_POINTER, _POINTER, _POINTER, _INT64, _INT64, _POINTER, _INT32],
    "macko_cpu_row_spans": [_POINTER, _POINTER, _INT64, _POINTER],
    "macko_cpu_spmv": [
        _POINTER, _INT32, _POINTER, _POINTER, _INT64, _INT64, _POINTER, _POINTER, _POINTER, _INT32, _INT64, _INT32,
    ],
}  # fmt: skip
_DTYPE_CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_STATUS = {
    1: "it refused its arguments",
    2: "the matrix has too many entries for int32 row offsets; keep it dense",
    3: "memory or threads ran out; close other programs or use a smaller model",
}


def library_path() -> Path:
    """Where the library that belongs to this package lies.

    Raises:
        NativeError: it was not built.
    """
    name = {"win32": "macko.dll", "darwin": "libmacko.dylib"}.get(sys.platform, "libmacko.so")
    # An editable install keeps the Python files and the library in two folders; both are on the package's path.
    spec = importlib.util.find_spec("macko_llm")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / "lib" / name
        if path.is_file():
            return path
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
    for name, arguments in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes = arguments
        function.restype = ctypes.c_int32
    return loaded


def cpu_pack(weight: torch.Tensor) -> MackoMatrix:
    """`format.pack` of a contiguous [rows, cols] float16 or bfloat16 matrix on the CPU."""
    rows, cols = weight.shape
    threads = torch.get_num_threads()
    row_offsets = torch.empty(rows + 1, dtype=torch.int32)
    _call("macko_cpu_row_offsets", _address(weight), rows, cols, _address(row_offsets), threads)
    padded = padded_count(int(row_offsets[-1]))
    values = torch.empty(padded, dtype=weight.dtype)
    deltas = torch.empty(padded // 2, dtype=torch.uint8)
    addresses = _address(row_offsets), _address(values), _address(deltas)
    _call("macko_cpu_pack", _address(weight), rows, cols, *addresses, threads)
    return MackoMatrix(values, deltas, row_offsets, (rows, cols))


def cpu_unpack(matrix: MackoMatrix) -> torch.Tensor:
    """`format.unpack` of a valid matrix on the CPU."""
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
    rows, cols = matrix.shape
    tokens = x.shape[0]
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (rows,)):
        raise NativeError(
            f"The bias is {bias.dtype} {list(bias.shape)}, not {x.dtype} [{rows}]; convert it to the input's dtype."
        )
    y = torch.empty(tokens, rows, dtype=x.dtype)
    _call(
        "macko_cpu_spmv",
        *(_address(matrix.values), _DTYPE_CODES[matrix.values.dtype]),
        *(_address(matrix.deltas), _address(matrix.row_offsets), rows, cols),
        *(_address(x), None if bias is None else _address(bias), _address(y), _DTYPE_CODES[x.dtype], tokens),
        torch.get_num_threads(),
    )
    return y


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
        raise NativeError(f"{name} failed: {_STATUS.get(status, f'unknown status {status}')}.")
