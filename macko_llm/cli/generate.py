"""`macko generate`."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from macko_llm.cli.console import megabytes, plain_errors, print_json
from macko_llm.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    LayoutOption,
    ModelArgument,
    TrustOption,
    expanded_path,
)
from macko_llm.cli.surroundings import with_hub, with_threads
from macko_llm.defaults import LAYOUT, MAX_NEW_TOKENS, TEMPERATURE
from macko_llm.errors import UsageError


@plain_errors
@with_hub
@with_threads
def generate(
    model: ModelArgument,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="Text to continue, or - to read it from stdin; several run at once."),
    ] = None,
    prompt_file: Annotated[
        list[Path] | None,
        typer.Option(
            "--prompt-file",
            "-f",
            metavar="FILE",
            parser=expanded_path,
            help="A UTF-8 file with a text to continue; may be given several times.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", help="Stop after this many tokens.")
    ] = MAX_NEW_TOKENS,
    temperature: Annotated[float, typer.Option(help="0 is greedy; above 0 tokens are drawn.")] = TEMPERATURE,
    top_k: Annotated[int | None, typer.Option(help="Draw among this many most probable tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw among the fewest tokens that hold this probability.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Draw no token below this share of the most probable one's probability.")
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1, tokens of the prompt and the text so far become less probable.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes the draw reproducible.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="The text ends before this; may be given several times.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    system_prompt: Annotated[str | None, typer.Option(help="What the system says first, with --chat.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    layout: LayoutOption = LAYOUT,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt; the text streams to stdout, a summary goes to stderr. Several prompts, first those
    of --prompt, then those of --prompt-file, are printed at the end, with --json as a list. A GPU holds a packed model
    in the layout that suits so many at once.

    Examples:
        macko generate ./packed --prompt "Once upon a time"

        macko generate ./packed --prompt "Why is the sky blue?" --chat --temperature 0.7 --top-p 0.9 --seed 1

        macko generate ./packed --prompt "Q: How old is the sea? A:" --prompt "Q: And the sky? A:" --stop "Q:"

        macko generate ./packed -f question.txt -n 200

        macko generate ./packed -f one.txt -f two.txt -f three.txt --layout tiled

        cat question.txt | macko generate ./packed --prompt -
    """
    from macko_llm import refusals
    from macko_llm.sampling import Sampling

    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        repetition_penalty=repetition_penalty,
    )
    refusals.check_new_tokens(max_new_tokens)
    refusals.check_dtype(dtype)
    refusals.check_device(device)
    refusals.check_layout(layout)
    texts = _read_prompts(prompt or (), prompt_file or ())
    folder = refusals.find_model(model)
    if layout != LAYOUT:
        refusals.require_packed(folder)

    from macko_llm import generation, models  # takes seconds, which a wrong call need not wait for
    from macko_llm.loading import load
    from macko_llm.text import encode_prompt

    refusals.check_layout(layout, models.resolve_device(device).type)
    config = models.load_config(folder, trust_remote_code=trust_remote_code)
    tokenizer = models.load_tokenizer(folder, trust_remote_code=trust_remote_code)
    prompts = [encode_prompt(tokenizer, text, chat=chat, system_prompt=system_prompt) for text in texts]
    generation.check_prompts(prompts, max_new_tokens, config)
    loaded = load(
        folder,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        layout=layout,
        tokens=len(prompts),
    )
    if len(prompts) == 1:
        made = [
            generation.generate(
                loaded,
                tokenizer,
                prompts[0],
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                stop=stop or (),
                on_text=None if as_json else _print_piece,
            )
        ]
    else:
        made = generation.generate_batch(
            loaded, tokenizer, prompts, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop or ()
        )
    if as_json:
        print_json(asdict(made[0]) if len(made) == 1 else [asdict(one) for one in made])
        return
    if len(made) == 1:
        print()
    else:
        for number, one in enumerate(made, 1):
            print(f"--- prompt {number} ---\n{one.text}")
    prefill = sum(one.prefill_tokens_per_second for one in made)
    speed = generation.batch_tokens_per_second(made)
    decode = f"{speed:.1f} tokens/s" if speed is not None else "one token" if len(made) == 1 else "one token each"
    peak = made[0].peak_memory_bytes
    memory = "" if peak is None else f"; peak memory: {megabytes(peak)}"
    print(
        f"prompt: {sum(one.prompt_tokens for one in made)} tokens, {prefill:.1f} tokens/s; "
        f"decode: {sum(one.new_tokens for one in made)} tokens, {decode}{memory}",
        file=sys.stderr,
    )


def _read_prompts(prompts: Sequence[str], files: Sequence[Path]) -> list[str]:
    if not prompts and not files:
        raise UsageError("There is no prompt; give --prompt TEXT, --prompt - for stdin, or --prompt-file FILE.")
    if prompts.count("-") > 1:
        raise UsageError("Only one prompt can come from stdin; use --prompt - once.")
    return [*(_read_stdin() if prompt == "-" else prompt for prompt in prompts), *map(_read_file, files)]


# The end of the last line is the file's, not the prompt's.


def _read_stdin() -> str:
    if sys.stdin is None:
        raise UsageError("Standard input is closed; give the prompt as text, or pipe it in.")
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"The prompt on stdin is not {error.encoding} text; convert it first.") from error
    except OSError as error:
        raise UsageError(f"Standard input cannot be read ({error.strerror or error}); pipe the prompt in.") from error


def _read_file(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"The prompt in {file} is not UTF-8 text; convert it first.") from error
    except OSError as error:
        raise UsageError(
            f"The prompt file {file} cannot be read ({error.strerror}); name a text file, or use --prompt - for stdin."
        ) from error


def _print_piece(piece: str) -> None:
    print(piece, end="", flush=True)
