"""`macko generate`."""

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from macko_llm.cli.console import megabytes, plain_errors, print_json
from macko_llm.cli.options import DeviceOption, DtypeOption, JsonOption, ModelArgument, TrustOption
from macko_llm.defaults import MAX_NEW_TOKENS, TEMPERATURE
from macko_llm.errors import UsageError


@plain_errors
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option(help="Text to continue, or - to read it from stdin.")],
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = MAX_NEW_TOKENS,
    temperature: Annotated[float, typer.Option(help="0 is greedy; above 0 tokens are drawn.")] = TEMPERATURE,
    top_k: Annotated[int | None, typer.Option(help="Draw among this many most probable tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw among the fewest tokens that hold this probability.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the draw reproducible.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    system_prompt: Annotated[str | None, typer.Option(help="What the system says first, with --chat.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt; the text streams to stdout, a summary goes to stderr.

    Examples:
        macko generate ./packed --prompt "Once upon a time"

        macko generate ./packed --prompt "Why is the sky blue?" --chat --temperature 0.7 --top-p 0.9 --seed 1

        cat question.txt | macko generate ./packed --prompt -
    """
    from macko_llm import checkpoint, generation, models
    from macko_llm.loading import load
    from macko_llm.sampling import Sampling

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    text = _read_stdin() if prompt == "-" else prompt
    folder = checkpoint.locate(model)
    tokenizer = models.load_tokenizer(folder, trust_remote_code=trust_remote_code)
    prompt_ids = generation.encode_prompt(tokenizer, text, chat=chat, system_prompt=system_prompt)
    loaded = load(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    made = generation.generate(
        loaded,
        tokenizer,
        prompt_ids,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        on_text=None if as_json else _print_piece,
    )
    if as_json:
        print_json(asdict(made))
        return
    print()
    decode = f"{made.tokens_per_second:.1f} tokens/s" if made.tokens_per_second is not None else "one token"
    print(
        f"prompt: {made.prompt_tokens} tokens, {made.prefill_tokens_per_second:.1f} tokens/s; "
        f"decode: {made.new_tokens} tokens, {decode}; peak memory: {megabytes(made.peak_memory_bytes)}",
        file=sys.stderr,
    )


def _read_stdin() -> str:
    try:
        # The end of the last line is the file's, not the prompt's.
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"The prompt on stdin is not {error.encoding} text; convert it first.") from error


def _print_piece(piece: str) -> None:
    print(piece, end="", flush=True)
