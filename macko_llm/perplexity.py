"""Perplexity of a causal language model on a text, by the rule of the pruning papers.

The text is tokenized once and cut into windows of `seqlen` tokens; the tail that fills no window is dropped. With
stride equal to seqlen this is the evaluation of SparseGPT (arXiv 2301.00774) and Wanda (arXiv 2306.11695), whose code
multiplies each window's mean loss by seqlen and divides by windows * seqlen in the end: the same number.
"""

import inspect
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from macko_llm.defaults import EVALUATION_SEQLEN
from macko_llm.dtypes import dtype_name
from macko_llm.errors import CalibrationError, CheckpointError, NonFiniteError, UsageError
from macko_llm.models import check_seqlen, check_token_ids, max_positions
from macko_llm.progress import Progress, no_progress
from macko_llm.refusals import check_batch_size, check_windows

_CHUNK_ELEMENTS = 2**25
"""fp32 logits that exist at once while losses are computed: 128 MiB, 256 tokens of a vocabulary of 128k."""


@dataclass(frozen=True)
class ReferenceReport:
    """How a model compares with the one that it was made from, over the same tokens.

    Attributes:
        perplexity: of the reference, exp(nll).
        nll: of the reference, as for the model.
        kl_divergence: mean of KL(reference || model) over the scored tokens, in nats; 0 where they predict alike.
        top_agreement: share of the scored tokens for which both find the same token the most probable.
        dtype: of the reference's weights, as "float16".
    """

    perplexity: float
    nll: float
    kl_divergence: float
    top_agreement: float
    dtype: str


@dataclass(frozen=True)
class PerplexityReport:
    """A perplexity and all that it depends on.

    Attributes:
        perplexity: exp(nll).
        nll: mean negative log-likelihood of the scored tokens, in nats.
        windows: windows evaluated.
        tokens: tokens scored; windows * (seqlen - 1) where stride is seqlen.
        seqlen: tokens in a window.
        stride: tokens from one window's start to the next.
        dataset: the text's name.
        split: of the dataset, None for a text that has none.
        dtype: of the model's weights, as "float16".
        reference: what a comparison with another model gave, None where there was none.
    """

    perplexity: float
    nll: float
    windows: int
    tokens: int
    seqlen: int
    stride: int
    dataset: str
    split: str | None
    dtype: str
    reference: ReferenceReport | None = None


def windows(token_ids: Tensor, seqlen: int, stride: int) -> Tensor:
    """Cut a text into windows that start at 0, stride, 2 * stride, ... and drop the tail that fills none.

    Args:
        token_ids: [n] int64.
        seqlen: tokens in a window, at least 2: the first has nothing to be predicted from.
        stride: tokens from one start to the next, in [1, seqlen].

    Returns:
        [windows, seqlen] int64, a view of `token_ids`.

    Raises:
        UsageError: seqlen or stride outside its range.
        CalibrationError: the text is shorter than one window.
    """
    check_windows(seqlen, stride)
    count = len(token_ids)
    if count < seqlen:
        fix = f"use --seqlen {count} or less, or a longer text" if count >= 2 else "use a longer text"
        raise CalibrationError(f"The text has {count} tokens, fewer than one window of {seqlen}; {fix}.")
    return token_ids.unfold(0, seqlen, stride)


def window_shape(
    config: PretrainedConfig, *, seqlen: int | None = None, stride: int | None = None, limit: int | None = None
) -> tuple[int, int]:
    """The seqlen and stride of `cut_text` with these settings, for which no text is needed.

    Args:
        config: the model's.
        seqlen: tokens in a window; None means 2048, or the model's longest context where that is shorter.
        stride: from one window's start to the next; None is seqlen: no overlap.
        limit: only the first windows.

    Raises:
        UsageError: a setting outside its range, or a seqlen above the model's longest context.
    """
    check_windows(seqlen, stride, limit)
    if seqlen is None:
        seqlen = min(EVALUATION_SEQLEN, max_positions(config) or EVALUATION_SEQLEN)
    stride = seqlen if stride is None else stride
    check_windows(seqlen, stride)
    check_seqlen(seqlen, config)
    return seqlen, stride


