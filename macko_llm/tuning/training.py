"""The training loop: AdamW through accelerate, on the weights that pruning kept."""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import PretrainedConfig, PreTrainedModel

from macko_llm import models
from macko_llm.errors import NonFiniteError, UsageError
from macko_llm.progress import Progress, no_progress
from macko_llm.tuning.masking import KeptZeros
from macko_llm.tuning.settings import RATE_OF_WIDTH, TuneRecipe

MAX_GRADIENT_NORM = 1.0
"""Longer gradients are shortened to this."""


@dataclass(frozen=True)
class TuneReport:
    """What tuning did.

    Attributes:
        layers: qualified name of each linear that was tuned -> its share of zeros afterwards.
        sparsity_before: share of zeros over all of them before.
        sparsity: the same afterwards; greater where a weight that was kept became zero or was rounded to it.
        loss_before: mean loss in nats of the tokens of the first step, before it.
        loss_after: of the same tokens, after the last step.
        steps: updates.
        tokens: tokens that went through the model in them.
        seconds: wall-clock time of the training, without loading and saving.
    """

    layers: dict[str, float]
    sparsity_before: float
    sparsity: float
    loss_before: float
    loss_after: float
    steps: int
    tokens: int
    seconds: float


def tune_model(
    model: PreTrainedModel, tokens: Tensor, recipe: TuneRecipe, progress: Progress = no_progress
) -> TuneReport:
    """Train the linears inside the decoder blocks of a pruned model, in place; what is zero in them stays zero.

    Embeddings, norms, biases and the lm_head stay as they are. The model is in eval mode all the time: without dropout a CPU
    makes the same weights of the same call.

    Args:
        model: on one device, in any floating dtype; it is trained in float32, and has its dtype again at the end.
        tokens: int64 [sequences, seqlen] from the model's vocabulary, taken in turn, and again from the first where the steps
            take more.
        recipe: the settings of the text and `dtype` are not looked at: the tokens and the model decide.
        progress: called with (what, steps done, steps).

    Raises:
        UsageError: the linears hold no zeros, or sequences longer than the model takes.
        CheckpointError: blocks of an unsupported kind, or token ids outside the vocabulary.
        NonFiniteError: NaN or infinity in weights, or in a loss.
    """
    started = time.perf_counter()
    layers = pruned_linears(model)
    models.check_seqlen(tokens.shape[1], model.config)
    models.check_token_ids([int(tokens.min()), int(tokens.max())], model.config, "The text")
    weights = [cast(nn.Parameter, linear.weight) for linear in layers.values()]
    sparsity = _share_of_zeros(weights)
    first = next(_batches(tokens, recipe.batch_size * recipe.accumulation))
    with _trainable(model, weights), KeptZeros(weights) as zeros:
        before = _mean_loss(model, first, recipe.batch_size)
        if not math.isfinite(before):
            raise NonFiniteError(
                f"The loss of the model is {before} before the first step; use an undamaged checkpoint."
            )
        _train(model, weights, zeros, tokens, recipe, progress)
        after = _mean_loss(model, first, recipe.batch_size)
    if not math.isfinite(after):
        raise _diverged(f"The loss after the last step is {after}")
    for name, weight in zip(layers, weights, strict=True):
        if not weight.isfinite().all():
            raise _diverged(f"The tuned weights of {name} overflow {str(weight.dtype).removeprefix('torch.')}")
    return TuneReport(
        layers={name: _share_of_zeros([weight]) for name, weight in zip(layers, weights, strict=True)},
        sparsity_before=sparsity,
        sparsity=_share_of_zeros(weights),
        loss_before=before,
        loss_after=after,
        steps=recipe.steps,
        tokens=recipe.steps * first.numel(),
        seconds=time.perf_counter() - started,
    )


