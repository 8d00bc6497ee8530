"""The decode loop: tokens out of any transformers causal language model, dense or packed, one step at a time.

`stream` yields one `Step` a token and prints nothing; `generate` drains it into a `Generation` with the speeds and the
peak memory; `generate_batch` does so for several prompts at once.
"""

import re
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from macko_llm.defaults import MAX_NEW_TOKENS, RUN_AHEAD
from macko_llm.engine import Engine, make_engine
from macko_llm.errors import NonFiniteError, UsageError
from macko_llm.models import check_token_ids, max_positions
from macko_llm.refusals import check_new_tokens
from macko_llm.sampling import GREEDY, NOT_FINITE, Sampling
from macko_llm.text import Detokenizer, StopStrings

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Step:
    """One new token.

    Attributes:
        index: 0 for the token that the prefill gives, then 1, 2, ...
        token_id: the token, a stop token included.
        text: the text that is certain since this token, empty while a character lacks bytes or a stop string may have
            begun; special and stop tokens have none.
        seconds: time that the engine took from the first token's request to this token being known: wall time for the
            first, building the engine included, and for each later one the device's own. The consumer's time between
            steps is not in it.
        finish_reason: None while there is more; on the last step "stop" after a stop token or a stop string, "length" at
            max_new_tokens.
    """

    index: int
    token_id: int
    text: str
    seconds: float
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Generation:
    """A finished text and what it took.

    The speeds are this text's. In a batch all texts are read in the same time, and each is written until it ends, so that
    the speeds of the texts, added up, are the batch's while all of them are being written.

    Attributes:
        text: all new text, without the prompt, a stop string and what would have come after it.
        prompt_tokens: tokens of the prompt.
        new_tokens: tokens generated, a stop token included.
        prefill_tokens_per_second: prompt tokens over the time to the first new token.
        tokens_per_second: new tokens after the first over the time they took; None where there is only the first.
        peak_memory_bytes: on GPUs what torch had allocated at most during this call, summed over the model's GPUs; else
            the peak resident memory of the process so far, None where the system does not tell. A batch's texts share it.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_tokens_per_second: float
    tokens_per_second: float | None
    peak_memory_bytes: int | None


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a text: of the generation config, else of the model config, else of the tokenizer.

    The first that names any decides alone, so that a text ends where `model.generate` ends it.
    """
    configs = (getattr(model, "generation_config", None), model.config, model.config.get_text_config(), tokenizer)
    for config in configs:
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Tensor | Sequence[int],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    sampling: Sampling = GREEDY,
    stop_ids: Collection[int] | None = None,
    stop: Sequence[str] = (),
) -> Iterator[Step]:
    """Continue a prompt, one step a token; all arguments are checked at the call, the work begins at the first `next`.

    The texts of the steps, put together, are what decoding prompt and new tokens in one go (without special tokens,
    spaces left alone) shows after the prompt. Greedy steps are the tokens of `model.generate(do_sample=False)`, called with
    the repetition penalty of `sampling`; the logits processors of a generation config are not applied.

    Args:
        model: any transformers causal language model, in eval mode.
        tokenizer: the model's tokenizer.
        prompt_ids: [1, n] or [n] token ids, n >= 1.
        max_new_tokens: stop after this many.
        sampling: how each token is chosen, from fp32 logits.
        stop_ids: tokens that end the text; None takes the model's (`stop_token_ids`).
        stop: texts that end the text, before them; where several could, the one that is complete first.

    Raises:
        UsageError: an empty prompt, no new tokens wanted, more tokens together than the model has positions, or an empty
            stop string.
        CheckpointError: a token that the model does not know: the tokenizer belongs to another model.
        NonFiniteError: while iterating, when the logits are NaN or infinite.
    """
    return (
        step for (step,) in _start(model, tokenizer, [prompt_ids], max_new_tokens, sampling, stop_ids, stop) if step
    )


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Tensor | Sequence[int],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    sampling: Sampling = GREEDY,
    stop_ids: Collection[int] | None = None,
    stop: Sequence[str] = (),
    on_text: Callable[[str], object] | None = None,
) -> Generation:
    """Continue a prompt to its end; arguments and errors of `stream`.

    Args:
        model: as in `stream`.
        tokenizer: as in `stream`.
        prompt_ids: as in `stream`; `text.encode_prompt` makes them.
        max_new_tokens: as in `stream`.
        sampling: as in `stream`.
        stop_ids: as in `stream`.
        stop: as in `stream`.
        on_text: called with each piece of new text as it comes; its time is not counted.
    """
    rows = _start(model, tokenizer, [prompt_ids], max_new_tokens, sampling, stop_ids, stop)
    return _drain(model, [prompt_ids], rows, on_text)[0]


