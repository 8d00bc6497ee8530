"""Checkpoint to packed checkpoint and back, one tensor at a time."""

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from macko_llm import checkpoint, models, outputs, packed_checkpoint, refusals
from macko_llm.checkpoint import TensorInfo
from macko_llm.defaults import MAX_SHARD_SIZE
from macko_llm.dtypes import HEADERS, VALUE_DTYPES, VALUE_HEADERS
from macko_llm.errors import CheckpointError, NonFiniteError, UsageError
from macko_llm.format import MackoMatrix, all_finite, check_shape
from macko_llm.layouts import canonical
from macko_llm.model_card import model_card
from macko_llm.packed_checkpoint import ARRAY_NAMES, PackedConfig, array_keys, read_matrix
from macko_llm.progress import Progress, no_progress
from macko_llm.shards import ShardWriter
from macko_llm.stages import stage
from macko_llm.streaming import TensorReader, wait
from macko_llm.version import __version__

_CAST_HEADERS = (*VALUE_HEADERS.values(), "F32", "F64")
_ROUNDED_AT_ONCE = 1 << 22  # weights, which are compared in float64


@dataclass(frozen=True)
class LayerReport:
    """One linear layer of a packed checkpoint.

    Attributes:
        rows, cols: shape of the matrix.
        sparsity: share of zeros.
        entries: stored values; more than the nonzeros by the explicit zeros that bridge long gaps. 0 if it stays dense.
        bytes_dense, bytes_packed: size before, and as stored.
        packed: False where packing would have made it larger.
    """

    rows: int
    cols: int
    sparsity: float
    entries: int
    bytes_dense: int
    bytes_packed: int
    packed: bool


@dataclass(frozen=True)
class Rounding:
    """What storing weights in another dtype changed; nothing where they have that dtype already.

    Attributes:
        weights: how many have another value.
        zeros: how many of those became zero.
        largest: the largest relative change of the others.
        subnormal: how many of the others are too small for the dtype's full precision.
        tensors: how many hold such weights.
    """

    weights: int = 0
    zeros: int = 0
    largest: float = 0.0
    subnormal: int = 0
    tensors: int = 0

    def __add__(self, other: "Rounding") -> "Rounding":
        return Rounding(
            self.weights + other.weights,
            self.zeros + other.zeros,
            max(self.largest, other.largest),
            self.subnormal + other.subnormal,
            self.tensors + other.tensors,
        )


@dataclass(frozen=True)
class KindReport:
    """All layers of one place in a block, or several of them put together: how many, their sizes, their share of zeros."""

    layers: int
    bytes_dense: int
    bytes_packed: int
    sparsity: float


@dataclass(frozen=True)
class PackReport:
    """A packed checkpoint: `layers` are the linears of its blocks, byte counts and rounding are of all tensors."""

    value_dtype: str
    bytes_dense: int
    bytes_packed: int
    layers: dict[str, LayerReport]
    seconds: float
    rounding: Rounding = Rounding()

    @property
    def sparsity(self) -> float:
        """Share of zeros over all layers listed."""
        elements = sum(layer.rows * layer.cols for layer in self.layers.values())
        return sum(layer.sparsity * layer.rows * layer.cols for layer in self.layers.values()) / max(elements, 1)

    @property
    def kinds(self) -> dict[str, KindReport]:
        """The layers by what they are in a block: "self_attn.q_proj", and "mlp.experts.*.up_proj" of all experts."""
        groups: dict[str, list[LayerReport]] = {}
        for name, layer in self.layers.items():
            groups.setdefault(_kind(name), []).append(layer)
        return {kind: _kind_report(layers) for kind, layers in groups.items()}

    @property
    def kept_dense(self) -> list[str]:
        """Layers that packing would have made larger."""
        return [name for name, layer in self.layers.items() if not layer.packed]


