"""What one rank of a tensor-parallel group holds of a packed layer, collected as the arrays come from the files.

vLLM fuses layers: q_proj, k_proj and v_proj of a checkpoint become one `qkv_proj`, of which each rank has some heads of each.
Which rows of which of them lie where is vLLM's affair: its own weight loader is given the numbers of the rows in place of a
weight, and where it puts them, the rows belong.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from macko_llm.errors import FormatError, UsageError
from macko_llm.format import MackoMatrix
from macko_llm.layouts import canonical
from macko_llm.packed_checkpoint import ARRAY_NAMES
from macko_llm.slicing import slice_columns, slice_rows, stack_rows

DENSE_NAME = "weight"
"""What a member of a fused layer is called that the checkpoint holds dense, while it packs others; it is packed here."""


class Parts:
    """The rows that have come so far.

    Args:
        name: what errors call the layer.
        loader: vLLM's weight loader of the layer, (parameter, tensor, *shard); it reads `output_dim` or `input_dim` of the
            parameter.
        rows: that this rank holds.
        cols: of the whole matrix.
        own_cols: of them, those that this rank holds.
        dtype: of the packed values.
    """

    def __init__(
        self, name: str, loader: Callable[..., Any], rows: int, cols: int, own_cols: int, dtype: torch.dtype
    ) -> None:
        self._name = name
        self._loader: Callable[..., Any] | None = loader
        self._rows = rows
        self._cols = cols
        self._own_cols = own_cols
        self._dtype = dtype
        self._waiting: dict[tuple[Any, ...], dict[str, Tensor]] = {}
        self._placed: dict[int, MackoMatrix] = {}
        """By their first row of this rank."""

    def add(self, array: str, tensor: Tensor, shard: tuple[Any, ...]) -> None:
        """Take an array of a member. Once it has all, the rows of this rank are cut out, and the others let go.

        Args:
            array: one of `ARRAY_NAMES`, or `DENSE_NAME`.
            tensor: as the checkpoint has it, on the device where the layer will be.
            shard: what vLLM calls the member: ("q",), (0,), or () for a layer that is not fused.

        Raises:
            FormatError: the arrays are not valid, or do not fit the layer.
            UsageError: the layer was taken already.
        """
        if self._loader is None:
            raise UsageError(f"{self._name} is loaded and arranged already; start vLLM again to load other weights.")
        arrays = self._waiting.setdefault(shard, {})
        arrays[array] = tensor
        if DENSE_NAME in arrays:
            matrix: MackoMatrix = canonical.pack(tensor.to(self._dtype))
        elif len(arrays) == len(ARRAY_NAMES):
            values, deltas, row_offsets = (arrays[name] for name in ARRAY_NAMES)
            if values.dtype != self._dtype:
                raise FormatError(
                    f"{self._name} holds {values.dtype} values, and its config.json says {self._dtype}; download it again."
                )
            matrix = MackoMatrix(values, deltas, row_offsets, (len(row_offsets) - 1, self._cols))
            canonical.validate(matrix, self._name)
        else:
            return
        del self._waiting[shard]
        self._place(matrix, shard)

    def take(self) -> MackoMatrix:
        """All that this rank holds, [rows, own columns], and keep nothing of it: vLLM keeps the loaders of a layer for good.

        Raises:
            FormatError: the checkpoint lacks some of it, or holds some of it twice.
        """
        parts = [self._placed[first] for first in sorted(self._placed)]
        if self._waiting or sum(part.shape[0] for part in parts) != self._rows:
            raise self._not_once()
        self._placed, self._loader = {}, None
        return parts[0] if len(parts) == 1 else stack_rows(parts)

    def _place(self, matrix: MackoMatrix, shard: tuple[Any, ...]) -> None:
        rows, cols = matrix.shape
        if cols != self._cols:
            raise self._misfit(matrix)
        try:
            own_rows = _runs(self._numbers(self._rows, rows, "output_dim", shard))
            own_cols = [(0, 0, cols)]
            if self._own_cols != cols:
                own_cols = _runs(self._numbers(self._own_cols, cols, "input_dim", shard))
        except (AssertionError, RuntimeError) as error:  # what vLLM says of a tensor of another shape
            raise self._misfit(matrix) from error
        ((_, first_col, last_col),) = own_cols
        if last_col - first_col != cols:
            matrix = slice_columns(matrix, first_col, last_col)
        for place, start, stop in own_rows:
            if place in self._placed:
                raise self._not_once()
            self._placed[place] = slice_rows(matrix, start, stop)

    def _numbers(self, held: int, total: int, dimension: str, shard: tuple[Any, ...]) -> Tensor:
        """Which of all `total` rows or columns of a member each of this rank's is, [held]; -1 where it is none of them."""
        numbers = Parameter(torch.full((held,), -1, device="cpu"), requires_grad=False)
        setattr(numbers, dimension, 0)
        assert self._loader is not None
        self._loader(numbers, torch.arange(total, device="cpu"), *shard)
        return numbers.data

    def _not_once(self) -> FormatError:
        return FormatError(
            f"The checkpoint does not hold each array of {self._name} once; download or pack the model again."
        )

    def _misfit(self, matrix: MackoMatrix) -> FormatError:
        rows, cols = matrix.shape
        return FormatError(
            f"{self._name} is {rows} x {cols} in the checkpoint, which its config.json does not fit; download it again."
        )


def _runs(numbers: Tensor) -> list[tuple[int, int, int]]:
    """(place, first, last + 1) of numbers that follow each other, first to last; numbers below 0 are none."""
    runs: list[tuple[int, int, int]] = []
    for place, number in enumerate(numbers.tolist()):
        if number < 0:
            continue
        if runs and place == runs[-1][0] + runs[-1][2] - runs[-1][1] and number == runs[-1][2]:
            runs[-1] = (runs[-1][0], runs[-1][1], number + 1)
        else:
            runs.append((place, number, number + 1))
    return runs
