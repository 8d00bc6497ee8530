"""The MACKO format in plain torch: the executable form of docs/format.md.

Every backend is tested against these functions byte for byte. They favour being obviously right over being fast; the native
library does the same work quickly. Format: "MACKO: Sparse matrix-vector multiplication for low sparsity", arXiv 2511.13061.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from macko_llm.defaults import ENTRY_ALIGNMENT, MAX_ENTRIES
from macko_llm.dtypes import VALUE_DTYPES
from macko_llm.errors import FormatError, NonFiniteError

FORMAT_VERSION = 1
DELTA_BITS = 4
MAX_DELTA = 2**DELTA_BITS - 1
"""Most columns that one entry can skip."""


@dataclass(frozen=True)
class MackoMatrix:
    """A sparse matrix in canonical MACKO order.

    Attributes:
        values: [padded] float16 or bfloat16, entries row after row; `padded` is a multiple of ENTRY_ALIGNMENT, tail zero.
        deltas: [padded / 2] uint8, two 4-bit deltas a byte, the even entry in the low nibble: columns skipped since the
            previous entry of the row (since column -1 for the first).
        row_offsets: [rows + 1] int32, the entry at which each row begins.
        shape: (rows, cols) of the dense matrix.
    """

    values: torch.Tensor
    deltas: torch.Tensor
    row_offsets: torch.Tensor
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of the three arrays."""
        return self.values.nbytes + self.deltas.nbytes + self.row_offsets.nbytes


