"""Engines: texts of different lengths at once against each alone, and every engine against the eager one."""

import dataclasses
import functools
import gc
import math
import warnings
import weakref

import pytest
import torch
from families import FAMILIES, MAX_POSITIONS, VOCABULARY, WINDOW
from generation_helpers import Scripted, build, greedy_of_transformers, prompt_of
from transformers import AutoModelForCausalLM, DynamicCache

from macko_llm.engine import make_engine
from macko_llm.engines import decoder
from macko_llm.engines.eager import EagerEngine, pad_left
from macko_llm.engines.fixed import FixedEngine, NotSuitedError
from macko_llm.engines.transformers_step import TransformersStep
from macko_llm.errors import MackoWarning, UsageError
from macko_llm.sampling import GREEDY, NOT_FINITE, Sampling

LENGTHS = [3, WINDOW + 4, 1, WINDOW]
NEW = 30


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return build(request.param)


@pytest.fixture(scope="module")
def model():
    return build("llama")


def prompts_of(lengths):
    return [prompt_of(length, seed)[0].tolist() for seed, length in enumerate(lengths)]


def run(engine, prompts, new):
    """[batch][new] tokens; what an engine returned must stay as it was until the end."""
    tokens = [engine.prefill(prompts)]
    while len(tokens) < new:
        tokens.append(engine.decode(tokens[-1]))
    return torch.stack(tokens, dim=1).tolist()


def static(model, prompts, sampling=GREEDY, bucket=16):
    most = max(map(len, prompts)) + NEW
    return FixedEngine(model, max_tokens=most, sampling=sampling, kinds=[TransformersStep], bucket=bucket)


def eager(model, prompts, sampling=GREEDY):
    return EagerEngine(model, max_tokens=max(map(len, prompts)) + NEW, sampling=sampling)


def test_padding_on_the_left():
    ids, padding = pad_left([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert padding.tolist() == [0, 2]


def test_texts_of_different_lengths_at_once_are_each_alone(family):
    prompts = prompts_of(LENGTHS)
    alone = [greedy_of_transformers(family, torch.tensor([prompt]), NEW) for prompt in prompts]
    assert run(eager(family, prompts), prompts, NEW) == alone


@pytest.mark.parametrize("make", [eager, static])
def test_logits_are_made_of_the_last_position_alone(family, make):
    """Those of a long prompt would take more memory than the model."""
    made = []
    head = family.get_output_embeddings()
    prompts = prompts_of([WINDOW + 9, 20])
    with head.register_forward_hook(lambda _module, _input, output: made.append(tuple(output.shape))):
        run(make(family, prompts), prompts, 3)
    assert len(made) >= 3
    assert set(made) == {(2, 1, VOCABULARY)}


@pytest.mark.parametrize("lengths", [[7], [7, 7]])
def test_texts_of_one_length_need_no_mask(lengths):
    """So that their results are, bit for bit, those of a plain forward."""
    speaker = Scripted([4, 5], 300)
    forward = speaker.forward

    def plain(input_ids, past_key_values, use_cache):
        said = forward(input_ids, past_key_values, use_cache)
        said.logits = said.logits.expand(len(lengths), -1, -1)
        return said

    speaker.forward = plain
    assert run(eager(speaker, prompts_of(lengths)), prompts_of(lengths), 2) == [[4, 5]] * len(lengths)


def test_different_lengths_need_a_model_with_a_mask():
    with pytest.raises(UsageError, match="one at a time"):
        eager(Scripted([4], 300), prompts_of([2, 3])).prefill(prompts_of([2, 3]))


def test_a_prefill_begins_anew(model):
    engine = eager(model, prompts_of([9]), Sampling(temperature=1.0, seed=3))
    first = run(engine, prompts_of([9]), 9)
    run(engine, prompts_of([2, 5]), 5)
    assert run(engine, prompts_of([9]), 9) == first


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, top_p=0.9, seed=0)])
def test_a_text_that_is_not_finite_leaves_the_others_alone(sampling):
    model = build("llama")
    prompts = [[5, 6, 7], [8, 9, 10]]
    clean = run(eager(model, prompts, sampling), prompts, 6)
    with torch.no_grad():
        model.get_input_embeddings().weight[10] = math.nan
    poisoned = run(eager(model, prompts, sampling), prompts, 6)
    assert poisoned == [clean[0], [NOT_FINITE] * 6]