@dataclass(frozen=True)
class TextWindows:
    """A text as it will be scored.

    Attributes:
        batches: [windows, seqlen] int64.
        stride: tokens from one window's start to the next.
    """

    batches: Tensor
    stride: int

    @property
    def seqlen(self) -> int:
        """Tokens in a window."""
        return self.batches.shape[1]


def cut_text(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    config: PretrainedConfig,
    *,
    seqlen: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    cut: int | None = None,
) -> TextWindows:
    """Make windows of a text, for which a model's weights are not needed.

    Args:
        tokenizer: the model's tokenizer; its special tokens (BOS) are added once, to the whole text.
        text: what to predict.
        config: the model's.
        seqlen: tokens in a window; None means 2048, or the model's longest context where that is shorter.
        stride: from one window's start to the next; None is seqlen: no overlap.
        limit: only the first windows.
        cut: use only the first cut * seqlen tokens of the text, as some published rules do.

    Raises:
        UsageError: seqlen, stride or limit outside its range, or a seqlen above the model's longest context.
        CalibrationError: the text is shorter than one window.
        CheckpointError: a token that the model does not know: the tokenizer belongs to another model.
    """
    seqlen, stride = window_shape(config, seqlen=seqlen, stride=stride, limit=limit)
    # verbose=False: the text is cut into windows below, so that it is longer than the model reads is no news.
    token_ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    batches = windows(token_ids if cut is None else token_ids[: cut * seqlen], seqlen, stride)[:limit]
    check_token_ids(token_ids.tolist(), config, "The text")
    return TextWindows(batches, stride)


def check_reference(
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    reference_tokenizer: PreTrainedTokenizerBase,
    reference_config: PretrainedConfig,
) -> None:
    """Refuse a reference whose predictions are not about the same tokens as the model's.

    Raises:
        UsageError: another vocabulary, or logits for another number of tokens.
    """
    sizes = [some.get_text_config().vocab_size for some in (config, reference_config)]
    if sizes[0] != sizes[1] or tokenizer.get_vocab() != reference_tokenizer.get_vocab():
        raise UsageError(
            "The reference has another vocabulary; give --reference the model that this one was made from."
        )


def evaluate(
    model: PreTrainedModel,
    text: TextWindows,
    *,
    dataset: str,
    split: str | None = None,
    reference: PreTrainedModel | None = None,
    batch_size: int = 1,
    progress: Progress = no_progress,
) -> PerplexityReport:
    """Perplexity of a text under `model`.

    The first window scores all its seqlen - 1 predicted tokens, each later one its last min(stride, seqlen - 1), so
    that with a stride below seqlen no token is scored twice. Losses are fp32, their sum and all divergences are float64.

    Args:
        model: a causal language model in eval mode, dense or packed.
        text: what to predict.
        dataset: the text's name, for the report.
        split: of the dataset, for the report.
        reference: another model, with the same vocabulary, to compare the predictions with.
        batch_size: windows evaluated together. Each model makes logits of [batch_size, seqlen, vocabulary] at once; the result
            is the same but for rounding.
        progress: called with (what, windows done, windows to do).

    Raises:
        UsageError: batch_size is below 1.
        CheckpointError: the windows of a batch do not fit the device's memory.
        NonFiniteError: a loss is NaN or infinite.
    """
    check_batch_size(batch_size)
    totals, scored, done = _Sums(), 0, 0
    what = f"perplexity on {dataset}"
    progress(what, 0, len(text.batches))
    for batch, predicted in _together(text, batch_size):
        try:
            sums = _window_sums(model, reference, batch, predicted)
        except torch.OutOfMemoryError as error:
            raise CheckpointError(
                f"Evaluating {len(batch)} x {text.seqlen} tokens at once does not fit on {model.device}; "
                "use a smaller --batch-size or --seqlen, or --device cpu."
            ) from error
        for window in sums:
            done += 1
            for whose, loss in (("", window.loss), (" under the reference", window.reference_loss)):
                if not math.isfinite(loss):
                    raise NonFiniteError(
                        f"The loss of window {done}{whose} is {loss}; "
                        "use --dtype bfloat16 or float32, or repair the checkpoint if its weights are not finite."
                    )
            totals = _Sums(*map(operator.add, totals, window))
            scored += predicted
        progress(what, done, len(text.batches))
    nll, reference_nll, divergence, agreement = (total / scored for total in totals)
    return PerplexityReport(
        perplexity=_exp(nll),
        nll=nll,
        windows=done,
        tokens=scored,
        seqlen=text.seqlen,
        stride=text.stride,
        dataset=dataset,
        split=split,
        dtype=dtype_name(model.dtype),
        reference=None
        if reference is None
        else ReferenceReport(_exp(reference_nll), reference_nll, divergence, agreement, dtype_name(reference.dtype)),
    )


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 709 else math.inf  # a broken model can be worse than a float can say


