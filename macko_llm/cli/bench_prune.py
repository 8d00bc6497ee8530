"""`macko bench prune`."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from macko_llm.cli.console import megabytes, plain_errors, print_json, print_table, progress_bars
from macko_llm.cli.options import (
    DeviceOption,
    JsonOption,
    allocations,
    expanded_path,
    methods,
    places,
    shapes,
    updates,
)
from macko_llm.cli.surroundings import with_hub, with_threads
from macko_llm.defaults import CALIBRATION_SEQLEN, HIDDEN_STATES
from macko_llm.recipe import ALLOCATIONS, METHODS, UPDATES, PruneRecipe, one_of
from macko_llm.stages import Stage

if TYPE_CHECKING:
    from macko_llm.benchmarks.prune import PruneCosts

NOTHING = "-"
PEAKS = ("peak GPU", "of it allocated", "peak host", "host before")


@plain_errors
@with_hub
@with_threads
def prune(
    model: Annotated[str | None, typer.Argument(help="A folder or hub id, dense.")] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="SHAPE",
            autocompletion=shapes,
            help="In place of a MODEL: llama2-7b, llama2-70b, llama3-8b, tinyllama-1.1b or tiny, random weights.",
        ),
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Take only the shape of the MODEL; a --config implies it.")
    ] = False,
    blocks: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Prune only so many blocks of a --config, and reckon from them what all would take."
        ),
    ] = None,
    method: Annotated[str, typer.Option(autocompletion=methods, help=f"{one_of(METHODS)}.")] = PruneRecipe.method,
    update: Annotated[str, typer.Option(autocompletion=updates, help=f"{one_of(UPDATES)}.")] = PruneRecipe.update,
    allocation: Annotated[
        str, typer.Option(autocompletion=allocations, help=f"{one_of(ALLOCATIONS)}.")
    ] = PruneRecipe.allocation,
    sparsity: Annotated[float, typer.Option(help="Share of the weights to remove, in [0, 1).")] = PruneRecipe.sparsity,
    nsamples: Annotated[int, typer.Option(help="Calibration sequences, of random tokens.")] = PruneRecipe.nsamples,
    seqlen: Annotated[
        int | None,
        typer.Option(help=f"Tokens in each of them. [default: {CALIBRATION_SEQLEN}, or the longest context]"),
    ] = None,
    hidden_states: Annotated[
        str, typer.Option(autocompletion=places, help="As for `macko prune`: auto, device, host or disk.")
    ] = HIDDEN_STATES,
    packed: Annotated[
        bool, typer.Option("--pack", help="Prune into a packed checkpoint, in place of packing the dense one after it.")
    ] = False,
    folder: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            parser=expanded_path,
            help="Where to write the models, which are removed at the end. [default: the system's temporary folder]",
        ),
    ] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Time pruning and packing: seconds by stage, peaks of GPU and host memory.

    Writes a model with random weights, and prunes it with random calibration tokens, as `macko prune` would, in a process of
    its own.

    Examples:
        macko bench prune --config llama2-7b --random-weights

        macko bench prune --config llama2-7b --random-weights --hidden-states host --pack

        macko bench prune --config llama2-70b --random-weights --blocks 2

        macko bench prune ./model --method sparsegpt --folder /dev/shm
    """
    from macko_llm import refusals
    from macko_llm.benchmarks.shapes import check_blocks, check_shape

    recipe = PruneRecipe(
        method=method, update=update, allocation=allocation, sparsity=sparsity, nsamples=nsamples, seqlen=seqlen
    )
    refusals.check_device(device)
    refusals.check_place(hidden_states)
    refusals.check_folder(folder)
    source = refusals.check_subject(model, config, (), random_weights)
    if source is not None and not random_weights:
        refusals.require_prunable(source)
    if config is not None:
        check_shape(config)
    check_blocks(blocks, config)

    from macko_llm.benchmarks.prune import measure_pruning  # takes seconds, which a wrong call need not wait for

    with progress_bars() as progress:
        report = measure_pruning(
            model,
            config,
            recipe,
            random_weights=random_weights,
            blocks=blocks,
            packed=packed,
            hidden_states=hidden_states,
            device=device,
            folder=folder,
            progress=progress,
        )
    command = shlex.join(
        [
            *("macko", "bench", "prune", *([model] if model is not None else ["--config", str(config)])),
            *["--random-weights"] * random_weights,
            *([] if blocks is None else ["--blocks", str(blocks)]),
            *("--method", method, "--update", update, "--allocation", allocation, "--sparsity", str(sparsity)),
            *("--nsamples", str(nsamples), "--seqlen", str(report.recipe.seqlen), "--hidden-states", hidden_states),
            *["--pack"] * packed,
            *([] if folder is None else ["--folder", str(folder)]),
            *("--device", device),
        ]
    )
    if as_json:
        print_json({"command": command, **asdict(report)})
    else:
        print_costs(report, command)


def print_costs(report: "PruneCosts", command: str) -> None:
    """A column a job, a line a stage, and below what a reader must know."""
    jobs = {"prune --pack" if report.packed else "prune": report.prune}
    if report.pack is not None:
        jobs["pack"] = report.pack
    stages = [stage for stage in get_args(Stage) if any(stage in job.stages for job in jobs.values())]
    columns: dict[str, list[str]] = {"": [*stages, "total", "process", *PEAKS]}
    for name, job in jobs.items():
        peaks = (job.peak_gpu_reserved_bytes, job.peak_gpu_bytes, job.peak_host_bytes, job.host_bytes_before)
        sizes = [NOTHING if peak is None else megabytes(peak) for peak in peaks]
        columns[name] = [*_seconds(job.stages, stages, job.seconds), f"{job.process_seconds:.2f} s", *sizes]
        if job.all_stages is not None and job.all_seconds is not None:
            of_all = _seconds(job.all_stages, stages, job.all_seconds)
            columns[f"{name}, all blocks"] = [*of_all, *[NOTHING] * (len(PEAKS) + 1)]
    print(_title(report))
    print_table("", [*columns], [*zip(*columns.values(), strict=True)])
    if report.blocks_measured < report.blocks:
        print(
            f"Only {report.blocks_measured} of {report.blocks} blocks were there; the seconds of all are reckoned from theirs."
        )
    print(f"Measured {report.machine.date} with\n{command}")


def _title(report: "PruneCosts") -> str:
    recipe = report.recipe
    return (
        f"{report.machine.title}, transformers {report.transformers}\n"
        f"{report.model}, {megabytes(report.weight_bytes)}, {recipe.title} {recipe.sparsity:.0%}, "
        f"{recipe.nsamples} x {recipe.seqlen} random tokens, hidden states: {report.hidden_states}"
    )


def _seconds(of_stages: dict[Stage, float], stages: list[Stage], total: float) -> list[str]:
    return [*(f"{of_stages[stage]:.2f} s" if stage in of_stages else NOTHING for stage in stages), f"{total:.2f} s"]
