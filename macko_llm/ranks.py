"""Processes that run one model together, each with its slices of the weights: what they say to each other.

Every process has a rank, 0 the first. All of them compute the same hidden states; only the inside of an attention and of an
MLP is shared out (`tensor_parallel.py`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from macko_llm.errors import MackoError, UsageError
from macko_llm.refusals import check_device_of_processes

Result = TypeVar("Result")


@dataclass(frozen=True)
class Place:
    """Which of the processes this one is.

    Attributes:
        rank: 0, 1, ...
        size: how many there are.
        local_rank: the rank among those of this machine, which is the number of its GPU.
        meeting: a file by which they find each other, removed afterwards by who made it; None where torchrun has told them.
        local_size: how many there are on this machine; None if all are.
    """

    rank: int
    size: int
    local_rank: int
    meeting: Path | None = None
    local_size: int | None = None

    def share(self, count: int) -> slice:
        """The part of so many rows or columns, a multiple of the size, that is this process's."""
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)


@contextmanager
def joined(place: Place, device: str) -> Iterator[torch.device]:
    """While this lasts, this process and the others of its size are one group, by NCCL on GPUs and by gloo on CPUs.

    Args:
        place: of this process.
        device: "auto" (a GPU each if there is one), "cpu" or "cuda".

    Returns:
        The device of this process.

    Raises:
        UsageError: another device, or fewer GPUs than processes on this machine.
    """
    own = _device(place, device)
    store = None if place.meeting is None else dist.FileStore(str(place.meeting), place.size)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo", store=store, rank=place.rank, world_size=place.size
    )
    yield own
    dist.destroy_process_group()  # not after an error: the others would tell of a lost connection instead


def together(work: Callable[[], Result]) -> Result:
    """What `work()` gives in this process, once all have done it; it must not wait for others itself.

    Raises:
        MackoError: in every process, what it raised in the first where it raised one, or in words what else it raised.
    """
    result: Any = None
    error: MackoError | None = None
    try:
        result = work()
    except MackoError as refusal:
        error = refusal
    except Exception as failure:
        reason = ": ".join([type(failure).__name__, *str(failure).strip().splitlines()[:1]])
        error = MackoError(
            f"Process {dist.get_rank()} of {dist.get_world_size()} failed ({reason}); see `macko doctor`."
        )
    for told in gathered(error):
        if told is not None:
            raise told
    return result


def gathered(value: Result) -> list[Result]:
    """What each process passes, by rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def take_from_first(tensor: Tensor) -> Tensor:
    """The tensor of rank 0, in memory of its own; of the same shape, dtype and kind of device everywhere."""
    tensor = tensor.clone()
    dist.broadcast(tensor, 0)
    return tensor


class SummedLinear(nn.Module):
    """y = x Wᵀ + b, of which each process has the columns of W that belong to its part of x.

    Args:
        part: a linear layer of these columns, without a bias.
        bias: b, [out_features], or None.
        share: what of x is this process's; None where it gets only that.
    """

    def __init__(self, part: nn.Module, bias: Tensor | None, share: slice | None = None) -> None:
        super().__init__()
        self.part = part
        self.bias: Tensor | None
        self.register_buffer("bias", bias, persistent=False)
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features, or this process's part of them] -> [..., out_features], the same in all processes."""
        y: Tensor = self.part(x if self.share is None else x[..., self.share]).contiguous()
        dist.all_reduce(y)
        return y if self.bias is None else y + self.bias


class GatheredLinear(nn.Module):
    """y = x Wᵀ + b, of which each process has some rows of W and of b, and all get all of y.

    Args:
        part: a linear layer of these rows, the same number in each process.
    """

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], the same in all processes."""
        part: Tensor = self.part(x).contiguous()
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part)
        return torch.cat(parts, dim=-1)


def is_sliced(model: nn.Module) -> bool:
    """Whether other processes hold the rest of the model."""
    return any(isinstance(module, SummedLinear | GatheredLinear) for module in model.modules())


def _device(place: Place, device: str) -> torch.device:
    check_device_of_processes(device)
    gpus = torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and not gpus):
        return torch.device("cpu")
    if not gpus:
        raise UsageError("There is no GPU here; use --device cpu.")
    needed = place.size if place.local_size is None else place.local_size
    if needed > gpus:  # said in all processes, not just in those without one
        there = "There is 1 GPU" if gpus == 1 else f"There are {gpus} GPUs"
        raise UsageError(f"{there} here, and {needed} processes need one each; use --device cpu, or fewer processes.")
    return torch.device("cuda", place.local_rank)
