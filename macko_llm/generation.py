"""The decode loop: tokens out of any transformers causal language model, dense or packed, one step at a time.

`stream` yields one `Step` a token and prints nothing; `generate` drains it into a `Generation` with the speeds and the
peak memory.
"""

import inspect
import re
import resource
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from macko_llm.defaults import MAX_NEW_TOKENS
from macko_llm.errors import NonFiniteError, UsageError
from macko_llm.models import cache_argument, check_token_ids, max_positions
from macko_llm.sampling import GREEDY, NOT_FINITE, Chooser, Sampling

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes the first bytes of an unfinished character to."""


@dataclass(frozen=True)
class Step:
    """One new token.

    Attributes:
        index: 0 for the token that the prefill gives, then 1, 2, ...
        token_id: the token, a stop token included.
        text: the text that this token finished, empty while a character lacks bytes; special and stop tokens have none.
        seconds: time from the first token's request to this token being known, without the time that the consumer took
            between steps.
        finish_reason: None while there is more; on the last step "stop" after a stop token, "length" at max_new_tokens.
    """

    index: int
    token_id: int
    text: str
    seconds: float
    finish_reason: Literal["stop", "length"] | None


@dataclass(frozen=True)
class Generation:
    """A finished text and what it took.

    Attributes:
        text: all new text, without the prompt.
        prompt_tokens: tokens of the prompt.
        new_tokens: tokens generated, a stop token included.
        prefill_tokens_per_second: prompt tokens over the time to the first new token.
        tokens_per_second: new tokens after the first over the time they took; None where there is only the first.
        peak_memory_bytes: on GPUs what torch had allocated at most during this call, summed over the model's GPUs; else
            the peak resident memory of the process so far.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_tokens_per_second: float
    tokens_per_second: float | None
    peak_memory_bytes: int


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool = False, system_prompt: str | None = None
) -> Tensor:
    """Token ids of a prompt, [1, n] int64 on the CPU.

    Args:
        tokenizer: the model's tokenizer; without `chat` its own special tokens (BOS) are added.
        prompt: text to continue, or with `chat` what the user says. Empty text to continue becomes the BOS token.
        chat: put the prompt into the tokenizer's chat template and open the model's answer.
        system_prompt: what the system says before the user, only with `chat`.

    Raises:
        UsageError: a system prompt without chat, no chat template or one that refuses the roles, an empty prompt where
            there is no BOS.
    """
    if chat:
        text = _render_chat(tokenizer, prompt, system_prompt)
    elif system_prompt is not None:
        raise UsageError("A system prompt belongs to a chat; add --chat, or write it into the prompt.")
    else:
        text = prompt
    # A template writes its own BOS. verbose=False: the length is checked against the model, with a better sentence.
    ids = list(tokenizer(text, add_special_tokens=not chat, verbose=False)["input_ids"])
    if not ids:
        if tokenizer.bos_token_id is None:
            raise UsageError("The prompt is empty and the tokenizer has no BOS token to start from; give some text.")
        ids = [tokenizer.bos_token_id]
    return torch.tensor([ids], dtype=torch.int64)


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
) -> Iterator[Step]:
    """Continue a prompt, one step a token; all arguments are checked at the call, the work begins at the first `next`.

    The texts of the steps, put together, are what decoding prompt and new tokens in one go (without special tokens,
    spaces left alone) shows after the prompt. Greedy steps are the tokens of `model.generate(do_sample=False)`;
    penalties and other logits processors of a generation config are not applied.

    Args:
        model: any transformers causal language model, in eval mode.
        tokenizer: the model's tokenizer.
        prompt_ids: [1, n] or [n] token ids, n >= 1.
        max_new_tokens: stop after this many.
        sampling: how each token is chosen, from fp32 logits.
        stop_ids: tokens that end the text; None takes the model's (`stop_token_ids`).

    Raises:
        UsageError: an empty prompt, no new tokens wanted, or more tokens together than the model has positions.
        CheckpointError: a token that the model does not know: the tokenizer belongs to another model.
        NonFiniteError: while iterating, when the logits are NaN or infinite.
    """
    ids = _token_list(prompt_ids)
    _check_length(len(ids), max_new_tokens, max_positions(model.config))
    check_token_ids(ids, model.config, "The prompt")
    stop = frozenset(stop_token_ids(model, tokenizer) if stop_ids is None else stop_ids)
    return _steps(model, _Detokenizer(tokenizer, ids), ids, max_new_tokens, Chooser(sampling), stop)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Tensor | Sequence[int],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    sampling: Sampling = GREEDY,
    stop_ids: Collection[int] | None = None,
    on_text: Callable[[str], object] | None = None,
) -> Generation:
    """Continue a prompt to its end; arguments and errors of `stream`.

    Args:
        model: as in `stream`.
        tokenizer: as in `stream`.
        prompt_ids: as in `stream`; `encode_prompt` makes them.
        max_new_tokens: as in `stream`.
        sampling: as in `stream`.
        stop_ids: as in `stream`.
        on_text: called with each piece of new text as it comes; its time is not counted.
    """
    ids = _token_list(prompt_ids)
    steps = stream(model, tokenizer, ids, max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=stop_ids)
    gpus = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type == "cuda"}
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    pieces: list[str] = []
    arrived: list[float] = []
    for step in steps:
        arrived.append(step.seconds)
        pieces.append(step.text)
        if on_text is not None and step.text:
            on_text(step.text)
    return Generation(
        text="".join(pieces),
        prompt_tokens=len(ids),
        new_tokens=len(arrived),
        prefill_tokens_per_second=len(ids) / arrived[0],
        tokens_per_second=(len(arrived) - 1) / (arrived[-1] - arrived[0]) if len(arrived) > 1 else None,
        peak_memory_bytes=sum(map(torch.cuda.max_memory_allocated, gpus)) if gpus else _peak_resident_bytes(),
    )


