"""Perplexity against cases computed by hand and against a naive loop in float64."""

import logging
import math
from dataclasses import replace
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from macko_llm import perplexity, refusals
from macko_llm.errors import CalibrationError, CheckpointError, NonFiniteError, UsageError
from macko_llm.perplexity import PerplexityReport, token_losses, windows
from macko_llm.progress import Progress, no_progress

WORDS = [f"w{i}" for i in range(30)]
POSITIONS = 24


def evaluate(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    dataset: str,
    batch_size: int = 1,
    progress: Progress = no_progress,
    **cut: Any,
) -> PerplexityReport:
    """Cut a text and score it."""
    text_windows = perplexity.cut_text(tokenizer, text, model.config, **cut)
    return perplexity.evaluate(model, text_windows, dataset=dataset, batch_size=batch_size, progress=progress)


def word_tokenizer(words, **special):
    """One token a word, ids in order; BOS in front where `bos_token` is given."""
    vocabulary = {word: index for index, word in enumerate([*special.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if "bos_token" in special:
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


class FixedProbabilities(nn.Module):
    """Predicts the next token from the last one alone, by a table of probabilities."""

    def __init__(self, table, positions=None):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(table).log())
        self.config = SimpleNamespace(max_position_embeddings=positions, vocab_size=len(table))
        self.config.get_text_config = lambda: self.config
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def forward(self, input_ids, use_cache):
        assert not use_cache
        return SimpleNamespace(logits=self.logits[input_ids])


# P(next | last) over the words a, b, c.
TABLE = [[1 / 2, 1 / 4, 1 / 4], [1 / 8, 1 / 8, 3 / 4], [1 / 3, 1 / 3, 1 / 3]]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(WORDS, bos_token="B")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 1,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def text():
    return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (80,), generator=torch.Generator().manual_seed(1)))


def naive(model, ids, seqlen, stride):
    """(mean nll, windows, scored tokens): every token's float64 log-softmax, one by one."""
    losses, count, start = [], 0, 0
    while start + seqlen <= len(ids):
        window = ids[start : start + seqlen]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([window])).logits[0].double()
        first = 1 if start == 0 else max(1, seqlen - stride)
        for position in range(first, seqlen):
            losses.append(-logits[position - 1].log_softmax(-1)[window[position]].item())
        count += 1
        start += stride
    return sum(losses) / len(losses), count, len(losses)


def test_by_hand():
    """Two windows "a b c" and "c a a", the tail "b" dropped: 1/4, 3/4 and 1/3, 1/2."""
    report = evaluate(FixedProbabilities(TABLE), word_tokenizer(list("abc")), "a b c c a a b", dataset="hand", seqlen=3)
    product = 1 / 4 * 3 / 4 * 1 / 3 * 1 / 2
    assert report.perplexity == pytest.approx(product ** (-1 / 4), rel=1e-6)
    assert report.nll == pytest.approx(-math.log(product) / 4, rel=1e-6)
    assert (report.windows, report.tokens, report.seqlen, report.stride) == (2, 4, 3, 3)
    assert (report.dataset, report.dtype) == ("hand", "float32")


def test_by_hand_with_overlap():
    """Stride 1: the first window scores b and c, each later one its last token; the 7 words hold 5 windows."""
    report = evaluate(
        FixedProbabilities(TABLE), word_tokenizer(list("abc")), "a b c c a a b", dataset="hand", seqlen=3, stride=1
    )
    product = (1 / 4 * 3 / 4) * 1 / 3 * 1 / 3 * 1 / 2 * 1 / 4
    assert report.nll == pytest.approx(-math.log(product) / 6, rel=1e-6)
    assert (report.windows, report.tokens, report.stride) == (5, 6, 1)


