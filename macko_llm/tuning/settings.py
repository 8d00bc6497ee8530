"""What a tuning run is made of: every setting with its default, in one place."""

import math
from dataclasses import dataclass, fields
from typing import Any

from macko_llm.errors import UsageError

_AT_LEAST = {
    "steps": 1,
    "batch_size": 1,
    "accumulation": 1,
    "seqlen": 2,
    "learning_rate": 0,
    "weight_decay": 0,
    "warmup": 0,
}
RATE_OF_WIDTH = 0.2
"""The usual learning rate times the model's width: 1.6e-3 for a width of 128, 4.9e-5 for 4096.

A step of Adam changes the output of a row by what it changes of every weight of the row together, so that the rate which suits
falls as rows get longer (Yang et al., 2022, arXiv 2203.03466)."""


@dataclass(frozen=True)
class TuneRecipe:
    """The settings of one tuning run.

    Attributes:
        dataset: the text to learn from: "c4", "wikitext2", a dataset of the hub, or a path; see `macko_llm.calibration`.
        split: of a dataset; None means "train".
        text_column: of a dataset, or the field of .json, .jsonl and .parquet files; None means "text".
        steps: updates of the weights.
        batch_size: sequences that go through the model at once.
        accumulation: batches that make up an update.
        seqlen: tokens in a sequence; None means 2048, or the model's longest context where that is shorter.
        learning_rate: of AdamW at its highest, from where it falls to zero along half a cosine; None means RATE_OF_WIDTH
            divided by the model's width.
        warmup: share of the steps, in [0, 1), over which the learning rate rises to that.
        weight_decay: of AdamW.
        seed: of the draw of the sequences.
        dtype: "auto" (the checkpoint's), "float16", "bfloat16" or "float32", in which the result is saved; weights are
            trained in float32.

    Raises:
        UsageError: a value that makes no sense.
    """

    dataset: str = "c4"
    split: str | None = None
    text_column: str | None = None
    steps: int = 200
    batch_size: int = 8
    accumulation: int = 1
    seqlen: int | None = None
    learning_rate: float | None = None
    warmup: float = 0.05
    weight_decay: float = 0.0
    seed: int = 0
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise UsageError(f"{name} is {value}; use {least} or more.")
        if self.learning_rate == 0:
            raise UsageError("learning_rate is 0, with which nothing is learned; use for example 1e-4.")
        if self.warmup >= 1:
            raise UsageError(
                f"warmup is {self.warmup:g}, but it is a share of the steps in [0, 1); use for example 0.05."
            )
        for name in ("dataset", "split", "text_column"):
            if getattr(self, name) == "":
                raise UsageError(f"{name} is empty; name one, or leave it out for the usual one.")

    def settings(self) -> dict[str, Any]:
        """The settings that say something, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}
