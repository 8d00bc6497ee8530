"""The probabilities of the next token against plain Python and against transformers' own warpers."""

import math

import pytest
import torch
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from macko_llm.errors import UsageError
from macko_llm.sampling import Sampling, token_probabilities


def naive_probabilities(logits, temperature, top_k, top_p):
    """One row in plain Python: temperature, top-k with ties, then the fewest tokens that reach top_p."""
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
    total = sum(weight.values())
    return [weight.get(token, 0.0) / total for token in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 4, 1000])
@pytest.mark.parametrize("top_p", [None, 0.2, 0.77, 0.999, 1.0])
def test_probabilities_agree_with_naive_and_with_transformers(temperature, top_k, top_p):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 2
    probabilities = token_probabilities(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    expected = torch.tensor([naive_probabilities(row, temperature, top_k, top_p) for row in logits.tolist()])
    torch.testing.assert_close(probabilities, expected, rtol=1e-4, atol=1e-6)

    scores = TemperatureLogitsWarper(temperature)(None, logits)
    scores = scores if top_k is None else TopKLogitsWarper(top_k)(None, scores)
    scores = scores if top_p is None else TopPLogitsWarper(top_p)(None, scores)
    torch.testing.assert_close(probabilities, scores.softmax(-1), rtol=1e-4, atol=1e-6)


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
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**64}, "seed"),
        ({"top_k": 5}, "add --temperature"),
        ({"top_p": 0.9}, "add --temperature"),
    ],
)
def test_impossible_sampling(wrong, sentence):
    with pytest.raises(UsageError, match=sentence):
        Sampling(**wrong)
