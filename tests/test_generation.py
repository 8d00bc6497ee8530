"""The decode loop against transformers' own, and its text against decoding everything at once."""

import math
import os
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, VOCABULARY
from generation_helpers import (
    TOKENIZER,
    Scripted,
    build,
    byte_level,
    greedy_of_transformers,
    prompt_of,
    spoken,
    tokens_of,
)
from helpers import library_warnings
from hypothesis import given, settings
from hypothesis import strategies as st

from macko_llm.defaults import MAX_NEW_TOKENS
from macko_llm.demo.run import MODEL_FOLDER
from macko_llm.engine import make_engine
from macko_llm.errors import CheckpointError, NonFiniteError, UsageError
from macko_llm.generation import Generation, batch_tokens_per_second, generate, generate_batch, stop_token_ids, stream
from macko_llm.models import load_model, load_tokenizer
from macko_llm.perplexity import cut_text, evaluate
from macko_llm.sampling import Sampling
from macko_llm.text import encode_prompt


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return build(request.param)


@pytest.fixture(scope="module")
def model():
    return build("llama")


# The tokens


@pytest.mark.parametrize("length", [1, 5, 20])
def test_greedy_is_that_of_transformers(family, length):
    prompt = prompt_of(length)
    expected = greedy_of_transformers(family, prompt, 40)
    assert len(set(expected)) > 3, "too dull a text to prove anything"
    assert tokens_of(family, prompt, max_new_tokens=40) == expected
    assert tokens_of(family, prompt[0].tolist(), max_new_tokens=40) == expected


def test_no_library_warns(family):
    with library_warnings() as said:
        tokens_of(family, prompt_of(5), max_new_tokens=4)
    assert said == []


def test_no_library_warns_of_the_bundled_model():
    with library_warnings() as said:
        model = load_model(MODEL_FOLDER, device="cpu")
        tokenizer = load_tokenizer(MODEL_FOLDER)
        generate(model, tokenizer, encode_prompt(tokenizer, "Once upon a time"), max_new_tokens=4)
        text = cut_text(tokenizer, "Once upon a time " * 40, model.config, seqlen=32)
        evaluate(model, text, dataset="none")
    assert said == []


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_greedy_with_a_repetition_penalty_is_that_of_transformers(penalty):
    """Of the bundled model; a batch of different lengths is each text alone, so padding counts for nothing."""
    model, tokenizer = load_model(MODEL_FOLDER, device="cpu", dtype="float32"), load_tokenizer(MODEL_FOLDER)
    texts = [
        "Once upon a time",
        "The old owl told a long story to the small fox. The fox",
        "One",
        "It was a cold day and",
    ]
    prompts = [encode_prompt(tokenizer, text) for text in texts]
    options = {"max_new_tokens": 60, "stop_ids": ()}
    sampling = Sampling(repetition_penalty=penalty)

    def of_transformers(prompt, **others):
        return greedy_of_transformers(model, prompt, 60, eos_token_id=None, **others)

    expected = [of_transformers(prompt, repetition_penalty=penalty) for prompt in prompts]
    assert all(one != of_transformers(prompt) for one, prompt in zip(expected, prompts, strict=True))
    alone = [[step.token_id for step in stream(model, tokenizer, p, sampling=sampling, **options)] for p in prompts]
    assert alone == expected
    engine = make_engine(model, max_tokens=max(p.shape[1] for p in prompts) + 60, sampling=sampling)
    tokens = [engine.prefill([prompt[0].tolist() for prompt in prompts])]
    while len(tokens) < 60:
        tokens.append(engine.decode(tokens[-1]))
    assert torch.stack(tokens, dim=1).tolist() == expected


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


def test_a_seed_says_the_same_however_many_tokens_are_asked_for(model):
    sampling = Sampling(temperature=1.5, seed=3)
    longest = tokens_of(model, prompt_of(4), max_new_tokens=50, sampling=sampling)
    for new in (1, 2, 17, 49):
        assert tokens_of(model, prompt_of(4), max_new_tokens=new, sampling=sampling) == longest[:new]


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


# Stop strings


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_stop_string_ends_the_text_before_it(data):
    text = data.draw(st.text("ab é日", min_size=1, max_size=30), "text")
    at = data.draw(st.integers(0, len(text) - 1), "at")
    stop = text[at : at + data.draw(st.integers(1, 6), "length")]
    new = TOKENIZER(text)["input_ids"]
    steps = spoken(TOKENIZER, TOKENIZER("The")["input_ids"], new, max_new_tokens=len(new) + 1, stop=[stop, "never"])
    assert "".join(step.text for step in steps) == text[: text.index(stop)]
    assert [step.finish_reason for step in steps] == [None] * (len(steps) - 1) + ["stop"]
    said = len(TOKENIZER.decode(new[: len(steps)]).rstrip("\ufffd"))
    assert said >= text.index(stop) + len(stop), "the text goes on until the stop string is whole"


