"""The "macko" quantization method of transformers: packed checkpoints load with plain `from_pretrained`."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from macko_llm import checkpoint, models
from macko_llm.errors import FormatError, UsageError
from macko_llm.format import DELTA_BITS, FORMAT_VERSION, VALUE_DTYPES, MackoMatrix
from macko_llm.layouts import canonical
from macko_llm.linear import ARRAY_NAMES, MackoLinear, arrange_group

HEADER_DTYPES = {"float16": "F16", "bfloat16": "BF16"}
"""What safetensors calls the dtypes of the values."""


@register_quantization_config(checkpoint.QUANT_METHOD)
class MackoConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint (docs/format.md).

    Args:
        value_dtype: "float16" or "bfloat16".
        modules_to_not_convert: names of the linear layers that stay dense.
        format_version: refused when newer than this package.
        delta_bits: bits of a delta; 4 in this version.
        unknown: keys of a later minor version, ignored.

    Raises:
        FormatError: this package cannot read such a checkpoint.
    """

    def __init__(
        self,
        value_dtype: str = "float16",
        modules_to_not_convert: list[str] | None = None,
        format_version: int = FORMAT_VERSION,
        delta_bits: int = DELTA_BITS,
        **unknown: Any,
    ) -> None:
        del unknown
        if not isinstance(format_version, int) or not 1 <= format_version <= FORMAT_VERSION:
            raise FormatError(
                f"The checkpoint has MACKO format version {format_version} and this package reads {FORMAT_VERSION}; "
                "update macko-llm."
            )
        if delta_bits != DELTA_BITS or value_dtype not in VALUE_DTYPES:
            raise FormatError(
                f"The checkpoint has {delta_bits}-bit deltas and {value_dtype} values; this package reads {DELTA_BITS}-bit "
                f"deltas and {' or '.join(VALUE_DTYPES)} values, so update macko-llm or pack the model again."
            )
        self.quant_method = checkpoint.QUANT_METHOD  # type: ignore[assignment]
        self.format_version = format_version
        self.delta_bits = delta_bits
        self.value_dtype = value_dtype
        self.modules_to_not_convert = list(modules_to_not_convert or ())


@register_quantizer(checkpoint.QUANT_METHOD)
class MackoQuantizer(HfQuantizer):
    """Puts `MackoLinear` placeholders where the checkpoint holds packed matrices, and checks them once they are filled."""

    quantization_config: MackoConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        if not self.pre_quantized:
            raise UsageError("Loading does not pack a dense model; make a packed checkpoint with `macko pack` first.")
        if not checkpoint_files:
            raise UsageError("A packed model loads from its safetensors files; pass from_pretrained its folder.")
        self._infos = infos = checkpoint.tensor_infos([Path(file) for file in checkpoint_files])
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        linears = {name: module for name, module in model.named_modules() if models.is_plain_linear(module)}
        for name in check_headers(linears, infos, self.quantization_config.value_dtype):
            padded = infos[f"{name}.{ARRAY_NAMES[0]}"].shape[0]
            model.set_submodule(name, _placeholder(linears[name], padded, self._value_dtype))
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for name, parameter in model.named_parameters():
            dtype = self._dtypes.get(name, parameter.dtype)
            if parameter.dtype != dtype:  # a renamed tensor of a quantized model may be left as it was stored
                parameter.data = parameter.data.to(dtype)
        # Packed weights cannot be trained, and the gradients of all others would have to pass through them.
        model.requires_grad_(False)
        offloads = {"cpu", "disk"} & set(map(str, getattr(model, "hf_device_map", {}).values()))
        for name, layer in _packed_layers(model).items():
            if not layer.weight_values.is_meta:
                _keep_in_own_memory(layer)
                layer.validate(name)
            elif offloads:  # else `loading` fills it; what offloading brings is validated again before each product
                canonical.validate(_stored_matrix(name, layer, self._infos), name)
        for group in layer_groups(model):
            arrange_group(list(group.values()))
        return model

    @property
    def _value_dtype(self) -> torch.dtype:
        return VALUE_DTYPES[self.quantization_config.value_dtype]

    def is_serializable(self, *_: Any) -> bool:
        """`save_pretrained` writes the canonical arrays."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Every op has a fake kernel, so that `generate` may compile a static cache."""
        return True


