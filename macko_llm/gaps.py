"""What a model whose weights are on the meta device still lacks, and where its files hold it."""

from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from macko_llm import checkpoint
from macko_llm.checkpoint import TensorInfo
from macko_llm.dtypes import HEADERS
from macko_llm.streaming import TensorReader


@dataclass(frozen=True)
class Gap:
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
        self.put(tensor)
        return reading

    def put(self, tensor: Tensor) -> None:
        """Put a tensor of the same shape and dtype into the places."""
        if isinstance(self.empty, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=self.empty.requires_grad)
        for module, name in self.places:
            setattr(module, name, tensor)

    @property
    def tensor(self) -> Tensor:
        """What is in the places now."""
        module, name = self.places[0]
        tensor: Tensor = getattr(module, name)
        return tensor

    def open(self) -> None:
        """Put the empty tensor back; the one that was there is freed."""
        for module, name in self.places:
            setattr(module, name, self.empty)


def find_gaps(model: PreTrainedModel, folder: Path) -> dict[str, Gap] | None:
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
        gaps[stored] = Gap(tensor, list(places[key].values()), infos[stored])
    return gaps


def move_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Bring the buffers that no file holds, which are real already, to a device."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                setattr(module, name, buffer.to(device))
