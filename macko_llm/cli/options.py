"""Arguments and options that several commands share, and how their texts are read."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from macko_llm.defaults import HIDDEN_STATE_PLACES, LAYOUTS, MODEL_DTYPE_NAMES, VALUE_DTYPE_NAMES
from macko_llm.errors import UsageError
from macko_llm.recipe import ALLOCATIONS, METHODS, UNSTRUCTURED, UPDATES

Value = TypeVar("Value")


def expanded_path(text: str | Path) -> Path:
    """A path as the shell would have written it: `--output=~/out` reaches a program with the tilde in it."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 - pathlib's fails where nobody has that name


def model_dtypes() -> list[str]:
    """What shells complete for --dtype."""
    return ["auto", *MODEL_DTYPE_NAMES]


def layouts() -> list[str]:
    """What shells complete for --layout."""
    return [*LAYOUTS]


def methods() -> list[str]:
    """What shells complete for --method."""
    return [*METHODS]


def updates() -> list[str]:
    """What shells complete for --update."""
    return [*UPDATES]


def allocations() -> list[str]:
    """What shells complete for --allocation."""
    return [*ALLOCATIONS]


def patterns() -> list[str]:
    """What shells complete for --pattern."""
    return [UNSTRUCTURED, "2:4", "4:8"]


def value_dtypes() -> list[str]:
    """What shells complete for the --dtype of packed values."""
    return [*VALUE_DTYPE_NAMES]


def shapes() -> list[str]:
    """What shells complete for --config."""
    from macko_llm.benchmarks.shapes import SHAPES

    return [*SHAPES]


def places() -> list[str]:
    """What shells complete for --hidden-states."""
    return [*HIDDEN_STATE_PLACES]


def _devices() -> list[str]:
    return ["auto", "cpu", "cuda"]


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a hub id, dense or packed.")]
DenseArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a hub id of a dense model.")]
PackedArgument = Annotated[str, typer.Argument(metavar="PACKED", help="A folder or a hub id of a packed model.")]
OutputOption = Annotated[
    Path, typer.Option("--output", "-o", metavar="OUT", parser=expanded_path, help="Folder to write.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace a model that lies in the output folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        autocompletion=_devices,
        help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...",
    ),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        autocompletion=model_dtypes,
        help="auto (the checkpoint's), float16, bfloat16 or float32. On a CPU bfloat16 rounds packed float16 values: large "
        "layers are then multiplied 1.1 to 1.4 times as fast, whole models hardly; the bundled model's perplexity goes from "
        "1.5510 to 1.5512.",
    ),
]
LayoutOption = Annotated[
    str,
    typer.Option(
        "--layout",
        metavar="LAYOUT",
        autocompletion=layouts,
        help="How a GPU holds packed weights: sliced (faster for one token at a time), tiled (for several) or auto (by their "
        "number).",
    ),
]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]
ShardSizeOption = Annotated[str, typer.Option(metavar="SIZE", help="Largest weight file, such as 5GB or 500MB.")]


SOURCES = (
    "a dataset of the hub (owner/name or owner/name:configuration) or a local folder laid out as one, a path (.txt, .md, "
    ".json, .jsonl, .parquet, also with .gz, or a folder of them)"
)
EvaluationTextOption = Annotated[str, typer.Option("--dataset", help=f"wikitext2, c4, {SOURCES}.")]
TextColumnOption = Annotated[
    str | None,
    typer.Option(help="Of a dataset, or the field of .json, .jsonl and .parquet files. [default: text]"),
]
TestSplitOption = Annotated[str | None, typer.Option(help="Of a dataset. [default: test]")]
TrainSplitOption = Annotated[str | None, typer.Option(help="Of a dataset. [default: train]")]
StrideOption = Annotated[
    int | None, typer.Option(help="Tokens from one window to the next. [default: seqlen, no overlap]")
]
LimitOption = Annotated[int | None, typer.Option(metavar="WINDOWS", help="Use at most this many windows.")]
TemperatureOption = Annotated[float, typer.Option(help="0 is greedy; above 0 tokens are drawn.")]
TopPOption = Annotated[float | None, typer.Option(help="Draw among the fewest tokens that hold this probability.")]
DrawSeedOption = Annotated[int | None, typer.Option(help="Makes the draw reproducible.")]


def parse_list(texts: Sequence[str] | None, parse: Callable[[str], Value]) -> list[Value]:
    """The values of an option that may be repeated and takes commas, each once, in order."""
    return list(dict.fromkeys(parse(part.strip()) for text in texts or () for part in text.split(",")))


def parse_sparsity(text: str) -> float:
    """A share of zeros.

    Raises:
        UsageError: it is no number from 0 to below 1.
    """
    try:
        sparsity = float(text)
    except ValueError as error:
        raise UsageError(f"{text!r} is not a sparsity; write a share of zeros as in --sparsity 0.5.") from error
    if not 0 <= sparsity < 1:
        raise UsageError(f"The sparsity {text} is outside [0, 1); 0.5 makes half of the weights zero.")
    return sparsity


def parse_layers(texts: Sequence[str] | None) -> list[tuple[str, float]] | None:
    """Patterns of layers with the sparsity of each, from texts such as "*.down_proj=0.4"; None where there are none.

    Raises:
        UsageError: a text without a pattern or a share of zeros.
    """
    pairs = []
    for text in texts or ():
        pattern, equals, share = text.rpartition("=")  # a regular expression may hold more of them
        if not equals:
            raise UsageError(f'{text!r} gives layers no sparsity; write for example --layers "*.down_proj=0.4".')
        pairs.append((pattern.strip(), parse_sparsity(share.strip())))
    return pairs or None
