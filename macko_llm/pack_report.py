"""What a packed checkpoint takes: reports on its layers, on kinds of them, and on all of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from macko_llm.format import MackoMatrix
from macko_llm.layouts import canonical


@dataclass(frozen=True)
class LayerReport:
    """One linear layer of a packed checkpoint.

    Attributes:
        rows, cols: shape of the matrix.
        sparsity: share of zeros.
        entries: stored values; more than the nonzeros by the explicit zeros that bridge long gaps. 0 if it stays dense.
        bytes_dense, bytes_packed: size before, and as stored.
        packed: False where packing would have made it larger.
    """

    rows: int
    cols: int
    sparsity: float
    entries: int
    bytes_dense: int
    bytes_packed: int
    packed: bool


@dataclass(frozen=True)
class Rounding:
    """What storing weights in another dtype changed; nothing where they have that dtype already.

    Attributes:
        weights: how many have another value.
        zeros: how many of those became zero.
        largest: the largest relative change of the others.
        subnormal: how many of the others are too small for the dtype's full precision.
        tensors: how many hold such weights.
    """

    weights: int = 0
    zeros: int = 0
    largest: float = 0.0
    subnormal: int = 0
    tensors: int = 0

    def __add__(self, other: "Rounding") -> "Rounding":
        return Rounding(
            self.weights + other.weights,
            self.zeros + other.zeros,
            max(self.largest, other.largest),
            self.subnormal + other.subnormal,
            self.tensors + other.tensors,
        )


@dataclass(frozen=True)
class KindReport:
    """All layers of one place in a block, or several of them put together: how many, their sizes, their share of zeros."""

    layers: int
    bytes_dense: int
    bytes_packed: int
    sparsity: float


@dataclass(frozen=True)
class PackReport:
    """A packed checkpoint: `layers` are the linears of its blocks, byte counts and rounding are of all tensors."""

    value_dtype: str
    bytes_dense: int
    bytes_packed: int
    layers: dict[str, LayerReport]
    seconds: float
    rounding: Rounding = Rounding()

    @property
    def sparsity(self) -> float:
        """Share of zeros over all layers listed."""
        elements = sum(layer.rows * layer.cols for layer in self.layers.values())
        return sum(layer.sparsity * layer.rows * layer.cols for layer in self.layers.values()) / max(elements, 1)

    @property
    def kinds(self) -> dict[str, KindReport]:
        """The layers by what they are in a block: "self_attn.q_proj", and "mlp.experts.*.up_proj" of all experts."""
        groups: dict[str, list[LayerReport]] = {}
        for name, layer in self.layers.items():
            groups.setdefault(_kind(name), []).append(layer)
        return {kind: _kind_report(layers) for kind, layers in groups.items()}

    @property
    def kept_dense(self) -> list[str]:
        """Layers that packing would have made larger."""
        return [name for name, layer in self.layers.items() if not layer.packed]


def layer_report(values: Tensor, matrix: MackoMatrix | None) -> LayerReport:
    """Report on a packed matrix, or on a dense weight `values` where `matrix` is None."""
    rows, cols = matrix.shape if matrix else values.shape
    nonzeros = canonical.count_nonzeros(matrix) if matrix else int(torch.count_nonzero(values))
    bytes_dense = rows * cols * values.element_size()
    return LayerReport(
        rows=rows,
        cols=cols,
        sparsity=1 - nonzeros / max(rows * cols, 1),
        entries=int(matrix.row_offsets[-1]) if matrix else 0,
        bytes_dense=bytes_dense,
        bytes_packed=matrix.nbytes if matrix else bytes_dense,
        packed=matrix is not None,
    )


def _kind(name: str) -> str:
    """A layer's name behind its block's number, without other numbers."""
    parts = name.split(".")
    block = next((place for place, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join("*" if part.isdigit() else part for part in parts[block + 1 :])


def _kind_report(layers: Sequence[LayerReport]) -> KindReport:
    elements = sum(layer.rows * layer.cols for layer in layers)
    return KindReport(
        layers=len(layers),
        bytes_dense=sum(layer.bytes_dense for layer in layers),
        bytes_packed=sum(layer.bytes_packed for layer in layers),
        sparsity=sum(layer.sparsity * layer.rows * layer.cols for layer in layers) / elements,
    )