def pruned_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linears inside the decoder blocks of a pruned model, qualified name -> module, one for each weight.

    Raises:
        UsageError: none of their weights is zero.
        CheckpointError: blocks of an unsupported kind.
        NonFiniteError: NaN or infinity in a weight.
    """
    distinct: dict[int, tuple[str, nn.Linear]] = {}
    for name, linear in models.prunable_linears(model).items():
        distinct.setdefault(id(linear.weight), (name, linear))
        if not linear.weight.isfinite().all():
            raise NonFiniteError(f"The weights of {name} hold NaN or infinity; use an undamaged checkpoint.")
    if all(linear.weight.all() for _, linear in distinct.values()):
        raise UsageError("The model has no zeros to keep; prune it first with `macko prune`.")
    return dict(distinct.values())


def usual_rate(config: PretrainedConfig) -> float:
    """The learning rate where a recipe names none."""
    return RATE_OF_WIDTH / float(config.get_text_config().hidden_size)


def rate_at(step: int, steps: int, warmup: float) -> float:
    """The share of the highest learning rate that a step takes: up along a line, down along half a cosine.

    Args:
        step: from 0 to steps - 1.
        steps: in all.
        warmup: share of them in which it rises, in [0, 1).
    """
    rise = int(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    return (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2


def _train(
    model: PreTrainedModel,
    weights: list[nn.Parameter],
    zeros: KeptZeros,
    tokens: Tensor,
    recipe: TuneRecipe,
    progress: Progress,
) -> None:
    # The model stays on its device and in float32, whatever accelerate was configured to do here.
    accelerator = Accelerator(
        device_placement=False, mixed_precision="no", gradient_accumulation_steps=recipe.accumulation
    )
    highest = recipe.learning_rate or usual_rate(model.config)
    adamw = AdamW(weights, lr=highest, weight_decay=recipe.weight_decay)
    schedule = LambdaLR(adamw, lambda step: rate_at(step, recipe.steps, recipe.warmup))
    model, optimizer, scheduler = accelerator.prepare(model, adamw, schedule)
    batches = _batches(tokens, recipe.batch_size)
    for step in range(recipe.steps):
        progress("tuning", step, recipe.steps)
        for _ in range(recipe.accumulation):
            with accelerator.accumulate(model):
                loss = _loss(model, next(batches))
                if not loss.isfinite():
                    raise _diverged(f"The loss of step {step + 1} is {loss.item()}")
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(weights, MAX_GRADIENT_NORM)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        zeros.restore()
    progress("tuning", recipe.steps, recipe.steps)


@contextmanager
def _trainable(model: PreTrainedModel, weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """The model in float32 with gradients for some weights alone; at the end it is as it was, but for what these learned."""
    parameters = [(parameter, parameter.dtype, parameter.requires_grad) for parameter in model.parameters()]
    training = model.training
    model.eval().requires_grad_(False)
    for parameter, _, _ in parameters:
        parameter.grad = None
        parameter.data = parameter.data.float()
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        model.train(training)
        for parameter, dtype, required in parameters:
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(required)
        for weight in weights:
            weight.data.masked_fill_(weight == 0, 0)  # what is rounded to zero may be -0


def _batches(tokens: Tensor, size: int) -> Iterator[Tensor]:
    """[size, seqlen] after [size, seqlen], from the first sequence again after the last one."""
    start = 0
    while True:
        yield tokens[torch.arange(start, start + size) % len(tokens)]
        start += size


def _loss(model: PreTrainedModel, batch: Tensor) -> Tensor:
    batch = batch.to(model.device)
    loss: Tensor = model(input_ids=batch, labels=batch, use_cache=False).loss
    return loss


@torch.no_grad()
def _mean_loss(model: PreTrainedModel, sequences: Tensor, batch_size: int) -> float:
    losses = [_loss(model, batch).double() for batch in sequences.split(batch_size)]
    return float(torch.stack(losses).mean())


def _share_of_zeros(weights: list[nn.Parameter]) -> float:
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def _diverged(what: str) -> NonFiniteError:
    return NonFiniteError(f"{what}; use a lower learning rate.")
