"""The schema of a packed checkpoint (docs/format.md, "A checkpoint"): what its config, its headers and its arrays must be.

Whoever reads packed checkpoints asks here, so that all of them take and refuse the same folders.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from macko_llm import checkpoint
from macko_llm.checkpoint import TensorInfo
from macko_llm.dtypes import VALUE_DTYPES, VALUE_HEADERS
from macko_llm.errors import FormatError
from macko_llm.format import DELTA_BITS, ENTRY_ALIGNMENT, FORMAT_VERSION, MackoMatrix
from macko_llm.layouts import canonical

ARRAY_NAMES = ("weight_values", "weight_deltas", "weight_row_offsets")
"""What a packed layer stores in place of `weight`, in checkpoints and in `state_dict()`."""


@dataclass(frozen=True)
class PackedConfig:
    """`quantization_config` of a packed checkpoint, checked.

    Attributes:
        value_dtype: "float16" or "bfloat16".
        modules_to_not_convert: names of the linear layers that stay dense.
        format_version: refused when newer than this package.
        delta_bits: bits of a delta; 4 in this version.

    Raises:
        FormatError: this package cannot read such a checkpoint.
    """

    value_dtype: str = "float16"
    modules_to_not_convert: list[str] | None = None
    format_version: int = FORMAT_VERSION
    delta_bits: int = DELTA_BITS

    def __post_init__(self) -> None:
        if not isinstance(self.format_version, int) or not 1 <= self.format_version <= FORMAT_VERSION:
            raise FormatError(
                f"The checkpoint has MACKO format version {self.format_version} and this package reads {FORMAT_VERSION}; "
                "update macko-llm."
            )
        if self.delta_bits != DELTA_BITS or self.value_dtype not in [*VALUE_DTYPES]:
            raise FormatError(
                f"The checkpoint has {self.delta_bits}-bit deltas and {self.value_dtype} values; this package reads "
                f"{DELTA_BITS}-bit deltas and {' or '.join(VALUE_DTYPES)} values, so update macko-llm or pack the model again."
            )

    @classmethod
    def read(cls, entries: Mapping[str, Any]) -> "PackedConfig":
        """From `quantization_config` of config.json; keys of a later minor version are ignored."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in entries.items() if key in known})

    def entries(self) -> dict[str, Any]:
        """`quantization_config` for config.json."""
        return {
            "delta_bits": self.delta_bits,
            "format_version": self.format_version,
            "modules_to_not_convert": list(self.modules_to_not_convert or ()),
            "quant_method": checkpoint.QUANT_METHOD,
            "value_dtype": self.value_dtype,
        }


def array_keys(name: str) -> list[str]:
    """What the three arrays of a layer are called in the files, in the order of `ARRAY_NAMES`."""
    return [f"{name}.{array}" for array in ARRAY_NAMES]


def check_headers(
    linears: Mapping[str, tuple[int, int]], infos: Mapping[str, TensorInfo], value_dtype: str
) -> list[str]:
    """Compare what the files say of the packed matrices with the model, before anything is allocated for them.

    Args:
        linears: the linear layers of the model's blocks, name -> (out_features, in_features).
        infos: the tensors of the checkpoint.
        value_dtype: "float16" or "bfloat16", as the config says.

    Returns:
        The names of the packed layers.

    Raises:
        FormatError: an array is missing, has another shape or dtype, or belongs to no layer; or a layer is stored twice.
    """
    packed = dict.fromkeys(key.rpartition(".")[0] for key in infos if key.rpartition(".")[2] in ARRAY_NAMES)
    for name in packed:
        if name not in linears:
            raise FormatError(
                f"The checkpoint packs {name}, which its config.json does not have in a block; download it again."
            )
        _check_layer(name, linears[name], infos, value_dtype)
        if f"{name}.weight" in infos:
            raise FormatError(
                f"The checkpoint holds {name} both packed and dense, as {name}.weight; take one out, or pack the model again."
            )
    return list(packed)


def check_complete(missing: Iterable[str]) -> None:
    """Refuse a checkpoint without some of the model's tensors, which transformers would start from random values.

    Args:
        missing: names of tensors that the checkpoint does not hold, or not in the model's shape.

    Raises:
        FormatError: there is one.
    """
    first = next(iter(missing), None)
    if first is not None:
        raise FormatError(f"The checkpoint has no {first} that fits its config.json; download or pack the model again.")


def read_matrix(name: str, shape: tuple[int, int], infos: Mapping[str, TensorInfo]) -> MackoMatrix:
    """The packed matrix of a layer, from its files, on the CPU.

    Raises:
        CheckpointError: a file is corrupt or truncated.
        FormatError: the matrix breaks an invariant of the format.
    """
    values, deltas, row_offsets = (_read(key, infos[key]) for key in array_keys(name))
    matrix = MackoMatrix(values, deltas, row_offsets, shape)
    canonical.validate(matrix, name)
    return matrix


def _read(key: str, info: TensorInfo) -> Tensor:
    with checkpoint.open_tensors(info.file) as reader:
        return reader.get_tensor(key)


def _check_layer(name: str, shape: tuple[int, int], infos: Mapping[str, TensorInfo], value_dtype: str) -> None:
    values, deltas, row_offsets = (infos.get(key) for key in array_keys(name))
    if values is None or deltas is None or row_offsets is None:
        raise FormatError(f"The checkpoint lacks an array of {name}; download or pack the model again.")
    rows, cols = shape
    padded = values.shape[0] if len(values.shape) == 1 else -1
    consistent = (
        (values.dtype, deltas.dtype, row_offsets.dtype) == (VALUE_HEADERS[value_dtype], "U8", "I32")
        and padded % ENTRY_ALIGNMENT == 0
        and deltas.shape == (padded // 2,)
        and row_offsets.shape == (rows + 1,)
    )
    if not consistent:
        raise FormatError(
            f"The arrays of {name} ({values.dtype} {list(values.shape)}, {deltas.dtype} {list(deltas.shape)}, "
            f"{row_offsets.dtype} {list(row_offsets.shape)}) do not fit its {rows} x {cols} "
            f"matrix of {value_dtype}; download or pack the model again."
        )
