"""`macko demo`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from macko_llm.cli.console import plain_errors, print_json, progress_bars
from macko_llm.cli.options import JsonOption, expanded_path
from macko_llm.cli.reports import print_quality
from macko_llm.cli.surroundings import with_threads


@plain_errors
@with_threads
def demo(
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            parser=expanded_path,
            help="Keeps the models and texts, to try more with them.",
        ),
    ] = Path("macko-demo"),
    as_json: JsonOption = False,
) -> None:
    """Prune, pack, evaluate and run the bundled model, on the CPU, in under two minutes.

    Examples:
        macko demo

        macko demo -o /tmp/macko-demo
    """
    from macko_llm.demo.run import run

    with progress_bars() as progress:
        result = run(output, progress)
    if as_json:
        print_json(asdict(result))
        return
    print_quality(result.report)
    print(f"The packed model tells a story:\n\n{result.prompt}{result.story}\n")
    print(f"The models and texts are in {output}; `macko generate {output}/packed-50 --prompt ...` tells another one.")
