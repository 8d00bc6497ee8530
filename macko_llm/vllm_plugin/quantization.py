"""The "macko" quantization method of vLLM: `vllm serve PACKED` multiplies packed layers as they are."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from macko_llm.checkpoint import QUANT_METHOD
from macko_llm.dtypes import VALUE_DTYPES
from macko_llm.packed_checkpoint import ARRAY_NAMES, PackedConfig
from macko_llm.vllm_plugin.parts import DENSE_NAME, Parts
from macko_llm.vllm_plugin.product import arrange, describe, multiply


@register_quantization_config(QUANT_METHOD)
class MackoVllmConfig(QuantizationConfig):
    """`quantization_config` of a packed checkpoint (docs/format.md), as vLLM asks for it.

    Args:
        stored: what config.json says, checked.
    """

    def __init__(self, stored: PackedConfig) -> None:
        super().__init__()
        self.value_dtype = VALUE_DTYPES[stored.value_dtype]
        self.dense = list(stored.modules_to_not_convert or ())

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MackoVllmConfig":
        """From `quantization_config` of config.json; raises FormatError if this package cannot read such a checkpoint."""
        return cls(PackedConfig.read(config))

    @classmethod
    def get_name(cls) -> Any:
        """See QuantizationConfig."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """See QuantizationConfig. Kernels multiply tokens of the values' dtype; others take a dense product."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """See QuantizationConfig."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """See QuantizationConfig. All is in config.json."""
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Call the dense layers by vLLM's names."""
        self.dense = hf_to_vllm_mapper.apply_list(self.dense)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Ours for linear layers of which the checkpoint packs at least a part; embeddings, lm_head and caches are vLLM's."""
        if not isinstance(layer, LinearBase):
            return None
        is_dense = [member in self.dense for member in self._members(prefix)]
        if prefix in self.dense or all(is_dense):  # files of some families hold fused layers, as GLM-4's gate_up_proj
            return UnquantizedLinearMethod()
        return MackoLinearMethod(self.value_dtype, partly_dense=any(is_dense))

    def _members(self, prefix: str) -> list[str]:
        """The checkpoint's layers that make up one of vLLM's."""
        parent, dot, name = prefix.rpartition(".")
        return [parent + dot + member for member in self.packed_modules_mapping.get(name, [name])]


class MackoLinearMethod(LinearMethodBase):
    """Loads, arranges and multiplies the packed weight of one of vLLM's linear layers.

    A fused layer becomes one matrix, whatever it is made of, and so one kernel multiplies it. Members that the checkpoint
    holds dense beside packed ones are packed with them.

    Args:
        value_dtype: of packed values.
        partly_dense: whether the checkpoint holds some members of the layer dense.
    """

    def __init__(self, value_dtype: torch.dtype, partly_dense: bool) -> None:
        self._value_dtype = value_dtype
        self._names = (*ARRAY_NAMES, DENSE_NAME) if partly_dense else ARRAY_NAMES
        self._tokens: int = get_current_vllm_config().scheduler_config.max_num_seqs

    def create_weights(
        self,
        layer: Any,  # torch knows no attributes of a module but its tensors
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Placeholders without elements, since nobody knows how long the arrays are before they come."""
        del output_size, params_dtype
        loader: Callable[..., Any] = extra_weight_attrs["weight_loader"]
        rows = sum(output_partition_sizes)
        name = getattr(layer, "prefix", "") or "a packed layer"
        layer.macko_parts = Parts(name, loader, rows, input_size, input_size_per_partition, self._value_dtype)
        dtypes = {"weight_deltas": torch.uint8, "weight_row_offsets": torch.int32}
        for array in self._names:
            empty = torch.empty(0, dtype=dtypes.get(array, self._value_dtype))
            placeholder = Parameter(empty, requires_grad=False)
            placeholder.weight_loader = partial(_load, layer.macko_parts, array)  # type: ignore[attr-defined]
            layer.register_parameter(array, placeholder)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Arrange what has come for the device, and for as many tokens at a time as vLLM may decode sequences."""
        description, arrays = describe(arrange(layer.macko_parts.take(), self._tokens))
        for name in (*self._names, "macko_parts"):
            delattr(layer, name)
        for name, array in arrays.items():
            layer.register_parameter(name, Parameter(array.detach(), requires_grad=False))
        layer.macko_description = description
        layer.macko_names = tuple(arrays)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., own columns] -> [..., own rows] of x's dtype."""
        arrays = [getattr(layer, name) for name in layer.macko_names]
        return multiply(x, arrays, layer.macko_description, bias)


def _load(parts: Parts, array: str, placeholder: Parameter, tensor: Tensor, *shard: Any) -> None:
    parts.add(array, tensor.to(placeholder.device), shard)
