"""What the files of a checkpoint hold, checked against the model of its config.json before any weights are read."""

from pathlib import Path

from transformers import PreTrainedModel

from macko_llm import checkpoint, models, packed_checkpoint
from macko_llm.checkpoint import TensorInfo
from macko_llm.dtypes import CAST_HEADERS, HEADERS
from macko_llm.errors import CheckpointError
from macko_llm.packed_checkpoint import PackedConfig


def linear_shapes(skeleton: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """The linear layers of the blocks: name -> (out_features, in_features)."""
    linears = models.prunable_linears(skeleton)
    return {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}


def tensor_infos(source: Path, skeleton: PreTrainedModel) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint, in the files that transformers reads: name -> info."""
    named = getattr(skeleton.config, "transformers_weights", None)
    return checkpoint.tensor_infos(checkpoint.weight_files(source, named))


def check_dense(linears: dict[str, tuple[int, int]], infos: dict[str, TensorInfo]) -> None:
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
        if info.dtype not in CAST_HEADERS:
            raise _needs_scales(f"{name}.weight", info)


def check_dtypes(infos: dict[str, TensorInfo]) -> None:
    """Raise CheckpointError unless packing can cast, or else write, every tensor."""
    for key, info in infos.items():  # embeddings and norms are cast, too
        if info.dtype.startswith("F") and info.dtype not in CAST_HEADERS:
            raise _needs_scales(key, info)
        if info.dtype not in HEADERS:
            raise CheckpointError(
                f"{key} is stored as {info.dtype}, which cannot be written; use a model of ordinary dtypes."
            )


def packed_contents(
    source: Path, trust_remote_code: bool
) -> tuple[str, dict[str, tuple[int, int]], dict[str, TensorInfo]]:
    """The value dtype, the shapes of the linears and the tensors of a packed checkpoint, checked as far as headers tell."""
    value_dtype = PackedConfig.read(checkpoint.read_config(source)["quantization_config"]).value_dtype
    skeleton = models.skeleton(source, trust_remote_code=trust_remote_code)
    linears, infos = linear_shapes(skeleton), tensor_infos(source, skeleton)
    packed = packed_checkpoint.check_headers(linears, infos, value_dtype)
    check_dense({name: shape for name, shape in linears.items() if name not in packed}, infos)
    models.load_empty(source, trust_remote_code=trust_remote_code)  # whatever else makes loading refuse it
    return value_dtype, linears, infos


def _needs_scales(key: str, info: TensorInfo) -> CheckpointError:
    return CheckpointError(
        f"{key} is stored as {info.dtype}, which needs scales to be understood; pack a model whose weights are 16-bit or "
        "float32."
    )
