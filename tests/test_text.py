"""Prompts and chat templates, and texts that stop strings end."""

import pytest
import torch
from generation_helpers import TOKENIZER, TOKENIZERS, byte_fallback, byte_level
from hypothesis import example, given, settings
from hypothesis import strategies as st

from macko_llm.errors import UsageError
from macko_llm.text import StopStrings, encode_prompt

# Prompts


def test_prompts_get_the_tokenizers_special_tokens():
    llama_like = TOKENIZERS["byte fallback"]
    ids = encode_prompt(llama_like, "the dog")
    assert ids.dtype == torch.int64
    assert ids.tolist() == [llama_like("the dog")["input_ids"]]
    assert ids[0, 0] == llama_like.bos_token_id
    assert encode_prompt(TOKENIZER, "the dog").tolist() == [TOKENIZER("the dog")["input_ids"]]


def test_an_empty_prompt_is_the_bos_token():
    assert encode_prompt(TOKENIZERS["byte fallback"], "").tolist() == [[TOKENIZERS["byte fallback"].bos_token_id]]
    assert encode_prompt(TOKENIZER, "").tolist() == [[TOKENIZER.bos_token_id]]
    without = byte_level()
    without.bos_token = None
    with pytest.raises(UsageError, match=r"prompt is empty .* give some text"):
        encode_prompt(without, "")


CHAT_TEMPLATE = (
    "<s>{% for m in messages %}{% if m.role == 'system' and m.content == 'no' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def chat_tokenizer():
    tokenizer = byte_fallback()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def test_chat_prompts(chat_tokenizer):
    def shown(*args, **options):
        return chat_tokenizer.decode(encode_prompt(chat_tokenizer, *args, chat=True, **options)[0])

    said = [{"role": "user", "content": "Hi"}]
    ids = encode_prompt(chat_tokenizer, "Hi", chat=True)
    assert ids.tolist()[0] == chat_tokenizer.apply_chat_template(said, add_generation_prompt=True)["input_ids"]
    assert ids.tolist()[0].count(chat_tokenizer.bos_token_id) == 1
    assert shown("Hi").split() == ["<s>", "[user]", "Hi", "[assistant]"]
    assert shown("Hi", system_prompt="Rhyme.").split() == ["<s>", "[system]", "Rhyme.", "[user]", "Hi", "[assistant]"]
    assert shown("").split() == ["<s>", "[user]", "[assistant]"]


def test_impossible_chats(chat_tokenizer):
    with pytest.raises(UsageError, match=r"no chat template; .* drop --chat"):
        encode_prompt(TOKENIZER, "Hi", chat=True)
    with pytest.raises(UsageError, match=r"System role not supported.*drop --system-prompt"):
        encode_prompt(chat_tokenizer, "Hi", chat=True, system_prompt="no")
    with pytest.raises(UsageError, match="add --chat"):
        encode_prompt(chat_tokenizer, "Hi", system_prompt="Rhyme.")


# Stop strings


def naive_cut(text, stops):
    """`text` before the stop string that is complete first, letter by letter, and whether there was one."""
    for end in range(len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


@settings(deadline=None, max_examples=400)
@given(st.lists(st.text("ab ", max_size=5)), st.lists(st.text("ab ", min_size=1, max_size=5), max_size=3))
@example(["a", "b", "c"], ["abcd", "bc"])
@example(["aab", "aac"], ["aabaac"])
@example(["aa", "ab"], ["aab"])
def test_stop_strings_cut_wherever_the_pieces_end(pieces, stops):
    expected, found = naive_cut("".join(pieces), stops)
    stop_strings = StopStrings(stops)
    shown = ""
    for piece in pieces:
        shown += stop_strings.push(piece)
        assert expected.startswith(shown), "what was shown cannot be taken back"
        if stop_strings.found:
            break
    assert stop_strings.found == found
    assert shown + stop_strings.flush() == expected


def test_only_what_may_begin_a_stop_string_waits():
    stop_strings = StopStrings(["END", "\n\n"])
    assert [stop_strings.push(piece) for piece in ["one E", "x", "\n", "two", "EN", "E"]] == [
        "one ",
        "Ex",
        "",
        "\ntwo",
        "",
        "EN",
    ]
    assert stop_strings.flush() == "E"
    assert not stop_strings.found


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UsageError, match="stop string is empty"):
        StopStrings(["a", ""])
