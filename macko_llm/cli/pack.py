"""`macko pack`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from macko_llm.cli.console import megabytes, plain_errors, print_json, progress_bars
from macko_llm.cli.options import (
    DenseArgument,
    DeviceOption,
    JsonOption,
    OverwriteOption,
    ShardSizeOption,
    TrustOption,
    expanded_path,
    value_dtypes,
)
from macko_llm.cli.reports import pack_report_json, print_kinds
from macko_llm.cli.surroundings import with_hub, with_threads
from macko_llm.defaults import MAX_SHARD_SIZE
from macko_llm.errors import UsageError

if TYPE_CHECKING:
    from macko_llm.pack_report import PackReport


NAMES_LISTED = 8
"""A large model has hundreds of layers; --json names them all."""


@plain_errors
@with_hub
@with_threads
def pack(
    model: DenseArgument,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="OUT", parser=expanded_path, help="Folder to write; --dry-run needs none."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            autocompletion=value_dtypes,
            help="float16 or bfloat16. [default: the checkpoint's, float16 for float32]",
        ),
    ] = None,
    max_shard_size: ShardSizeOption = MAX_SHARD_SIZE,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    overwrite: OverwriteOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say how large the result would be, by kind of layer.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Store a pruned model in the MACKO sparse format.

    A matrix that packing would make larger (below about 20 % sparsity) stays dense.

    Examples:
        macko pack ./pruned -o packed

        macko pack ./pruned -o packed --dtype bfloat16 --max-shard-size 2GB

        macko pack ./pruned --dry-run
    """
    from macko_llm import checkpoint, refusals

    if output is None and not dry_run:
        raise UsageError("There is no folder to write; give -o OUT, or --dry-run to see only how large it would be.")
    refusals.check_device(device)
    folder = checkpoint.locate(model)
    refusals.check_pack(folder, output, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite)

    from macko_llm.packing import pack_checkpoint  # takes seconds, which a wrong call need not wait for

    with progress_bars() as progress:
        report = pack_checkpoint(
            folder,
            None if dry_run else output,
            dtype=dtype,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        where = None if output is None else str(output)
        kinds = {"kinds": {name: asdict(kind) for name, kind in report.kinds.items()}} if dry_run else {}
        print_json({"output": where, "dry_run": dry_run, **pack_report_json(report), **kinds})
        return
    sizes = f"{megabytes(report.bytes_dense)} into {megabytes(report.bytes_packed)} {_ratio(report)}"
    if dry_run:
        print_kinds(report)
        print(f"Would pack {sizes}; nothing was written.")
    else:
        print(f"Packed {sizes}: {output}")
    if report.rounding.weights:
        print(_say_rounding(report))
    if report.kept_dense:
        print(_say_kept_dense(report))


def _say_rounding(report: "PackReport") -> str:
    rounding = report.rounding
    zeros = f", {rounding.zeros} became zero" if rounding.zeros else ""
    subnormal = f", {rounding.subnormal} subnormal" if rounding.subnormal else ""
    return (
        f"{rounding.weights} weights of {rounding.tensors} tensors were rounded to {report.value_dtype}, by "
        f"{rounding.largest:.2g} of their value at most{zeros}{subnormal}; `macko unpack` gives the rounded ones back."
    )


def _say_kept_dense(report: "PackReport") -> str:
    names = report.kept_dense
    if len(names) == len(report.layers):
        return (
            "All layers stay dense, because packing would make them larger; prune the model first with `macko prune`."
        )
    listed = ", ".join(names[:NAMES_LISTED]) + (", ..." if len(names) > NAMES_LISTED else "")
    return f"{len(names)} of {len(report.layers)} layers stay dense, because packing would make them larger: {listed}"


def _ratio(report: "PackReport") -> str:
    return f"({report.bytes_dense / max(report.bytes_packed, 1):.2f}x smaller, {report.sparsity:.1%} sparsity)"
