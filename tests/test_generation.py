"""The decode loop against transformers' own, and its text against decoding everything at once."""

import math
import os
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, VOCABULARY
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import LlamaConfig, PreTrainedTokenizerFast

from macko_llm.defaults import MAX_NEW_TOKENS
from macko_llm.errors import CheckpointError, NonFiniteError, UsageError
from macko_llm.generation import encode_prompt, generate, stop_token_ids, stream
from macko_llm.sampling import Sampling

CORPUS = [
    "Once upon a time, a cat met a dog. 👩‍👩‍👧 naïve café 😀😃 日本語 Привет",
    "the end of the story\n\n  of  the dog",
] * 3


def byte_level():
    """Trained byte-level BPE, as in GPT-2: any byte is a token, special ones are <s> and </s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def byte_fallback():
    """BPE in the manner of sentencepiece, as in Llama 2: ▁ for spaces, the first one stripped, bytes for unknown characters."""
    words = ["▁the", "▁dog", "▁met", "▁▁"]
    pieces = [word[:end] for word in words for end in range(2, len(word) + 1)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted({*"".join(words)}), *pieces]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [(piece[:-1], piece[-1]) for piece in pieces]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"byte level": byte_level(), "byte fallback": byte_fallback()}
TOKENIZER = TOKENIZERS["byte level"]


def build(family):
    """A tiny model of a family that says various things and never stops by itself."""
    model = FAMILIES[family]()
    model.generation_config.eos_token_id = None
    # Tied random embeddings say the last token for ever.
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(1)))
    return model


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Models this small only lose time to threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return build(request.param)


@pytest.fixture(scope="module")
def model():
    return build("llama")


def prompt_of(length, seed=0):
    return torch.randint(5, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def tokens_of(model, prompt, **options):
    return [step.token_id for step in stream(model, TOKENIZER, prompt, **{"stop_ids": (), **options})]


def greedy_of_transformers(model, prompt, new, **options):
    everything = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, **options
    )
    return everything[0, prompt.shape[1] :].tolist()


class Scripted(nn.Module):
    """Says the given tokens, whatever it reads; remembers what it was fed."""

    def __init__(self, script, vocabulary):
        super().__init__()
        self.script, self.fed = script, []
        self.config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=10**6, num_hidden_layers=1)
        self.device = torch.device("cpu")

    def forward(self, input_ids, past_key_values, use_cache):
        assert use_cache
        assert past_key_values.get_seq_length() == 0
        logits = torch.zeros(1, input_ids.shape[1], self.config.vocab_size)
        logits[:, -1, self.script[len(self.fed)]] = 1
        self.fed.append(input_ids.tolist())
        return SimpleNamespace(logits=logits)


def spoken(tokenizer, prompt, new, **options):
    """The steps of a model that says `new`."""
    options = {"max_new_tokens": len(new), "stop_ids": (), **options}
    return list(stream(Scripted(new, len(tokenizer)), tokenizer, prompt, **options))


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


# The tokens


@pytest.mark.parametrize("length", [1, 5, 20])
def test_greedy_is_that_of_transformers(family, length):
    prompt = prompt_of(length)
    expected = greedy_of_transformers(family, prompt, 40)
    assert len(set(expected)) > 3, "too dull a text to prove anything"
    assert tokens_of(family, prompt, max_new_tokens=40) == expected
    assert tokens_of(family, prompt[0].tolist(), max_new_tokens=40) == expected


def test_greedy_stops_where_transformers_stops(model):
    prompt = prompt_of(4)
    free = greedy_of_transformers(model, prompt, 30)
    stop = free[11]
    assert tokens_of(model, prompt, max_new_tokens=30, stop_ids=[stop]) == greedy_of_transformers(
        model, prompt, 30, eos_token_id=stop
    )


def test_indices_and_finish_reasons(model):
    free = list(stream(model, TOKENIZER, prompt_of(4), max_new_tokens=30, stop_ids=()))
    assert [step.index for step in free] == list(range(30))
    assert [step.finish_reason for step in free] == [None] * 29 + ["length"]
    stop = free[11].token_id
    first = [step.token_id for step in free].index(stop)
    stopped = list(stream(model, TOKENIZER, prompt_of(4), max_new_tokens=30, stop_ids={stop, 1}))
    assert [step.token_id for step in stopped] == [step.token_id for step in free[: first + 1]]
    assert [step.finish_reason for step in stopped] == [None] * first + ["stop"]


def test_stop_on_the_last_allowed_token_is_a_stop(model):
    token = tokens_of(model, prompt_of(4), max_new_tokens=1)[0]
    (step,) = stream(model, TOKENIZER, prompt_of(4), max_new_tokens=1, stop_ids=[token])
    assert step.finish_reason == "stop"


def test_default_length(model):
    with pytest.raises(UsageError, match=f"1 tokens and {MAX_NEW_TOKENS} new ones"):
        stream(model, TOKENIZER, [5])


def test_one_token_is_fed_a_step():
    new = [7, 8, 9]
    speaker = Scripted(new, 300)
    assert [step.token_id for step in stream(speaker, TOKENIZER, [4, 5, 6], max_new_tokens=3, stop_ids=())] == new
    assert speaker.fed == [[[4, 5, 6]], [[7]], [[8]]]


@pytest.mark.parametrize(
    ("generation", "config", "of_tokenizer", "expected"),
    [
        (5, 6, True, {5}),
        ([5, 7], 6, True, {5, 7}),
        (None, 6, True, {6}),
        (None, None, True, {1}),
        (None, None, False, set()),
    ],
)
def test_stop_tokens_come_from_the_first_that_names_any(generation, config, of_tokenizer, expected):
    model = build("llama")
    model.generation_config.eos_token_id, model.config.eos_token_id = generation, config
    tokenizer = byte_level()
    if not of_tokenizer:
        tokenizer.eos_token = None
    assert stop_token_ids(model, tokenizer) == expected


def test_the_models_stop_tokens_are_used_unless_others_are_given():
    model = build("llama")
    free = tokens_of(model, prompt_of(4), max_new_tokens=20)
    model.generation_config.eos_token_id = [VOCABULARY - 1, free[6]]
    cut = free[: free.index(free[6]) + 1]
    assert tokens_of(model, prompt_of(4), max_new_tokens=20, stop_ids=None) == cut
    assert greedy_of_transformers(model, prompt_of(4), 20) == cut
    assert tokens_of(model, prompt_of(4), max_new_tokens=20) == free


def test_gradients_work_between_steps(model):
    steps = stream(model, TOKENIZER, prompt_of(4), max_new_tokens=3)
    next(steps)
    assert not torch.is_inference_mode_enabled()
    assert (torch.ones(1, requires_grad=True) * 2).requires_grad


# Sampling


def test_seeded_sampling_is_reproducible(model):
    def say(seed):
        return tokens_of(model, prompt_of(4), max_new_tokens=20, sampling=Sampling(temperature=1.5, seed=seed))

    torch.manual_seed(1)
    first = say(3)
    torch.manual_seed(2)
    assert say(3) == first
    texts = {tuple(say(seed)) for seed in range(4)}
    assert len(texts) == 4
    unseeded = {tuple(say(None)) for _ in range(4)}
    assert len(unseeded) == 4


def test_sampling_leaves_the_global_random_state_alone(model):
    before = torch.random.get_rng_state()
    tokens_of(model, prompt_of(4), max_new_tokens=3, sampling=Sampling(temperature=1.0, seed=3))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=2.0, top_k=1), Sampling(temperature=2.0, top_p=1e-9), Sampling(temperature=1e-60)],
)
def test_narrow_sampling_is_greedy(model, sampling):
    assert tokens_of(model, prompt_of(4), max_new_tokens=20, sampling=sampling) == tokens_of(
        model, prompt_of(4), max_new_tokens=20
    )


def test_draws_follow_the_probabilities():
    """Over 500 seeds a token comes as often as its probability says, within 5 standard deviations."""
    speaker, draws = Scripted([0], 4), 500
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    speaker.forward = lambda input_ids, **_: SimpleNamespace(logits=logits.expand(1, input_ids.shape[1], 4))
    samplings = [Sampling(temperature=1.0, top_k=3, seed=seed) for seed in range(draws)]
    counts = Counter(tokens_of(speaker, [0], max_new_tokens=1, sampling=sampling)[0] for sampling in samplings)
    for token, share in enumerate([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0.0]):
        assert abs(counts[token] - draws * share) <= 5 * math.sqrt(draws * share * (1 - share))


def test_the_largest_seed_works(model):
    tokens_of(model, prompt_of(4), max_new_tokens=2, sampling=Sampling(temperature=1.0, seed=2**64 - 1))


# The text


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


# Limits and errors, all before any work


@pytest.mark.parametrize(
    ("prompt", "new", "sentence"),
    [
        (
            60,
            5,
            r"60 tokens and 5 new ones .* 64 positions; use --max-new-tokens 4 or less, or shorten the prompt by 1 ",
        ),
        (3, 62, r"3 tokens and 62 new ones .*--max-new-tokens 61 or less, or shorten the prompt by 1 "),
        (3, 63, r"--max-new-tokens 61 or less, or shorten the prompt by 2 "),
        (3, 64, r"--max-new-tokens 61 or less\.$"),
        (64, 1, r"64 tokens leave no room .* 64 positions; shorten the prompt by 1 "),
        (70, 10, r"70 tokens leave no room .*; shorten the prompt by 16 tokens"),
        (70, 64, r"shorten the prompt and ask for fewer"),
    ],
)
def test_past_the_models_positions(model, prompt, new, sentence):
    with pytest.raises(UsageError, match=sentence):
        stream(model, TOKENIZER, prompt_of(prompt), max_new_tokens=new)


def test_up_to_the_models_positions(family):
    prompt = prompt_of(60)
    assert tokens_of(family, prompt, max_new_tokens=4) == greedy_of_transformers(family, prompt, 4)


@pytest.mark.parametrize(
    ("prompt", "new", "error", "sentence"),
    [
        ([], 3, UsageError, "holds no tokens"),
        (torch.zeros(1, 0, dtype=torch.int64), 3, UsageError, "holds no tokens"),
        (torch.zeros(2, 3, dtype=torch.int64), 3, UsageError, r"shape \[2, 3\]"),
        ([5], 0, UsageError, "--max-new-tokens 1 or more"),
        ([5, VOCABULARY], 3, CheckpointError, f"token {VOCABULARY}, .* only {VOCABULARY}; use the tokenizer"),
        ([-1], 3, CheckpointError, "token -1,"),
    ],
)
def test_impossible_calls(model, prompt, new, error, sentence):
    with pytest.raises(error, match=sentence):
        stream(model, TOKENIZER, prompt, max_new_tokens=new)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.0, seed=0), Sampling(temperature=1.0, top_p=0.9)]
)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_not_finite_logits_name_the_fix(sampling, poison):
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[3, 0] = poison
        model.lm_head.weight[3, 1:] = 0
    steps = stream(model, TOKENIZER, prompt_of(4), max_new_tokens=40, sampling=sampling)
    with pytest.raises(NonFiniteError, match=r"new token .*--dtype"):
        list(steps)


def test_all_forbidden_is_not_finite():
    speaker = Scripted([3], 300)
    speaker.forward = lambda input_ids, **_: SimpleNamespace(logits=torch.full((1, input_ids.shape[1], 300), -math.inf))
    with pytest.raises(NonFiniteError, match="new token 0"):
        list(stream(speaker, TOKENIZER, [5], max_new_tokens=1))


# The report


def test_report(model):
    result = generate(model, TOKENIZER, prompt_of(9), max_new_tokens=12, stop_ids=())
    assert (result.prompt_tokens, result.new_tokens) == (9, 12)
    alone = generate(model, TOKENIZER, prompt_of(9), max_new_tokens=1)
    assert alone.new_tokens == 1
    assert alone.tokens_per_second is None


def test_speeds_count_the_engines_time_alone(monkeypatch):
    """A clock that ticks 2 s in the prefill, 0.5 s in each later step, and 100 s in whoever reads the text."""
    now = 0.0
    monkeypatch.setattr("macko_llm.generation.time", SimpleNamespace(perf_counter=lambda: now))
    speaker = Scripted(TOKENIZER("a cat met a dog")["input_ids"], len(TOKENIZER))
    speak = speaker.forward

    def slowly(input_ids, past_key_values, use_cache):
        nonlocal now
        now += 0.5 if speaker.fed else 2.0
        return speak(input_ids, past_key_values, use_cache)

    def read(_text):
        nonlocal now
        now += 100

    speaker.forward = slowly
    prompt = [4, 5, 6, 7]
    result = generate(speaker, TOKENIZER, prompt, max_new_tokens=3, stop_ids=(), on_text=read)
    assert result.prefill_tokens_per_second == 2.0
    assert result.tokens_per_second == 2.0
    assert now > 100


def test_peak_memory_is_in_bytes(model):
    ballast = torch.ones(2**26)
    peak = generate(model, TOKENIZER, prompt_of(2), max_new_tokens=1).peak_memory_bytes
    assert ballast.nbytes < peak < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
