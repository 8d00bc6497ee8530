"""One linear layer at a time: dense, CSR and packed, on weights that no cache holds, with their errors."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from macko_llm import models
from macko_llm.benchmarks import weights
from macko_llm.benchmarks.machine import Machine, describe_machine, is_out_of_memory
from macko_llm.benchmarks.timing import Timing, measure
from macko_llm.dtypes import VALUE_DTYPES
from macko_llm.errors import UsageError
from macko_llm.linear import MackoLinear
from macko_llm.progress import Progress, no_progress
from macko_llm.refusals import check_benchmark_dtype

LLAMA_2_7B = ((4096, 4096), (11008, 4096), (4096, 11008), (12288, 4096), (22016, 4096))
"""(rows, cols) of attention, up, down, the fused q, k, v and the fused gate, up."""
SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TOKENS = (1,)

CACHE_MULTIPLE = 6
"""A rotation's weights are at least this many times the GPU's L2, so that even a random replacement keeps nothing."""
CPU_ROTATION_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Conditions(Machine):
    """What the figures of a report depend on.

    Attributes:
        dtype: of weights and inputs.
        l2_bytes: of the GPU.
        rotation_bytes: what each method's weights add up to at least.
    """

    dtype: str
    l2_bytes: int | None
    rotation_bytes: int


@dataclass(frozen=True)
class Method:
    """One way to compute the product.

    Attributes:
        timing: of one product.
        nbytes: of one weight in memory.
        copies: of the weight, different ones, that the launches go round.
        relative_error: ||y - ref|| / ||ref|| with ref in float64 from the same 16-bit weights and inputs.
        dtype: of its weights and inputs.
    """

    timing: Timing
    nbytes: int
    copies: int
    relative_error: float
    dtype: str

    @property
    def microseconds(self) -> float:
        """Of one product."""
        return self.timing.microseconds


@dataclass(frozen=True)
class Case:
    """One shape, sparsity and number of tokens.

    Attributes:
        rows, cols: of the weight.
        sparsity: share of zeros asked for; every row has exactly int(cols * sparsity).
        tokens: the input is [tokens, cols].
        dense: `F.linear`, cuBLAS on a GPU.
        csr: torch's sparse CSR product, cuSPARSE on a GPU; None where torch has none.
        macko: the packed layer as models use it.
        bytes_moved: by macko: the packed weight, the input and the output, each once.
        gigabytes_per_second: bytes_moved / time of macko.
        bandwidth_share: of the read bandwidth.
        speedup: time of dense / time of macko.
        notes: what a reader must know of this case, in sentences.
    """

    rows: int
    cols: int
    sparsity: float
    tokens: int
    dense: Method
    csr: Method | None
    macko: Method
    bytes_moved: int
    gigabytes_per_second: float
    bandwidth_share: float
    speedup: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class SpmvReport:
    """All cases of one run."""

    conditions: Conditions
    cases: tuple[Case, ...]


@torch.inference_mode()
def measure_spmv(
    shapes: Sequence[tuple[int, int]] = LLAMA_2_7B,
    sparsities: Sequence[float] = SPARSITIES,
    tokens: Sequence[int] = TOKENS,
    *,
    dtype: str = "float16",
    device: str = "auto",
    progress: Progress = no_progress,
) -> SpmvReport:
    """Time the product of random weights, every row of which has the same number of zeros (as Wanda leaves them).

    Args:
        shapes: (rows, cols).
        sparsities: each from 0 to below 1.
        tokens: rows of the input.
        dtype: float16 or bfloat16.
        device: where to compute.
        progress: told of each case.

    Raises:
        UsageError: there is no such device or dtype, or a weight does not fit on it.
    """
    check_benchmark_dtype(dtype)
    where = models.resolve_device(device)
    progress("measuring read bandwidth", 0, 1)
    conditions = _conditions(where, dtype)
    total = len(shapes) * len(sparsities) * len(tokens)
    cases: list[Case] = []
    for rows, cols in shapes:
        for sparsity in sparsities:
            try:
                for case in _measure_matrix((rows, cols), sparsity, tokens, where, conditions):
                    cases.append(case)
                    progress("measuring products", len(cases), total)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise UsageError(
                    f"Several weights of {rows} x {cols} do not fit on {where}; use a smaller --shape or --tokens."
                ) from error
    return SpmvReport(conditions, tuple(cases))


def _measure_matrix(
    shape: tuple[int, int], sparsity: float, tokens: Sequence[int], device: torch.device, conditions: Conditions
) -> Iterator[Case]:
    """The cases of one matrix; all of them share its copies."""
    rows, cols = shape
    dtype = VALUE_DTYPES[conditions.dtype]
    csr_dtype = weights.csr_dtype(dtype, device)
    sets = weights.make_weight_sets(
        shape, sparsity, dtype, device, csr_dtype=csr_dtype, rotation_bytes=conditions.rotation_bytes
    )
    generator = torch.Generator(device).manual_seed(1)
    for count in tokens:
        x = torch.randn(count, cols, dtype=dtype, device=device, generator=generator)
        # The first weight is the same in all sets, so one reference serves all.
        reference = _reference(x, sets.dense[0])
        dense = _method(lambda weight, x: F.linear(x, weight), sets.dense, x, reference)
        packed = _method(lambda layer, x: layer(x), sets.packed, x, reference)
        csr = None
        if csr_dtype is not None:
            csr = _method(lambda weight, x: weights.csr_product(x, weight), sets.csr, x.to(csr_dtype), reference)
        moved = packed.nbytes + (rows + cols) * count * dtype.itemsize
        speed = moved / packed.microseconds / 1e3
        yield Case(
            rows=rows,
            cols=cols,
            sparsity=sparsity,
            tokens=count,
            dense=dense,
            csr=csr,
            macko=packed,
            bytes_moved=moved,
            gigabytes_per_second=speed,
            bandwidth_share=speed / conditions.read_gigabytes_per_second,
            speedup=dense.microseconds / packed.microseconds,
            notes=tuple(_notes({"dense": dense, "CSR": csr, "macko": packed}, conditions)),
        )


def _method(
    product: Callable[[Any, Tensor], Tensor], copies: Sequence[Tensor | MackoLinear], x: Tensor, reference: Tensor
) -> Method:
    error = (product(copies[0], x).double() - reference).norm() / reference.norm()
    rotation = [functools.partial(product, weight, x) for weight in copies]
    return Method(
        timing=measure(rotation, x.device),
        nbytes=weights.weight_bytes(copies[0]),
        copies=len(copies),
        relative_error=error.item(),
        dtype=str(x.dtype).removeprefix("torch."),
    )


def _reference(x: Tensor, weight: Tensor) -> Tensor:
    """The product in float64, [tokens, rows]."""
    return torch.cat([x.double() @ part.double().t() for part in weights.row_parts(weight)], dim=1)


def _notes(methods: dict[str, Method | None], conditions: Conditions) -> Iterator[str]:
    for name, method in methods.items():
        if method is None:
            yield f"torch has no {name} product for {conditions.dtype} here, so it is left out."
            continue
        if method.dtype != conditions.dtype:
            yield f"{name} is timed in {method.dtype}, because torch has no such product for {conditions.dtype} here."
        if method.timing.graph_failure:
            yield f"{name} is timed without a CUDA graph, gaps between launches included: {method.timing.graph_failure}."
        if method.copies * method.nbytes < conditions.rotation_bytes:
            yield f"Small shapes: {weights.MAX_COPIES} weights are fewer bytes than keep them out of the caches."


def _conditions(device: torch.device, dtype: str) -> Conditions:
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else None
    rotation_bytes = CPU_ROTATION_BYTES
    if l2_bytes is not None:
        # Three methods share the memory, and making weights needs room too.
        rotation_bytes = min(CACHE_MULTIPLE * l2_bytes, torch.cuda.mem_get_info(device)[0] // 8)
    machine = asdict(describe_machine(device))
    return Conditions(**machine, dtype=dtype, l2_bytes=l2_bytes, rotation_bytes=rotation_bytes)
