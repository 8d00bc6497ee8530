"""`macko inspect`."""

from macko_llm.cli.console import megabytes, plain_errors, print_json, progress_bars
from macko_llm.cli.options import JsonOption, PackedArgument, TrustOption
from macko_llm.cli.reports import pack_report_json, print_layers
from macko_llm.cli.surroundings import with_hub, with_threads
from macko_llm.recipe import title


@plain_errors
@with_hub
@with_threads
def inspect(packed: PackedArgument, trust_remote_code: TrustOption = False, as_json: JsonOption = False) -> None:
    """Say what is inside a packed checkpoint, and check every invariant of the format.

    Examples:
        macko inspect ./packed
    """
    from macko_llm import checkpoint, refusals

    folder = checkpoint.locate(packed)
    refusals.require_packed(folder)

    from macko_llm import models
    from macko_llm.inspecting import inspect_checkpoint  # takes seconds, which a wrong call need not wait for

    with progress_bars() as progress:
        report = inspect_checkpoint(folder, trust_remote_code=trust_remote_code, progress=progress)
    provenance = checkpoint.read_provenance(folder)
    if as_json:
        print_json({"model": packed, "valid": True, **pack_report_json(report), "provenance": provenance})
        return
    print_layers(report)
    pruned_by = title(provenance.get("prune", {}))
    print(
        f"{len(report.layers) - len(report.kept_dense)} of {len(report.layers)} layers packed as {report.value_dtype}, "
        f"{report.sparsity:.1%} sparsity, pruned by: {pruned_by}; {megabytes(report.bytes_packed)} instead of "
        f"{megabytes(report.bytes_dense)}. Every packed matrix is valid, every other tensor finite, and the files hold the "
        "whole model."
    )
    if not models.has_tokenizer(folder):
        print("There is no tokenizer, which `macko generate` and `macko eval-perplexity` need.")