@pytest.mark.parametrize(
    ("seqlen", "stride"), [(20, None), (20, 7), (20, 1), (20, 19), (9, 9), (24, 12), (2, 1), (2, 2)]
)
def test_agrees_with_naive_loop(model, tokenizer, text, seqlen, stride):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    report = evaluate(model, tokenizer, text, dataset="random", seqlen=seqlen, stride=stride)
    nll, count, scored = naive(model, ids, seqlen, stride or seqlen)
    assert report.nll == pytest.approx(nll, rel=1e-5)
    assert report.perplexity == pytest.approx(math.exp(nll), rel=1e-4)
    assert (report.windows, report.tokens, report.seqlen, report.stride) == (count, scored, seqlen, stride or seqlen)


def test_agrees_with_the_papers_formula(model, tokenizer, text):
    """exp(sum of mean window loss * seqlen / (windows * seqlen)), the losses as transformers computes them."""
    seqlen = 16
    ids = torch.tensor(tokenizer(text)["input_ids"])
    count = len(ids) // seqlen
    total = 0.0
    for index in range(count):
        window = ids[None, index * seqlen : (index + 1) * seqlen]
        with torch.no_grad():
            total += model(input_ids=window, labels=window).loss.item() * seqlen
    report = evaluate(model, tokenizer, text, dataset="random", seqlen=seqlen)
    assert report.perplexity == pytest.approx(math.exp(total / (count * seqlen)), rel=1e-5)