def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tensor | Sequence[int]],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    sampling: Sampling = GREEDY,
    stop_ids: Collection[int] | None = None,
    stop: Sequence[str] = (),
) -> list[Generation]:
    """Continue several prompts at once, each to its own end.

    Args:
        model: as in `stream`.
        tokenizer: as in `stream`.
        prompts: prompts as in `stream`, one or more; their lengths may differ.
        max_new_tokens: as in `stream`, for each text.
        sampling: as in `stream`; what a seed draws for a text depends on its place and on the number of texts.
        stop_ids: as in `stream`.
        stop: as in `stream`.

    Returns:
        One for each prompt, in order.

    Raises:
        UsageError: as `stream`, and where there is no prompt or the model cannot read different lengths at once.
        CheckpointError: as `stream`.
        NonFiniteError: when the logits of a text that has not ended are NaN or infinite.
    """
    return _drain(model, prompts, _start(model, tokenizer, prompts, max_new_tokens, sampling, stop_ids, stop))


def batch_tokens_per_second(texts: Sequence[Generation]) -> float | None:
    """New tokens after the firsts, of all texts of a batch, over the time that the longest took; None where there are none."""
    spans = [(one.new_tokens - 1, one.tokens_per_second) for one in texts]
    longest = max((new / speed for new, speed in spans if speed is not None), default=None)
    return sum(new for new, _ in spans) / longest if longest else None


