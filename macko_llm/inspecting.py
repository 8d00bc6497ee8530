"""A look inside a packed checkpoint: whether it keeps the format, and what it holds."""

import time
from pathlib import Path

from macko_llm import checkpoint, refusals
from macko_llm.checkpoint_contents import packed_contents
from macko_llm.dtypes import CAST_HEADERS
from macko_llm.errors import NonFiniteError
from macko_llm.format import all_finite
from macko_llm.pack_report import LayerReport, PackReport, layer_report
from macko_llm.packed_checkpoint import ARRAY_NAMES, read_matrix
from macko_llm.progress import Progress, no_progress


def inspect_checkpoint(
    source: Path, *, trust_remote_code: bool = False, progress: Progress = no_progress
) -> PackReport:
    """Read a packed checkpoint, check every invariant of the format, and report what is inside.

    Raises:
        UsageError: `source` is not packed.
        CheckpointError: loading would refuse `source`, or a matrix breaks an invariant of the format.
        NonFiniteError: a tensor that is not packed holds NaN or infinity, which packing never writes.
    """
    started = time.perf_counter()
    refusals.require_packed(source)
    value_dtype, linears, infos = packed_contents(source, trust_remote_code)
    layers: dict[str, LayerReport] = {}
    bytes_dense = bytes_packed = 0
    for number, (key, tensor) in enumerate(checkpoint.tensors(infos)):
        progress("checking", number, len(infos))
        name, _, array = key.rpartition(".")
        bytes_packed += tensor.nbytes
        if array == ARRAY_NAMES[0]:
            matrix = read_matrix(name, linears[name], infos)
            layers[name] = layer_report(matrix.values, matrix)
            bytes_dense += layers[name].bytes_dense
        elif array not in ARRAY_NAMES:
            bytes_dense += tensor.nbytes
            if infos[key].dtype in CAST_HEADERS and not all_finite(tensor):
                raise NonFiniteError(f"{key} holds NaN or infinity; pack the model again, or download it again.")
            if name in linears and array == "weight":
                layers[name] = layer_report(tensor, None)
    progress("checking", len(infos), len(infos))
    ordered = {name: layers[name] for name in linears}
    return PackReport(value_dtype, bytes_dense, bytes_packed, ordered, time.perf_counter() - started)
