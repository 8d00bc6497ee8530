"""The probabilities of the next token against plain Python and against transformers' own warpers."""

import math
from bisect import bisect_right
from itertools import accumulate

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from macko_llm.errors import UsageError
from macko_llm.sampling import (
    GREEDY,
    NOT_FINITE,
    Sampling,
    choose,
    penalized,
    token_probabilities,
    tokens_of_prompts,
    uniforms,
)


def naive_probabilities(logits, temperature, top_k=None, top_p=None, min_p=None):
    """One row in plain Python: temperature, top-k with ties, the fewest tokens that reach top_p, then min-p."""
    weight = {token: math.exp((logit - max(logits)) / temperature) for token, logit in enumerate(logits)}
    if top_k is not None:
        kth = sorted(weight.values(), reverse=True)[min(top_k, len(weight)) - 1]
        weight = {token: w for token, w in weight.items() if w >= kth}
    if top_p is not None:
        kept, mass, total = {}, 0.0, sum(weight.values())
        for token, w in sorted(weight.items(), key=lambda item: -item[1]):
            if mass >= top_p:
                break
            kept[token] = w
            mass += w / total
        weight = kept
    if min_p is not None:
        weight = {token: w for token, w in weight.items() if w >= min_p * max(weight.values())}
    total = sum(weight.values())
    return [weight.get(token, 0.0) / total for token in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 4, 1000])
@pytest.mark.parametrize("top_p", [None, 0.2, 0.77, 0.999, 1.0])
@pytest.mark.parametrize("min_p", [None, 0.0, 0.03, 0.4, 1.0])
def test_probabilities_agree_with_naive_and_with_transformers(temperature, top_k, top_p, min_p):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 2
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    probabilities = token_probabilities(logits, sampling)
    expected = torch.tensor([naive_probabilities(row, temperature, top_k, top_p, min_p) for row in logits.tolist()])
    torch.testing.assert_close(probabilities, expected, rtol=1e-4, atol=1e-6)

    scores = TemperatureLogitsWarper(temperature)(None, logits)
    scores = scores if top_k is None else TopKLogitsWarper(top_k)(None, scores)
    scores = scores if top_p is None else TopPLogitsWarper(top_p)(None, scores)
    scores = scores if min_p is None else MinPLogitsWarper(min_p)(None, scores)
    torch.testing.assert_close(probabilities, scores.softmax(-1), rtol=1e-4, atol=1e-6)


@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=12),
    temperature=st.floats(0.1, 5),
    min_p=st.floats(0.001, 1),
)
def test_min_p_is_about_what_the_temperature_has_made_of_the_logits(logits, temperature, min_p):
    shares = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    assume(all(abs(share / min_p - 1) > 1e-4 for share in shares))  # on the edge roundings decide
    found = token_probabilities(torch.tensor([logits]), Sampling(temperature=temperature, min_p=min_p))[0]
    assert (found > 0).tolist() == [share >= min_p for share in shares]
    expected = torch.tensor(naive_probabilities(logits, temperature, min_p=min_p))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_token_that_crosses_top_p_is_kept():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()

    def kept(top_p):
        return token_probabilities(logits, Sampling(temperature=1.0, top_p=top_p))[0].nonzero().flatten().tolist()

    assert (kept(0.4), kept(0.6), kept(0.81), kept(0.94), kept(0.96)) == (
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2],
        [0, 1, 2, 3],
    )


def test_tokens_tied_with_the_kth_are_kept_and_forbidden_ones_are_not():
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0, -math.inf]])
    assert (token_probabilities(logits, Sampling(temperature=1.0, top_k=2))[0] > 0).tolist() == [1, 1, 1, 0, 0]
    assert token_probabilities(logits, Sampling(temperature=1.0, top_k=5))[0, 4] == 0
    hot = token_probabilities(logits, Sampling(temperature=1e300))[0]
    torch.testing.assert_close(hot, torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0]))


# The draw

SAMPLINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_k=5),
    Sampling(temperature=1.5, top_p=0.8),
    Sampling(temperature=2.0, top_k=9, top_p=0.9),
    Sampling(temperature=1.5, min_p=0.1),
    Sampling(temperature=3.0, top_k=30, top_p=0.95, min_p=0.2),
]
NARROWING = ("temperature", "top_k", "top_p", "min_p")


def naive_of(logits, sampling):
    return naive_probabilities(logits, *(getattr(sampling, name) for name in NARROWING))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_draws_follow_the_probabilities(sampling):
    """20001 evenly spaced uniform numbers choose each token as often as plain Python's probabilities say."""
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(1)) * 2
    expected = naive_of(logits[0].tolist(), sampling)
    count = 20001
    even = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = choose(logits.expand(count, 40), sampling, even)
    share = torch.bincount(drawn, minlength=40) / count
    torch.testing.assert_close(share, torch.tensor(expected), rtol=0, atol=2 / count + 1e-6)
    assert drawn.tolist() == sorted(drawn.tolist()), "a larger number never draws an earlier token"


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_each_text_is_drawn_with_its_own_number(sampling):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(200, 30, generator=generator)
    numbers = uniforms(Sampling(temperature=1.0, seed=2), 1, 200)[0]
    steps = [list(accumulate(naive_of(row, sampling))) for row in logits.tolist()]
    expected = [bisect_right(row, u * row[-1]) for row, u in zip(steps, numbers.tolist(), strict=True)]
    assert choose(logits, sampling, numbers).tolist() == expected


@pytest.mark.parametrize("uniform", [0.0, 5e-324, 0.5, 1 - 2**-53])
def test_a_token_of_probability_0_is_never_drawn(uniform):
    logits = torch.full((3, 1000), -math.inf)
    logits[0, 500] = 1.0
    logits[1, [7, 900]] = torch.tensor([0.0, -200.0])  # the second is 0 in fp32
    logits[2, 3:998] = torch.linspace(-1, 1, 995)
    drawn = choose(logits, Sampling(temperature=1.0), torch.full((3,), uniform, dtype=torch.float64)).tolist()
    assert drawn[:2] == [500, 7]
    assert 3 <= drawn[2] < 998
    assert (drawn[2] == 3) == (uniform < 0.1)
    assert (drawn[2] == 997) == (uniform > 0.9)


@pytest.mark.parametrize("sampling", [GREEDY, *SAMPLINGS])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_logits_that_are_not_finite_choose_no_token(sampling, poison):
    logits = torch.zeros(4, 20)
    logits[0, 4] = logits[2, 5] = logits[3, 6] = 50.0
    logits[1, 7] = poison
    logits[2] = -math.inf
    logits[3, 8] = -math.inf
    numbers = None if sampling is GREEDY else torch.full((4,), 0.5, dtype=torch.float64)
    assert choose(logits, sampling, numbers).tolist() == [4, NOT_FINITE, NOT_FINITE, 6]


def test_uniform_numbers():
    sampling = Sampling(temperature=1.0, seed=5)
    numbers = uniforms(sampling, 1000, 3)
    assert numbers.dtype == torch.float64
    assert numbers.shape == (1000, 3)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 5 * math.sqrt(1 / 12 / 3000)
    assert not torch.equal(numbers, uniforms(Sampling(temperature=1.0, seed=6), 1000, 3))
    assert not torch.equal(uniforms(Sampling(temperature=1.0), 9, 1), uniforms(Sampling(temperature=1.0), 9, 1))
    assert uniforms(GREEDY, 1000, 3) is None


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("steps", [1, 2, 15, 16, 17, 100])
def test_the_numbers_of_a_step_do_not_depend_on_the_steps_to_come(steps, batch):
    sampling = Sampling(temperature=1.0, seed=5)
    assert torch.equal(uniforms(sampling, steps, batch), uniforms(sampling, 200, batch)[:steps])


# The repetition penalty