class _Writer:
    """Turns the tokens of one text into steps, and knows when it ends."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: list[int],
        limit: int,
        stop_ids: frozenset[int],
        stop: Sequence[str],
    ) -> None:
        self.detokenizer = Detokenizer(tokenizer, prompt)
        self.stop_strings = StopStrings(stop)
        self.limit = limit
        self.stop_ids = stop_ids
        self.written = 0
        self.finished = False

    def step(self, token_id: int, seconds: float) -> Step:
        """The step of the next token."""
        if token_id == NOT_FINITE:
            raise NonFiniteError(
                f"The logits of new token {self.written} are NaN or infinite; "
                "use --dtype bfloat16 or float32, or repair the checkpoint if it holds such weights."
            )
        reason: FinishReason | None = None
        fresh = ""
        if token_id in self.stop_ids:
            reason = "stop"
        else:
            fresh = self.detokenizer.push(token_id)
            if self.written == self.limit - 1:
                reason = "length"
        if reason:
            fresh += self.detokenizer.flush()
        text = self.stop_strings.push(fresh)
        if self.stop_strings.found:
            reason = "stop"
        elif reason:
            text += self.stop_strings.flush()
        step = Step(self.written, token_id, text, seconds, reason)
        self.written += 1
        self.finished = reason is not None
        return step


def check_prompts(
    prompts: Sequence[Tensor | Sequence[int]], max_new_tokens: int, config: PretrainedConfig
) -> list[list[int]]:
    """Refuse what `stream` would refuse of these prompts, for which a model's config is enough.

    Returns:
        Their tokens.

    Raises:
        UsageError: no prompt, no new tokens wanted, or more tokens together than the model has positions.
        CheckpointError: a token that the model does not know: the tokenizer belongs to another model.
    """
    if not prompts:
        raise UsageError("There is no prompt; give at least one.")
    ids = [_token_list(prompt) for prompt in prompts]
    for prompt in ids:
        _check_length(len(prompt), max_new_tokens, max_positions(config))
        check_token_ids(prompt, config, "The prompt")
    return ids


def _start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tensor | Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Collection[int] | None,
    stop: Sequence[str],
) -> Iterator[list[Step | None]]:
    """Check everything now; the steps of all texts, position by position, None where a text has ended."""
    ids = check_prompts(prompts, max_new_tokens, model.config)
    ends = frozenset(stop_token_ids(model, tokenizer) if stop_ids is None else stop_ids)
    writers = [_Writer(tokenizer, prompt, max_new_tokens, ends, stop) for prompt in ids]
    return _write(writers, _token_rows(model, ids, max_new_tokens, sampling))


def _write(writers: list[_Writer], rows: Iterator[tuple[list[int], float]]) -> Iterator[list[Step | None]]:
    for tokens, seconds in rows:
        yield [
            None if writer.finished else writer.step(token, seconds)
            for writer, token in zip(writers, tokens, strict=True)
        ]
        if all(writer.finished for writer in writers):
            return


def _token_rows(
    model: PreTrainedModel, prompts: list[list[int]], new_tokens: int, sampling: Sampling
) -> Iterator[tuple[list[int], float]]:
    """The tokens of each step, one a text, and the seconds until then; on a GPU some steps run ahead of the host."""
    began = time.perf_counter()
    longest = max(map(len, prompts))
    engine = make_engine(model, max_tokens=longest + new_tokens, sampling=sampling)
    newest = engine.prefill(prompts)
    tokens = newest.tolist()
    seconds = time.perf_counter() - began
    yield tokens, seconds
    most = 1 + (RUN_AHEAD if engine.device.type == "cuda" else 0)
    left = new_tokens - 1
    queued: deque[Callable[[], tuple[list[int], float]]] = deque()
    while left or queued:
        while left and len(queued) < most:
            newest, read = _decode(engine, newest)
            queued.append(read)
            left -= 1
        tokens, took = queued.popleft()()
        seconds += took
        yield tokens, seconds


def _decode(engine: Engine, token: Tensor) -> tuple[Tensor, Callable[[], tuple[list[int], float]]]:
    """Ask for the next tokens; on a GPU without waiting for them. What is returned with them waits, and tells its time."""
    if engine.device.type != "cuda":
        began = time.perf_counter()
        token = engine.decode(token)
        done = token.tolist(), time.perf_counter() - began
        return token, lambda: done
    stream = torch.cuda.current_stream(engine.device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record(stream)
    token = engine.decode(token)
    on_host = token.to("cpu", non_blocking=True)  # torch makes it pinned memory
    end.record(stream)

    def read() -> tuple[list[int], float]:
        end.synchronize()
        return on_host.tolist(), begin.elapsed_time(end) / 1e3

    return token, read


def _drain(
    model: PreTrainedModel,
    prompts: Sequence[Tensor | Sequence[int]],
    rows: Iterator[list[Step | None]],
    on_text: Callable[[str], object] | None = None,
) -> list[Generation]:
    gpus = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type == "cuda"}
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    texts: list[list[Step]] = [[] for _ in prompts]
    for row in rows:
        for steps, step in zip(texts, row, strict=True):
            if step is None:
                continue
            steps.append(step)
            if on_text is not None and step.text:
                on_text(step.text)
    peak = sum(map(torch.cuda.max_memory_allocated, gpus)) if gpus else _peak_resident_bytes()
    return [_generation(len(_token_list(prompt)), steps, peak) for prompt, steps in zip(prompts, texts, strict=True)]


def _generation(prompt_tokens: int, steps: list[Step], peak_memory_bytes: int | None) -> Generation:
    first, last = steps[0].seconds, steps[-1].seconds
    return Generation(
        text="".join(step.text for step in steps),
        prompt_tokens=prompt_tokens,
        new_tokens=len(steps),
        prefill_tokens_per_second=prompt_tokens / first,
        tokens_per_second=(len(steps) - 1) / (last - first) if len(steps) > 1 else None,
        peak_memory_bytes=peak_memory_bytes,
    )


def _token_list(prompt_ids: Tensor | Sequence[int]) -> list[int]:
    ids = torch.as_tensor(prompt_ids)
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim != 1:
        raise UsageError(f"The prompt's token ids have the shape {list(ids.shape)}; give one prompt, [n] or [1, n].")
    if not len(ids):
        raise UsageError("The prompt holds no tokens; give at least one, the BOS token for instance.")
    return ids.to(torch.int64).tolist()


def _check_length(prompt: int, new: int, limit: int | None) -> None:
    check_new_tokens(new)
    if limit is None or prompt + new <= limit:
        return
    too_many = prompt + new - limit
    shorter = f"shorten the prompt by {too_many} tokens"
    lower = f"use --max-new-tokens {limit - prompt} or less"
    if prompt >= limit:
        fix = f"{shorter} or more" if new < limit else "shorten the prompt and ask for fewer new tokens"
        raise UsageError(f"The prompt's {prompt} tokens leave no room in the model's {limit} positions; {fix}.")
    fix = f"{lower}, or {shorter}" if too_many < prompt else lower
    raise UsageError(
        f"The prompt's {prompt} tokens and {new} new ones are more than the model's {limit} positions; {fix}."
    )


def _peak_resident_bytes() -> int | None:
    # Linux starts ru_maxrss of a new program at the peak of the process that launched it; VmHWM is the program's own.
    status = Path("/proc/self/status")
    if status.exists() and (own := re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)):
        return int(own[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
