"""Parts of a packed matrix, packed again: what each of several devices holds of it."""

import torch
from torch import Tensor

from macko_llm.errors import UsageError
from macko_llm.format import DELTA_BITS, MAX_DELTA, MackoMatrix, padded_count
from macko_llm.layouts import canonical


def slice_rows(matrix: MackoMatrix, start: int, stop: int) -> MackoMatrix:
    """Rows start to stop - 1, bytes for bytes what packing those rows of the dense matrix gives. Nothing is unpacked.

    Args:
        matrix: valid, [rows, cols]. Where it is not what a writer would produce (docs/format.md), neither is the slice, which
            is valid too and unpacks to the same rows.
        start: the first row.
        stop: the row after the last; 0 <= start <= stop <= rows.

    Returns:
        [stop - start, cols], in memory of its own on the matrix's device.

    Raises:
        UsageError: there are no such rows.
    """
    rows, cols = matrix.shape
    if not 0 <= start <= stop <= rows:
        raise UsageError(f"Rows {start}:{stop} are not in a matrix of {rows}; take them from 0:{rows}.")
    offsets = matrix.row_offsets[start : stop + 1]
    first, end = int(offsets[0]), int(offsets[-1])
    values = matrix.values.new_zeros(padded_count(end - first))
    values[: end - first] = matrix.values[first:end]
    return MackoMatrix(values, _slice_deltas(matrix.deltas, first, end), offsets - first, (stop - start, cols))


def slice_columns(matrix: MackoMatrix, start: int, stop: int) -> MackoMatrix:
    """Columns start to stop - 1, bytes for bytes what packing those columns of the dense matrix gives. Dense is the way there.

    Args:
        matrix: valid, [rows, cols].
        start: the first column.
        stop: the column after the last; 0 <= start < stop <= cols.

    Returns:
        [rows, stop - start], in memory of its own on the matrix's device.

    Raises:
        UsageError: there are no such columns, or none at all.
    """
    cols = matrix.shape[1]
    if not 0 <= start < stop <= cols:
        raise UsageError(f"Columns {start}:{stop} are not in a matrix of {cols}; take at least one from 0:{cols}.")
    return canonical.pack_finite(canonical.unpack(matrix)[:, start:stop].contiguous())


def _slice_deltas(deltas: Tensor, first: int, end: int) -> Tensor:
    """The nibbles of entries first to end - 1 from the low nibble of the first byte on, the rest zero."""
    cut = deltas[first // 2 : (end + 1) // 2]
    if first % 2:  # each byte is the high nibble of one and the low nibble of the next
        cut = torch.cat([cut, cut.new_zeros(1)])
        cut = (cut[:-1] >> DELTA_BITS) | (cut[1:] << DELTA_BITS)
    count = end - first
    moved = deltas.new_zeros(padded_count(count) // 2)
    moved[: (count + 1) // 2] = cut[: (count + 1) // 2]
    if count % 2:
        moved[count // 2] &= MAX_DELTA
    return moved
