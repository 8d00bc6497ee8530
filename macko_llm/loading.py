"""Loading a model for inference: its weights stream from their files to their device and into their layout.

transformers makes the model, compares the files with it, and sets all that a model knows of itself, with every weight on
the meta device. Then each tensor is read straight to where it stays. The canonical arrays of packed layers, which a GPU
does not keep, take turns in the same memory: there is never more than the model and the arrays of a few layers.
"""

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from macko_llm import checkpoint, models
from macko_llm.checkpoint import TensorInfo
from macko_llm.dtypes import HEADERS
from macko_llm.linear import MackoLinear, arrange_group
from macko_llm.packed_checkpoint import ARRAY_NAMES, array_keys
from macko_llm.streaming import TensorReader, wait
from macko_llm.transformers_integration import layer_groups

_GROUPS_AT_A_TIME = 2  # one is read while the one before it is arranged
_ALIGNMENT = 256  # bytes, of arrays that share memory


def load(
    path: str | Path, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a causal language model, dense or packed, ready for inference.

    Args:
        path: a folder or a hub id.
        dtype: "auto" (the checkpoint's), "float16", "bfloat16" or "float32".
        device: "auto", "cpu", "cuda", "cuda:1", ...
        trust_remote_code: run Python code that lies in the folder.

    Raises:
        CheckpointError: the model is missing, incomplete, corrupt, or not a causal language model.
        UsageError: unknown dtype or device, or a dtype that the packed values cannot serve.
    """
    folder = checkpoint.locate(path)
    torch_device = models.resolve_device(device)
    stored_as = checkpoint.quantization_method(folder)
    if torch_device.type in ("cpu", "cuda") and stored_as in (None, checkpoint.QUANT_METHOD):
        model = models.load_empty(folder, dtype=dtype, trust_remote_code=trust_remote_code)
        gaps = _find_gaps(model, folder)
        if gaps is not None:
            with models.plain_errors(folder, torch_device), torch.no_grad():
                _fill(model, gaps, torch_device)
            return model
    return models.load_model(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)


@dataclass(frozen=True)
class _Gap:
    """A tensor that the model still lacks.

    Attributes:
        empty: the tensor, on the meta device.
        places: the modules that hold it, and their name for it; a tied weight has several.
        info: where it is stored.
    """

    empty: Tensor
    places: list[tuple[nn.Module, str]]
    info: TensorInfo

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the model."""
        return self.empty.numel() * self.empty.element_size()

    def close(self, tensor: Tensor, reader: TensorReader) -> list[Future[None]]:
        """Begin to read into a tensor of the same shape and dtype, and put it into the places."""
        reading = reader.read(self.info, tensor)
        if isinstance(self.empty, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=self.empty.requires_grad)
        for module, name in self.places:
            setattr(module, name, tensor)
        return reading


def _find_gaps(model: PreTrainedModel, folder: Path) -> dict[str, _Gap] | None:
    """What is to be read, by its name in the files.

    Returns:
        None unless the files simply hold each tensor under the model's own name. Where transformers renames or merges what
        it finds, or ties weights that are both stored, it loads the model itself: the result is the same, only slower.
    """
    if getattr(model, "_weight_conversions", None):
        return None
    infos = checkpoint.tensor_infos(
        checkpoint.weight_files(folder, getattr(model.config, "transformers_weights", None))
    )
    if any({target, source} <= infos.keys() for target, source in model.all_tied_weights_keys.items()):
        return None
    empty: dict[int, Tensor] = {}
    places: dict[int, dict[str, tuple[nn.Module, str]]] = {}
    for prefix, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.is_meta:
                empty[id(tensor)] = tensor
                places.setdefault(id(tensor), {})[f"{prefix}.{name}".removeprefix(".")] = (module, name)
    gaps = {}
    for key, tensor in empty.items():
        stored = next((name for name in places[key] if name in infos), None)
        if stored is None or infos[stored].shape != tuple(tensor.shape) or infos[stored].dtype not in HEADERS:
            return None
        gaps[stored] = _Gap(tensor, list(places[key].values()), infos[stored])
    return gaps


@dataclass(frozen=True)
class _Group:
    """Packed layers that are arranged together, by name, and the arrays that they lack."""

    layers: dict[str, MackoLinear]
    arrays: list[_Gap]

    @property
    def nbytes(self) -> int:
        """Bytes of memory in which the arrays lie one after the other."""
        return sum(_aligned(array.nbytes) for array in self.arrays)


def _groups(model: PreTrainedModel, gaps: dict[str, _Gap]) -> list[_Group]:
    """The packed layers, first to last."""
    return [
        _Group(layers, [gaps[key] for name in layers for key in array_keys(name)]) for layers in layer_groups(model)
    ]


def _fill(model: PreTrainedModel, gaps: dict[str, _Gap], device: torch.device) -> None:
    """Close all gaps, and move what is real already."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                setattr(module, name, buffer.to(device))
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
