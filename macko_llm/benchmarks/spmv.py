"""One linear layer at a time: dense, CSR and packed, on weights that no cache holds, with their errors."""

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from macko_llm import models
from macko_llm.benchmarks import weights
from macko_llm.benchmarks.machine import Machine, describe_machine, is_out_of_memory, read_bandwidth
from macko_llm.benchmarks.timing import Timing, measure
from macko_llm.defaults import LAYOUT
from macko_llm.dtypes import VALUE_DTYPES, dtype_name
from macko_llm.errors import UsageError
from macko_llm.linear import MackoLinear
from macko_llm.progress import Progress, no_progress
from macko_llm.refusals import check_benchmark_dtype, check_layout

LLAMA_2_7B = ((4096, 4096), (11008, 4096), (4096, 11008), (12288, 4096), (22016, 4096))
"""(rows, cols) of attention, up, down, the fused q, k, v and the fused gate, up."""
SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TOKENS = {"cuda": (1, 2, 4, 8, 16, 32), "cpu": (1,)}
"""Of a device: on a CPU, more of them would take hours."""

CACHE_MULTIPLE = 6
"""A rotation's weights are at least this many times the GPU's L2, so that even a random replacement keeps nothing."""
CPU_ROTATION_BYTES = 512 * 2**20
DENSE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""In which dense is timed on a CPU, whose fastest differs from machine to machine."""


@dataclass(frozen=True)
class Conditions(Machine):
    """What the figures of a report depend on.

    Attributes:
        dtype: of weights and inputs, or several with commas between them.
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
        dtype: of the packed values and of the input.
        layout: of the packed layers, the name of its file in `layouts`.
        dense: `F.linear` in the same dtype, cuBLAS on a GPU.
        dense_others: on a CPU, dense in the others of DENSE_DTYPES.
        csr: torch's sparse CSR product, cuSPARSE on a GPU; None where torch has none.
        scipy: on a CPU, SciPy's CSR product in float32; None where SciPy is not installed.
        macko: the packed layer as models use it.
        bytes_moved: by macko: the packed weight, the input and the output, each once.
        gigabytes_per_second: bytes_moved / time of macko.
        read_gigabytes_per_second: the read bandwidth; on a CPU measured beside this case, for there it wanders.
        bandwidth_share: of that.
        speedup: time of dense / time of macko.
        speedup_over_fastest: the same with dense in its fastest dtype of those that were timed.
        notes: what a reader must know of this case, in sentences.
    """

    rows: int
    cols: int
    sparsity: float
    tokens: int
    dtype: str
    layout: str
    dense: Method
    dense_others: tuple[Method, ...]
    csr: Method | None
    scipy: Method | None
    macko: Method
    bytes_moved: int
    gigabytes_per_second: float
    read_gigabytes_per_second: float
    bandwidth_share: float
    speedup: float
    speedup_over_fastest: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Means:
    """Geometric means over the cases of one dtype; the fields are those of Case."""

    dtype: str
    bandwidth_share: float
    speedup: float
    speedup_over_fastest: float


@dataclass(frozen=True)
class SpmvReport:
    """All cases of one run."""

    conditions: Conditions
    cases: tuple[Case, ...]
    means: tuple[Means, ...]


@torch.inference_mode()
def measure_spmv(
    shapes: Sequence[tuple[int, int]] = LLAMA_2_7B,
    sparsities: Sequence[float] = SPARSITIES,
    tokens: Sequence[int] = (1,),
    *,
    layout: str = LAYOUT,
    dtypes: Sequence[str] = ("float16",),
    device: str = "auto",
    progress: Progress = no_progress,
) -> SpmvReport:
    """Time the product of random weights, every row of which has the same number of zeros (as Wanda leaves them).

    Args:
        shapes: (rows, cols).
        sparsities: each from 0 to below 1.
        tokens: rows of the input.
        layout: of packed layers on a GPU; "auto" is what a layer is arranged in that is told of so many tokens.
        dtypes: of the packed values, float16, bfloat16 or both.
        device: where to compute.
        progress: told of each case.

    Raises:
        UsageError: there is no such device, dtype or layout, or a weight does not fit on it.
    """
    for dtype in dtypes:
        check_benchmark_dtype(dtype)
    where = models.resolve_device(device)
    check_layout(layout, where.type)
    progress("measuring read bandwidth", 0, 1)
    conditions = _conditions(where, dtypes)
    total = len(shapes) * len(sparsities) * len(tokens) * len(dtypes)
    cases: list[Case] = []
    for rows, cols in shapes:
        for sparsity in sparsities:
            try:
                for case in _measure_matrix((rows, cols), sparsity, tokens, layout, dtypes, where, conditions):
                    cases.append(case)
                    progress("measuring products", len(cases), total)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise UsageError(
                    f"Several weights of {rows} x {cols} do not fit on {where}; use a smaller --shape or --tokens."
                ) from error
    return SpmvReport(conditions, tuple(cases), tuple(_means(dtype, cases) for dtype in dtypes))


def _measure_matrix(
    shape: tuple[int, int],
    sparsity: float,
    tokens: Sequence[int],
    layout: str,
    dtypes: Sequence[str],
    device: torch.device,
    conditions: Conditions,
) -> Iterator[Case]:
    """The cases of one matrix, which share its copies; a GPU holds those of one dtype and one layout at a time."""
    if device.type == "cpu":
        # What is not zero in float16 is not zero in any of the others either.
        drawn = "float16" if "float16" in dtypes else dtypes[0]
        yield from _measure_copies(shape, sparsity, tokens, layout, drawn, dtypes, device, conditions)
    else:
        for dtype in dtypes:
            for counts in weights.in_layouts(shape, sparsity, VALUE_DTYPES[dtype], device, layout, tokens):
                yield from _measure_copies(shape, sparsity, counts, layout, dtype, [dtype], device, conditions)


def _measure_copies(
    shape: tuple[int, int],
    sparsity: float,
    tokens: Sequence[int],
    layout: str,
    drawn: str,
    dtypes: Sequence[str],
    device: torch.device,
    conditions: Conditions,
) -> Iterator[Case]:
    """The cases of weights that are drawn in one dtype, and rounded to the others, in one layout."""
    rows, cols = shape
    csr_dtype = weights.csr_dtype(VALUE_DTYPES[drawn], device)
    rotation_bytes = conditions.rotation_bytes
    sets = weights.make_weight_sets(
        shape,
        sparsity,
        VALUE_DTYPES[drawn],
        device,
        csr_dtype=csr_dtype,
        rotation_bytes=rotation_bytes,
        layout=layout,
        tokens=tokens[0],
    )
    on_cpu = device.type == "cpu"
    dense_copies = {VALUE_DTYPES[drawn]: sets.dense}
    for other in DENSE_DTYPES if on_cpu else ():
        if other not in dense_copies:
            dense_copies[other] = weights.dense_in(sets.dense, other, rotation_bytes)
    packed_copies = {drawn: sets.packed}
    for name in dtypes:
        if name not in packed_copies:
            packed_copies[name] = weights.packed_in(sets.packed, VALUE_DTYPES[name])
    scipy_copies = [weights.scipy_csr(weight) for weight in sets.csr] if on_cpu and csr_dtype == torch.float32 else []
    generator = torch.Generator(device).manual_seed(1)
    for count in tokens:
        x = torch.randn(count, cols, dtype=VALUE_DTYPES[drawn], device=device, generator=generator)
        # The first weight is the same in all sets, so one reference serves all of a dtype.
        inputs = {dtype: x.to(dtype) for dtype in dense_copies}
        references = {dtype: _reference(inputs[dtype], copies[0]) for dtype, copies in dense_copies.items()}
        dense = {
            dtype: _method(_dense_product, copies, inputs[dtype], references[dtype], weights.weight_bytes(copies[0]))
            for dtype, copies in dense_copies.items()
        }
        csr = scipy = None
        if csr_dtype is not None:
            of_csr = x.to(csr_dtype), references[VALUE_DTYPES[drawn]], weights.weight_bytes(sets.csr[0])
            csr = _method(lambda weight, x: weights.csr_product(x, weight), sets.csr, *of_csr)
            if scipy_copies and scipy_copies[0] is not None:
                scipy = _method(lambda weight, x: weights.scipy_product(x, weight), scipy_copies, *of_csr)
        fastest = min(method.microseconds for method in dense.values())
        for name in dtypes:
            dtype, copies = VALUE_DTYPES[name], packed_copies[name]
            nbytes = weights.weight_bytes(copies[0])
            packed = _method(lambda layer, x: layer(x), copies, inputs[dtype], references[dtype], nbytes)
            moved = nbytes + (rows + cols) * count * dtype.itemsize
            speed = moved / packed.microseconds / 1e3
            read = read_bandwidth(device) if on_cpu else conditions.read_gigabytes_per_second
            methods = {"dense": dense[dtype], "CSR": csr, "macko": packed}
            yield Case(
                rows=rows,
                cols=cols,
                sparsity=sparsity,
                tokens=count,
                dtype=name,
                layout=weights.layout_name(copies[0]),
                dense=dense[dtype],
                dense_others=tuple(method for other, method in dense.items() if other != dtype),
                csr=csr,
                scipy=scipy,
                macko=packed,
                bytes_moved=moved,
                gigabytes_per_second=speed,
                read_gigabytes_per_second=read,
                bandwidth_share=speed / read,
                speedup=dense[dtype].microseconds / packed.microseconds,
                speedup_over_fastest=fastest / packed.microseconds,
                notes=(*_notes(methods, name, conditions), *_notes_on_layout(copies[0], inputs[dtype])),
            )


def _dense_product(weight: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, weight)


def _means(dtype: str, cases: Sequence[Case]) -> Means:
    own = [case for case in cases if case.dtype == dtype]
    return Means(
        dtype,
        bandwidth_share=statistics.geometric_mean(case.bandwidth_share for case in own),
        speedup=statistics.geometric_mean(case.speedup for case in own),
        speedup_over_fastest=statistics.geometric_mean(case.speedup_over_fastest for case in own),
    )


def _method(
    product: Callable[[Any, Tensor], Tensor], copies: Sequence[Any], x: Tensor, reference: Tensor, nbytes: int
) -> Method:
    error = (product(copies[0], x).double() - reference).norm() / reference.norm()
    rotation = [functools.partial(product, weight, x) for weight in copies]
    return Method(
        timing=measure(rotation, x.device),
        nbytes=nbytes,
        copies=len(copies),
        relative_error=error.item(),
        dtype=dtype_name(x.dtype),
    )


def _reference(x: Tensor, weight: Tensor) -> Tensor:
    """The product in float64, [tokens, rows]."""
    return torch.cat([x.double() @ part.double().t() for part in weights.row_parts(weight)], dim=1)


def _notes(methods: dict[str, Method | None], dtype: str, conditions: Conditions) -> Iterator[str]:
    for name, method in methods.items():
        if method is None:
            yield f"torch has no {name} product for {dtype} here, so it is left out."
            continue
        if method.dtype != dtype:
            yield f"{name} is timed in {method.dtype}, because torch has no such product for {dtype} here."
        if method.timing.graph_failure:
            yield f"{name} is timed without a CUDA graph, gaps between launches included: {method.timing.graph_failure}."
        if method.copies * method.nbytes < conditions.rotation_bytes:
            yield f"Small shapes: {weights.MAX_COPIES} weights are fewer bytes than keep them out of the caches."


def _notes_on_layout(layer: MackoLinear, x: Tensor) -> Iterator[str]:
    few = layer.packed.few_tokens(x.dtype)
    if len(x) > few:
        yield f"A {weights.layout_name(layer)} layer is unpacked to multiply more than {few} tokens, which its time includes."


def _conditions(device: torch.device, dtypes: Sequence[str]) -> Conditions:
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else None
    rotation_bytes = CPU_ROTATION_BYTES
    if l2_bytes is not None:
        # Three methods share the memory, and making weights needs room too.
        rotation_bytes = min(CACHE_MULTIPLE * l2_bytes, torch.cuda.mem_get_info(device)[0] // 8)
    machine = asdict(describe_machine(device))
    return Conditions(**machine, dtype=",".join(dtypes), l2_bytes=l2_bytes, rotation_bytes=rotation_bytes)