def _kind(name: str) -> str:
    """A layer's name behind its block's number, without other numbers."""
    parts = name.split(".")
    block = next((place for place, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join("*" if part.isdigit() else part for part in parts[block + 1 :])


def _kind_report(layers: Sequence[LayerReport]) -> KindReport:
    elements = sum(layer.rows * layer.cols for layer in layers)
    return KindReport(
        layers=len(layers),
        bytes_dense=sum(layer.bytes_dense for layer in layers),
        bytes_packed=sum(layer.bytes_packed for layer in layers),
        sparsity=sum(layer.sparsity * layer.rows * layer.cols for layer in layers) / elements,
    )


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


def pack_checkpoint(
    source: Path,
    target: Path | None,
    *,
    dtype: str | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    overwrite: bool = False,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> PackReport:
    """Store a pruned checkpoint in the MACKO format.

    Args:
        source: folder of a dense checkpoint.
        target: folder to write; None writes nothing and only reports the sizes.
        dtype: "float16" or "bfloat16"; None keeps the dtype of 16-bit weights, and makes float32 what config.json says, if
            that has 16 bits, else float16.
        max_shard_size: largest safetensors file, such as "5GB".
        overwrite: replace a model that lies in `target`.
        device: where to pack, with the same result: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        trust_remote_code: run Python code that lies in `source`.
        progress: told of each tensor.

    Raises:
        UsageError: `source` is packed already, `target` would cost data, or there is no such device.
        CheckpointError: `source` is damaged, of a kind that cannot be packed, or too large for the device.
        NonFiniteError: weights hold NaN or infinity, or overflow the dtype.
    """
    started = time.perf_counter()
    shard_bytes = refusals.check_pack(source, target, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite)
    where = models.resolve_device(device)
    if where.type not in ("cpu", "cuda"):
        raise UsageError(f"There is no packing on {device}; use --device cpu.")
    skeleton = models.skeleton(source, trust_remote_code=trust_remote_code)
    linears = _shapes(skeleton)
    infos = dict(sorted(_infos(source, skeleton).items(), key=lambda entry: checkpoint.natural_order(entry[0])))
    _check_dense(linears, infos)
    for key, info in infos.items():  # embeddings and norms are cast, too
        if info.dtype.startswith("F") and info.dtype not in _CAST_HEADERS:
            raise _needs_scales(key, info)
        if info.dtype not in HEADERS:
            raise CheckpointError(
                f"{key} is stored as {info.dtype}, which cannot be written; use a model of ordinary dtypes."
            )
    value_dtype = dtype or own_value_dtype(
        {infos[f"{name}.weight"].dtype for name in linears}, checkpoint.read_config(source)
    )

    with ExitStack() as stack:
        partial = None if target is None else stack.enter_context(outputs.new_folder(target, overwrite=overwrite))
        writer = PackedWriter(linears, value_dtype, None if partial is None else ShardWriter(partial, shard_bytes))
        try:
            for number, (key, tensor) in enumerate(stack.enter_context(closing(_read_ahead(infos, where)))):
                progress("packing", number, len(infos))
                writer.add(key, tensor)
                del tensor  # before there is memory for another one
        except torch.OutOfMemoryError as error:
            raise CheckpointError(f"Packing {source} does not fit on {where}; use --device cpu.") from error
        progress("packing", len(infos), len(infos))
        report = writer.report() if partial is None else writer.finish(source, partial, skeleton)
    return replace(report, seconds=time.perf_counter() - started)


def unpack_checkpoint(
    source: Path,
    target: Path,
    *,
    max_shard_size: str = MAX_SHARD_SIZE,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> None:
    """Give the dense checkpoint back, bit for bit as it was packed: in the dtype of the packed values, without -0.0.

    Args:
        source: folder of a packed checkpoint.
        target: folder to write.
        max_shard_size: largest safetensors file, such as "5GB".
        overwrite: replace a model that lies in `target`.
        trust_remote_code: run Python code that lies in `source`.
        progress: told of each tensor.

    Raises:
        UsageError: `source` is not packed, or `target` would cost data.
        CheckpointError: loading would refuse `source`, or a matrix breaks an invariant of the format.
    """
    shard_bytes = refusals.check_unpack(source, target, max_shard_size=max_shard_size, overwrite=overwrite)
    _, linears, infos = _read_packed(source, trust_remote_code)
    with outputs.new_folder(target, overwrite=overwrite) as partial:
        writer = ShardWriter(partial, shard_bytes)
        for number, (key, tensor) in enumerate(_tensors(infos)):
            progress("unpacking", number, len(infos))
            name, _, array = key.rpartition(".")
            if array == ARRAY_NAMES[0]:
                writer.add(f"{name}.weight", canonical.unpack(read_matrix(name, linears[name], infos)))
            elif array not in ARRAY_NAMES:
                writer.add(key, tensor)
        writer.close()
        progress("unpacking", len(infos), len(infos))
        config = checkpoint.read_config(source)
        del config["quantization_config"]
        _forget_named_weights(config)
        checkpoint.write_json(partial / checkpoint.CONFIG_FILE, config)
        checkpoint.copy_side_files(source, partial)
        provenance = checkpoint.read_provenance(source)
        provenance.pop("pack", None)
        checkpoint.write_provenance(partial, provenance)


def inspect_checkpoint(
    source: Path, *, trust_remote_code: bool = False, progress: Progress = no_progress
) -> PackReport:
    """Read a packed checkpoint, check every invariant of the format, and report what is inside.

    Raises:
        UsageError: `source` is not packed.
        CheckpointError: loading would refuse `source`, or a matrix breaks an invariant of the format.
        NonFiniteError: a tensor that is not packed holds NaN or infinity, which packing never writes.
    """
    started = time.perf_counter()
    refusals.require_packed(source)
    value_dtype, linears, infos = _read_packed(source, trust_remote_code)
    layers: dict[str, LayerReport] = {}
    bytes_dense = bytes_packed = 0
    for number, (key, tensor) in enumerate(_tensors(infos)):
        progress("checking", number, len(infos))
        name, _, array = key.rpartition(".")
        bytes_packed += tensor.nbytes
        if array == ARRAY_NAMES[0]:
            matrix = read_matrix(name, linears[name], infos)
            layers[name] = _layer_report(matrix.values, matrix)
            bytes_dense += layers[name].bytes_dense
        elif array not in ARRAY_NAMES:
            bytes_dense += tensor.nbytes
            if infos[key].dtype in _CAST_HEADERS and not all_finite(tensor):
                raise NonFiniteError(f"{key} holds NaN or infinity; pack the model again, or download it again.")
            if name in linears and array == "weight":
                layers[name] = _layer_report(tensor, None)
    progress("checking", len(infos), len(infos))
    ordered = {name: layers[name] for name in linears}
    return PackReport(value_dtype, bytes_dense, bytes_packed, ordered, time.perf_counter() - started)


def own_value_dtype(stored: set[str], config: dict[str, Any]) -> str:
    """The dtype to pack a checkpoint in: the stored one where it has 16 bits, else what its config says, else float16."""
    for name in VALUE_DTYPES:
        if stored == {VALUE_HEADERS[name]}:
            return name
    own = str(config.get("dtype") or config.get("torch_dtype") or "")
    return own if own in VALUE_DTYPES else "float16"


def _read_packed(
    source: Path, trust_remote_code: bool
) -> tuple[str, dict[str, tuple[int, int]], dict[str, TensorInfo]]:
    """The value dtype, the shapes of the linears and the tensors of a packed checkpoint, checked as far as headers tell."""
    value_dtype = PackedConfig.read(checkpoint.read_config(source)["quantization_config"]).value_dtype
    skeleton = models.skeleton(source, trust_remote_code=trust_remote_code)
    linears, infos = _shapes(skeleton), _infos(source, skeleton)
    packed = packed_checkpoint.check_headers(linears, infos, value_dtype)
    _check_dense({name: shape for name, shape in linears.items() if name not in packed}, infos)
    models.load_empty(source, trust_remote_code=trust_remote_code)  # whatever else makes loading refuse it
    return value_dtype, linears, infos


def _shapes(skeleton: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """The linear layers of the blocks: name -> (out_features, in_features)."""
    linears = models.prunable_linears(skeleton)
    return {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}


def _infos(source: Path, skeleton: PreTrainedModel) -> dict[str, TensorInfo]:
    named = getattr(skeleton.config, "transformers_weights", None)
    return checkpoint.tensor_infos(checkpoint.weight_files(source, named))


def _forget_named_weights(config: dict[str, Any]) -> None:
    """Take out of a config what its weights were called: the new ones have the usual names."""
    for part in (config, *config.values()):
        if isinstance(part, dict):
            part.pop("transformers_weights", None)


def _check_dense(linears: dict[str, tuple[int, int]], infos: dict[str, TensorInfo]) -> None:
    """Raise CheckpointError unless the checkpoint holds a dense weight for each of the linears."""
    if linears and infos and not any(f"{name}.weight" in infos for name in linears):
        raise CheckpointError(
            f"The files call the weights of the model's layers otherwise than {next(iter(linears))}.weight, as those of "
            "models for text and images do; pack a checkpoint of the text model alone."
        )
    for name, shape in linears.items():
        info = infos.get(f"{name}.weight")
        if info is None:
            raise CheckpointError(f"The checkpoint has no tensor {name}.weight; save it again with save_pretrained.")
        if info.shape != shape:
            raise CheckpointError(
                f"{name}.weight is {list(info.shape)}, but config.json makes it {list(shape)}; "
                "download the model again."
            )
        if info.dtype not in _CAST_HEADERS:
            raise _needs_scales(f"{name}.weight", info)


def _needs_scales(key: str, info: TensorInfo) -> CheckpointError:
    return CheckpointError(
        f"{key} is stored as {info.dtype}, which needs scales to be understood; pack a model whose weights are 16-bit or "
        "float32."
    )


def _tensors(infos: dict[str, TensorInfo]) -> Iterator[tuple[str, Tensor]]:
    """All tensors, one file open at a time."""
    files: dict[Path, list[str]] = {}
    for name, info in infos.items():
        files.setdefault(info.file, []).append(name)
    for file, names in files.items():
        with checkpoint.open_tensors(file) as reader:
            for name in names:
                yield name, reader.get_tensor(name)


def _read_ahead(infos: dict[str, TensorInfo], device: torch.device) -> Generator[tuple[str, Tensor], None, None]:
    """All tensors, on a device; while one is worked on, the next is read, and there are never more than these two."""
    reading: deque[tuple[str, Tensor, list[Future[None]]]] = deque()
    with TensorReader(device) as reader:
        for key, info in infos.items():
            tensor = torch.empty(info.shape, dtype=HEADERS[info.dtype], device=device)
            reading.append((key, tensor, reader.read(info, tensor)))
            if len(reading) > 1:
                yield _arrived(*reading.popleft())
        while reading:
            yield _arrived(*reading.popleft())


def _arrived(key: str, tensor: Tensor, reading: list[Future[None]]) -> tuple[str, Tensor]:
    wait(reading)
    return key, tensor


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
        return _layer_report(weight, None), {f"{name}.weight": weight}
    arrays = (matrix.values, matrix.deltas, matrix.row_offsets)
    return _layer_report(matrix.values, matrix), dict(zip(array_keys(name), arrays, strict=True))


def _layer_report(values: Tensor, matrix: MackoMatrix | None) -> LayerReport:
    """Report on a packed matrix, or on a dense weight `values` where `matrix` is None."""
    rows, cols = matrix.shape if matrix else values.shape
    nonzeros = canonical.count_nonzeros(matrix) if matrix else int(torch.count_nonzero(values))
    bytes_dense = rows * cols * values.element_size()
    return LayerReport(
        rows=rows,
        cols=cols,
        sparsity=1 - nonzeros / max(rows * cols, 1),
        entries=int(matrix.row_offsets[-1]) if matrix else 0,
        bytes_dense=bytes_dense,
        bytes_packed=matrix.nbytes if matrix else bytes_dense,
        packed=matrix is not None,
    )


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
    _forget_named_weights(config)
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
