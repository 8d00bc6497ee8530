"""`macko chat`."""

import sys
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Annotated

import typer

from macko_llm.cli.console import plain_errors, print_error, until_interrupted
from macko_llm.cli.options import (
    DeviceOption,
    DrawSeedOption,
    DtypeOption,
    LayoutOption,
    ModelArgument,
    TemperatureOption,
    TopPOption,
    TrustOption,
)
from macko_llm.cli.surroundings import with_hub, with_threads
from macko_llm.defaults import CHAT_NEW_TOKENS, LAYOUT, TEMPERATURE
from macko_llm.errors import UsageError

EXIT, RESET = "/exit", "/reset"
PROMPT = "> "


@plain_errors
@with_hub
@with_threads
def chat(
    model: ModelArgument,
    system: Annotated[
        str | None, typer.Option("--system", "--system-prompt", help="What the system says before the conversation.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            "-n",
            help="Stop an answer after this many tokens. "
            f"[default: {CHAT_NEW_TOKENS}, or half of the model's positions]",
        ),
    ] = None,
    temperature: TemperatureOption = TEMPERATURE,
    top_p: TopPOption = None,
    seed: DrawSeedOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    layout: LayoutOption = LAYOUT,
    trust_remote_code: TrustOption = False,
) -> None:
    """Talk with a model, which remembers what was said; answers stream to stdout, all else goes to stderr.

    /reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer. From a pipe, each line that is not
    empty is a turn. A model without a chat template continues the text of both. Where the model has no room for the
    whole conversation, its oldest turns are forgotten. It reads all of it anew for each answer, which begins later the more
    has been said.

    Examples:
        macko chat ./packed

        macko chat ./packed --system "Answer in one sentence." --temperature 0.7 --top-p 0.9 --seed 1

        cat questions.txt | macko chat ./packed -n 100
    """
    from macko_llm import refusals
    from macko_llm.sampling import Sampling

    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    if max_new_tokens is not None:
        refusals.check_new_tokens(max_new_tokens)
    refusals.check_dtype(dtype)
    refusals.check_device(device)
    refusals.check_layout(layout)
    if sys.stdin is None:
        raise UsageError("Standard input is closed; type at a terminal, or pipe the conversation in.")
    folder = refusals.find_model(model)
    if layout != LAYOUT:
        refusals.require_packed(folder)

    from macko_llm import generation, models  # takes seconds, which a wrong call need not wait for
    from macko_llm.chat import Turn, make_prompt
    from macko_llm.loading import load
    from macko_llm.text import has_chat_template

    refusals.check_layout(layout, models.resolve_device(device).type)
    config = models.load_config(folder, trust_remote_code=trust_remote_code)
    tokenizer = models.load_tokenizer(folder, trust_remote_code=trust_remote_code)
    positions = models.max_positions(config)
    most = max_new_tokens or min(CHAT_NEW_TOKENS, (positions or 2 * CHAT_NEW_TOKENS) // 2)
    room = None if positions is None else positions - most
    # What no line could mend is refused before the weights are read.
    shortest = make_prompt(tokenizer, (), "Hello", system=system).ids
    if room is not None and len(shortest) > room:
        fix = "use a smaller --max-new-tokens" + ("" if system is None else ", or say less with --system")
        raise UsageError(
            f"--max-new-tokens is {most}, which leaves no room for what is said before in the model's {positions} positions; "
            f"{fix}."
        )
    generation.check_prompts([shortest], most, config)
    loaded = load(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code, layout=layout)
    at_terminal = sys.stdin.isatty()
    answers = has_chat_template(tokenizer)
    if not answers:
        print_error("The model has no chat template, so it continues what you write.")
    if at_terminal:
        print(f"{RESET} forgets the conversation, {EXIT} or Ctrl-D ends it, Ctrl-C stops an answer.", file=sys.stderr)

    turns: tuple[Turn, ...] = ()
    answered = 0
    for line in _typed_lines() if at_terminal else _piped_lines():
        said, command = line.rstrip("\r\n"), line.strip()
        if command == EXIT:
            break
        if command == RESET:
            turns = ()
            print_error("The conversation is forgotten.")
        if command in ("", RESET):
            continue
        try:
            prompt = make_prompt(tokenizer, turns, said, system=system, room=room)
        except UsageError as error:
            if not at_terminal:  # the turns that follow would answer to something else
                raise
            print_error(str(error))
            continue
        forgotten = len(turns) - len(prompt.turns)
        if forgotten:
            oldest = "the oldest turn is" if forgotten == 1 else f"the {forgotten} oldest turns are"
            print_error(f"The conversation is longer than the model's {positions} positions; {oldest} forgotten.")
        answer, reason = "", None
        # A draw that began anew with each answer would give the same one to the same words.
        draw = sampling if seed is None else replace(sampling, seed=(seed + answered) % 2**64)
        with until_interrupted() if at_terminal else nullcontext():
            for step in generation.stream(loaded, tokenizer, prompt.ids, max_new_tokens=most, sampling=draw):
                print(step.text, end="", flush=True)
                answer, reason = answer + step.text, step.finish_reason
        print(flush=True)
        if answers and reason == "length":
            print_error(f"The answer was cut at --max-new-tokens {most}; give a larger number for longer ones.")
        turns = (*prompt.turns, Turn(said, answer))
        answered += 1


def _piped_lines() -> Iterator[str]:
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise UsageError(f"A line on stdin is not {error.encoding} text; convert it first.") from error
    except OSError as error:
        raise UsageError(f"Standard input cannot be read ({error.strerror or error}); pipe lines in.") from error


def _typed_lines() -> Iterator[str]:
    """Lines with a prompt before each, which is no part of the output; Ctrl-C throws away what was typed of one."""
    with suppress(ImportError):  # Windows has its own
        import readline  # noqa: F401 - lines can be edited, and those before come back
    own = sys.stdout.isatty()  # `input` shows its prompt on stdout where that is no terminal, too
    while True:
        line = None
        with until_interrupted():
            if not own:
                print(PROMPT, end="", file=sys.stderr, flush=True)
            try:
                line = input(PROMPT if own else "")
            except EOFError:
                print(file=sys.stdout if own else sys.stderr)
                return
            except UnicodeDecodeError as error:
                print_error(f"What was typed is not {error.encoding} text; type it again.")
                continue
        if line is None:
            print(f"\n({EXIT} or Ctrl-D ends the conversation)", file=sys.stderr)
        else:
            yield line
