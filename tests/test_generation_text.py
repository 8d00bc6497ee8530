"""The text of generated tokens, piece by piece."""

import pytest
import torch
from families import FAMILIES
from generation_helpers import (
    TOKENIZER,
    TOKENIZERS,
    build,
    decode,
    greedy_of_transformers,
    spoken,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from macko_llm.generation import generate


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return build(request.param)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_pieces_make_the_text_of_one_decode(name, data):
    """Any text, cut anywhere between characters into prompt and continuation."""
    tokenizer = TOKENIZERS[name]
    words = st.text() | st.sampled_from(
        ["the dog", " met", "  a", "\n", "é", "日本", "😀", "👩‍👩‍👧", " ", "</s>", "\ufffd"]
    )
    text = "".join(data.draw(st.lists(words, min_size=1, max_size=6), "text"))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = decode(tokenizer, ids)
    cuts = [at for at in range(1, len(ids)) if decode(tokenizer, ids[:at]) + decode_rest(tokenizer, ids, at) == whole]
    if not cuts:
        return
    cut = data.draw(st.sampled_from(cuts), "cut")
    steps = spoken(tokenizer, ids[:cut], ids[cut:])
    assert "".join(step.text for step in steps) == decode_rest(tokenizer, ids, cut)
    assert [step.token_id for step in steps] == ids[cut:]


def decode_rest(tokenizer, ids, at):
    """What decoding everything shows after the text of the first `at` tokens."""
    return decode(tokenizer, ids)[len(decode(tokenizer, ids[:at])) :]


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(0, len(TOKENIZER) - 1), min_size=1, max_size=12))
def test_any_bytes_make_the_text_of_one_decode(new):
    """A byte-level tokenizer can say bytes that are no text; pieces still make what one decode makes of them."""
    prompt = TOKENIZER("The cat")["input_ids"]
    steps = spoken(TOKENIZER, prompt, new)
    assert "The cat" + "".join(step.text for step in steps) == decode(TOKENIZER, prompt + new)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_unfinished_character_waits(name):
    tokenizer = TOKENIZERS[name]
    prompt, new = tokenizer("the")["input_ids"], tokenizer("𓀀", add_special_tokens=False)["input_ids"]
    new = [token for token in new if tokenizer.convert_ids_to_tokens(token) != "▁"]
    assert len(new) == 4
    assert [step.text for step in spoken(tokenizer, prompt, new)] == ["", "", "", "𓀀"]
    assert [step.text for step in spoken(tokenizer, prompt + new[:3], new[3:])] == ["𓀀"]


def test_a_prompt_that_ends_within_a_character():
    tokenizer = TOKENIZERS["byte fallback"]
    ids = tokenizer("the日00", add_special_tokens=False)["input_ids"]
    assert [step.text for step in spoken(tokenizer, ids[:2], ids[2:])] == ["", "日", "0", "0"]
    ids = TOKENIZER("𓀀00")["input_ids"]
    assert "".join(step.text for step in spoken(TOKENIZER, ids[:2], ids[2:])) == "𓀀00"


def test_a_character_cut_off_at_the_end_shows_once():
    tokenizer = TOKENIZERS["byte level"]
    new = tokenizer("é日")["input_ids"]
    assert [step.text for step in spoken(tokenizer, [0], new[:-1])][-1] == "\ufffd"
    tokenizer = TOKENIZERS["byte fallback"]
    new = tokenizer("é日", add_special_tokens=False)["input_ids"][1:]
    assert [step.text for step in spoken(tokenizer, [1], new[:-1])] == ["", "é", "", "\ufffd" * 2]


def test_spaces_before_words_are_kept_after_a_prompt_and_after_special_tokens():
    tokenizer = TOKENIZERS["byte fallback"]
    the, dog, bos = tokenizer.convert_tokens_to_ids(["▁the", "▁dog", "<s>"])
    assert [step.text for step in spoken(tokenizer, [bos, the], [dog, dog])] == [" dog", " dog"]
    assert [step.text for step in spoken(tokenizer, [bos], [the, dog])] == ["the", " dog"]
    assert [step.text for step in spoken(tokenizer, [bos, the], [dog, bos, bos, dog])] == [" dog", "", "", " dog"]


@pytest.mark.parametrize("stop_text", ["</s>", " dog"])
def test_stop_tokens_have_no_text_and_release_what_waits(stop_text):
    (stop,) = TOKENIZER(stop_text)["input_ids"][:1]
    new = [*TOKENIZER(" a")["input_ids"], TOKENIZER("😀")["input_ids"][0], stop]
    steps = spoken(TOKENIZER, TOKENIZER("The")["input_ids"], new, max_new_tokens=50, stop_ids=[stop])
    assert steps[-1].finish_reason == "stop"
    assert "".join(step.text for step in steps) == " a\ufffd" * (new[-2] != stop)


def test_text_of_a_random_model(family):
    prompt = torch.tensor([TOKENIZER("A cat 😀")["input_ids"]])
    new = greedy_of_transformers(family, prompt, 30)
    pieces = []
    result = generate(family, TOKENIZER, prompt, max_new_tokens=30, stop_ids=(), on_text=pieces.append)
    assert "A cat 😀" + result.text == decode(TOKENIZER, prompt[0].tolist() + new)
    assert "".join(pieces) == result.text
    assert all(pieces)
