"""Writing safetensors shards tensor by tensor: nothing is held in memory, and a job that was cut off can go on."""

import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BufferedRandom
from pathlib import Path
from typing import Any, BinaryIO

import torch

from macko_llm.checkpoint import INDEX_FILE, LENGTH_BYTES, WEIGHTS_FILE, TensorInfo, write_json
from macko_llm.dtypes import HEADERS
from macko_llm.errors import CheckpointError
from macko_llm.stages import stage

_HEADER_NAMES = {dtype: header for header, dtype in HEADERS.items()}
_METADATA = {"format": "pt"}  # transformers reads no shard without it
# The order in which safetensors writes dtypes, so that a file is the same whoever writes it.
_DTYPE_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL")
_COPY_BYTES = 2**20  # stays in a core's cache; new memory for each part would take longer than the copy
_STAGED_BYTES = 16 * 2**20  # of pinned memory, through which tensors come from a GPU
_THREADS = 4


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that has been written: the number of its shard, and its entry in that shard's header."""

    shard: int
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class ShardWriter:
    """Writes tensors to safetensors shards of a folder, byte for byte as safetensors does.

    Tensors are appended to a file without a header, and put in order when all are there: a few shards at a time, which lie on
    the disk twice for that long.

    Args:
        folder: where the shards go.
        max_shard_bytes: a shard ends before its tensors would pass this size (a larger single tensor gets its own).
        written: `state()` of a writer of the same folder that was cut off; what that had written later is overwritten.

    Raises:
        CheckpointError: a file cannot be written, or a tensor has a dtype that no checkpoint here has.
        KeyError, TypeError, ValueError: `written` is no such state, or lacks its files.
    """

    def __init__(self, folder: Path, max_shard_bytes: int, written: Mapping[str, Any] | None = None) -> None:
        self._folder = folder
        self._max_shard_bytes = max_shard_bytes
        self._tensors = {name: _stored(entry) for name, entry in (written or {}).items()}
        self._shard = max((stored.shard for stored in self._tensors.values()), default=1)
        self._check_there()
        self._end = max((stored.end for stored in self._tensors.values() if stored.shard == self._shard), default=0)
        self._staging: torch.Tensor | None = None

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors so far."""
        return sum(stored.end - stored.begin for stored in self._tensors.values())

    @stage("writing")
    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor, on the CPU or not; from a GPU it takes no host memory to speak of."""
        if self._end and self._end + tensor.nbytes > self._max_shard_bytes:
            self._shard, self._end = self._shard + 1, 0
        data = tensor.detach().contiguous()
        if data.dtype not in _HEADER_NAMES:
            raise CheckpointError(f"{name} is {data.dtype}, which cannot be written; use a model of ordinary dtypes.")
        entry = StoredTensor(
            self._shard, _HEADER_NAMES[data.dtype], tuple(data.shape), self._end, self._end + data.nbytes
        )
        self._write(entry, data)
        self._tensors[name] = entry
        self._end = entry.end

    @stage("writing")
    def replace(self, name: str, tensor: torch.Tensor) -> None:
        """Write over a tensor, with one of its shape and dtype."""
        entry, data = self._tensors[name], tensor.detach().contiguous()
        if (_HEADER_NAMES.get(data.dtype), tuple(data.shape)) != (entry.dtype, entry.shape):
            raise ValueError(f"{name} is {entry.dtype} {list(entry.shape)}, not {data.dtype} {list(data.shape)}")
        self._write(entry, data)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def state(self) -> dict[str, Any]:
        """What has been written, as JSON has it."""
        return {name: asdict(stored) for name, stored in self._tensors.items()}

    def info(self, name: str) -> TensorInfo:
        """Where a tensor that has been written lies, until the shards are closed."""
        stored = self._tensors[name]
        return TensorInfo(self._path(stored.shard), stored.dtype, stored.shape, stored.begin)

    @stage("saving")
    def close(self, **metadata: Any) -> None:
        """Write the shards under their final names, and the index, with more metadata, if there is more than one."""
        files = {
            number: WEIGHTS_FILE if self._shard == 1 else f"model-{number:05d}-of-{self._shard:05d}.safetensors"
            for number in range(1, self._shard + 1)
        }
        with _plain_errors():
            with ThreadPoolExecutor(_THREADS, thread_name_prefix="macko-write") as pool:
                for _ in pool.map(self._put_in_order, files.keys(), files.values()):
                    pass  # raises what went wrong
            if len(files) > 1:
                weight_map = {name: files[stored.shard] for name, stored in sorted(self._tensors.items())}
                index = {"metadata": {**metadata, "total_size": self.total_bytes}, "weight_map": weight_map}
                write_json(self._folder / INDEX_FILE, index)

    def _write(self, entry: StoredTensor, data: torch.Tensor) -> None:
        with _plain_errors(), self._open(entry.shard) as file:
            file.seek(entry.begin)
            for part in self._on_host(data.reshape(-1).view(torch.uint8)):
                file.write(memoryview(part.numpy().data))

    def _on_host(self, data: torch.Tensor) -> Iterator[torch.Tensor]:
        """Flat bytes, part after part, each to be used before the next one is asked for."""
        if not data.is_cuda:
            yield data.cpu()
            return
        if self._staging is None:
            self._staging = torch.empty(_STAGED_BYTES, dtype=torch.uint8, pin_memory=True)
        for part in data.split(_STAGED_BYTES):
            yield self._staging[: len(part)].copy_(part)

    def _check_there(self) -> None:
        """Raise ValueError unless what has been written is in the files."""
        ends: dict[int, int] = {}
        for stored in self._tensors.values():
            ends[stored.shard] = max(ends.get(stored.shard, 0), stored.end)
        closing = any(self._folder.glob("model*.safetensors"))
        for number, end in ends.items():
            path = self._path(number)
            if path.stat().st_size < end if path.is_file() else not closing:
                raise ValueError(f"{path} lacks what was written")

    def _put_in_order(self, number: int, file: str) -> None:
        if (self._folder / file).exists() and not self._path(number).exists():
            return  # a call that was cut off later has been here
        tensors = [(name, stored) for name, stored in self._tensors.items() if stored.shard == number]
        tensors.sort(key=lambda entry: (_DTYPE_ORDER.index(entry[1].dtype), entry[0]))
        header: dict[str, Any] = {"__metadata__": _METADATA}
        end = 0
        for name, stored in tensors:
            begin, end = end, end + stored.end - stored.begin
            header[name] = {"dtype": stored.dtype, "shape": list(stored.shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text = text.ljust(-(-len(text) // LENGTH_BYTES) * LENGTH_BYTES)
        with self._open(number) as source, (self._folder / file).open("wb") as target:
            buffer = memoryview(bytearray(_COPY_BYTES))
            target.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
            for _, stored in tensors:
                source.seek(stored.begin)
                _copy(source, target, stored.end - stored.begin, buffer)
        self._path(number).unlink()

    def _open(self, number: int) -> BufferedRandom:
        """A shard, to write anywhere in it; what is there stays."""
        return os.fdopen(os.open(self._path(number), os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b")

    def _path(self, number: int) -> Path:
        return self._folder / f"shard-{number:05d}.part"


def _copy(source: BufferedRandom, target: BinaryIO, count: int, buffer: memoryview) -> None:
    while count:
        read = source.readinto(buffer[:count])
        if not read:
            raise OSError(f"{source.name} has shrunk")
        target.write(buffer[:read])
        count -= read


def _stored(entry: Mapping[str, Any]) -> StoredTensor:
    stored = StoredTensor(**{**entry, "shape": tuple(entry["shape"])})
    numbers = (stored.shard, stored.begin, stored.end, *stored.shape)
    if stored.dtype not in _DTYPE_ORDER or not all(type(number) is int for number in numbers):
        raise TypeError("no entry of a tensor")
    return stored


@contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"A shard could not be written ({error}); free some space on the disk.") from error
