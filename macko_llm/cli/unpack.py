"""`macko unpack`."""

from macko_llm.cli.console import megabytes, plain_errors, print_json, progress_bars
from macko_llm.cli.options import (
    JsonOption,
    OutputOption,
    OverwriteOption,
    PackedArgument,
    ShardSizeOption,
    TrustOption,
)
from macko_llm.cli.surroundings import with_hub, with_threads
from macko_llm.defaults import MAX_SHARD_SIZE


@plain_errors
@with_hub
@with_threads
def unpack(
    packed: PackedArgument,
    output: OutputOption,
    max_shard_size: ShardSizeOption = MAX_SHARD_SIZE,
    trust_remote_code: TrustOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Give the dense checkpoint back, bit for bit as it was packed: what packing rounded stays rounded.

    Examples:
        macko unpack ./packed -o pruned
    """
    from macko_llm import checkpoint, refusals

    folder = checkpoint.locate(packed)
    refusals.check_unpack(folder, output, max_shard_size=max_shard_size, overwrite=overwrite)

    from macko_llm.unpacking import unpack_checkpoint  # takes seconds, which a wrong call need not wait for

    with progress_bars() as progress:
        unpack_checkpoint(
            folder,
            output,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    written = checkpoint.folder_bytes(output)
    if as_json:
        print_json({"output": str(output), "bytes_dense": written})
    else:
        print(f"Unpacked {packed} into {megabytes(written)}: {output}")
