"""`macko bench quality`."""

import tempfile
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from macko_llm.cli.console import plain_errors, print_json, progress_bars
from macko_llm.cli.options import DeviceOption, JsonOption, expanded_path
from macko_llm.cli.reports import print_quality
from macko_llm.cli.surroundings import with_hub, with_threads
from macko_llm.defaults import EVALUATION_DATASET, QUALITY_SEQLEN
from macko_llm.recipe import PruneRecipe


@plain_errors
@with_hub
@with_threads
def quality(
    model: Annotated[str | None, typer.Argument(help="A folder or hub id, dense. [default: the bundled model]")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="As for `macko prune`. [default: generated stories for the bundled model, else c4]"),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help=f"As for eval-perplexity. [default: generated stories for the bundled model, else {EVALUATION_DATASET}]"
        ),
    ] = None,
    calibration_split: Annotated[
        str | None, typer.Option(help="Of a dataset to calibrate on. [default: train]")
    ] = None,
    calibration_column: Annotated[
        str | None,
        typer.Option(help="With the text to calibrate on; as --text-column of `macko prune`. [default: text]"),
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="As for `macko prune`, of the calibration alone.")
    ] = False,
    dataset_split: Annotated[str | None, typer.Option(help="Of a dataset to evaluate on. [default: test]")] = None,
    dataset_column: Annotated[
        str | None,
        typer.Option(help="With the text to evaluate on; as --text-column of eval-perplexity. [default: text]"),
    ] = None,
    sparsity: Annotated[list[float] | None, typer.Option(help="May be given several times. [default: 0.5]")] = None,
    nsamples: Annotated[int, typer.Option(help="Calibration sequences.")] = PruneRecipe.nsamples,
    seqlen: Annotated[
        int | None,
        typer.Option(
            help="Tokens in a calibration sequence and in an evaluation window. "
            f"[default: {QUALITY_SEQLEN}, or the longest context]"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the calibration draw.")] = PruneRecipe.seed,
    limit: Annotated[int | None, typer.Option(metavar="WINDOWS", help="Evaluate at most this many windows.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="OUT", parser=expanded_path, help="Keep the checkpoints in this folder."
        ),
    ] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Prune, pack, evaluate and generate: one table of sizes, perplexities and speeds.

    Examples:
        macko bench quality

        macko bench quality ./model --sparsity 0.5 --sparsity 0.6 --calibration train.txt --dataset valid.txt
    """
    from macko_llm import refusals
    from macko_llm.calibration import check_source

    # What is wrong for every model is refused before one is fetched, and before imports that take seconds.
    refusals.check_windows(seqlen, None, limit)
    recipe = PruneRecipe(
        split=calibration_split,
        text_column=calibration_column,
        chat_template=chat_template,
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
    )
    sparsities = sparsity or [recipe.sparsity]
    for share in sparsities:
        replace(recipe, sparsity=share)
    refusals.check_device(device)
    folder = None
    if model is not None:
        calibration, dataset = calibration or PruneRecipe.calibration, dataset or EVALUATION_DATASET
        check_source(calibration, calibration_split, calibration_column, chat_template=chat_template)
        check_source(dataset, dataset_split, dataset_column)
        folder = refusals.find_model(model)

    from macko_llm import models
    from macko_llm.benchmarks.quality import measure_chain
    from macko_llm.demo import run as demo

    with ExitStack() as stack:
        workdir = output or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="macko-bench-")))
        if folder is None:
            folder, texts = demo.MODEL_FOLDER, demo.write_texts(workdir)
            calibration, dataset = calibration or str(texts.calibration), dataset or str(texts.held_out)
            check_source(calibration, calibration_split, calibration_column, chat_template=chat_template)
            check_source(dataset, dataset_split, dataset_column)
        assert calibration is not None
        assert dataset is not None
        if seqlen is None:
            seqlen = min(QUALITY_SEQLEN, models.max_positions(models.load_config(folder)) or QUALITY_SEQLEN)
        progress = stack.enter_context(progress_bars())
        report = measure_chain(
            folder,
            workdir,
            replace(recipe, calibration=calibration, seqlen=seqlen),
            sparsities=sparsities,
            dataset=dataset,
            split=dataset_split,
            text_column=dataset_column,
            seqlen=seqlen,
            limit=limit,
            device=device,
            progress=progress,
        )
    if as_json:
        print_json(asdict(report))
    else:
        print_quality(report)
