"""The "macko" quantization method of transformers: packed checkpoints load with plain `from_pretrained`."""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import (
    AutoHfQuantizer,
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from macko_llm import checkpoint, models, packed_checkpoint, saving
from macko_llm.defaults import LAYOUT, TOKENS_AT_A_TIME
from macko_llm.dtypes import VALUE_DTYPES
from macko_llm.errors import NonFiniteError, UsageError
from macko_llm.format import all_finite, check_finite
from macko_llm.layouts import canonical
from macko_llm.linear import MackoLinear, arrange_group
from macko_llm.packed_checkpoint import ARRAY_NAMES, PackedConfig
from macko_llm.refusals import check_layout, check_tokens_at_a_time

_OF_LOADING = ("layout", "tokens")
"""Attributes of a `MackoConfig` that no file holds."""


@register_quantization_config(checkpoint.QUANT_METHOD)
class MackoConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint (docs/format.md), and how it is held in memory.

    `from_pretrained(folder, quantization_config=MackoConfig(tokens=8))` takes `layout` and `tokens` from here, and all else
    from the checkpoint. No file holds these two: what is stored is the same for all layouts. Given for a pruned dense
    checkpoint, it has its layers packed once they are loaded, as `macko pack` would.

    Args:
        value_dtype: see `PackedConfig`; of a dense checkpoint's layers, unless they are loaded in a 16-bit dtype, which stays.
        modules_to_not_convert, format_version, delta_bits: see `PackedConfig`.
        layout: "sliced" (for one token at a time), "tiled" (for several) or "auto" (by `tokens`); of GPUs.
        tokens: that will mostly be multiplied at a time: the texts of a batch.
        unknown: keys of a later minor version, ignored.

    Raises:
        FormatError: this package cannot read such a checkpoint.
        UsageError: there is no such layout, or tokens is below 1.
    """

    value_dtype: str
    modules_to_not_convert: list[str]
    layout: str
    tokens: int

    def __init__(
        self,
        value_dtype: str = PackedConfig.value_dtype,
        modules_to_not_convert: list[str] | None = None,
        format_version: int = PackedConfig.format_version,
        delta_bits: int = PackedConfig.delta_bits,
        layout: str = LAYOUT,
        tokens: int = TOKENS_AT_A_TIME,
        **unknown: Any,
    ) -> None:
        del unknown
        config = PackedConfig(value_dtype, modules_to_not_convert, format_version, delta_bits)
        self.__dict__.update(config.entries())
        check_layout(layout)
        check_tokens_at_a_time(tokens)
        self.layout, self.tokens = layout, tokens

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], *arguments: Any, **more: Any) -> Any:
        """What a file says."""
        return super().from_dict(_stored(config_dict), *arguments, **more)

    def to_dict(self) -> dict[str, Any]:
        """What a file says."""
        return _stored(super().to_dict())


def _stored(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if key not in _OF_LOADING}


@register_quantizer(checkpoint.QUANT_METHOD)
class MackoQuantizer(HfQuantizer):
    """Puts `MackoLinear` placeholders where the checkpoint holds packed matrices, and checks them once they are filled.

    The layers of a dense checkpoint are packed once they are loaded, where that makes them smaller.
    """

    quantization_config: MackoConfig
    origin: saving.Origin | None = None
    """What the model was loaded from, packed."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        if not self.pre_quantized:
            models.prunable_linears(model)  # refuses what cannot be packed before its weights are read
            self.quantization_config = copy.copy(self.quantization_config)  # the caller's may serve for other models
            return model
        if not checkpoint_files:
            raise UsageError("A packed model loads from its safetensors files; pass from_pretrained its folder.")
        self.origin = saving.Origin.read(Path(checkpoint_files[0]).parent)
        self._infos = infos = checkpoint.tensor_infos([Path(file) for file in checkpoint_files])
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        linears = models.prunable_linears(model)
        shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
        for name in packed_checkpoint.check_headers(shapes, infos, self.quantization_config.value_dtype):
            padded = infos[packed_checkpoint.array_keys(name)[0]].shape[0]
            model.set_submodule(name, self._placeholder(linears[name], padded))
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        if self.pre_quantized:
            self._check_filled(model)
        else:
            self._pack(model)
        # Packed weights cannot be trained, and the gradients of all others would have to pass through them.
        model.requires_grad_(False)
        for group in layer_groups(model):
            arrange_group(list(group.values()))
        return model

    def _check_filled(self, model: PreTrainedModel) -> None:
        places = set(map(str, getattr(model, "hf_device_map", {}).values()))
        offloaded = bool({"cpu", "disk"} & places)
        if len(places) <= 1:  # dispatching to several makes new parameters, without transformers' mark
            packed_checkpoint.check_complete(self._not_stored(model))
        for name, parameter in model.named_parameters():
            dtype = self._dtypes.get(name, parameter.dtype)
            if parameter.dtype != dtype:  # a renamed tensor of a quantized model may be left as it was stored
                parameter.data = parameter.data.to(dtype)
        for name, layer in _packed_layers(model).items():
            if not layer.weight_values.is_meta:
                _keep_in_own_memory(layer)
                layer.validate(name)
            elif offloaded:  # else `loading` fills it; offloaded arrays are validated before each product, too
                packed_checkpoint.read_matrix(name, (layer.out_features, layer.in_features), self._infos)

    def _pack(self, model: PreTrainedModel) -> None:
        """Pack the layers of a dense model, one after the other, and say so in its config."""
        config, linears = self.quantization_config, models.prunable_linears(model)
        if any(linear.weight.is_meta for linear in linears.values()):
            raise UsageError("An offloaded model is not packed on loading; pack it first with `macko pack`.")
        held = {linear.weight.dtype for linear in linears.values()}
        value_dtype = next((name for name, dtype in VALUE_DTYPES.items() if held == {dtype}), config.value_dtype)
        dtype = VALUE_DTYPES[value_dtype]
        for name in list(linears):
            linear = linears.pop(name)  # lets go of its dense weight before the next one is packed
            weight = linear.weight.detach().to(dtype)
            check_finite(all_finite(linear.weight), f"{name}.weight")
            if not all_finite(weight):
                raise NonFiniteError(
                    f"{name}.weight overflows {value_dtype}; load the model with dtype=torch.bfloat16."
                )
            matrix = canonical.pack_finite(weight)
            if matrix.nbytes < weight.nbytes:
                layer = MackoLinear.from_matrix(matrix, linear.bias)
                layer.layout, layer.tokens = config.layout, config.tokens
                model.set_submodule(name, layer)
        if not _packed_layers(model):
            raise UsageError(
                "No layer has enough zeros to be smaller packed; prune the model first with `macko prune`."
            )
        dense = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        config.__dict__.update(PackedConfig(value_dtype, dense).entries())

    def _not_stored(self, model: PreTrainedModel) -> Iterator[str]:
        """Parameters that transformers started from random values (it marks those that it read), or took in another shape."""
        for name, parameter in model.named_parameters():
            random = not parameter.is_meta and not getattr(parameter, "_is_hf_initialized", False)
            if random or parameter.shape != self._shapes.get(name, parameter.shape):
                yield name

    def _placeholder(self, linear: nn.Linear, padded: int) -> MackoLinear:
        config = self.quantization_config
        layer = MackoLinear(
            linear.in_features,
            linear.out_features,
            padded,
            dtype=VALUE_DTYPES[config.value_dtype],
            device="meta",
            layout=config.layout,
            tokens=config.tokens,
        )
        layer.bias = linear.bias
        return layer

    def is_serializable(self, *_: Any) -> bool:
        """`save_pretrained` writes the canonical arrays."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on packed layers are; transformers refuses to train a quantized model without any."""
        return True

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


def _packed_layers(model: nn.Module) -> dict[str, MackoLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MackoLinear)}


def _keep_in_own_memory(layer: MackoLinear) -> None:
    """Copy arrays on the CPU: transformers maps files into memory, and who writes to the file would change the weights."""
    for name in ARRAY_NAMES:
        array = getattr(layer, name)
        if array.device.type == "cpu":
            setattr(layer, name, nn.Parameter(array.clone(), requires_grad=False))


_merge_configs: Any = getattr(AutoHfQuantizer, "merge_quantization_configs", None)


def _merge(stored: Any, given: Any) -> Any:
    """A checkpoint's config with `layout` and `tokens` of the caller's, which transformers would ignore; else what it does."""
    if not isinstance(given, MackoConfig):
        return _merge_configs(stored, given)
    merged = _merge_configs(stored, None)
    if not isinstance(merged, MackoConfig):
        return _merge_configs(stored, given)  # refuses
    for name in _OF_LOADING:
        setattr(merged, name, getattr(given, name))
    return merged


# transformers has a list of the methods of which it takes settings from the caller, and no way to enter it. A release
# without this function goes by the defaults, and loads packed models all the same.
if _merge_configs is not None:
    AutoHfQuantizer.merge_quantization_configs = staticmethod(_merge)  # type: ignore[method-assign,assignment]

saving.extend(PreTrainedModel)
