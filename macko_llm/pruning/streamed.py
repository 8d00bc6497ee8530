"""Pruning a checkpoint of which only one block is in memory, each written when it is done, by a job that can be cut off."""

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from macko_llm.progress import Progress
from macko_llm.pruning.blocks import layer_amounts, prune_blocks, shapes_of
from macko_llm.pruning.journal import JOURNAL_FILE, Job, Journal, read_journal
from macko_llm.pruning.methods import Amount
from macko_llm.pruning.report import PruneReport, make_report
from macko_llm.pruning.selection import chosen_linears
from macko_llm.pruning.sinks import Sink, SinkMaker
from macko_llm.pruning.weights import Homes, StreamedWeights
from macko_llm.recipe import UNIFORM, PruneRecipe
from macko_llm.streaming import TensorReader


@torch.no_grad()
def prune_streamed(
    model: PreTrainedModel,
    homes: Homes,
    tokens: Tensor | None,
    recipe: PruneRecipe,
    job: Job,
    folder: Path,
    *,
    device: torch.device,
    place: str,
    new_sink: SinkMaker,
    progress: Progress,
) -> tuple[PruneReport, Sink]:
    """Prune a model block by block into the files of a folder, or go on where a job in that folder was cut off.

    Args:
        model: from `models.load_empty`.
        homes: of all that it lacks.
        tokens: int64 [nsamples, seqlen]; None where the recipe needs none.
        recipe: how to prune.
        job: what decides the result.
        folder: for the files, and for the journal of what is done.
        device: where to compute.
        place: of the hidden states.
        new_sink: makes what writes the files.
        progress: called with (what, done, total).

    Returns:
        The report, and the sink that wants to be finished. The journal stays until `forget` is called.

    Raises:
        UsageError: the job in the folder is another one.
        CheckpointError, CalibrationError, NonFiniteError: as `prune_blocks`.
    """
    journal = read_journal(folder, job) or Journal(job)
    sink = new_sink(folder, journal.sink)
    started = time.perf_counter() - journal.seconds
    layers = chosen_linears(model, recipe)
    zeros = dict(journal.zeros)
    pruned = [key for block in [*homes.blocks][: journal.blocks] for key in homes.blocks[block]]

    def load(key: str, target: Tensor, reader: TensorReader) -> bool:
        if key not in pruned:
            return False
        sink.load(key, target, reader)
        return True

    def note(blocks: int) -> None:
        Journal(job, shares, blocks, zeros, sink.state(), time.perf_counter() - started).write(folder)

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
        for key, gap in homes.in_front.items() if done == 0 else ():
            sink.add(key, weights.read(gap))
        blocks = prune_blocks(model, layers, tokens, recipe, amounts, weights, progress, finished=done)
        for block, of_block in blocks:
            for key, gap in homes.blocks[block].items():
                sink.add(key, gap.tensor)
            zeros.update(of_block)
            done += 1
            note(done)
        rest = {key: gap for key, gap in homes.outside.items() if key not in sink}
        for key, gap in rest.items():
            sink.add(key, weights.read(gap))
        if rest:
            note(done)
    return make_report(recipe, tokens, shapes_of(layers), zeros, time.perf_counter() - started), sink


def forget(folder: Path) -> None:
    """Remove the journal of a job that is finished."""
    (folder / JOURNAL_FILE).unlink(missing_ok=True)
