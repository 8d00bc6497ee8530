"""Perplexity of a causal language model on a text, by the rule of the pruning papers.

The text is tokenized once and cut into windows of `seqlen` tokens; the tail that fills no window is dropped. With
stride equal to seqlen this is the evaluation of SparseGPT (arXiv 2301.00774) and Wanda (arXiv 2306.11695), whose code
multiplies each window's mean loss by seqlen and divides by windows * seqlen in the end: the same number.
"""

import inspect
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from macko_llm.defaults import EVALUATION_SEQLEN
from macko_llm.errors import CalibrationError, NonFiniteError, UsageError
from macko_llm.models import check_token_ids, max_positions
from macko_llm.progress import Progress, no_progress

_CHUNK_ELEMENTS = 2**25
"""fp32 logits that exist at once while losses are computed: 128 MiB, 256 tokens of a vocabulary of 128k."""


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
        dtype: of the model's weights, as "float16".
    """

    perplexity: float
    nll: float
    windows: int
    tokens: int
    seqlen: int
    stride: int
    dataset: str
    dtype: str


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
    if seqlen < 2:
        raise UsageError(f"A window of {seqlen} tokens predicts nothing; use --seqlen 2 or more.")
    if not 1 <= stride <= seqlen:
        raise UsageError(
            f"The stride {stride} does not suit windows of {seqlen} tokens; use --stride from 1 to {seqlen}."
        )
    count = len(token_ids)
    if count < seqlen:
        fix = f"use --seqlen {count} or less, or a longer text" if count >= 2 else "use a longer text"
        raise CalibrationError(f"The text has {count} tokens, fewer than one window of {seqlen}; {fix}.")
    return token_ids.unfold(0, seqlen, stride)


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
    seqlen: int = EVALUATION_SEQLEN,
    stride: int | None = None,
    limit: int | None = None,
) -> TextWindows:
    """Make windows of a text, for which a model's weights are not needed.

    Args:
        tokenizer: the model's tokenizer; its special tokens (BOS) are added once, to the whole text.
        text: what to predict.
        config: the model's.
        seqlen: tokens in a window; at most the model's positions are used.
        stride: from one window's start to the next; None is seqlen: no overlap.
        limit: only the first windows.

    Raises:
        UsageError: seqlen, stride or limit outside its range.
        CalibrationError: the text is shorter than one window.
        CheckpointError: a token that the model does not know: the tokenizer belongs to another model.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"A limit of {limit} windows leaves nothing to evaluate; use --limit 1 or more.")
    seqlen = min(seqlen, max_positions(config) or seqlen)
    stride = seqlen if stride is None else stride
    # verbose=False: the text is cut into windows below, so that it is longer than the model reads is no news.
    token_ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    batches = windows(token_ids, seqlen, stride)[:limit]
    check_token_ids(token_ids.tolist(), config, "The text")
    return TextWindows(batches, stride)


def evaluate(
    model: PreTrainedModel, text: TextWindows, *, dataset: str, progress: Progress = no_progress
) -> PerplexityReport:
    """Perplexity of a text under `model`.

    The first window scores all its seqlen - 1 predicted tokens, each later one its last min(stride, seqlen - 1), so
    that with a stride below seqlen no token is scored twice. Losses are fp32, their sum is float64.

    Args:
        model: a causal language model in eval mode, dense or packed.
        text: what to predict.
        dataset: the text's name, for the report.
        progress: called with (what, windows done, windows to do).

    Raises:
        NonFiniteError: a loss is NaN or infinite.
    """
    batches, seqlen, stride = text.batches, text.seqlen, text.stride
    total, scored = 0.0, 0
    what = f"perplexity on {dataset}"
    progress(what, 0, len(batches))
    for done, window in enumerate(batches, start=1):
        predicted = seqlen - 1 if done == 1 else min(stride, seqlen - 1)
        loss = _window_loss(model, window, predicted)
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"The loss of window {done} is {loss}; "
                "use --dtype bfloat16 or float32, or repair the checkpoint if its weights are not finite."
            )
        total += loss
        scored += predicted
        progress(what, done, len(batches))
    nll = total / scored
    return PerplexityReport(
        # A broken model can be worse than a float can say.
        perplexity=math.exp(nll) if nll < 709 else math.inf,
        nll=nll,
        windows=len(batches),
        tokens=scored,
        seqlen=seqlen,
        stride=stride,
        dataset=dataset,
        dtype=str(model.dtype).removeprefix("torch."),
    )


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


@torch.inference_mode()
def _window_loss(model: PreTrainedModel, window: Tensor, predicted: int) -> float:
    """Sum of the losses of the last `predicted` tokens of a [seqlen] window."""
    window = window.to(model.device)
    keep = {"logits_to_keep": predicted + 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits = model(input_ids=window[None], use_cache=False, **keep).logits[0]
    targets = window[-predicted:].to(logits.device)
    return token_losses(logits[-predicted - 1 : -1], targets).sum(dtype=torch.float64).item()