def test_text_that_waits_for_a_stop_string_is_shown_at_the_end():
    new = TOKENIZER("a cat met")["input_ids"]
    prompt = TOKENIZER("The")["input_ids"]
    steps = spoken(TOKENIZER, prompt, new, stop=["cat met a dog"])
    assert "".join(step.text for step in steps) == "a cat met"
    assert [step.finish_reason for step in steps][-1] == "length"
    (end,) = TOKENIZER("</s>")["input_ids"]
    steps = spoken(TOKENIZER, prompt, [*new, end], max_new_tokens=99, stop=["cat met a dog"], stop_ids=[end])
    assert "".join(step.text for step in steps) == "a cat met"
    assert [step.finish_reason for step in steps][-1] == "stop"


def test_a_stop_string_on_the_last_allowed_token_is_a_stop():
    steps = spoken(TOKENIZER, [0], TOKENIZER("a dog")["input_ids"], stop=["g"])
    assert steps[-1].finish_reason == "stop"


def test_an_empty_stop_string_is_refused_at_once(model):
    with pytest.raises(UsageError, match="stop string is empty"):
        stream(model, TOKENIZER, [5], max_new_tokens=3, stop=[""])


# Batches


def test_a_batch_is_each_text_alone(family):
    prompts = [prompt_of(length, seed=length) for length in (9, 2, 14)]
    said = [tokens_of(family, prompt, max_new_tokens=30) for prompt in prompts]
    # One ends early at its own stop token, which the others do not say before they end.
    stop = next(token for token in said[1] if token not in said[0] + said[2])
    options = {"max_new_tokens": 30, "stop_ids": [stop]}
    alone = [generate(family, TOKENIZER, prompt, **options) for prompt in prompts]
    batch = generate_batch(family, TOKENIZER, prompts, **options)
    assert [(one.text, one.prompt_tokens, one.new_tokens) for one in batch] == [
        (one.text, one.prompt_tokens, one.new_tokens) for one in alone
    ]
    assert batch[1].new_tokens == said[1].index(stop) + 1 < batch[0].new_tokens == 30


def test_a_batch_that_has_ended_runs_no_further(model):
    prompts = [prompt_of(4), prompt_of(6)]
    stops = [tokens_of(model, prompt, max_new_tokens=1)[0] for prompt in prompts]
    ended = generate_batch(model, TOKENIZER, prompts, max_new_tokens=50, stop_ids=stops)
    assert [one.new_tokens for one in ended] == [1, 1]
    assert [one.text for one in ended] == ["", ""]


def test_a_stop_string_ends_one_text_of_a_batch(model):
    prompts = [prompt_of(4), prompt_of(6)]
    texts = [generate(model, TOKENIZER, prompt, max_new_tokens=20, stop_ids=()).text for prompt in prompts]
    stop = next(texts[0][i : i + 2] for i in range(5, 20) if texts[0][i : i + 2] not in texts[1])
    batch = generate_batch(model, TOKENIZER, prompts, max_new_tokens=20, stop_ids=(), stop=[stop])
    assert [one.text for one in batch] == [texts[0][: texts[0].index(stop)], texts[1]]


def test_seeded_batches_are_reproducible(model):
    def say(seed):
        sampling = Sampling(temperature=1.5, seed=seed)
        made = generate_batch(
            model, TOKENIZER, [[5, 6], [5, 6], [7]], max_new_tokens=20, sampling=sampling, stop_ids=()
        )
        return [one.text for one in made]

    assert say(1) == say(1) != say(2)
    assert len(set(say(1))) == 3, "each text has its own draws"


def test_impossible_batches(model):
    with pytest.raises(UsageError, match="no prompt"):
        generate_batch(model, TOKENIZER, [])
    with pytest.raises(UsageError, match="60 tokens and 5 new ones"):
        generate_batch(model, TOKENIZER, [[5], prompt_of(60)], max_new_tokens=5)
    with pytest.raises(UsageError, match="holds no tokens"):
        generate_batch(model, TOKENIZER, [[5], []], max_new_tokens=5)


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


def test_the_speed_of_a_batch():
    """Three texts of which the longest takes 4 s: 8 + 4 + 0 tokens after the firsts."""
    texts = [Generation("", 1, new, 1.0, speed, 0) for new, speed in ((9, 2.0), (5, 2.0), (1, None))]
    assert batch_tokens_per_second(texts) == 3.0
    assert batch_tokens_per_second(texts[2:]) is None


def test_peak_memory_is_in_bytes(model):
    ballast = torch.ones(2**26)
    peak = generate(model, TOKENIZER, prompt_of(2), max_new_tokens=1).peak_memory_bytes
    assert ballast.nbytes < peak < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