@given(
    logits=st.lists(st.floats(-50, 50, width=32) | st.just(-math.inf), min_size=8, max_size=8),
    tokens=st.lists(st.integers(0, 7), min_size=1, max_size=10),
    penalty=st.floats(0.1, 10),
)
def test_the_penalty_is_that_of_transformers(logits, tokens, penalty):
    seen = torch.zeros(1, 8, dtype=torch.bool)
    seen[0, tokens] = True
    found = penalized(torch.tensor([logits]), seen, penalty)
    naive = [
        (logit / penalty if logit > 0 else logit * penalty) if token in tokens else logit
        for token, logit in enumerate(logits)
    ]
    torch.testing.assert_close(found, torch.tensor([naive]))
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([tokens]), torch.tensor([logits]))
    assert torch.equal(found, theirs)


def test_the_penalty_is_computed_in_fp32():
    logits = torch.tensor([[10.0, -3.0]], dtype=torch.float16)
    found = penalized(logits, torch.tensor([[True, True]]), 1.3)
    assert torch.equal(found, torch.tensor([[10.0, -3.0]]) * torch.tensor([1 / 1.3, 1.3]))


def test_padding_holds_no_token():
    """Neither that of the id 0, with which rows are padded, nor any other; and a real 0 counts."""
    ids = torch.tensor([[0, 0, 3, 1], [4, 4, 0, 2], [5, 5, 5, 1]])
    seen = tokens_of_prompts(ids, torch.tensor([2, 2, 0]), 6)
    assert [row.nonzero().flatten().tolist() for row in seen] == [[1, 3], [0, 2], [1, 5]]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_chosen_token_is_seen_from_then_on(temperature):
    """Each token is taken once, in the order of the logits, where seen ones are as good as forbidden; texts apart."""
    sampling = Sampling(temperature=temperature, top_k=1 if temperature else None, repetition_penalty=1e4)
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    seen = tokens_of_prompts(torch.tensor([[0], [0]]), torch.tensor([0, 0]), 4)
    half = torch.full((2,), 0.5, dtype=torch.float64) if temperature else None
    drawn = [choose(logits, sampling, half, seen).tolist() for _ in range(3)]
    assert drawn == [[1, 3], [2, 2], [3, 1]]
    assert seen.all()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_logits_that_are_not_finite_choose_no_token_with_a_penalty_either(poison):
    logits = torch.tensor([[0.0, poison, 1.0], [-math.inf, -math.inf, -math.inf], [0.0, 2.0, 1.0]])
    seen = torch.tensor([[False, True, False]] * 3)
    assert choose(logits, Sampling(repetition_penalty=1.5), None, seen).tolist() == [NOT_FINITE, NOT_FINITE, 1]


# Impossible settings


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"temperature": 1.0, "top_k": 0}, "at least 1"),
        ({"temperature": 1.0, "top_p": 0.0}, "more than 0 and at most 1"),
        ({"temperature": 1.0, "top_p": 1.1}, "more than 0 and at most 1"),
        ({"temperature": 1.0, "top_p": math.nan}, "more than 0 and at most 1"),
        ({"temperature": 1.0, "min_p": -0.1}, "use 0 to 1"),
        ({"temperature": 1.0, "min_p": 1.1}, "use 0 to 1"),
        ({"temperature": 1.0, "min_p": math.nan}, "use 0 to 1"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**64}, "seed"),
        ({"top_k": 5}, "add --temperature"),
        ({"top_p": 0.9}, "add --temperature"),
        ({"min_p": 0.1}, "add --temperature"),
        ({"repetition_penalty": 0.0}, "use 1 for none"),
        ({"repetition_penalty": -1.1}, "use 1 for none"),
        ({"repetition_penalty": math.nan}, "use 1 for none"),
        ({"repetition_penalty": math.inf}, "use 1 for none"),
    ],
)
def test_impossible_sampling(wrong, sentence):
    with pytest.raises(UsageError, match=sentence):
        Sampling(**wrong)
