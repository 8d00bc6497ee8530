"""Tensors from safetensors files into memory that is there already, on the CPU or a GPU, by a few threads.

Nothing is memory-mapped, so that no page of a file stays with the process, and a file that is overwritten later changes
nothing. For a GPU the bytes pass through a few pinned buffers that are used over and over.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType

import torch
from torch import Tensor

from macko_llm.checkpoint import TensorInfo
from macko_llm.dtypes import HEADERS
from macko_llm.errors import CheckpointError
from macko_llm.stages import stage

_THREADS = 4
_CHUNK_BYTES = 16 * 2**20


class TensorReader:
    """Fills tensors from files; a context manager whose end waits for whatever is still being read.

    Args:
        device: of all tensors that will be filled, the CPU or a CUDA GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="macko-read")
        self._device = device
        self._lanes: SimpleQueue[_Lane] = SimpleQueue()
        for _ in range(_THREADS):
            self._lanes.put(_Lane(device))

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def read(self, info: TensorInfo, target: Tensor) -> list[Future[None]]:
        """Begin to fill `target`, after the work that is queued for it on the current stream.

        Args:
            info: a tensor whose dtype is one of `dtypes.HEADERS`.
            target: a contiguous tensor of its shape, of any dtype, on the reader's device.

        Returns:
            What to wait for: `result()` of each raises CheckpointError if the file cannot be read. The data is there
            then, for work on any stream.
        """
        flat, count = target.detach().view(-1), _CHUNK_BYTES // HEADERS[info.dtype].itemsize
        free = torch.cuda.current_stream(self._device).record_event() if target.is_cuda else None
        return [
            self._pool.submit(self._read_chunk, info, first, flat[first : first + count], free)
            for first in range(0, len(flat), count)
        ]

    def _read_chunk(self, info: TensorInfo, first: int, target: Tensor, free: torch.cuda.Event | None) -> None:
        dtype = HEADERS[info.dtype]
        offset = info.offset + first * dtype.itemsize
        if free is None and target.dtype == dtype:
            _read(info.file, offset, target)
            return
        lane = self._lanes.get()  # there is one for each thread
        try:
            staged = lane.staging(dtype, len(target))
            _read(info.file, offset, staged)
            lane.deliver(staged, target, free)
        finally:
            self._lanes.put(lane)


class _Lane:
    """What one thread needs to bring bytes to a GPU or into another dtype: a buffer, and a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffer: Tensor | None = None

    def staging(self, dtype: torch.dtype, count: int) -> Tensor:
        if self._buffer is None:
            self._buffer = torch.empty(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=self._stream is not None)
        return self._buffer[: count * dtype.itemsize].view(dtype)

    def deliver(self, staged: Tensor, target: Tensor, free: torch.cuda.Event | None) -> None:
        """Copy to the target, converted where it is; the buffer may be filled again at once."""
        if self._stream is None or free is None:
            target.copy_(staged)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(free)
            if target.dtype != staged.dtype:
                staged = staged.to(target.device, non_blocking=True)
            target.copy_(staged, non_blocking=True)
        self._stream.synchronize()


@stage("reading")
def wait(futures: Sequence[Future[None]]) -> None:
    """Wait until all is read; raises CheckpointError."""
    for future in futures:
        future.result()


def _read(file: Path, offset: int, target: Tensor) -> None:
    """Fill a contiguous tensor on the CPU with the bytes of a file from an offset on."""
    memory = memoryview(target.view(torch.uint8).numpy().data)
    try:
        with file.open("rb", buffering=0) as stream:
            stream.seek(offset)
            while memory:
                count = stream.readinto(memory)
                if not count:
                    raise CheckpointError(
                        f"{file} is corrupt or truncated (it has shrunk); download or write the model again."
                    )
                memory = memory[count:]
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror}); download or write the model again."
        ) from error
