"""Conversations as prompts: what a model reads, and what is left out where there is no room."""

import pytest
from generation_helpers import byte_level
from transformers import PreTrainedTokenizerFast

from macko_llm.chat import Turn, make_prompt
from macko_llm.errors import UsageError

TEMPLATE = (
    "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TURNS = (Turn("a cat", "a dog"), Turn("the story", "the end"), Turn("the dog", "the cat"))


@pytest.fixture
def plain() -> PreTrainedTokenizerFast:
    return byte_level()


@pytest.fixture
def chatty() -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_a_template_gets_all_turns_with_their_roles_and_opens_the_answer(chatty: PreTrainedTokenizerFast) -> None:
    prompt = make_prompt(chatty, TURNS[:2], "and then", system="of the")
    assert chatty.decode(prompt.ids) == (
        "<s>[system]of the[user]a cat[assistant]a dog[user]the story[assistant]the end[user]and then[assistant]"
    )
    assert prompt.turns == TURNS[:2]
    assert prompt.ids.count(chatty.bos_token_id) == 1


def test_without_a_template_the_text_goes_on(plain: PreTrainedTokenizerFast) -> None:
    prompt = make_prompt(plain, TURNS[:2], "The cat")
    assert plain.decode(prompt.ids) == "a cata dog\nthe storythe end\nThe cat"
    with pytest.raises(UsageError, match=r"no chat template.*drop --system"):
        make_prompt(plain, (), "The cat", system="of the")


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_the_oldest_turns_go_where_there_is_no_room_and_the_system_stays(
    kept: int, chatty: PreTrainedTokenizerFast
) -> None:
    rest = TURNS[len(TURNS) - kept :]
    fits = make_prompt(chatty, rest, "and then", system="of the")
    for room in (len(fits.ids), len(fits.ids) + 1):
        assert make_prompt(chatty, TURNS, "and then", system="of the", room=room) == fits
    assert chatty.decode(fits.ids).startswith("<s>[system]of the[user]")


def test_a_line_that_fits_nowhere_is_refused(chatty: PreTrainedTokenizerFast) -> None:
    alone = len(make_prompt(chatty, (), "and then").ids)
    with pytest.raises(UsageError, match=f"takes {alone} tokens, and the model has {alone - 1} before its answer"):
        make_prompt(chatty, TURNS, "and then", room=alone - 1)


def test_a_template_that_refuses_the_system_says_what_to_drop(chatty: PreTrainedTokenizerFast) -> None:
    chatty.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    with pytest.raises(UsageError, match=r"no system\); drop --system\.$"):
        make_prompt(chatty, (), "and then", system="of the")


def test_bytes_that_are_no_text_are_refused(chatty: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UsageError, match="not UTF-8"):
        make_prompt(chatty, (), "a \udcff")
