"""`macko tune`."""

from dataclasses import asdict
from typing import Annotated

import typer

from macko_llm.cli.console import plain_errors, print_json, progress_bars
from macko_llm.cli.options import (
    SOURCES,
    DeviceOption,
    JsonOption,
    OutputOption,
    OverwriteOption,
    TextColumnOption,
    TrainSplitOption,
    TrustOption,
    model_dtypes,
)
from macko_llm.cli.surroundings import with_hub, with_threads
from macko_llm.defaults import CALIBRATION_SEQLEN
from macko_llm.tuning.settings import RATE_OF_WIDTH, TuneRecipe


@plain_errors
@with_hub
@with_threads
def tune(
    model: Annotated[
        str, typer.Argument(metavar="PRUNED", help="A folder or a hub id of a pruned model that is not packed.")
    ],
    output: OutputOption,
    dataset: Annotated[
        str,
        typer.Option(help=f"Text to learn from: c4, wikitext2, {SOURCES}, or .safetensors with int64 tokens."),
    ] = TuneRecipe.dataset,
    split: TrainSplitOption = None,
    text_column: TextColumnOption = None,
    steps: Annotated[int, typer.Option(help="Updates of the weights.")] = TuneRecipe.steps,
    batch_size: Annotated[
        int, typer.Option(help="Sequences that go through the model at once.")
    ] = TuneRecipe.batch_size,
    accumulation: Annotated[int, typer.Option(help="Batches that make up an update.")] = TuneRecipe.accumulation,
    seqlen: Annotated[
        int | None,
        typer.Option(help=f"Tokens in a sequence. [default: {CALIBRATION_SEQLEN}, or the longest context]"),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help=f"Of AdamW at its highest; it falls to zero by the end. [default: {RATE_OF_WIDTH:g} / the model's width]"
        ),
    ] = None,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which it rises to that.")] = TuneRecipe.warmup,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = TuneRecipe.weight_decay,
    seed: Annotated[int, typer.Option(help="Of the draw of the sequences.")] = TuneRecipe.seed,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            autocompletion=model_dtypes,
            help="auto (the checkpoint's), float16, bfloat16 or float32, to save in; training is in float32.",
        ),
    ] = TuneRecipe.dtype,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train the weights that pruning kept, so that they make up for the others.

    What is zero stays zero; embeddings, norms and the lm_head stay as they are. Writes an ordinary dense checkpoint, and
    macko.json that says how it was made.

    Examples:
        macko tune pruned -o tuned --dataset wikitext2

        macko tune pruned -o tuned --dataset my-texts.jsonl --steps 500

        macko tune pruned -o tuned --dataset HuggingFaceFW/fineweb-edu:sample-10BT

        macko tune pruned -o tuned --batch-size 1 --accumulation 8
    """
    recipe = TuneRecipe(
        dataset=dataset,
        split=split,
        text_column=text_column,
        steps=steps,
        batch_size=batch_size,
        accumulation=accumulation,
        seqlen=seqlen,
        learning_rate=learning_rate,
        warmup=warmup,
        weight_decay=weight_decay,
        seed=seed,
        dtype=dtype,
    )
    from macko_llm import calibration, refusals

    calibration.check_source(dataset, split, text_column)
    refusals.check_device(device)
    refusals.check_tune(model, output, dtype=dtype, overwrite=overwrite)

    from macko_llm.tuning.pipeline import tune_checkpoint  # takes seconds, which a wrong call need not wait for

    with progress_bars() as progress:
        report = tune_checkpoint(
            model,
            output,
            recipe,
            device=device,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        print_json({"output": str(output), **asdict(report)})
    else:
        print(
            f"Tuned {len(report.layers)} layers, {report.sparsity:.1%} of their weights zero as before, "
            f"in {report.steps} steps and {report.seconds:.1f} s: "
            f"loss {report.loss_before:.3f} -> {report.loss_after:.3f}: {output}"
        )
