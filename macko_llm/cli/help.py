"""How help reads: options without the types of a programming language, and examples a line each."""

import re
from collections.abc import Sequence
from typing import Any

import typer.core


def _with_plain_words(parameters: Sequence[Any]) -> list[Any]:
    """Parameters of a command as help shall show them: flags without a value, others with a word in capitals."""
    for parameter in parameters:
        if parameter.param_type_name == "argument":
            if hasattr(parameter, "display_type_rich"):  # its name says it
                parameter.display_type_rich = _nothing
        elif parameter.metavar is None:
            parameter.metavar = "" if getattr(parameter, "is_flag", False) else _word(parameter)
    return list(parameters)


def _nothing(ctx: Any) -> str:
    del ctx
    return ""


def _word(option: Any) -> str:
    kind = re.search(r"int|float", str(getattr(option, "type", "")).lower() + _shown_type(option))
    return {"int": "N", "float": "NUMBER"}[kind[0]] if kind else "TEXT"


def _shown_type(option: Any) -> str:
    describe = getattr(option, "bare_type", None)  # where typer has types of its own in place of click's
    return str(describe()) if describe else ""


class PlainHelp:
    """For a command or a group of them: help that says what a user writes."""

    help: str | None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.help = _examples_as_block(self.help or "")

    def get_params(self, ctx: Any) -> list[Any]:
        """See click's `Command.get_params`."""
        return _with_plain_words(super().get_params(ctx))  # type: ignore[misc]


class PlainCommand(PlainHelp, typer.core.TyperCommand):
    """A command with such help."""


def _examples_as_block(help_text: str) -> str:
    """Make of the examples a block that Markdown takes as it is, line by line."""
    prose, heading, examples = help_text.partition("Examples:\n")
    if not heading:
        return help_text
    lines = [line.strip() for line in examples.splitlines() if line.strip()]
    return "\n".join([prose + heading, "```text", *lines, "```"])
