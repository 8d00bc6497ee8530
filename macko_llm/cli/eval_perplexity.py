"""`macko eval-perplexity`."""

from dataclasses import asdict
from typing import Annotated

import typer

from macko_llm.cli.console import plain_errors, print_json, progress_bars
from macko_llm.cli.options import DeviceOption, DtypeOption, JsonOption, ModelArgument, TrustOption
from macko_llm.defaults import EVALUATION_SEQLEN


@plain_errors
def eval_perplexity(
    model: ModelArgument,
    dataset: Annotated[
        str, typer.Option(help="wikitext2, c4, or a path: .txt, .jsonl (field text), .parquet, or a folder of them.")
    ] = "wikitext2",
    seqlen: Annotated[
        int, typer.Option(help="Tokens in a window; at most the model's longest context.")
    ] = EVALUATION_SEQLEN,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from one window to the next. [default: seqlen, no overlap]")
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="WINDOWS", help="Use at most this many windows.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure how well a model predicts a text; lower is better.

    Examples:
        macko eval-perplexity ./packed

        macko eval-perplexity ./packed --dataset held-out.txt --seqlen 512
    """
    from macko_llm import calibration, checkpoint, models, perplexity
    from macko_llm.loading import load

    folder = checkpoint.locate(model)
    with progress_bars() as progress:
        text = calibration.evaluation_text(dataset)
        tokenizer = models.load_tokenizer(folder, trust_remote_code=trust_remote_code)
        config = models.load_config(folder, trust_remote_code=trust_remote_code)
        windows = perplexity.cut_text(tokenizer, text, config, seqlen=seqlen, stride=stride, limit=limit)
        loaded = load(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        report = perplexity.evaluate(loaded, windows, dataset=dataset, progress=progress)
    if as_json:
        print_json(asdict(report))
    else:
        print(
            f"perplexity {report.perplexity:.4f}  (dataset {report.dataset}, test split, seqlen {report.seqlen}, "
            f"stride {report.stride}, {report.windows} windows, {report.tokens} tokens, dtype {report.dtype})"
        )
