"""Pruning a checkpoint of which only one block is in memory, each written when it is done, by a job that can be cut off."""

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from macko_llm.progress import Progress
from macko_llm.pruning.blocks import layer_amounts, prune_blocks, shapes_of
from macko_llm.pruning.hidden_states import STATES_FILE
from macko_llm.pruning.journal import NEW_JOURNAL_FILE, Journal, damaged
from macko_llm.pruning.methods import Amount
from macko_llm.pruning.report import PruneReport, make_report
from macko_llm.pruning.selection import asked_head, chosen_linears
from macko_llm.pruning.sinks import Sink
from macko_llm.pruning.weights import Homes, StreamedWeights
from macko_llm.recipe import UNIFORM, PruneRecipe
from macko_llm.streaming import TensorReader


@torch.no_grad()
def prune_streamed(
    model: PreTrainedModel,
    homes: Homes,
    tokens: Tensor | None,
    recipe: PruneRecipe,
    journal: Journal,
    sink: Sink,
    folder: Path,
    *,
    device: torch.device,
    place: str,
    progress: Progress,
) -> PruneReport:
    """Prune a model block by block into the files of a folder, or go on where a job in that folder was cut off.

    Args:
        model: from `models.load_empty`.
        homes: of all that it lacks.
        tokens: int64 [nsamples, seqlen]; None where the recipe needs none.
        recipe: how to prune.
        journal: of what is done, and of a job that has not begun.
        sink: writes the files, from the journal's state on; it wants to be finished afterwards.
        folder: for the files, and for the journal, which stays there.
        device: where to compute.
        place: of the hidden states.
        progress: called with (what, done, total).

    Raises:
        CheckpointError: as `prune_blocks`, or the journal does not fit the model.
        CalibrationError, NonFiniteError: as `prune_blocks`.
    """
    started = time.perf_counter() - journal.seconds
    layers = chosen_linears(model, recipe)
    zeros = dict(journal.zeros)
    head = asked_head(model, recipe)
    units = [*homes.blocks, *([head.name] if head else [])]
    finished = units[: journal.blocks]
    pruned = [key for block in finished if block in homes.blocks for key in homes.blocks[block]]
    if (
        any(key not in sink for key in pruned)
        or zeros.keys() != {name for name in layers if f"{name}.".startswith(tuple(f"{unit}." for unit in finished))}
        or (journal.amounts is not None and journal.amounts.keys() != layers.keys())
    ):
        raise damaged(folder)

    def load(key: str, target: Tensor, reader: TensorReader) -> bool:
        if key not in pruned:
            return False
        sink.load(key, target, reader)
        return True

    def note(blocks: int) -> None:
        Journal(journal.job, shares, blocks, zeros, sink.state(), time.perf_counter() - started).write(folder)

    with StreamedWeights(model, homes, device, place, folder, load) as weights:
        shares: Mapping[str, float] | None = journal.amounts
        if shares is not None:
            amounts = {name: Amount(share) for name, share in shares.items()}
        else:
            amounts = layer_amounts(model, layers, tokens, recipe, weights, progress)
            if recipe.allocation != UNIFORM:
                shares = {name: amount.sparsity for name, amount in amounts.items()}
                note(0)
        done = journal.blocks
        for key, gap in homes.before.items() if done == 0 else ():
            sink.add(key, weights.read(gap))

        def add_rest() -> bool:
            rest = {key: gap for key, gap in homes.outside.items() if key not in sink}
            for key, gap in rest.items():
                sink.add(key, weights.read(gap))
            return bool(rest)

        blocks = prune_blocks(model, layers, tokens, recipe, amounts, weights, progress, finished=done)
        # Where all are pruned, the sink may have been cut off while it finished, and has nothing to load any more.
        for block, of_block in blocks if done < len(units) else ():
            if block in homes.blocks:
                for key, gap in homes.blocks[block].items():
                    sink.add(key, gap.tensor)
            else:  # the lm_head: most models' files have it before the blocks, so it goes to its place dense, and again pruned
                add_rest()
                key = f"{block}.weight"
                sink.replace(key, homes.heads[key].tensor)
            zeros.update(of_block)
            done += 1
            note(done)
        if add_rest():
            note(done)
    for file in (STATES_FILE, NEW_JOURNAL_FILE):  # of a process that was killed before it could remove them
        (folder / file).unlink(missing_ok=True)
    return make_report(recipe, tokens, shapes_of(layers), zeros, time.perf_counter() - started)