def test_limit_takes_the_first_windows(model, tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    report = evaluate(model, tokenizer, text, dataset="random", seqlen=16, stride=5, limit=3)
    nll, count, scored = naive(model, ids[: 16 + 2 * 5], 16, 5)
    assert report.nll == pytest.approx(nll, rel=1e-5)
    assert (report.windows, report.tokens) == (count, scored) == (3, 25)
    whole = evaluate(model, tokenizer, text, dataset="random", seqlen=16)
    assert evaluate(model, tokenizer, text, dataset="random", seqlen=16, limit=1000) == whole


# Beside a reference


def another(model, seed):
    """A model of the same shape, with other weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(model.config).eval()


def naive_comparison(model, reference, ids, seqlen, stride):
    """(mean KL(reference || model), share of equal most probable tokens): every token in float64, one by one."""
    divergences, agreements, start = [], [], 0
    while start + seqlen <= len(ids):
        window = torch.tensor([ids[start : start + seqlen]])
        with torch.no_grad():
            p, q = (some(input_ids=window).logits[0].double().softmax(-1) for some in (reference, model))
        for position in range(1 if start == 0 else max(1, seqlen - stride), seqlen):
            at = position - 1
            divergences.append(sum((a * math.log(a / b)).item() for a, b in zip(p[at], q[at], strict=True)))
            agreements.append(p[at].argmax().item() == q[at].argmax().item())
        start += stride
    return sum(divergences) / len(divergences), sum(agreements) / len(agreements)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("seqlen", "stride"), [(20, None), (20, 7), (2, 1)])
def test_the_divergence_from_a_reference_agrees_with_a_naive_sum(model, tokenizer, text, seqlen, stride, batch_size):
    reference = another(model, 7)
    cut = perplexity.cut_text(tokenizer, text, model.config, seqlen=seqlen, stride=stride)
    report = perplexity.evaluate(model, cut, dataset="random", reference=reference, batch_size=batch_size)
    ids = tokenizer(text)["input_ids"]
    divergence, agreement = naive_comparison(model, reference, ids, seqlen, stride or seqlen)
    backwards, _ = naive_comparison(reference, model, ids, seqlen, stride or seqlen)
    assert abs(divergence - backwards) > 1e-3 * divergence  # a test that could not tell them apart would show little
    assert report.reference.kl_divergence == pytest.approx(divergence, rel=1e-5)
    assert report.reference.top_agreement == pytest.approx(agreement)
    assert 0 < agreement < 1
    nll, _, _ = naive(reference, ids, seqlen, stride or seqlen)
    assert report.reference.nll == pytest.approx(nll, rel=1e-5)
    assert report.reference.perplexity == pytest.approx(math.exp(nll), rel=1e-4)
    alone = perplexity.evaluate(model, cut, dataset="random", batch_size=batch_size)
    assert report == replace(alone, reference=report.reference)
    assert alone.reference is None


def test_a_model_does_not_diverge_from_itself(model, tokenizer, text):
    cut = perplexity.cut_text(tokenizer, text, model.config, seqlen=20)
    report = perplexity.evaluate(model, cut, dataset="random", reference=model)
    assert (report.reference.kl_divergence, report.reference.top_agreement) == (0, 1)
    assert report.reference.perplexity == report.perplexity


def test_the_divergence_by_hand():
    """Of (1/2, 1/4, 1/4) from thirds: log 3 - 1.5 log 2; a token that the reference rules out counts nothing."""
    reference = torch.tensor([[1 / 2, 1 / 4, 1 / 4], [1 / 2, 1 / 2, 0], [1 / 2, 1 / 2, 0]]).log()
    model = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1 / 4, 1 / 4, 1 / 2], [1 / 2, 1 / 2, 0]]).log()
    expected = [math.log(3) - 1.5 * math.log(2), math.log(2), 0]
    assert perplexity.divergences(reference, model).tolist() == pytest.approx(expected, abs=1e-6)
    assert perplexity.divergences(model[:2], reference[:2]).tolist() == pytest.approx(
        [(2 * math.log(4 / 3) + math.log(2 / 3)) / 3, math.inf]
    )


@pytest.mark.parametrize("difference", [1.0, 1e-2, 1e-4])
def test_divergences_are_exact_however_little_the_models_differ(difference):
    """Against the naive sum in decimals; in fp32 the smallest would come out as noise, half of it negative."""
    torch.manual_seed(0)
    reference = torch.randn(8, 200).bfloat16() * 4
    model = reference.float() + difference * torch.randn(8, 200)
    exact = [decimal_divergence(p.tolist(), q.tolist()) for p, q in zip(reference, model, strict=True)]
    assert perplexity.divergences(reference, model).tolist() == pytest.approx(exact, rel=1e-5, abs=0)


def decimal_divergence(reference, model):
    p, q = ([Decimal(logit).exp() for logit in logits] for logits in (reference, model))
    return float(sum(a / sum(p) * (a / sum(p) / (b / sum(q))).ln() for a, b in zip(p, q, strict=True)))


def test_divergences_do_not_depend_on_the_chunks(monkeypatch):
    torch.manual_seed(0)
    reference, model = torch.randn(37, 11).bfloat16(), torch.randn(37, 11)
    whole = perplexity.divergences(reference, model)
    assert whole.dtype == torch.float64
    for elements in (1, 22, 200):
        monkeypatch.setattr("macko_llm.perplexity._CHUNK_ELEMENTS", elements)
        assert torch.equal(perplexity.divergences(reference, model), whole)


def test_a_reference_whose_loss_is_not_finite_is_named():
    stub, broken = FixedProbabilities(TABLE), FixedProbabilities(TABLE)
    with torch.no_grad():
        broken.logits[1, 0] = math.nan
    cut = perplexity.cut_text(word_tokenizer(list("abc")), "a a a a b c", stub.config, seqlen=3)
    with pytest.raises(NonFiniteError, match=r"window 2 under the reference is nan; use --dtype"):
        perplexity.evaluate(stub, cut, dataset="hand", reference=broken)


def test_a_reference_with_another_vocabulary_is_refused(model, tokenizer):
    perplexity.check_reference(tokenizer, model.config, word_tokenizer(WORDS, bos_token="B"), model.config)
    renamed = word_tokenizer([*WORDS[:-1], "other"], bos_token="B")
    larger = LlamaConfig(vocab_size=len(WORDS) + 2)
    for other_tokenizer, other_config in ((renamed, model.config), (tokenizer, larger)):
        with pytest.raises(UsageError, match="another vocabulary; give --reference the model that this one was made"):
            perplexity.check_reference(tokenizer, model.config, other_tokenizer, other_config)


def test_logits_are_made_only_where_they_are_scored(model, tokenizer, text):
    """With overlap, of the last positions of a window: what predicts the first scored token, and all after it."""
    made = []
    with model.lm_head.register_forward_hook(lambda _module, _input, output: made.append(tuple(output.shape))):
        evaluate(model, tokenizer, text, dataset="random", seqlen=16, stride=5, limit=3)
    assert made == [(1, kept, len(WORDS) + 1) for kept in (16, 6, 6)]


@pytest.mark.parametrize("batch_size", [2, 3, 4, 100])
@pytest.mark.parametrize(("seqlen", "stride"), [(10, None), (20, 7), (16, 1), (9, 8), (2, 1)])
def test_windows_evaluated_together_agree_with_the_naive_loop(model, tokenizer, text, seqlen, stride, batch_size):
    rows = []
    with model.model.register_forward_hook(lambda _module, _input, output: rows.append(len(output[0]))):
        report = evaluate(model, tokenizer, text, dataset="random", seqlen=seqlen, stride=stride, batch_size=batch_size)
    nll, count, scored = naive(model, tokenizer(text)["input_ids"], seqlen, stride or seqlen)
    assert report.nll == pytest.approx(nll, rel=1e-5)
    assert (report.windows, report.tokens) == (count, scored)
    assert sum(rows) == count
    assert max(rows) == min(batch_size, count - (1 if (stride or seqlen) < seqlen - 1 else 0))


def test_batches_make_logits_only_where_they_are_scored_and_count_windows(model, tokenizer, text):
    made, calls = [], []
    with model.lm_head.register_forward_hook(lambda _module, _input, output: made.append(tuple(output.shape[:2]))):
        evaluate(
            model,
            tokenizer,
            text,
            dataset="random",
            seqlen=16,
            stride=5,
            limit=6,
            batch_size=2,
            progress=lambda *call: calls.append(call[1:]),
        )
    assert made == [(1, 16), (2, 6), (2, 6), (1, 6)]
    assert calls == [(0, 6), (1, 6), (3, 6), (5, 6), (6, 6)]


def test_a_batch_that_does_not_fit_names_the_fix():
    class Full(FixedProbabilities):
        def forward(self, **_):
            raise torch.OutOfMemoryError

    with pytest.raises(CheckpointError, match=r"3 x 2 tokens at once does not fit on cpu; use a smaller --batch-size"):
        evaluate(
            Full(TABLE), word_tokenizer(list("abc")), "a a b c a b", dataset="hand", seqlen=2, limit=3, batch_size=3
        )


def test_only_the_default_seqlen_shrinks_to_the_model(model, tokenizer, text):
    shrunk = evaluate(model, tokenizer, text, dataset="random")
    assert shrunk.seqlen == shrunk.stride == POSITIONS
    assert shrunk == evaluate(model, tokenizer, text, dataset="random", seqlen=POSITIONS)
    assert evaluate(model, tokenizer, text, dataset="random", stride=6).seqlen == POSITIONS
    with pytest.raises(
        UsageError, match=rf"is {POSITIONS + 1}, but .* {POSITIONS} tokens; use a seqlen of {POSITIONS}"
    ):
        evaluate(model, tokenizer, text, dataset="random", seqlen=POSITIONS + 1)
    with pytest.raises(UsageError, match=f"from 1 to {POSITIONS}"):
        evaluate(model, tokenizer, text, dataset="random", stride=50)


def test_the_shape_of_windows_needs_neither_text_nor_model():
    with pytest.raises(UsageError, match="--limit 1"):
        refusals.check_windows(None, None, limit=0)
    with pytest.raises(UsageError, match="--stride from 1 to 2048"):
        refusals.check_windows(None, 2049)
    refusals.check_windows(None, 2048)
    refusals.check_windows(10**6, 5)


def test_no_cap_where_the_model_names_no_limit():
    report = evaluate(FixedProbabilities(TABLE), word_tokenizer(list("abc")), "a b c " * 10, dataset="hand", seqlen=30)
    assert (report.windows, report.seqlen) == (1, 30)


def test_long_text_warns_of_nothing(model, text, caplog, monkeypatch):
    tokenizer = word_tokenizer(WORDS, bos_token="B")
    tokenizer.model_max_length = 8
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    evaluate(model, tokenizer, text, dataset="random", seqlen=8)
    assert not caplog.records
    tokenizer(text)
    assert "sequence length is longer" in caplog.text


def test_progress_counts_windows(model, tokenizer, text):
    calls = []
    report = evaluate(
        model, tokenizer, text, dataset="random", seqlen=20, progress=lambda *call: calls.append(call[1:])
    )
    assert calls == [(done, report.windows) for done in range(report.windows + 1)]


def test_half_precision_logits_are_scored_in_fp32():
    torch.manual_seed(0)
    logits, targets = torch.randn(50, 1000).bfloat16() * 8, torch.randint(0, 1000, (50,))
    exact = -logits.double().log_softmax(-1)[torch.arange(50), targets]
    losses = token_losses(logits, targets)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=1e-5)


def test_losses_do_not_depend_on_the_chunks(monkeypatch):
    torch.manual_seed(0)
    logits, targets = torch.randn(37, 11), torch.randint(0, 11, (37,))
    whole = token_losses(logits, targets)
    for elements in (1, 11, 100):
        monkeypatch.setattr("macko_llm.perplexity._CHUNK_ELEMENTS", elements)
        assert torch.equal(token_losses(logits, targets), whole)


@given(st.integers(2, 60), st.data())
def test_windows_start_at_each_stride_and_drop_the_tail(count, data):
    seqlen = data.draw(st.integers(2, count))
    stride = data.draw(st.integers(1, seqlen))
    ids = list(range(count))
    expected = [ids[start : start + seqlen] for start in range(0, count, stride) if start + seqlen <= count]
    assert windows(torch.tensor(ids), seqlen, stride).tolist() == expected


def test_short_text_says_what_would_work(model, tokenizer):
    with pytest.raises(CalibrationError, match=r"has 6 tokens.*window of 24.*--seqlen 6 or less"):
        evaluate(model, tokenizer, " ".join(WORDS[:5]), dataset="random")
    evaluate(model, tokenizer, " ".join(WORDS[:5]), dataset="random", seqlen=6)
    with pytest.raises(CalibrationError, match=r"has 1 tokens.*; use a longer text"):
        evaluate(model, tokenizer, "", dataset="random")
    with pytest.raises(CalibrationError, match="has 0 tokens"):
        evaluate(FixedProbabilities(TABLE), word_tokenizer(list("abc")), "", dataset="hand")


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"stride": 9}, "stride 9 .* from 1 to 8"),
        ({"stride": 0}, "stride 0 "),
        ({"stride": -1}, "stride -1 "),
        ({"seqlen": 1}, "--seqlen 2"),
        ({"seqlen": 0}, "--seqlen 2"),
        ({"limit": 0}, "--limit 1"),
        ({"batch_size": 0}, "--batch-size 1"),
        ({"batch_size": -2}, "--batch-size 1"),
    ],
)
def test_wrong_calls(model, tokenizer, text, wrong, sentence):
    with pytest.raises(UsageError, match=sentence):
        evaluate(model, tokenizer, text, **{"dataset": "random", "seqlen": 8, **wrong})


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_not_finite_loss_names_the_fix(poison, batch_size):
    stub = FixedProbabilities(TABLE)
    with torch.no_grad():
        stub.logits[1, 0] = poison
    with pytest.raises(NonFiniteError, match=r"window 2 .*--dtype"):
        evaluate(stub, word_tokenizer(list("abc")), "a a a a b c", dataset="hand", seqlen=3, batch_size=batch_size)


def test_impossible_token_is_an_infinite_loss():
    stub = FixedProbabilities([[1.0, 0.0, 0.0]] * 3)
    with pytest.raises(NonFiniteError, match="window 1 is inf"):
        evaluate(stub, word_tokenizer(list("abc")), "a a b", dataset="hand", seqlen=3)


def test_tokenizer_of_another_model(model):
    with pytest.raises(CheckpointError, match=r"only 31"):
        evaluate(model, word_tokenizer([f"v{i}" for i in range(40)]), " ".join(f"v{i}" for i in range(40)), dataset="x")
