"""`macko prune`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from macko_llm.cli.console import megabytes, plain_errors, print_json, print_table, progress_bars
from macko_llm.cli.options import (
    SOURCES,
    DenseArgument,
    DeviceOption,
    JsonOption,
    OutputOption,
    OverwriteOption,
    TextColumnOption,
    TrainSplitOption,
    TrustOption,
    allocations,
    expanded_path,
    methods,
    model_dtypes,
    parse_layers,
    patterns,
    places,
    updates,
)
from macko_llm.cli.reports import pack_report_json
from macko_llm.cli.surroundings import with_hub, with_threads
from macko_llm.defaults import CALIBRATION_SEQLEN, HIDDEN_STATES
from macko_llm.recipe import ALLOCATIONS, METHODS, UNIFORM, UPDATES, PruneRecipe, load_recipe, make_recipe, one_of

if TYPE_CHECKING:
    from macko_llm.pack_report import PackReport


def _help(text: str, setting: str) -> str:
    default = getattr(PruneRecipe, setting)
    return f"{text} [default: {default if default is not None else f'{CALIBRATION_SEQLEN}, or the longest context'}]"


@plain_errors
@with_hub
@with_threads
def prune(
    model: DenseArgument,
    output: OutputOption,
    method: Annotated[
        str | None, typer.Option(autocompletion=methods, help=_help(f"{one_of(METHODS)}.", "method"))
    ] = None,
    update: Annotated[
        str | None,
        typer.Option(
            autocompletion=updates,
            help=_help(f"{one_of(UPDATES)}: re-fit the weights that the method keeps.", "update"),
        ),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            autocompletion=allocations,
            help=_help(f"{one_of(ALLOCATIONS)}: blocks with more outliers keep more.", "allocation"),
        ),
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help=_help("Share of the weights to remove, in [0, 1).", "sparsity"))
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(autocompletion=patterns, help=_help("unstructured, 2:4 or 4:8.", "pattern"))
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYERS",
            help="Prune these layers alone: a name or the end of one, with * as in a shell, or re: and a regular expression; "
            "may be given several times.",
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="LAYERS", help="Leave these layers dense; wins over --targets.")
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYERS=SHARE",
            help="Prune these layers to a sparsity of their own; may be given several times, and of several that fit a layer "
            "the last counts.",
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help=_help(
                f"c4, wikitext2, {SOURCES}, or .safetensors with int64 tokens.",
                "calibration",
            )
        ),
    ] = None,
    split: TrainSplitOption = None,
    text_column: TextColumnOption = None,
    chat_template: Annotated[
        bool | None,
        typer.Option(
            "--chat-template/--no-chat-template",
            help='Put documents into the tokenizer\'s chat template: lists of messages (field "messages") as they are, '
            "texts as what the user says. [default: no]",
        ),
    ] = None,
    nsamples: Annotated[int | None, typer.Option(help=_help("Calibration sequences.", "nsamples"))] = None,
    seqlen: Annotated[int | None, typer.Option(help=_help("Tokens in each of them.", "seqlen"))] = None,
    seed: Annotated[int | None, typer.Option(help=_help("Of the calibration draw.", "seed"))] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            autocompletion=model_dtypes,
            help=_help("auto, float16, bfloat16 or float32, to compute and save in.", "dtype"),
        ),
    ] = None,
    device: DeviceOption = "auto",
    hidden_states: Annotated[
        str,
        typer.Option(
            autocompletion=places,
            help="Where those of the calibration text are between blocks: auto, device, host or disk (beside the output).",
        ),
    ] = HIDDEN_STATES,
    packed: Annotated[
        bool, typer.Option("--pack", help="Write the packed checkpoint that macko pack would make of the result.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the job of this output that was cut off, after its last finished block."
        ),
    ] = False,
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="FILE.toml", parser=expanded_path, help="Settings from a file; flags override it."),
    ] = None,
    trust_remote_code: TrustOption = False,
    overwrite: OverwriteOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be pruned.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Set the least important weights of a model to zero.

    Writes an ordinary dense Hugging Face checkpoint with zeros, and macko.json that says how it was made.

    Examples:
        macko prune meta-llama/Llama-2-7b-hf -o pruned

        macko prune ./model -o pruned --sparsity 0.6 --calibration my-texts.jsonl

        macko prune ./model -o pruned --method sparsegpt --update admm

        macko prune ./model -o pruned --sparsity 0.7 --allocation owl

        macko prune ./model -o pruned --ignore down_proj --ignore "model.layers.0.*"

        macko prune ./model -o pruned --sparsity 0.6 --layers "*.down_proj=0.4" --layers "layers.0.*=0"

        macko prune ./model -o pruned --calibration HuggingFaceFW/fineweb-edu:sample-10BT

        macko prune ./chat-model -o pruned --chat-template --calibration HuggingFaceH4/ultrachat_200k --split train_sft

        macko prune ./model -o packed --pack

        macko prune ./model -o pruned --resume

        macko prune ./model -o pruned --recipe configs/llama2-7b-wanda-50.toml
    """
    flags = {
        "method": method,
        "update": update,
        "allocation": allocation,
        "sparsity": sparsity,
        "pattern": pattern,
        "targets": targets or None,
        "ignore": ignore or None,
        "layers": parse_layers(layers),
        "calibration": calibration,
        "split": split,
        "text_column": text_column,
        "chat_template": chat_template,
        "nsamples": nsamples,
        "seqlen": seqlen,
        "seed": seed,
        "dtype": dtype,
    }
    settings = make_recipe(load_recipe(recipe) if recipe else {}, flags)

    from macko_llm import calibration as sources
    from macko_llm import refusals

    if settings.needs_calibration:
        sources.check_source(
            settings.calibration, settings.split, settings.text_column, chat_template=settings.chat_template
        )
    refusals.check_device(device)
    refusals.check_place(hidden_states)
    if packed:
        refusals.check_value_dtype(settings.dtype)
    refusals.check_prune(model, output, settings, overwrite=overwrite, weights=not dry_run)

    from macko_llm.pruned_packing import prune_packed
    from macko_llm.pruning.pipeline import plan, prune_checkpoint  # takes seconds, which a wrong call need not wait for

    if dry_run:
        planned = plan(model, output, settings, trust_remote_code=trust_remote_code, overwrite=overwrite)
        if as_json:
            print_json({"output": str(output), "dry_run": True, **asdict(planned)})
        else:
            usual = f"{settings.sparsity:.1%}" if settings.allocation == UNIFORM else settings.allocation
            shares = {name: f"{share:.1%}" for name, share in planned.layer_sparsities.items()}
            rows = [
                [name, f"{rows} x {cols}", shares.get(name, usual)] for name, (rows, cols) in planned.layers.items()
            ]
            print_table("Would prune", ["layer", "shape", "sparsity"], rows)
            print(f"{len(rows)} layers to {planned.sparsity:.1%} sparsity; nothing was written.")
        return
    stored: PackReport | None = None
    with progress_bars() as progress:
        options: dict[str, Any] = {
            "device": device,
            "hidden_states": hidden_states,
            "resume": resume,
            "trust_remote_code": trust_remote_code,
            "overwrite": overwrite,
            "progress": progress,
        }
        if packed:
            report, stored = prune_packed(model, output, settings, **options)
        else:
            report = prune_checkpoint(model, output, settings, **options)
    if as_json:
        sizes = {} if stored is None else {"pack": pack_report_json(stored)}
        print_json({"output": str(output), **asdict(report), **sizes})
        return
    done = f"Pruned {len(report.layers)} layers to {report.sparsity:.1%} sparsity with {settings.title}"
    if stored is not None:
        done += f", packed {megabytes(stored.bytes_dense)} into {megabytes(stored.bytes_packed)},"
    print(f"{done} in {report.seconds:.1f} s: {output}")
