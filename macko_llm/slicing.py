"""Parts of packed matrices, packed again: what each of several devices holds of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from macko_llm.errors import UsageError
from macko_llm.format import DELTA_BITS, MAX_DELTA, MackoMatrix, check_entries, padded_count
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


def stack_rows(matrices: Sequence[MackoMatrix]) -> MackoMatrix:
    """Matrices one below the other, bytes for bytes what packing the dense matrix of them gives. Nothing is unpacked.

    Args:
        matrices: valid, at least one, of one dtype and device and with as many columns; see `slice_rows` for those that no
            writer would produce.

    Returns:
        [their rows, cols], in memory of its own.

    Raises:
        UsageError: their columns, dtypes or devices differ.
        FormatError: together they have too many entries.
    """
    kinds = {(matrix.shape[1], matrix.values.dtype, matrix.values.device) for matrix in matrices}
    if len(kinds) != 1:
        raise UsageError("Only packed matrices of one width, dtype and device can be stacked; convert them first.")
    counts = [int(matrix.row_offsets[-1]) for matrix in matrices]
    rows, cols, entries = sum(matrix.shape[0] for matrix in matrices), matrices[0].shape[1], sum(counts)
    check_entries(rows, cols, entries)
    values = matrices[0].values.new_zeros(padded_count(entries))
    nibbles = matrices[0].deltas.new_zeros(len(values))
    row_offsets = matrices[0].row_offsets.new_zeros(rows + 1)
    entry = row = 0
    for matrix, count in zip(matrices, counts, strict=True):
        values[entry : entry + count] = matrix.values[:count]
        nibbles[entry : entry + count] = torch.stack(
            [matrix.deltas & MAX_DELTA, matrix.deltas >> DELTA_BITS], 1
        ).flatten()[:count]
        row_offsets[row + 1 : row + matrix.shape[0] + 1] = matrix.row_offsets[1:] + entry
        entry, row = entry + count, row + matrix.shape[0]
    return MackoMatrix(values, nibbles[0::2] | (nibbles[1::2] << DELTA_BITS), row_offsets, (rows, cols))


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
