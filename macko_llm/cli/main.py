"""The `macko` command: gathers the commands, each of which lives in a file of its own."""

import functools
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
import typer.core

import macko_llm
from macko_llm.cli import bench_prune
from macko_llm.cli.bench_decode import decode
from macko_llm.cli.bench_quality import quality
from macko_llm.cli.bench_spmv import spmv
from macko_llm.cli.chat import chat
from macko_llm.cli.compare import compare
from macko_llm.cli.console import print_error, print_json, written_output
from macko_llm.cli.demo import demo
from macko_llm.cli.doctor import doctor
from macko_llm.cli.eval import evaluate
from macko_llm.cli.eval_perplexity import eval_perplexity
from macko_llm.cli.generate import generate
from macko_llm.cli.help import PlainCommand, PlainHelp
from macko_llm.cli.inspect import inspect
from macko_llm.cli.pack import pack
from macko_llm.cli.prune import prune
from macko_llm.cli.tune import tune
from macko_llm.cli.unpack import unpack
from macko_llm.errors import UsageError


class PlainGroup(PlainHelp, typer.core.TyperGroup):
    """Says a wrong call in one sentence too, where typer would draw a box around it."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, standalone_mode: bool = True, **options: Any) -> Any:
        """Run the command line; see click's `Command.main`."""
        arguments = list(sys.argv[1:] if args is None else args) or ["--help"]
        run = functools.partial(super().main, arguments, *rest, **options, standalone_mode=False)  # type: ignore[misc]
        if not standalone_mode:
            return run()
        try:
            with written_output():
                code = run() or 0
            sys.exit(code)
        except typer.Exit as done:
            sys.exit(done.exit_code)
        except typer.Abort:
            sys.exit(1)
        except Exception as error:
            # click's exceptions; some versions of typer bring a click of their own, so there is no one class to name.
            message = getattr(error, "format_message", None)
            if message is None:
                raise
            context = getattr(error, "ctx", None)
            path = context.command_path if context else "macko"
            sentence = f"{' '.join(message().split()).rstrip('.')}; see `{path} --help`."
            print_error(sentence)
            if "--json" in arguments:
                print_json({"error": sentence})
            sys.exit(getattr(error, "exit_code", UsageError.exit_code))


app = typer.Typer(
    name="macko",
    cls=PlainGroup,
    help="""Prune language models without structure, store them sparse, and run them faster and smaller than dense, on NVIDIA
    GPUs and on CPUs with AVX2 or AVX-512.

    Examples:
        macko demo

        macko prune meta-llama/Llama-2-7b-hf -o pruned

        macko pack ./pruned -o packed

        macko generate ./packed --prompt "Once upon a time"
    """,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
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


app.command(cls=PlainCommand)(prune)
app.command(cls=PlainCommand)(tune)
app.command(cls=PlainCommand)(pack)
app.command(cls=PlainCommand)(unpack)
app.command(cls=PlainCommand)(generate)
app.command(cls=PlainCommand)(chat)
app.command("eval", cls=PlainCommand)(evaluate)
app.command("eval-perplexity", cls=PlainCommand)(eval_perplexity)
app.command(cls=PlainCommand)(compare)
app.command(cls=PlainCommand)(inspect)
app.command(cls=PlainCommand)(doctor)
app.command(cls=PlainCommand)(demo)
bench = typer.Typer(
    cls=PlainGroup,
    help="""Measure: sizes and perplexities, whole models token by token, single products, pruning.

    Examples:
        macko bench quality

        macko bench decode --config llama2-7b
    """,
)
bench.command(cls=PlainCommand)(quality)
bench.command(cls=PlainCommand)(spmv)
bench.command(cls=PlainCommand)(decode)
bench.command(cls=PlainCommand)(bench_prune.prune)
app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point of the `macko` script."""
    app()
