"""Random pruned weights for benchmarks, in every representation and in more copies than a cache holds."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from macko_llm import models
from macko_llm.defaults import LAYOUT, TOKENS_AT_A_TIME
from macko_llm.layouts import canonical
from macko_llm.linear import MackoLinear

MIN_COPIES = 2
MAX_COPIES = 256
PART_ELEMENTS = 2**24
"""Elements of a weight that are worked on at once where each needs many bytes more."""


@dataclass(frozen=True)
class WeightSets:
    """Different weights of one shape and sparsity; each method holds as many of them as fill its rotation.

    Attributes:
        dense: [rows, cols] each.
        csr: the same as sparse CSR tensors with int32 indices; empty where torch has no such product.
        packed: the same as packed layers.
    """

    dense: list[Tensor]
    csr: list[Tensor]
    packed: list[MackoLinear]


def make_weight_sets(
    shape: tuple[int, int],
    sparsity: float,
    dtype: torch.dtype,
    device: torch.device,
    *,
    csr_dtype: torch.dtype | None,
    rotation_bytes: int,
    layout: str = LAYOUT,
    tokens: int = TOKENS_AT_A_TIME,
    seed: int = 0,
) -> WeightSets:
    """Draw weights until each representation adds up to `rotation_bytes`, in MIN_COPIES to MAX_COPIES copies.

    Args:
        shape: (rows, cols).
        sparsity: from 0 to below 1.
        dtype: float16 or bfloat16.
        device: where the weights are made and stay.
        csr_dtype: of the CSR values, or None for no CSR.
        rotation_bytes: that each method's copies add up to.
        layout: of packed layers, see `MackoLinear`.
        tokens: that they are arranged for.
        seed: of the draw.
    """
    generator = torch.Generator(device).manual_seed(seed)
    sets = WeightSets([], [], [])

    def lacks(copies: list[Tensor] | list[MackoLinear]) -> bool:
        if len(copies) < MIN_COPIES:
            return True
        return len(copies) < MAX_COPIES and len(copies) * weight_bytes(copies[0]) < rotation_bytes

    while True:
        lacks_csr = csr_dtype is not None and lacks(sets.csr)
        lacks_dense, lacks_packed = lacks(sets.dense), lacks(sets.packed)
        if not (lacks_dense or lacks_csr or lacks_packed):
            return sets
        weight = random_pruned(shape, sparsity, dtype, generator)
        if lacks_dense:
            sets.dense.append(weight)
        if lacks_csr and csr_dtype is not None:
            sets.csr.append(to_csr(weight, csr_dtype))
        if lacks_packed:
            sets.packed.append(packed_layer(weight, layout, tokens))


def dense_in(copies: Sequence[Tensor], dtype: torch.dtype, rotation_bytes: int) -> list[Tensor]:
    """The same dense weights in another dtype, as many as still add up to `rotation_bytes`."""
    each = copies[0].numel() * dtype.itemsize
    return [weight.to(dtype) for weight in copies[: max(MIN_COPIES, -(-rotation_bytes // each))]]


def packed_in(layers: Sequence[MackoLinear], dtype: torch.dtype) -> list[MackoLinear]:
    """The same packed layers with values of another dtype."""
    return [packed_layer(layer.packed.dense().to(dtype)) for layer in layers]


def packed_layer(weight: Tensor, layout: str = LAYOUT, tokens: int = TOKENS_AT_A_TIME) -> MackoLinear:
    """What a model holds in place of a [rows, cols] weight, on the weight's device, arranged for a layout and tokens."""
    layer = MackoLinear.from_matrix(canonical.pack(weight))
    layer.layout, layer.tokens = layout, tokens
    layer.arrange()
    return layer


def layout_name(layer: MackoLinear) -> str:
    """The layout that a layer is arranged in, by the name of its file in `layouts`."""
    return type(layer.packed).__module__.rpartition(".")[2]


