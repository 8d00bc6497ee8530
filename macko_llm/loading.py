"""Loading a model for inference: its weights stream from their files to their device and into their layout.

transformers makes the model, compares the files with it, and sets all that a model knows of itself, with every weight on
the meta device. Then each tensor is read straight to where it stays. The canonical arrays of packed layers, which a GPU
does not keep, take turns in the same memory: there is never more than the model and the arrays of a few layers.
"""

import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from macko_llm import checkpoint, models
from macko_llm.defaults import LAYOUT, TOKENS_AT_A_TIME
from macko_llm.gaps import Gap, find_gaps, move_buffers
from macko_llm.linear import MackoLinear, arrange_group
from macko_llm.packed_checkpoint import ARRAY_NAMES, array_keys
from macko_llm.refusals import require_packed
from macko_llm.streaming import TensorReader, wait
from macko_llm.transformers_integration import MackoConfig, layer_groups

_GROUPS_AT_A_TIME = 2  # one is read while the one before it is arranged
_ALIGNMENT = 256  # bytes, of arrays that share memory
_alone = threading.RLock()  # transformers changes what all threads share while it makes a model


def load(
    path: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    layout: str = LAYOUT,
    tokens: int = TOKENS_AT_A_TIME,
) -> PreTrainedModel:
    """Load a causal language model, dense or packed, ready for inference.

    Args:
        path: a folder or a hub id.
        dtype: "auto" (the checkpoint's), "float16", "bfloat16" or "float32". Packed values keep theirs, but for "bfloat16"
            on a CPU, which multiplies those faster.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        trust_remote_code: run Python code that lies in the folder.
        layout: of packed weights on a GPU: "sliced" (for one token at a time), "tiled" (for several) or "auto" (by `tokens`).
        tokens: that packed layers will mostly multiply at a time: the texts of a batch.

    Threads that call it at once wait for each other.

    Raises:
        CheckpointError: the model is missing, incomplete, corrupt, or not a causal language model.
        UsageError: unknown dtype, device or layout, tokens below 1, a dtype that the packed values cannot serve, or a layout
            for a model that is not packed.
    """
    config = MackoConfig(layout=layout, tokens=tokens)
    folder = checkpoint.locate(path)
    torch_device = models.resolve_device(device)
    stored_as = checkpoint.quantization_method(folder)
    if layout != LAYOUT:
        require_packed(folder)
    held = config if stored_as == checkpoint.QUANT_METHOD else None
    with _alone:
        if torch_device.type in ("cpu", "cuda") and stored_as in (None, checkpoint.QUANT_METHOD):
            model = _stream(folder, dtype, torch_device, trust_remote_code, held)
            if model is not None:
                return model
        return models.load_model(
            folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code, quantization_config=held
        )


def _stream(
    folder: Path, dtype: str, device: torch.device, trust_remote_code: bool, config: MackoConfig | None
) -> PreTrainedModel | None:
    """The model with its weights; None where `find_gaps` knows no way to read them one by one."""
    model = models.load_empty(folder, dtype=dtype, trust_remote_code=trust_remote_code, quantization_config=config)
    if device.type == "cpu" and dtype == "bfloat16":
        hold_bfloat16(model)
    gaps = find_gaps(model, folder)
    if gaps is None:
        return None
    with models.plain_errors(folder, device), torch.no_grad():
        _fill(model, gaps, device)
    return model


def hold_bfloat16(model: PreTrainedModel) -> None:
    """Have the packed layers of a model without weights read their values as bfloat16: none of float16's becomes zero."""
    for layer in model.modules():
        if isinstance(layer, MackoLinear):
            layer.weight_values = nn.Parameter(layer.weight_values.to(torch.bfloat16), requires_grad=False)
            model.config.quantization_config.value_dtype = "bfloat16"  # what is saved says so


@dataclass(frozen=True)
class _Group:
    """Packed layers that are arranged together, by name, and the arrays that they lack."""

    layers: dict[str, MackoLinear]
    arrays: list[Gap]

    @property
    def nbytes(self) -> int:
        """Bytes of memory in which the arrays lie one after the other."""
        return sum(_aligned(array.nbytes) for array in self.arrays)


def _groups(model: PreTrainedModel, gaps: dict[str, Gap]) -> list[_Group]:
    """The packed layers, first to last."""
    return [
        _Group(layers, [gaps[key] for name in layers for key in array_keys(name)]) for layers in layer_groups(model)
    ]


def _fill(model: PreTrainedModel, gaps: dict[str, Gap], device: torch.device) -> None:
    """Close all gaps, and move what is real already."""
    move_buffers(model, device)
    groups = _groups(model, gaps)
    packed = {id(array) for group in groups for array in group.arrays}
    dense = [gap for gap in gaps.values() if id(gap) not in packed]
    with TensorReader(device) as reader:
        # Dense weights come last: until then, arranging may work in their memory.
        _fill_packed(groups, reader, device)
        if groups and device.type == "cuda":
            torch.cuda.empty_cache()  # what arranging took would lie idle
        wait([future for gap in dense for future in gap.close(torch.empty_like(gap.empty, device=device), reader)])


def _fill_packed(groups: list[_Group], reader: TensorReader, device: torch.device) -> None:
    """Read groups of packed layers, and arrange each while the next one is read."""
    memories: list[Tensor | None] = [None]
    if groups and device.type == "cuda":
        largest = max(group.nbytes for group in groups)
        memories = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(_GROUPS_AT_A_TIME)]
    reading: deque[tuple[_Group, list[Future[None]]]] = deque()
    for group, memory in zip(groups, cycle(memories), strict=False):
        reading.append((group, _begin(group, memory, reader)))
        if len(reading) == _GROUPS_AT_A_TIME:
            _finish(*reading.popleft())
    while reading:
        _finish(*reading.popleft())


def _begin(group: _Group, memory: Tensor | None, reader: TensorReader) -> list[Future[None]]:
    """Begin to read a group's arrays: into memory that other groups have used and will use, or to stay, on the CPU."""
    reading: list[Future[None]] = []
    start = 0
    for array in group.arrays:
        if memory is None:
            tensor = torch.empty_like(array.empty, device="cpu")
        else:
            tensor = memory[start : start + array.nbytes].view(array.empty.dtype)
            start += _aligned(array.nbytes)
        reading += array.close(tensor, reader)
    return reading


def _finish(group: _Group, reading: list[Future[None]]) -> None:
    """Check and arrange a group that has been read, and let go of the memory of its arrays."""
    wait(reading)
    for name, layer in group.layers.items():
        layer.validate(name)
    arrange_group(list(group.layers.values()))
    for name, layer in group.layers.items():
        if layer.weight_values is not None and layer.weight_values.is_cuda:  # no layout suits it better
            for array in ARRAY_NAMES:
                setattr(layer, array, nn.Parameter(getattr(layer, array).clone(), requires_grad=False))
            layer.validate(name)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