def layer_groups(model: nn.Module) -> list[dict[str, MackoLinear]]:
    """All packed layers by name, those together that read the same input and can share a layout; first to last."""
    layers = _packed_layers(model)
    return [{name: layers[name] for name in names} for names in models.in_groups(layers, model)]


def fuse_projections(model: nn.Module) -> None:
    """Group the packed layers that read the same input, where `.to()` and the like have arranged each alone.

    Loading does so by itself. Layers that are in their groups already are left as they are, and so are those that no
    layout of a GPU suits.
    """
    for group in layer_groups(model):
        if all(layer.is_arranged for layer in group.values()):
            arrange_group(list(group.values()))


def check_headers(
    linears: dict[str, nn.Linear], infos: dict[str, checkpoint.TensorInfo], value_dtype: str
) -> list[str]:
    """Compare what the files say of the packed matrices with the model, before anything is allocated for them.

    Args:
        linears: the model's linear layers by name.
        infos: the tensors of the checkpoint.
        value_dtype: "float16" or "bfloat16", as the config says.

    Returns:
        The names of the packed layers.

    Raises:
        FormatError: an array is missing, has another shape or dtype, or belongs to no layer.
    """
    packed = dict.fromkeys(key.rpartition(".")[0] for key in infos if key.rpartition(".")[2] in ARRAY_NAMES)
    for name in packed:
        if name not in linears:
            raise FormatError(f"The checkpoint packs {name}, which its config.json does not have; download it again.")
        _check_layer_headers(name, linears[name], infos, value_dtype)
    return list(packed)


def _packed_layers(model: nn.Module) -> dict[str, MackoLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MackoLinear)}


def _check_layer_headers(
    name: str, linear: nn.Linear, infos: dict[str, checkpoint.TensorInfo], value_dtype: str
) -> None:
    values, deltas, row_offsets = (infos.get(f"{name}.{array}") for array in ARRAY_NAMES)
    if values is None or deltas is None or row_offsets is None:
        raise FormatError(f"The checkpoint lacks an array of {name}; download or pack the model again.")
    padded = values.shape[0] if len(values.shape) == 1 else -1
    consistent = (
        (values.dtype, deltas.dtype, row_offsets.dtype) == (HEADER_DTYPES[value_dtype], "U8", "I32")
        and padded % 8 == 0
        and deltas.shape == (padded // 2,)
        and row_offsets.shape == (linear.out_features + 1,)
    )
    if not consistent:
        raise FormatError(
            f"The arrays of {name} ({values.dtype} {list(values.shape)}, {deltas.dtype} {list(deltas.shape)}, "
            f"{row_offsets.dtype} {list(row_offsets.shape)}) do not fit its {linear.out_features} x {linear.in_features} "
            f"matrix of {value_dtype}; download or pack the model again."
        )


def _keep_in_own_memory(layer: MackoLinear) -> None:
    """Copy arrays on the CPU: transformers maps files into memory, and who writes to the file would change the weights."""
    for name in ARRAY_NAMES:
        array = getattr(layer, name)
        if array.device.type == "cpu":
            setattr(layer, name, nn.Parameter(array.clone(), requires_grad=False))


def _stored_matrix(name: str, layer: MackoLinear, infos: dict[str, checkpoint.TensorInfo]) -> MackoMatrix:
    arrays = []
    for array in ARRAY_NAMES:
        with checkpoint.open_tensors(infos[f"{name}.{array}"].file) as reader:
            arrays.append(reader.get_tensor(f"{name}.{array}"))
    values, deltas, row_offsets = arrays
    return MackoMatrix(values, deltas, row_offsets, (layer.out_features, layer.in_features))


def _placeholder(linear: nn.Linear, padded: int, dtype: torch.dtype) -> MackoLinear:
    layer = MackoLinear(linear.in_features, linear.out_features, padded, dtype=dtype, device="meta")
    layer.bias = linear.bias
    return layer
