"""Pruning the blocks of a model one after another, wherever its weights are."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from macko_llm.progress import Progress
from macko_llm.pruning.allocation import block_sparsities, layer_sparsities, outlier_ratio, overrides
from macko_llm.pruning.methods import Amount, Method, method_maker
from macko_llm.pruning.methods.magnitude import Magnitude
from macko_llm.pruning.methods.norms import InputNorms
from macko_llm.pruning.observing import observed_blocks
from macko_llm.pruning.selection import asked_head
from macko_llm.pruning.weights import Weights
from macko_llm.recipe import UNIFORM, PruneRecipe
from macko_llm.stages import stage


def layer_amounts(
    model: PreTrainedModel,
    layers: dict[str, nn.Linear],
    tokens: Tensor | None,
    recipe: PruneRecipe,
    weights: Weights,
    progress: Progress,
) -> dict[str, Amount]:
    """How much of each layer goes; what a spread over the blocks asks of the dense model takes a pass of its own.

    The lm_head has no part in that: it neither makes up for blocks, nor they for it.

    Args and errors are those of `prune_blocks`.
    """
    head = asked_head(model, recipe)
    own = overrides(layers, recipe, head)
    if head is not None:
        layers = {name: linear for name, linear in layers.items() if name != head.name}
    if recipe.allocation == UNIFORM or recipe.sparsity == 0 or not layers:
        return {**dict.fromkeys(layers, Amount(recipe.sparsity, recipe.group)), **own}
    names, ratios, sizes = [], [], []
    for _, norms in observed_blocks(model, layers, tokens, InputNorms, progress, "measuring blocks", weights):
        if norms:
            seen = [(layers[name].weight, norm.statistic(name)) for name, norm in norms.items()]
            names.append([*norms])
            ratios.append(outlier_ratio(seen))
            sizes.append(sum(weight.numel() for weight, _ in seen))
    wanted = {
        name: share
        for block, share in zip(names, block_sparsities(ratios, sizes, recipe.sparsity), strict=True)
        for name in block
    }
    shares = layer_sparsities(shapes_of(layers), wanted, recipe.sparsity)
    return {**{name: Amount(share) for name, share in shares.items()}, **own}


def prune_blocks(
    model: PreTrainedModel,
    layers: dict[str, nn.Linear],
    tokens: Tensor | None,
    recipe: PruneRecipe,
    amounts: Mapping[str, Amount],
    weights: Weights,
    progress: Progress,
    *,
    finished: int = 0,
) -> Iterator[tuple[str, dict[str, int]]]:
    """The decoder blocks in turn, pruned, while they are still in memory, each with the zeros of its layers; then the lm_head,
    under its own name, if it is one of the layers.

    Statistics are taken on the still dense block; then it is pruned, and run again, so that the next block sees what the
    pruned one computes. Without calibration it is pruned alone.

    Args:
        model: in eval mode.
        layers: qualified name -> linear, one for each weight.
        tokens: int64 [nsamples, seqlen]; None where the recipe needs none.
        recipe: how to prune.
        amounts: how much of each layer goes.
        weights: has the weights of a block in memory.
        progress: called with (what, done, total).
        finished: so many blocks are pruned already, and only run.

    Raises:
        CheckpointError: blocks of an unsupported kind.
        CalibrationError: a linear that no token reaches.
        NonFiniteError: NaN or infinity in weights or activations.
    """
    new: Callable[[int, torch.device], Method] = method_maker(recipe.method, recipe.update)
    if all(amount.sparsity == 0 for amount in amounts.values()):
        tokens, new = None, _Nothing
    head = asked_head(model, recipe)
    blocks = observed_blocks(
        model, layers, tokens, new, progress, "pruning blocks", weights, head=head, finished=finished
    )
    for block, methods in blocks:
        zeros = {}
        with stage("choosing"):
            for name in [*methods]:
                weight = layers[name].weight.data
                method = methods.pop(name)
                if amounts[name].sparsity > 0:
                    weight.copy_(method.prune(name, weight, amounts[name]))
                del method  # frees what has pruned its last weight
                zeros[name] = weight.numel() - int(torch.count_nonzero(weight))
        yield block, zeros


def shapes_of(layers: Mapping[str, nn.Linear]) -> dict[str, tuple[int, int]]:
    """(rows, cols) of each layer."""
    return {name: (linear.weight.shape[0], linear.weight.shape[1]) for name, linear in layers.items()}


class _Nothing(Magnitude):
    """Stands in for a method where nothing is to be pruned."""