def padded_count(entries: int) -> int:
    """Length of `values` for this many entries."""
    return -(-entries // ENTRY_ALIGNMENT) * ENTRY_ALIGNMENT


def packed_nbytes(rows: int, entries: int, value_bytes: int = 2) -> int:
    """Bytes of a packed matrix with this many rows and entries."""
    padded = padded_count(entries)
    return padded * value_bytes + padded // 2 + (rows + 1) * 4


def check_packable(weight: torch.Tensor, name: str = "the matrix") -> None:
    """Refuse what the format cannot hold.

    Raises:
        FormatError: `weight` is not a float16 or bfloat16 matrix with at least one column.
        NonFiniteError: it holds NaN or infinity.
    """
    check_shape(weight, name)
    check_finite(all_finite(weight), name)


def check_shape(weight: torch.Tensor, name: str = "the matrix") -> None:
    """Raise FormatError unless `weight` is a float16 or bfloat16 matrix with at least one column."""
    if weight.ndim != 2 or weight.dtype not in VALUE_DTYPES.values() or weight.shape[1] == 0:
        raise FormatError(
            f"{name} is {list(weight.shape)} {weight.dtype}; convert it to a float16 or bfloat16 matrix before packing."
        )


def check_finite(is_finite: bool, name: str = "the matrix") -> None:
    """Raise NonFiniteError unless the values of a matrix were found finite."""
    if not is_finite:
        raise NonFiniteError(f"{name} holds NaN or infinity; repair the checkpoint before packing it.")


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no element of a floating-point tensor is NaN or infinite."""
    if tensor.numel() == 0:
        return True
    lowest, highest = torch.aminmax(tensor)  # NaN if any is: one pass, where isfinite takes several and as much memory
    return bool(torch.isfinite(lowest) & torch.isfinite(highest))


def check_entries(rows: int, cols: int, entries: int) -> None:
    """Refuse a [rows, cols] matrix with more entries than row offsets can count; raises FormatError."""
    if entries > MAX_ENTRIES:
        raise FormatError(f"a {rows} x {cols} matrix with {entries} entries does not fit int32 offsets; keep it dense.")


def pack(weight: torch.Tensor) -> MackoMatrix:
    """Store a [rows, cols] float16 or bfloat16 matrix without its zeros (negative zero counts as zero)."""
    check_packable(weight)
    rows, cols = weight.shape
    device = weight.device
    row, col = weight.nonzero(as_tuple=True)
    first_of_row = torch.ones_like(row, dtype=torch.bool)
    first_of_row[1:] = row[1:] != row[:-1]
    previous = torch.full_like(col, -1)
    previous[1:] = col[:-1]
    previous[first_of_row] = -1
    gap = col - previous - 1

    # A gap of 16 or more columns is bridged by explicit zeros that each stand 15 skipped columns further on.
    bridges = gap // (MAX_DELTA + 1)
    entries_of_row = torch.zeros(rows, dtype=torch.int64, device=device).index_add_(0, row, bridges + 1)
    row_offsets = torch.zeros(rows + 1, dtype=torch.int64, device=device)
    row_offsets[1:] = entries_of_row.cumsum(0)
    entries = int(row_offsets[-1])
    check_entries(rows, cols, entries)

    position = (bridges + 1).cumsum(0) - 1
    values = torch.zeros(padded_count(entries), dtype=weight.dtype, device=device)
    values[position] = weight[row, col]
    nibbles = torch.zeros(padded_count(entries), dtype=torch.uint8, device=device)
    nibbles[:entries] = MAX_DELTA
    nibbles[position] = (gap % (MAX_DELTA + 1)).to(torch.uint8)
    deltas = nibbles[0::2] | (nibbles[1::2] << DELTA_BITS)
    return MackoMatrix(values, deltas, row_offsets.to(torch.int32), (rows, cols))


def unpack(matrix: MackoMatrix) -> torch.Tensor:
    """Give the dense [rows, cols] matrix back, bit for bit but for the sign of zeros."""
    rows, cols = matrix.shape
    offsets = matrix.row_offsets.to(torch.int64)
    weight = torch.zeros(rows, cols, dtype=matrix.values.dtype, device=matrix.values.device)
    row, column = entry_positions(matrix.deltas, offsets)
    weight[row, column] = matrix.values[: len(row)]
    return weight


def entry_positions(deltas: torch.Tensor, row_offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column, both [entries] int64, of each entry."""
    offsets = row_offsets.to(torch.int64)
    entries = int(offsets[-1])
    rows = torch.arange(len(offsets) - 1, device=deltas.device).repeat_interleave(offsets.diff(), output_size=entries)
    advance = _nibbles(deltas)[:entries].to(torch.int64) + 1
    travelled = torch.zeros(entries + 1, dtype=torch.int64, device=deltas.device)
    travelled[1:] = advance.cumsum(0)
    return rows, travelled[1:] - travelled[offsets[rows]] - 1


def row_spans(deltas: torch.Tensor, row_offsets: torch.Tensor) -> torch.Tensor:
    """Columns that each row's entries reach over, [rows] int64: the last entry's column + 1, or 0 for an empty row."""
    offsets = row_offsets.to(torch.int64)
    advance = _nibbles(deltas).to(torch.int64) + 1
    travelled = torch.zeros(len(advance) + 1, dtype=torch.int64, device=deltas.device)
    travelled[1:] = advance.cumsum(0)
    return travelled[offsets[1:]] - travelled[offsets[:-1]]


def validate(
    matrix: MackoMatrix,
    name: str = "the matrix",
    row_spans: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = row_spans,
) -> None:
    """Check every invariant of docs/format.md, so that no kernel has to.

    Args:
        matrix: what was read from a file.
        name: how to call it in the error.
        row_spans: another implementation of `row_spans`, for speed.

    Raises:
        FormatError: naming the first invariant that does not hold.
    """

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise FormatError(f"{name} is not valid MACKO data ({what}); download or pack it again.")

    rows, cols = matrix.shape
    values, deltas, offsets = matrix.values, matrix.deltas, matrix.row_offsets
    require(values.dtype in VALUE_DTYPES.values() and values.ndim == 1, "values are not float16 or bfloat16 [padded]")
    require(deltas.dtype == torch.uint8 and deltas.ndim == 1, "deltas are not uint8 [padded / 2]")
    require(
        offsets.dtype == torch.int32 and offsets.shape == (rows + 1,),
        f"row offsets are {offsets.dtype} {list(offsets.shape)}, not int32 [{rows + 1}]",
    )
    require(rows >= 0 and cols >= 1, f"shape is {rows} x {cols}")
    require(int(offsets[0]) == 0, f"row offsets start at {int(offsets[0])}, not 0")
    require(bool((offsets[1:] >= offsets[:-1]).all()), "row offsets decrease")
    entries = int(offsets[-1])
    require(
        len(values) == padded_count(entries),
        f"{len(values)} values for {entries} entries, not {padded_count(entries)}",
    )
    require(len(deltas) * 2 == len(values), f"{len(deltas)} bytes of deltas for {len(values)} values")
    require(bool((values[entries:] == 0).all()), "the tail of the values is not zero")
    tail_byte = (entries + 1) // 2
    tail_is_zero = bool((deltas[tail_byte:] == 0).all()) and (
        entries % 2 == 0 or int(deltas[entries // 2]) >> DELTA_BITS == 0
    )
    require(tail_is_zero, "the tail of the deltas is not zero")
    spans = row_spans(deltas, offsets)
    if rows and int(spans.max()) > cols:
        row = int(spans.argmax())
        require(False, f"row {row} reaches column {int(spans[row]) - 1} of {cols}")
    require(all_finite(values), "values hold NaN or infinity")


def _nibbles(deltas: torch.Tensor) -> torch.Tensor:
    return torch.stack([deltas & MAX_DELTA, deltas >> DELTA_BITS], dim=1).reshape(-1)