class _Detokenizer:
    """Text from tokens as they come.

    A token's text depends on the ones before it (leading spaces, bytes of one character), so a few tokens of context
    are decoded again each time and what they already showed is cut off.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: list[int]) -> None:
        self.tokenizer = tokenizer
        self.context = prompt
        self.shown = self._decode(prompt)
        self.pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this token finished."""
        self.pending.append(token_id)
        text = self._decode(self.context + self.pending)
        return "" if text.endswith(_UNFINISHED) else self._show(text)

    def flush(self) -> str:
        """The rest, however unfinished."""
        return self._show(self._decode(self.context + self.pending))

    def _show(self, text: str) -> str:
        fresh = self._after_shown(text)
        # Tokens without text (special ones) make no context: after them alone a leading space would be lost.
        if fresh:
            alone = self._decode(self.pending)
            if fresh.endswith(alone):
                self.context, self.shown = self.pending, alone
            else:  # the new tokens begin within a character
                self.context, self.shown = self.context + self.pending, text
            self.pending = []
        return fresh

    def _after_shown(self, text: str) -> str:
        if text.startswith(self.shown):
            return text[len(self.shown) :]
        finished = self.shown.rstrip(_UNFINISHED)
        if text.startswith(finished):  # the prompt ended within a character, which is whole now
            return text[len(finished) :]
        # Byte fallback takes back a whole run of bytes, shown text too, when one of them makes no character.
        return self._decode(self.pending)

    def _decode(self, ids: list[int]) -> str:
        return cast(str, self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _steps(
    model: PreTrainedModel,
    detokenizer: _Detokenizer,
    prompt: list[int],
    max_new_tokens: int,
    choose: Chooser,
    stop: frozenset[int],
) -> Iterator[Step]:
    clock = -time.perf_counter()
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    fed = torch.tensor([prompt], device=model.device)
    for index in range(max_new_tokens):
        token = choose(_last_logits(model, fed, cache))
        token_id = int(token)
        seconds = clock + time.perf_counter()
        if token_id == NOT_FINITE:
            raise NonFiniteError(
                f"The logits of new token {index} are NaN or infinite; "
                "use --dtype bfloat16 or float32, or repair the checkpoint if it holds such weights."
            )
        finish_reason: Literal["stop", "length"] | None = None
        text = ""
        if token_id in stop:
            finish_reason = "stop"
        else:
            text = detokenizer.push(token_id)
            if index == max_new_tokens - 1:
                finish_reason = "length"
        if finish_reason:
            text += detokenizer.flush()
        handed_over = time.perf_counter()
        yield Step(index, token_id, text, seconds, finish_reason)
        clock -= time.perf_counter() - handed_over
        if finish_reason:
            return
        fed = token.to(model.device)


# Inside this function only: a generator that yields within inference mode would switch it on for its consumer too.
@torch.inference_mode()
def _last_logits(model: PreTrainedModel, ids: Tensor, cache: DynamicCache) -> Tensor:
    """Feed [1, n] tokens behind those in the cache; [1, vocabulary] fp32 logits of the token after the last."""
    only_last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits = model(input_ids=ids, use_cache=True, **{cache_argument(model): cache}, **only_last).logits
    return logits[:, -1].float()


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
    if new < 1:
        raise UsageError(f"{new} new tokens were asked for; use --max-new-tokens 1 or more.")
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


def _render_chat(tokenizer: PreTrainedTokenizerBase, prompt: str, system_prompt: str | None) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise UsageError("The tokenizer has no chat template; use a chat model, or drop --chat.")
    messages = [{"role": "user", "content": prompt}]
    if system_prompt is not None:
        messages.insert(0, {"role": "system", "content": system_prompt})
    try:
        return cast(str, tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except TemplateError as error:
        fix = "drop --system-prompt" if system_prompt is not None else "drop --chat"
        raise UsageError(f"The tokenizer's chat template refuses these messages ({error}); {fix}.") from error


def _peak_resident_bytes() -> int:
    # Linux starts ru_maxrss of a new program at the peak of the process that launched it; VmHWM is the program's own.
    status = Path("/proc/self/status")
    if status.exists() and (own := re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)):
        return int(own[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
