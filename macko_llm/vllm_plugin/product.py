"""A packed product as one torch op, which decides how to multiply when it runs.

`Layout.linear` chooses by the number of tokens. Where a compiler traces it, as vLLM's does once for all numbers of tokens, it
would choose once. The op keeps the choice: for each number of tokens of which a CUDA graph is captured, and for each call
without one.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from macko_llm.format import MackoMatrix
from macko_llm.layouts.bitmap import BitmapMatrix
from macko_llm.layouts.canonical import Canonical
from macko_llm.layouts.layout import Layout
from macko_llm.layouts.sliced import SlicedMatrix
from macko_llm.layouts.strips import StripsMatrix
from macko_llm.layouts.tiled import TiledMatrix
from macko_llm.linear import MackoLinear
from macko_llm.packed_checkpoint import ARRAY_NAMES

_OF_ONE_BUFFER: dict[str, type[BitmapMatrix] | type[StripsMatrix] | type[SlicedMatrix] | type[TiledMatrix]] = {
    "bitmap": BitmapMatrix,
    "strips": StripsMatrix,
    "sliced": SlicedMatrix,
    "tiled": TiledMatrix,
}


class Description(NamedTuple):
    """A layout without its arrays, in what the schema of a torch op can carry, and in the order of `macko::product`.

    Attributes:
        layout: "canonical", or a key of `_OF_ONE_BUFFER`.
        dtype: of the values.
        numbers: (rows, cols) of canonical arrays, else the layout's own `numbers`.
        rows: of the dense matrix.
    """

    layout: str
    dtype: torch.dtype
    numbers: list[int]
    rows: int


def arrange(matrix: MackoMatrix, tokens: int) -> Layout:
    """A valid matrix in the layout that suits its device and products of so many tokens at a time (`layouts.choice`)."""
    layer = MackoLinear.from_matrix(matrix)
    layer.tokens = tokens
    layer.arrange()
    return layer.packed


def describe(layout: Layout) -> tuple[Description, dict[str, Tensor]]:
    """What `multiply` is to be told of a layout, and its arrays by name, in the order in which `multiply` takes them."""
    if isinstance(layout, Canonical):
        arrays = dict(zip(ARRAY_NAMES, (layout.values, layout.deltas, layout.row_offsets), strict=True))
        return Description("canonical", layout.dtype, list(layout.shape), layout.shape[0]), arrays
    for name, kind in _OF_ONE_BUFFER.items():
        if isinstance(layout, kind):
            return Description(name, layout.dtype, layout.numbers, layout.shape[0]), {"weight_layout": layout.data}
    raise TypeError(f"{type(layout).__name__} is no layout that an op can carry")


def multiply(x: Tensor, arrays: list[Tensor], description: Description, bias: Tensor | None) -> Tensor:
    """`Layout.linear` as one op: [..., cols] -> [..., rows] of x's dtype, without a gradient."""
    y: Tensor = torch.ops.macko.product(x, arrays, bias, *description)
    return y


_library = torch.library.Library("macko", "FRAGMENT")
_library.define(
    "product(Tensor x, Tensor[] arrays, Tensor? bias, str layout, ScalarType dtype, int[] numbers, SymInt rows) -> Tensor"
)


@torch.library.impl(_library, "product", "CompositeExplicitAutograd")
def _product_any(
    x: Tensor, arrays: list[Tensor], bias: Tensor | None, layout: str, dtype: torch.dtype, numbers: list[int], rows: int
) -> Tensor:
    del rows
    with torch.no_grad():
        return _layout(arrays, layout, dtype, numbers).linear(x, bias)


def _layout(arrays: list[Tensor], layout: str, dtype: torch.dtype, numbers: list[int]) -> Layout:
    if layout == "canonical":
        values, deltas, row_offsets = arrays
        return Canonical(values, deltas, row_offsets, (numbers[0], numbers[1]))
    return _OF_ONE_BUFFER[layout].from_numbers(arrays[0], dtype, numbers)


@torch.library.register_fake("macko::product")
def _product_fake(
    x: Tensor, arrays: list[Tensor], bias: Tensor | None, layout: str, dtype: torch.dtype, numbers: list[int], rows: int
) -> Tensor:
    del arrays, bias, layout, dtype, numbers
    return x.new_empty(*x.shape[:-1], rows)