def in_layouts(
    shape: tuple[int, int],
    sparsity: float,
    dtype: torch.dtype,
    device: torch.device,
    layout: str,
    tokens: Sequence[int],
) -> list[list[int]]:
    """Numbers of tokens, those together for which a layer of this shape and sparsity is arranged in the same layout."""
    if len(tokens) == 1:
        return [[*tokens]]
    weight = random_pruned(shape, sparsity, dtype, torch.Generator(device).manual_seed(0))
    together: dict[str, list[int]] = {}
    for count in tokens:
        together.setdefault(layout_name(packed_layer(weight, layout, count)), []).append(count)
    return [*together.values()]


def random_pruned(
    shape: tuple[int, int], sparsity: float, dtype: torch.dtype, generator: torch.Generator, *, std: float = 1
) -> Tensor:
    """A normal [rows, cols] matrix with exactly int(cols * sparsity) zeros, at random places, in every row."""
    rows, cols = shape
    weight = torch.randn(rows, cols, dtype=dtype, device=generator.device, generator=generator).mul_(std)
    weight.masked_fill_(weight == 0, std)  # what rounded to zero
    zeros = int(cols * sparsity)
    for part in row_parts(weight):
        scores = torch.rand(part.shape, device=generator.device, generator=generator)
        part.scatter_(1, scores.topk(zeros, sorted=False).indices, 0)
    return weight


def row_parts(weight: Tensor) -> Iterator[Tensor]:
    """Views of consecutive rows, about PART_ELEMENTS elements each."""
    yield from weight.split(max(1, PART_ELEMENTS // weight.shape[1]))


def to_csr(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A sparse CSR tensor with int32 indices: half the index bytes of torch's own conversion."""
    csr = _quiet(weight.to_sparse_csr)
    indices = csr.crow_indices().int(), csr.col_indices().int()
    return torch.sparse_csr_tensor(*indices, csr.values().to(dtype), size=weight.shape, check_invariants=False)


def csr_product(x: Tensor, weight: Tensor) -> Tensor:
    """Y = x Wᵀ, [tokens, rows], for x [tokens, cols] and a sparse CSR W [rows, cols] of the same dtype."""
    if x.shape[0] == 1:
        return torch.mv(weight, x[0])[None]
    return torch.mm(weight, x.t()).t()


def scipy_csr(weight: Tensor) -> Any:
    """SciPy's matrix around the arrays of a sparse CSR tensor on the CPU; None where SciPy is not installed."""
    try:
        from scipy.sparse import csr_array
    except ModuleNotFoundError:
        return None
    arrays = weight.values(), weight.col_indices(), weight.crow_indices()
    return csr_array(tuple(array.numpy() for array in arrays), shape=tuple(weight.shape))


def scipy_product(x: Tensor, weight: Any) -> Tensor:
    """Y = x Wᵀ, [tokens, rows], like `csr_product`."""
    return (
        torch.from_numpy(weight @ x[0].numpy())[None]
        if x.shape[0] == 1
        else torch.from_numpy(weight @ x.t().numpy()).t()
    )


def csr_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype | None:
    """The dtype in which torch multiplies CSR here: `dtype`, else float32, else None."""
    for candidate in (dtype, torch.float32):
        weight, x = torch.eye(8, dtype=candidate, device=device), torch.ones(2, 8, dtype=candidate, device=device)
        try:
            for tokens in (1, 2):
                csr_product(x[:tokens], to_csr(weight, candidate))
        except RuntimeError:
            continue
        return candidate
    return None


def weight_bytes(weight: Tensor | MackoLinear) -> int:
    """Bytes of memory that one product reads of a weight."""
    if isinstance(weight, MackoLinear):
        return models.memory_bytes(weight)
    if weight.layout == torch.sparse_csr:
        return weight.crow_indices().nbytes + weight.col_indices().nbytes + weight.values().nbytes
    return weight.nbytes


def _quiet(convert: Callable[[], Tensor]) -> Tensor:
    """Without torch's warning that its CSR tensors are new."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        return convert()
