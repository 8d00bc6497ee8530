"""The `macko` command: gathers the commands, each of which lives in a file of its own."""

from typing import Annotated

import typer

import macko_llm
from macko_llm.cli import bench
from macko_llm.cli.demo import demo
from macko_llm.cli.doctor import doctor
from macko_llm.cli.eval_perplexity import eval_perplexity
from macko_llm.cli.generate import generate
from macko_llm.cli.inspect import inspect
from macko_llm.cli.pack import pack
from macko_llm.cli.prune import prune
from macko_llm.cli.unpack import unpack

app = typer.Typer(
    name="macko",
    help="Prune language models without structure, store them sparse, run them faster and smaller than dense.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"macko {macko_llm.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    del version


app.command()(prune)
app.command()(pack)
app.command()(unpack)
app.command()(generate)
app.command("eval-perplexity")(eval_perplexity)
app.command()(inspect)
app.command()(doctor)
app.command()(demo)
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Entry point of the `macko` script."""
    app()
