"""The one table of dtypes: what configs and the command line, safetensors headers and the native library call them."""

from typing import NamedTuple

import torch


class _Dtype(NamedTuple):
    torch: torch.dtype
    name: str | None  # on the command line and in config.json, of those that models are loaded in
    header: str  # in a safetensors header
    code: int | None  # macko_dtype in csrc/macko.h
    packs: bool  # whether packed values may have it


_TABLE = (
    _Dtype(torch.float16, "float16", "F16", 0, True),
    _Dtype(torch.bfloat16, "bfloat16", "BF16", 1, True),
    _Dtype(torch.float32, "float32", "F32", 2, False),
    _Dtype(torch.float64, None, "F64", None, False),
    _Dtype(torch.int64, None, "I64", None, False),
    _Dtype(torch.int32, None, "I32", None, False),
    _Dtype(torch.int16, None, "I16", None, False),
    _Dtype(torch.int8, None, "I8", None, False),
    _Dtype(torch.uint8, None, "U8", None, False),
    _Dtype(torch.bool, None, "BOOL", None, False),
)

MODEL_DTYPES = {row.name: row.torch for row in _TABLE if row.name}
"""Those that models are loaded in, by name."""
VALUE_DTYPES = {row.name: row.torch for row in _TABLE if row.name and row.packs}
"""Those of packed values, by name."""
VALUE_HEADERS = {row.name: row.header for row in _TABLE if row.name and row.packs}
"""What safetensors calls those of packed values, by name."""
HEADERS = {row.header: row.torch for row in _TABLE}
"""Those that files may hold, by their names in safetensors headers; tensors of others cannot be read here."""
CODES = {row.torch: row.code for row in _TABLE if row.code is not None}
"""What the native library is told."""
