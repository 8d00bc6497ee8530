"""The tensors of a dense checkpoint become those of a packed one: cast, checked, packed and written, each by itself."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from macko_llm import checkpoint
from macko_llm.dtypes import VALUE_DTYPES
from macko_llm.errors import NonFiniteError
from macko_llm.format import all_finite, check_shape
from macko_llm.layouts import canonical
from macko_llm.model_card import model_card
from macko_llm.pack_report import LayerReport, PackReport, Rounding, layer_report
from macko_llm.packed_checkpoint import PackedConfig, array_keys
from macko_llm.shards import ShardWriter
from macko_llm.stages import stage
from macko_llm.version import __version__

_ROUNDED_AT_ONCE = 1 << 22  # weights, which are compared in float64


class PackedWriter:
    """Turns the tensors of a dense checkpoint into those of a packed one, each by itself, and appends them to shards.

    Args:
        linears: names of the layers to pack, in the order of the report; other tensors are only cast.
        value_dtype: "float16" or "bfloat16", which all floating-point tensors get.
        shards: what writes them; None writes nothing.
        state: `state()` of a writer that was cut off; its shards go on from the same moment.
    """

    def __init__(
        self,
        linears: Iterable[str],
        value_dtype: str,
        shards: ShardWriter | None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._linears = dict.fromkeys(linears)
        self._value_dtype = value_dtype
        self._shards = shards
        before = state or {"layers": {}, "bytes_dense": 0, "bytes_packed": 0, "rounding": {}}
        self._layers = {name: LayerReport(**layer) for name, layer in before["layers"].items()}
        self._bytes_dense: int = before["bytes_dense"]
        self._bytes_packed: int = before["bytes_packed"]
        self._rounding = Rounding(**before["rounding"])

    @stage("packing")
    def add(self, key: str, tensor: Tensor) -> None:
        """Cast, check and write one tensor, packed if it is the weight of a layer to pack; on the CPU or a GPU.

        Raises:
            NonFiniteError: it holds NaN or infinity, or overflows the dtype.
            CheckpointError: it cannot be written.
        """
        tensor, rounding = _cast(tensor, VALUE_DTYPES[self._value_dtype], key)
        stored = {key: tensor}
        name = key.removesuffix(".weight")
        if name in self._linears and key.endswith(".weight"):
            self._layers[name], stored = _pack_layer(name, tensor)
        self._rounding += rounding
        self._bytes_dense += tensor.nbytes
        self._bytes_packed += sum(part.nbytes for part in stored.values())
        for part_name, part in sorted(stored.items()) if self._shards else ():  # as save_pretrained fills its shards
            self._shards.add(part_name, part)  # type: ignore[union-attr]

    def state(self) -> dict[str, Any]:
        """What has been added, as JSON has it; the shards have a state of their own."""
        return {
            "layers": {name: asdict(layer) for name, layer in self._layers.items()},
            "bytes_dense": self._bytes_dense,
            "bytes_packed": self._bytes_packed,
            "rounding": asdict(self._rounding),
        }

    def report(self) -> PackReport:
        """What has been added, when all layers have been; the seconds are for the caller to fill in."""
        layers = {name: self._layers[name] for name in self._linears}
        return PackReport(self._value_dtype, self._bytes_dense, self._bytes_packed, layers, 0.0, self._rounding)

    @stage("saving")
    def finish(
        self, source: Path, target: Path, skeleton: PreTrainedModel, provenance: dict[str, Any] | None = None
    ) -> PackReport:
        """Close the shards and write what surrounds them: config.json, macko.json, the tokenizer's files, a model card.

        Args:
            source: folder of the dense checkpoint, from which config.json and side files come.
            target: the shards' folder.
            skeleton: the model, without weights.
            provenance: how the dense weights were made; None takes macko.json of `source`.
        """
        if self._shards:
            self._shards.close()
        report = self.report()
        before = checkpoint.read_provenance(source) if provenance is None else provenance
        _write_packed_surroundings(source, target, skeleton, report, before)
        return report


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> tuple[Tensor, Rounding]:
    if not tensor.is_floating_point():
        return tensor, Rounding()
    cast = tensor.to(dtype)
    if not all_finite(cast):  # which NaN and infinity stay, and what overflows becomes
        if not all_finite(tensor):
            raise NonFiniteError(f"{name} holds NaN or infinity; repair the checkpoint before packing it.")
        raise NonFiniteError(
            f"{name} holds {tensor.abs().max():.4g}, which overflows {str(dtype).removeprefix('torch.')}; "
            "pack with --dtype bfloat16."
        )
    return cast, Rounding() if cast.dtype == tensor.dtype else _rounding(tensor, cast)


def _rounding(exact: Tensor, rounded: Tensor) -> Rounding:
    total, tiny = Rounding(), torch.finfo(rounded.dtype).tiny
    for some, others in zip(
        exact.flatten().split(_ROUNDED_AT_ONCE), rounded.flatten().split(_ROUNDED_AT_ONCE), strict=True
    ):
        before, after = some.double(), others.double()
        change = (after - before).abs() / before.abs()  # NaN where zero stays zero
        changed, zeros = before != after, (after == 0) & (before != 0)
        kept = changed & ~zeros
        largest = change[kept].amax().item() if kept.any() else 0.0
        subnormal = int((kept & (after.abs() < tiny)).sum())
        total += Rounding(int(changed.sum()), int(zeros.sum()), largest, subnormal)
    return replace(total, tensors=int(total.weights > 0))


def _pack_layer(name: str, weight: Tensor) -> tuple[LayerReport, dict[str, Tensor]]:
    check_shape(weight, name)
    matrix = canonical.pack_finite(weight)
    if matrix.nbytes >= weight.nbytes:
        return layer_report(weight, None), {f"{name}.weight": weight}
    arrays = (matrix.values, matrix.deltas, matrix.row_offsets)
    return layer_report(matrix.values, matrix), dict(zip(array_keys(name), arrays, strict=True))


def _write_packed_surroundings(
    source: Path, target: Path, skeleton: PreTrainedModel, report: PackReport, before: dict[str, Any]
) -> None:
    packed = {name for name, layer in report.layers.items() if layer.packed}
    all_linears = [name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)]
    config = checkpoint.read_config(source)
    config.pop("torch_dtype", None)
    for part in (config, *(value for key, value in config.items() if key.endswith("_config") and value)):
        if part is config or "dtype" in part:
            part["dtype"] = report.value_dtype
    checkpoint.forget_named_weights(config)
    dense = [name for name in all_linears if name not in packed]
    config["quantization_config"] = PackedConfig(report.value_dtype, dense).entries()
    checkpoint.write_json(target / checkpoint.CONFIG_FILE, dict(sorted(config.items())))  # as transformers sorts it
    checkpoint.copy_side_files(source, target)
    provenance = dict(before)
    provenance["pack"] = {
        "value_dtype": report.value_dtype,
        "sparsity": report.sparsity,
        "bytes_dense": report.bytes_dense,
        "bytes_packed": report.bytes_packed,
        "rounding": asdict(report.rounding),
        "layers": {name: layer.sparsity for name, layer in report.layers.items()},
        "versions": {"macko_llm": __version__, "torch": torch.__version__},
    }
    checkpoint.write_provenance(target, provenance)
    (target / checkpoint.CARD_FILE).write_text(model_card(provenance), encoding="utf-8")
