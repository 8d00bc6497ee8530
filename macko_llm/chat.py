"""A conversation: what was said so far, and the prompt that asks for the next answer. Knows no model and prints nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from macko_llm.errors import UsageError
from macko_llm.text import encode_text, has_chat_template, render_conversation

SYSTEM_OPTION = "--system"


@dataclass(frozen=True)
class Turn:
    """What a user said, and what the model made of it."""

    said: str
    answer: str


@dataclass(frozen=True)
class Prompt:
    """What a model reads before it answers.

    Attributes:
        ids: its tokens.
        turns: the turns that are in it; of those that were given, older ones had no room.
    """

    ids: list[int]
    turns: tuple[Turn, ...]


def make_prompt(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Turn],
    said: str,
    *,
    system: str | None = None,
    room: int | None = None,
) -> Prompt:
    """The prompt for an answer to `said`, after as many of the latest turns as there is room for.

    Args:
        tokenizer: the model's tokenizer. One without a chat template gets plain text: each turn and its answer, a line's end
            after it, and `said`.
        turns: what was said before, in order.
        said: what the user says now.
        system: what the system says first, which is never left out; needs a chat template.
        room: most tokens that the prompt may have; None for any number.

    Raises:
        UsageError: `said` alone has more than `room` tokens, a system prompt without a chat template, or a template that
            refuses one; what `text.encode_text` refuses.
    """
    if system is not None and not has_chat_template(tokenizer):
        raise UsageError(f"The model has no chat template, where a system prompt would stand; drop {SYSTEM_OPTION}.")
    kept = tuple(turns)
    while True:
        ids = _encode(tokenizer, kept, said, system)
        if room is None or len(ids) <= room:
            return Prompt(ids, kept)
        if not kept:
            raise UsageError(
                f"What was said takes {len(ids)} tokens, and the model has {room} before its answer; say it shorter, or use "
                "a smaller --max-new-tokens."
            )
        kept = kept[1:]


def _encode(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], said: str, system: str | None) -> list[int]:
    if not has_chat_template(tokenizer):
        text = "".join(f"{turn.said}{turn.answer}\n" for turn in turns) + said
        return encode_text(tokenizer, text)[0].tolist()
    messages = [] if system is None else [{"role": "system", "content": system}]
    for turn in turns:
        messages += [{"role": "user", "content": turn.said}, {"role": "assistant", "content": turn.answer}]
    messages.append({"role": "user", "content": said})
    option = "this line" if system is None else SYSTEM_OPTION
    text = render_conversation(tokenizer, messages, open_answer=True, option=option)
    return encode_text(tokenizer, text, special_tokens=False)[0].tolist()