def _together(text: TextWindows, batch_size: int) -> Iterator[tuple[Tensor, int]]:
    """The windows in order, [at most batch_size, seqlen], with the number of tokens that each of a batch scores.

    With overlap the first window goes alone: the others need logits for fewer tokens.
    """
    predicted = min(text.stride, text.seqlen - 1)
    alone = 1 if predicted < text.seqlen - 1 else 0
    for window in text.batches[:alone]:
        yield window[None], text.seqlen - 1
    for start in range(alone, len(text.batches), batch_size):
        yield text.batches[start : start + batch_size], predicted


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihoods in nats, [n] fp32, a chunk of tokens at a time.

    Args:
        logits: [n, vocabulary], any floating-point dtype.
        targets: [n] int64 on the same device.
    """
    chunk = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    parts = [
        F.cross_entropy(some.float(), wanted, reduction="none")
        for some, wanted in zip(logits.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.cat(parts)


def divergences(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || model) of each token's prediction in nats, [n] float64, a chunk of tokens at a time.

    Args:
        reference: [n, vocabulary] logits, any floating-point dtype.
        logits: the model's, [n, vocabulary] on the same device.
    """
    chunk = max(1, _CHUNK_ELEMENTS // 2 // logits.shape[-1])
    parts = []
    for of_reference, of_model in zip(reference.split(chunk), logits.split(chunk), strict=True):
        # In float64: between models that hardly differ, fp32 would leave what it rounds, of either sign.
        expected = of_reference.double().log_softmax(-1)
        weight = expected.exp()
        terms = weight * (expected - of_model.double().log_softmax(-1))
        parts.append(terms.masked_fill_(weight == 0, 0).sum(-1))  # 0 log 0 is 0
    return torch.cat(parts)


class _Sums(NamedTuple):
    """Over the scored tokens of a window; all but the first are 0 where there is no reference."""

    loss: float = 0.0
    reference_loss: float = 0.0
    divergence: float = 0.0
    agreements: float = 0.0


@torch.inference_mode()
def _window_sums(
    model: PreTrainedModel, reference: PreTrainedModel | None, windows: Tensor, predicted: int
) -> list[_Sums]:
    """Sums over the last `predicted` tokens of each of [n, seqlen] windows."""
    logits = _scored_logits(model, windows, predicted)
    others = None if reference is None else _scored_logits(reference, windows, predicted).to(logits.device)
    targets = windows[:, -predicted:].to(logits.device)
    # Window by window: to join their positions in one dimension would copy the logits.
    rows = []
    for index, (mine, wanted) in enumerate(zip(logits, targets, strict=True)):
        parts = [token_losses(mine, wanted)]
        if others is not None:
            theirs = others[index]
            parts += [token_losses(theirs, wanted), divergences(theirs, mine), mine.argmax(-1) == theirs.argmax(-1)]
        rows.append(torch.stack([part.sum(dtype=torch.float64) for part in parts]))
    return [_Sums(*row) for row in torch.stack(rows).tolist()]


def _scored_logits(model: PreTrainedModel, windows: Tensor, predicted: int) -> Tensor:
    """What a model predicts the last `predicted` tokens of [n, seqlen] windows from, [n, predicted, vocabulary]."""
    keep = {"logits_to_keep": predicted + 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits = model(input_ids=windows.to(model.device), use_cache=False, **keep).logits
    return logits[:, -predicted - 1 : -1]
