"""`macko generate`."""

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from macko_llm.cli.console import megabytes, plain_errors, print_json
from macko_llm.cli.launching import (
    OnText,
    first_process_speaks,
    in_processes,
    place_of_torchrun,
    processes_of_torchrun,
)
from macko_llm.cli.options import (
    DeviceOption,
    DrawSeedOption,
    DtypeOption,
    JsonOption,
    LayoutOption,
    ModelArgument,
    TemperatureOption,
    TopPOption,
    TrustOption,
    expanded_path,
)
from macko_llm.cli.surroundings import with_hub, with_threads
from macko_llm.defaults import LAYOUT, MAX_NEW_TOKENS, TEMPERATURE
from macko_llm.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from macko_llm.generation import Generation
    from macko_llm.ranks import Place
    from macko_llm.sampling import Sampling


@plain_errors
@first_process_speaks
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
    temperature: TemperatureOption = TEMPERATURE,
    top_k: Annotated[int | None, typer.Option(help="Draw among this many most probable tokens.")] = None,
    top_p: TopPOption = None,
    min_p: Annotated[
        float | None, typer.Option(help="Draw no token below this share of the most probable one's probability.")
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1, tokens of the prompt and the text so far become less probable.")
    ] = 1.0,
    seed: DrawSeedOption = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="The text ends before this; may be given several times.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    system_prompt: Annotated[str | None, typer.Option(help="What the system says first, with --chat.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    layout: LayoutOption = LAYOUT,
    tensor_parallel: Annotated[
        int | None,
        typer.Option(
            "--tensor-parallel", metavar="N", help="Share the model among N processes, on a GPU each or on the CPU."
        ),
    ] = None,
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

        macko generate ./packed --prompt "Once upon a time" --tensor-parallel 2

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
    processes = _count_processes(tensor_parallel)
    if processes > 1:
        refusals.check_device_of_processes(device)
    speaks = not processes_of_torchrun() or place_of_torchrun().rank == 0
    texts = _read_prompts(prompt or (), prompt_file or ()) if speaks else []
    folder = refusals.find_model(model)
    refusals.check_processes(processes, folder)
    if layout != LAYOUT:
        refusals.require_packed(folder)
    job = _Job(
        folder=folder,
        texts=texts,
        chat=chat,
        system_prompt=system_prompt,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop or (),
        dtype=dtype,
        device=device,
        layout=layout,
        trust_remote_code=trust_remote_code,
    )
    on_text = None if as_json else _print_piece
    if processes_of_torchrun():
        made = _share(place_of_torchrun(), job, on_text if speaks else None)
    elif processes > 1:
        made = in_processes(processes, _share, job, on_text=on_text)
    else:
        made = _continue(job, on_text)
    if not speaks:
        return
    if as_json:
        print_json(asdict(made[0]) if len(made) == 1 else [asdict(one) for one in made])
        return
    if len(made) == 1:
        print()
    else:
        for number, one in enumerate(made, 1):
            print(f"--- prompt {number} ---\n{one.text}")
    from macko_llm import generation

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


@dataclass(frozen=True)
class _Job:
    """What there is to do; goes to other processes, so it holds neither torch nor transformers."""

    folder: Path
    texts: Sequence[str]
    chat: bool
    system_prompt: str | None
    max_new_tokens: int
    sampling: "Sampling"
    stop: Sequence[str]
    dtype: str
    device: str
    layout: str
    trust_remote_code: bool


def _continue(job: _Job, on_text: OnText | None) -> "list[Generation]":
    """Do it in this process."""
    from macko_llm import models, refusals  # takes seconds, which a wrong call need not wait for
    from macko_llm.loading import load

    refusals.check_layout(job.layout, models.resolve_device(job.device).type)
    return _write(job, *_prepare(job, functools.partial(load, job.folder, device=job.device)), on_text)


def _share(place: "Place", job: _Job, on_text: OnText | None) -> "list[Generation]":
    """Do it in one of several processes that share the model; all return the same."""
    from macko_llm import ranks
    from macko_llm.tensor_parallel import load_slices

    with ranks.joined(place, job.device) as device:
        job = replace(job, texts=ranks.gathered(job.texts)[0])
        load = functools.partial(load_slices, job.folder, place, device)
        made = _write(job, *ranks.together(lambda: _prepare(job, load)), on_text)
        peaks = [peak for peak in ranks.gathered(made[0].peak_memory_bytes) if peak is not None]
    return [replace(one, peak_memory_bytes=sum(peaks) or None) for one in made]


def _prepare(
    job: _Job, load: "Callable[..., PreTrainedModel]"
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase, list[Tensor]]":
    from macko_llm import generation, models
    from macko_llm.text import encode_prompt

    config = models.load_config(job.folder, trust_remote_code=job.trust_remote_code)
    tokenizer = models.load_tokenizer(job.folder, trust_remote_code=job.trust_remote_code)
    prompts = [encode_prompt(tokenizer, text, chat=job.chat, system_prompt=job.system_prompt) for text in job.texts]
    generation.check_prompts(prompts, job.max_new_tokens, config)
    model = load(dtype=job.dtype, trust_remote_code=job.trust_remote_code, layout=job.layout, tokens=len(prompts))
    return model, tokenizer, prompts


def _write(
    job: _Job,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: "list[Tensor]",
    on_text: OnText | None,
) -> "list[Generation]":
    from macko_llm import generation

    options: dict[str, Any] = {"max_new_tokens": job.max_new_tokens, "sampling": job.sampling, "stop": job.stop}
    if len(prompts) > 1:
        return generation.generate_batch(model, tokenizer, prompts, **options)
    return [generation.generate(model, tokenizer, prompts[0], **options, on_text=on_text)]


def _count_processes(asked: int | None) -> int:
    """How many share the model."""
    started = processes_of_torchrun()
    if started and asked not in (None, started):
        raise UsageError(
            f"torchrun has started {started} processes, and --tensor-parallel asks for {asked}; leave that out."
        )
    return started or (1 if asked is None else asked)


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