# The fixed decode step, which does on the CPU what a GPU captures


@pytest.mark.parametrize("attention", ["the model's", "eager"])
@pytest.mark.parametrize("lengths", [[1], [5], [16], LENGTHS, [WINDOW + 9, 20]])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_fixed_step_says_what_the_eager_engine_says(name, attention, lengths):
    """From caches of 16 slots to 64: two that grow, and windows shorter than the text."""
    family, prompts = build(name), prompts_of(lengths)
    if attention == "eager":
        family.set_attn_implementation("eager")
    expected = run(eager(family, prompts), prompts, NEW)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(static(family, prompts), prompts, NEW) == expected
        assert run(static(family, prompts, bucket=512), prompts, NEW) == expected


@pytest.mark.parametrize("sampling", [Sampling(temperature=1.5, seed=1), Sampling(temperature=1.0, top_p=0.8, seed=2)])
def test_the_fixed_step_draws_what_the_eager_engine_draws(model, sampling):
    prompts = prompts_of([3, 9])
    expected = run(eager(model, prompts, sampling), prompts, NEW)
    assert run(static(model, prompts, sampling), prompts, NEW) == expected


PENALTIES = [Sampling(repetition_penalty=1.3), Sampling(temperature=1.2, top_k=40, seed=3, repetition_penalty=1.3)]


@pytest.mark.parametrize("sampling", PENALTIES, ids=["greedy", "drawn"])
def test_a_penalty_in_the_fixed_step_is_that_of_the_eager_engine(model, sampling):
    """Texts of different lengths, through a cache that grows twice, and a second time, when all is forgotten."""
    prompts = prompts_of(LENGTHS)
    expected = run(eager(model, prompts, sampling), prompts, NEW)
    engine = static(model, prompts, sampling)
    assert run(engine, prompts, NEW) == expected
    assert run(engine, prompts, NEW) == expected
    assert expected != run(eager(model, prompts, dataclasses.replace(sampling, repetition_penalty=1.0)), prompts, NEW)


def test_a_penalty_outlives_a_step_that_gives_up(model, monkeypatch):
    """The eager engine goes on with what the fixed step has seen."""
    prompts = prompts_of(LENGTHS)
    expected = run(eager(model, prompts, PENALTIES[0]), prompts, NEW)
    make_step = TransformersStep.__init__

    def give_up(self, eager, capacity, token, old):
        if old is not None:
            raise NotSuitedError("it shall not grow")
        make_step(self, eager, capacity, token, old)

    monkeypatch.setattr(TransformersStep, "__init__", give_up)
    with pytest.warns(MackoWarning, match="it shall not grow"):
        assert run(static(model, prompts, PENALTIES[0]), prompts, NEW) == expected


@pytest.mark.parametrize("make", [eager, static])
def test_without_a_penalty_nothing_is_kept_for_it(model, make):
    engine = make(model, prompts_of([4]))
    engine.prefill(prompts_of([4]))
    assert getattr(engine, "eager", engine).seen is None


