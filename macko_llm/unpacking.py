"""Packed checkpoint to dense checkpoint, one tensor at a time."""

from pathlib import Path

from macko_llm import checkpoint, outputs, refusals
from macko_llm.checkpoint_contents import packed_contents
from macko_llm.defaults import MAX_SHARD_SIZE
from macko_llm.layouts import canonical
from macko_llm.packed_checkpoint import ARRAY_NAMES, read_matrix
from macko_llm.progress import Progress, no_progress
from macko_llm.shards import ShardWriter


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
    _, linears, infos = packed_contents(source, trust_remote_code)
    with outputs.new_folder(target, overwrite=overwrite) as partial:
        writer = ShardWriter(partial, shard_bytes)
        for number, (key, tensor) in enumerate(checkpoint.tensors(infos)):
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
        checkpoint.forget_named_weights(config)
        checkpoint.write_json(partial / checkpoint.CONFIG_FILE, config)
        checkpoint.copy_side_files(source, partial)
        provenance = checkpoint.read_provenance(source)
        provenance.pop("pack", None)
        checkpoint.write_provenance(partial, provenance)
