"""Engines: texts of different lengths at once against each alone, and every engine against the eager one."""

import math

import pytest
import torch
from families import FAMILIES, MAX_POSITIONS, WINDOW
from generation_helpers import Scripted, build, greedy_of_transformers, prompt_of

from macko_llm.engine import EagerEngine, make_engine, pad_left
from macko_llm.errors import UsageError
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


def test_on_the_cpu_the_engine_is_the_eager_one(model):
    engine = make_engine(model, max_tokens=MAX_POSITIONS, batch=1, sampling=GREEDY)
    assert isinstance(engine, EagerEngine)
    assert engine.device == torch.device("cpu")
