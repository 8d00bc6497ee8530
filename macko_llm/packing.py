"""Dense checkpoint to packed checkpoint, one tensor at a time."""

import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from macko_llm import checkpoint, models, outputs, refusals
from macko_llm.checkpoint import TensorInfo
from macko_llm.checkpoint_contents import check_dense, check_dtypes, linear_shapes, tensor_infos
from macko_llm.defaults import MAX_SHARD_SIZE
from macko_llm.dtypes import HEADERS, VALUE_DTYPES, VALUE_HEADERS
from macko_llm.errors import CheckpointError, UsageError
from macko_llm.pack_report import PackReport
from macko_llm.packed_writer import PackedWriter
from macko_llm.progress import Progress, no_progress
from macko_llm.shards import ShardWriter
from macko_llm.streaming import TensorReader, wait


def pack_checkpoint(
    source: Path,
    target: Path | None,
    *,
    dtype: str | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    overwrite: bool = False,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> PackReport:
    """Store a pruned checkpoint in the MACKO format.

    Args:
        source: folder of a dense checkpoint.
        target: folder to write; None writes nothing and only reports the sizes.
        dtype: "float16" or "bfloat16"; None keeps the dtype of 16-bit weights, and makes float32 what config.json says, if
            that has 16 bits, else float16.
        max_shard_size: largest safetensors file, such as "5GB".
        overwrite: replace a model that lies in `target`.
        device: where to pack, with the same result: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        trust_remote_code: run Python code that lies in `source`.
        progress: told of each tensor.

    Raises:
        UsageError: `source` is packed already, `target` would cost data, or there is no such device.
        CheckpointError: `source` is damaged, of a kind that cannot be packed, or too large for the device.
        NonFiniteError: weights hold NaN or infinity, or overflow the dtype.
    """
    started = time.perf_counter()
    shard_bytes = refusals.check_pack(source, target, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite)
    where = models.resolve_device(device)
    if where.type not in ("cpu", "cuda"):
        raise UsageError(f"There is no packing on {device}; use --device cpu.")
    skeleton = models.skeleton(source, trust_remote_code=trust_remote_code)
    linears = linear_shapes(skeleton)
    infos = dict(sorted(tensor_infos(source, skeleton).items(), key=lambda entry: checkpoint.natural_order(entry[0])))
    check_dense(linears, infos)
    check_dtypes(infos)
    value_dtype = dtype or own_value_dtype(
        {infos[f"{name}.weight"].dtype for name in linears}, checkpoint.read_config(source)
    )

    with ExitStack() as stack:
        partial = None if target is None else stack.enter_context(outputs.new_folder(target, overwrite=overwrite))
        writer = PackedWriter(linears, value_dtype, None if partial is None else ShardWriter(partial, shard_bytes))
        try:
            for number, (key, tensor) in enumerate(stack.enter_context(closing(_read_ahead(infos, where)))):
                progress("packing", number, len(infos))
                writer.add(key, tensor)
                del tensor  # before there is memory for another one
        except torch.OutOfMemoryError as error:
            raise CheckpointError(f"Packing {source} does not fit on {where}; use --device cpu.") from error
        progress("packing", len(infos), len(infos))
        report = writer.report() if partial is None else writer.finish(source, partial, skeleton)
    return replace(report, seconds=time.perf_counter() - started)


def own_value_dtype(stored: set[str], config: dict[str, Any]) -> str:
    """The dtype to pack a checkpoint in: the stored one where it has 16 bits, else what its config says, else float16."""
    for name in VALUE_DTYPES:
        if stored == {VALUE_HEADERS[name]}:
            return name
    own = str(config.get("dtype") or config.get("torch_dtype") or "")
    return own if own in VALUE_DTYPES else "float16"


def _read_ahead(infos: dict[str, TensorInfo], device: torch.device) -> Generator[tuple[str, Tensor], None, None]:
    """All tensors, on a device; while one is worked on, the next is read, and there are never more than these two."""
    reading: deque[tuple[str, Tensor, list[Future[None]]]] = deque()
    with TensorReader(device) as reader:
        for key, info in infos.items():
            tensor = torch.empty(info.shape, dtype=HEADERS[info.dtype], device=device)
            reading.append((key, tensor, reader.read(info, tensor)))
            if len(reading) > 1:
                yield _arrived(*reading.popleft())
        while reading:
            yield _arrived(*reading.popleft())


def _arrived(key: str, tensor: Tensor, reading: list[Future[None]]) -> tuple[str, Tensor]:
    wait(reading)
    return key, tensor
