"""The one table of dtypes: what configs and the command line, safetensors headers and the native library call them."""

from typing import NamedTuple

import torch

from macko_llm.defaults import MODEL_DTYPE_NAMES, VALUE_DTYPE_NAMES


class _Dtype(NamedTuple):
    torch: torch.dtype
    header: str  # in a safetensors header
    code: int | None  # macko_dtype in csrc/macko.h


_TABLE = (
    _Dtype(torch.float16, "F16", 0),
    _Dtype(torch.bfloat16, "BF16", 1),
    _Dtype(torch.float32, "F32", 2),
    _Dtype(torch.float64, "F64", None),
    _Dtype(torch.int64, "I64", None),
    _Dtype(torch.int32, "I32", None),
    _Dtype(torch.int16, "I16", None),
    _Dtype(torch.int8, "I8", None),
    _Dtype(torch.uint8, "U8", None),
    _Dtype(torch.bool, "BOOL", None),
)

MODEL_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in MODEL_DTYPE_NAMES}
"""Those that models are loaded in, by their names on the command line and in config.json."""
VALUE_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in VALUE_DTYPE_NAMES}
"""Those of packed values, by name."""
HEADERS = {row.header: row.torch for row in _TABLE}
"""Those that files may hold, by their names in safetensors headers; tensors of others cannot be read here."""
VALUE_HEADERS = {name: next(row.header for row in _TABLE if row.torch == dtype) for name, dtype in VALUE_DTYPES.items()}
"""What safetensors calls those of packed values, by name."""
CAST_HEADERS = (*VALUE_HEADERS.values(), "F32", "F64")
"""What it calls those that packing casts to values; other floating-point ones need scales to be understood."""
CODES = {row.torch: row.code for row in _TABLE if row.code is not None}
"""What the native library is told."""


def dtype_name(dtype: torch.dtype) -> str:
    """Of any dtype, as in config.json and on the command line: "float16"."""
    return str(dtype).removeprefix("torch.")