def test_the_fixed_step_says_that_logits_are_not_finite():
    model = build("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[10] = math.nan
    prompts = [[5, 6, 7], [8, 9, 10]]
    assert run(static(model, prompts), prompts, 6) == run(eager(model, prompts), prompts, 6)


def test_a_prefill_of_the_fixed_engine_begins_anew(model):
    engine = static(model, prompts_of([9]), Sampling(temperature=1.0, seed=3))
    first = run(engine, prompts_of([9]), NEW)
    run(engine, prompts_of([2, 5]), 5)
    assert run(engine, prompts_of([9]), NEW) == first


@pytest.mark.parametrize("family_name", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("works_until", [0, 16, 32])
def test_what_cannot_be_fixed_goes_on_in_the_eager_engine_with_one_warning(family_name, works_until):
    """A model that refuses fixed caches, from the start or once they have grown past some length."""
    model = build(family_name)
    forward = model.forward

    @functools.wraps(forward)
    def picky(**arguments):
        cache = arguments.get("cache", arguments.get("past_key_values"))
        if not isinstance(cache, DynamicCache) and cache.get_max_length() > works_until:
            raise RuntimeError("no such cache. Ever")
        return forward(**arguments)

    prompts = prompts_of([9, 4])
    expected = run(eager(model, prompts), prompts, NEW)
    model.forward = picky
    engine = static(model, prompts)
    with pytest.warns(
        MackoWarning, match=r"ForCausalLM generates more slowly than it could: no such cache\. Ever\.$"
    ) as caught:
        assert run(engine, prompts, NEW) == expected
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: setattr(model, "_can_compile_fullgraph", False), "knows no fixed cache"),
        (lambda model: setattr(model, "create_masks_for_generate", None), "masks of its own"),
        (lambda model: setattr(model.config, "attention_chunk_size", 8), "kinds that are not supported"),
    ],
)
def test_what_could_differ_is_refused(change, reason):
    model = build("llama")
    prompts = prompts_of([9])
    change(model)
    expected = run(eager(model, prompts), prompts, 9)
    with pytest.warns(MackoWarning, match=reason):
        assert run(static(model, prompts), prompts, 9) == expected


@pytest.mark.parametrize(("error", "warned"), [(NotSuitedError("another family"), 0), (RuntimeError("a fault"), 1)])
def test_the_next_kind_of_step_takes_over(model, error, warned):
    """Silently where the first does not claim to suit the model; a fault of one that does is told."""

    def refuses(*_):
        raise error

    prompts = prompts_of([9, 4])
    expected = run(eager(model, prompts), prompts, NEW)
    most = max(map(len, prompts)) + NEW
    engine = FixedEngine(model, max_tokens=most, sampling=GREEDY, kinds=[refuses, TransformersStep], bucket=16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert run(engine, prompts, NEW) == expected
    assert [str(warning.message).endswith("could: a fault.") for warning in caught] == [True] * warned


def test_on_the_cpu_the_engine_is_the_eager_one(model):
    engine = make_engine(model, max_tokens=MAX_POSITIONS, sampling=GREEDY)
    assert isinstance(engine, EagerEngine)
    assert engine.device == torch.device("cpu")


def test_a_decoder_is_freed_with_its_last_user(model, monkeypatch):
    """Without the help of the collector, which would let the caches of many texts lie about; its kernels are not run."""
    monkeypatch.setattr(decoder, "_count_splits", lambda *_: 1)
    caches = [[torch.zeros(1, 2, 8, 16) for _ in range(2)] for _ in "kv"]
    made = decoder.Decoder(model, *caches)
    assert [launch.part for launch in made.launches] == [
        "rest",
        *["linears", "attention", *["linears"] * 3] * 2,
        "linears",
    ]
    freed = weakref.ref(made)
    gc.disable()
    try:
        del made
        assert freed() is None
    finally:
        gc.enable()


def test_the_kernels_refuse_a_window_that_llama_does_not_have():
    """The cache forgets what lies outside, so they would read zeros there; the model's own forward reads what is left."""
    config = FAMILIES["llama"]().config
    config.sliding_window = WINDOW
    windowed = AutoModelForCausalLM.from_config(config).eval()
    assert "sliding window" in decoder.why_not(windowed)
    assert "sliding window" not in decoder.why_not(FAMILIES["llama"]())
    prompts = prompts_of([WINDOW + 9, 20])
    assert run(static(windowed, prompts), prompts, NEW) == run(eager(windowed, prompts), prompts, NEW)
