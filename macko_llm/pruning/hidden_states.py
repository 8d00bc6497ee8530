"""The hidden states between two blocks, of all calibration sequences: in one buffer, which each block writes over."""

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from macko_llm.errors import CheckpointError

_SHARE = 0.5  # of the memory that is free, which the buffer takes at most where nobody has said where it shall be
STATES_FILE = "hidden-states.part"


class HiddenStates:
    """Hidden states [nsamples, seqlen, hidden size], given and taken a sequence at a time, [1, seqlen, hidden size].

    Args:
        count: calibration sequences.
        first: the first of them, [1, seqlen, hidden size], on the device where blocks run; others must be like it.
        place: "device", "host", "disk", or "auto": the first of these with room for them.
        folder: for the file of "disk"; where there is none, "auto" does without.

    Raises:
        CheckpointError: they do not fit there.
    """

    def __init__(self, count: int, first: Tensor, place: str, folder: Path | None) -> None:
        shape = (count, *first.shape[1:])
        self._device = first.device
        if place == "auto":
            place = _place(count * first.nbytes, self._device, folder)
        try:
            if place == "disk" and folder is not None:
                self._buffer = _on_disk(shape, first.dtype, folder / STATES_FILE)
            elif place == "device":
                self._buffer = torch.empty(shape, dtype=first.dtype, device=self._device)
            else:
                self._buffer = torch.empty(shape, dtype=first.dtype, pin_memory=self._device.type == "cuda")
        except (RuntimeError, OSError) as error:
            raise CheckpointError(
                f"The hidden states of {count} sequences take {count * first.nbytes / 1e9:.1f} GB, for which there is no room "
                f"on the {place}; use another of --hidden-states, or a smaller --nsamples."
            ) from error

    def __len__(self) -> int:
        return len(self._buffer)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Tensor:
        return self._buffer[index : index + 1].to(self._device, non_blocking=True)

    def __setitem__(self, index: int, states: Tensor) -> None:
        place = self._buffer[index : index + 1]
        if states.shape != place.shape or states.dtype != place.dtype:
            raise CheckpointError(
                f"A block makes {states.dtype} {list(states.shape)} of {place.dtype} {list(place.shape)}, which is not "
                "supported; use a model whose blocks pass on hidden states of one kind."
            )
        # Later work on the same stream reads it only after it has arrived.
        place.copy_(states, non_blocking=place.is_pinned())


Maker = Callable[[int, Tensor], HiddenStates]
"""(calibration sequences, the first of them) -> room for all."""


def _place(nbytes: int, device: torch.device, folder: Path | None) -> str:
    if device.type == "cuda" and nbytes <= _SHARE * torch.cuda.mem_get_info(device)[0]:
        return "device"
    return "disk" if folder is not None and nbytes > _SHARE * _free_bytes() else "host"


def _free_bytes() -> float:
    """Of host memory; infinite where the system does not tell."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    return math.inf


def _on_disk(shape: tuple[int, ...], dtype: torch.dtype, file: Path) -> Tensor:
    count = torch.Size(shape).numel()
    try:
        with file.open("wb") as stream:
            if sys.platform == "linux":  # writing to a mapped file that finds no room ends a process without a word
                os.posix_fallocate(stream.fileno(), 0, count * dtype.itemsize)
            else:
                stream.truncate(count * dtype.itemsize)
        return torch.from_file(str(file), shared=True, size=count, dtype=dtype).view(shape)
    finally:
        if sys.platform != "win32":
            file.unlink(missing_ok=True)  # gone when the buffer is, however the process ends
