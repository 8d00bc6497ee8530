"""Text to tokens and back: prompts, chat templates, and text from tokens as they come."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from macko_llm.errors import UsageError

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes the first bytes of an unfinished character to."""


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
            there is no BOS, lone surrogates, as which Python reads bytes that are not UTF-8.
    """
    if chat:
        return encode_text(tokenizer, _render_chat(tokenizer, prompt, system_prompt), special_tokens=False)
    if system_prompt is not None:
        raise UsageError("A system prompt belongs to a chat; add --chat, or write it into the prompt.")
    return encode_text(tokenizer, prompt)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, *, special_tokens: bool = True) -> Tensor:
    """Token ids of a text, [1, n] int64 on the CPU; of an empty one the BOS token.

    Args:
        tokenizer: the model's tokenizer.
        text: what to encode.
        special_tokens: add the tokenizer's own (BOS); a chat template has written them already.

    Raises:
        UsageError: an empty text where there is no BOS, lone surrogates.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError("The prompt holds bytes that are not UTF-8 text; convert it first.") from error
    # verbose=False: the length is checked against the model, with a better sentence.
    ids = list(tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"])
    if not ids:
        if tokenizer.bos_token_id is None:
            raise UsageError("The prompt is empty and the tokenizer has no BOS token to start from; give some text.")
        ids = [tokenizer.bos_token_id]
    return torch.tensor([ids], dtype=torch.int64)


class Detokenizer:
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


class StopStrings:
    """Cuts a text before the first stop string in it, as it comes in pieces.

    Where several stop strings could end the text, the one that is complete first does, and of those that end together
    the longest, so that it does not matter how the text is cut into pieces.

    Attributes:
        found: whether a stop string has ended the text.

    Raises:
        UsageError: an empty stop string.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        if not all(strings):
            raise UsageError("A stop string is empty and would end every text at once; give some text, or drop it.")
        self.strings = tuple(strings)
        self.found = False
        self._held = ""

    def push(self, fresh: str) -> str:
        """What may be shown once `fresh` has come: all but what might be the beginning of a stop string."""
        text = self._held + fresh
        ends = [(at + len(string), at) for string in self.strings if (at := text.find(string)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        held = max((_overlap(text, string) for string in self.strings), default=0)
        shown = len(text) - held
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of `text` that begins `string` without being all of it."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer knows how a conversation is written."""
    return getattr(tokenizer, "chat_template", None) is not None


def require_chat_template(tokenizer: PreTrainedTokenizerBase, option: str) -> None:
    """Raise UsageError, which names the option that asked for it, unless the tokenizer has a chat template."""
    if not has_chat_template(tokenizer):
        raise UsageError(f"The tokenizer has no chat template; use a chat model, or drop {option}.")


def render_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    *,
    open_answer: bool = False,
    option: str,
) -> str:
    """A conversation as the tokenizer's chat template writes it, special tokens included.

    Args:
        tokenizer: the model's tokenizer.
        messages: each with a "role" and a "content".
        open_answer: end with what begins the model's answer.
        option: what to drop where the template refuses the messages, for the error.

    Raises:
        UsageError: no chat template, or one that refuses the messages.
    """
    require_chat_template(tokenizer, option)
    try:
        return cast(str, tokenizer.apply_chat_template(messages, add_generation_prompt=open_answer, tokenize=False))
    except TemplateError as error:
        raise UsageError(f"The tokenizer's chat template refuses these messages ({error}); drop {option}.") from error


def _render_chat(tokenizer: PreTrainedTokenizerBase, prompt: str, system_prompt: str | None) -> str:
    require_chat_template(tokenizer, "--chat")
    messages = [{"role": "user", "content": prompt}]
    if system_prompt is not None:
        messages.insert(0, {"role": "system", "content": system_prompt})
    option = "--system-prompt" if system_prompt is not None else "--chat"
    return render_conversation(tokenizer, messages, open_answer=True, option=option)
