"""The main job on the bundled model: prune, pack, evaluate, generate."""

import lzma
from dataclasses import dataclass
from pathlib import Path

from macko_llm import generation, models, outputs
from macko_llm.benchmarks.quality import QualityReport, measure_chain
from macko_llm.defaults import BENCHMARK_PROMPT
from macko_llm.loading import load
from macko_llm.progress import Progress, no_progress
from macko_llm.recipe import PruneRecipe
from macko_llm.text import encode_prompt

FOLDER = Path(__file__).parent
MODEL_FOLDER = FOLDER / "model"
SPARSITY = 0.5
NSAMPLES = 32
SEQLEN = 512


@dataclass(frozen=True)
class Texts:
    """Files of generated stories."""

    calibration: Path
    held_out: Path


@dataclass(frozen=True)
class DemoResult:
    """What the demo shows."""

    report: QualityReport
    prompt: str
    story: str


def bundled_text(name: str) -> bytes:
    """A text of the two that lie compressed beside the model."""
    return lzma.decompress((FOLDER / f"{name}.xz").read_bytes())


def write_texts(folder: Path) -> Texts:
    """Write stories to calibrate on, and others to evaluate on, into `folder`.

    Raises:
        UsageError: other files of these names lie there.
        CheckpointError: they cannot be written.
    """
    texts = Texts(folder / "calibration.txt", folder / "held-out.txt")
    files = (texts.calibration, texts.held_out)
    with outputs.several_outputs(folder, [file.name for file in files]):
        for file in files:
            file.write_bytes(bundled_text(file.name))
    return texts


def run(folder: Path, progress: Progress = no_progress) -> DemoResult:
    """Take the bundled model through the whole chain on the CPU; models and texts stay in `folder`."""
    progress("writing stories", 0, 1)
    texts = write_texts(folder)
    progress("writing stories", 1, 1)
    recipe = PruneRecipe(calibration=str(texts.calibration), nsamples=NSAMPLES, seqlen=SEQLEN)
    report = measure_chain(
        MODEL_FOLDER,
        folder,
        recipe,
        sparsities=[SPARSITY],
        dataset=str(texts.held_out),
        seqlen=SEQLEN,
        device="cpu",
        progress=progress,
    )
    packed = folder / f"packed-{SPARSITY * 100:g}"
    tokenizer = models.load_tokenizer(packed)
    made = generation.generate(
        load(packed, device="cpu"), tokenizer, encode_prompt(tokenizer, BENCHMARK_PROMPT), max_new_tokens=400
    )
    return DemoResult(report, BENCHMARK_PROMPT, made.text)
