"""`macko eval-perplexity`."""

import functools
from dataclasses import asdict
from typing import Annotated

import typer

from macko_llm.cli.console import plain_errors, print_json, progress_bars
from macko_llm.cli.options import (
    DeviceOption,
    DtypeOption,
    EvaluationTextOption,
    JsonOption,
    LimitOption,
    ModelArgument,
    StrideOption,
    TestSplitOption,
    TextColumnOption,
    TrustOption,
)
from macko_llm.cli.surroundings import with_hub, with_threads
from macko_llm.defaults import EVALUATION_DATASET, EVALUATION_SEQLEN


@plain_errors
@with_hub
@with_threads
def eval_perplexity(
    model: ModelArgument,
    dataset: EvaluationTextOption = EVALUATION_DATASET,
    split: TestSplitOption = None,
    text_column: TextColumnOption = None,
    seqlen: Annotated[
        int | None,
        typer.Option(help=f"Tokens in a window. [default: {EVALUATION_SEQLEN}, or the longest context]"),
    ] = None,
    stride: StrideOption = None,
    limit: LimitOption = None,
    batch_size: Annotated[
        int,
        typer.Option(
            help="Windows evaluated together; their logits take batch size x seqlen x vocabulary values of memory at once."
        ),
    ] = 1,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="DENSE",
            help="The model that MODEL was made from; adds its perplexity, the mean divergence KL(DENSE || MODEL), and how "
            "often both find the same token the most probable. Both are in memory at once.",
        ),
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure how well a model predicts a text; lower is better.

    Examples:
        macko eval-perplexity ./packed

        macko eval-perplexity ./packed --dataset held-out.txt --seqlen 512

        macko eval-perplexity ./packed --dataset c4

        macko eval-perplexity ./packed --reference ./dense

        macko eval-perplexity ./packed --dataset Salesforce/wikitext:wikitext-103-raw-v1 --split validation
    """
    from macko_llm import calibration, refusals

    # What is wrong for every model and every text is refused before any is fetched, and before imports that take seconds.
    refusals.check_windows(seqlen, stride, limit)
    refusals.check_batch_size(batch_size)
    calibration.check_source(dataset, split, text_column)
    refusals.check_dtype(dtype)
    refusals.check_device(device)
    folder = refusals.find_model(model)
    reference_folder = None if reference is None else refusals.find_model(reference)

    from macko_llm import models, perplexity
    from macko_llm.loading import load

    with progress_bars() as progress:
        config = models.load_config(folder, trust_remote_code=trust_remote_code)
        seqlen, stride = perplexity.window_shape(config, seqlen=seqlen, stride=stride, limit=limit)
        tokenizer = models.load_tokenizer(folder, trust_remote_code=trust_remote_code)
        if reference_folder is not None:
            other = models.load_config(reference_folder, trust_remote_code=trust_remote_code)
            models.check_seqlen(seqlen, other)
            other_tokenizer = models.load_tokenizer(reference_folder, trust_remote_code=trust_remote_code)
            perplexity.check_reference(tokenizer, config, other_tokenizer, other)
        text = calibration.evaluation_text(dataset, split, text_column)
        cut = calibration.evaluation_windows(dataset)
        windows = perplexity.cut_text(tokenizer, text, config, seqlen=seqlen, stride=stride, limit=limit, cut=cut)
        load_as = functools.partial(load, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        loaded = load_as(folder)
        dense = None if reference_folder is None else load_as(reference_folder)
        report = perplexity.evaluate(
            loaded,
            windows,
            dataset=dataset,
            split=calibration.used_split(dataset, "test", split),
            reference=dense,
            batch_size=batch_size,
            progress=progress,
        )
    if as_json:
        print_json(asdict(report))
    else:
        part = f", {report.split} split" if report.split else ""
        print(
            f"perplexity {report.perplexity:.4f}  (dataset {report.dataset}{part}, seqlen {report.seqlen}, "
            f"stride {report.stride}, {report.windows} windows, {report.tokens} tokens, dtype {report.dtype})"
        )
        if report.reference is not None:
            print(
                f"reference perplexity {report.reference.perplexity:.4f}, "
                f"KL(reference || model) {report.reference.kl_divergence:.6f} nats a token, "
                f"the same most probable token for {report.reference.top_agreement:.2%}"
            )
