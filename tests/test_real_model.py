"""The whole chain on a real trained model that is not ours, against numbers of an independent, naive implementation.

The model (a Llama of 656 thousand parameters trained on TinyStories) and the texts lie beside the repository, in
../shared; where they do not, these tests are skipped. The numbers: 32 calibration sequences of 512 tokens, 50 % of each
row, perplexity on the validation text in windows of 512.
"""

from pathlib import Path

import pytest
import torch

import macko_llm
from macko_llm import calibration, checkpoint, generation, models, perplexity
from macko_llm.inspecting import inspect_checkpoint
from macko_llm.packing import pack_checkpoint
from macko_llm.pruning import prune_checkpoint
from macko_llm.recipe import PruneRecipe
from macko_llm.text import encode_prompt
from macko_llm.unpacking import unpack_checkpoint

SHARED = Path(__file__).resolve().parents[2] / "shared"
MODEL = SHARED / "models" / "tinystories-656k"
TRAIN, VALID, WIKITEXT = (
    SHARED / "data" / name for name in ("tinystories-train.txt", "tinystories-valid.txt", "wikitext-2-raw-test.txt")
)
SEQLEN = 512
WINDOWS = 134
PROMPTS = ["Once upon a time", "Lily and Tom went to the park.", "The big dog was sad because"]

pytestmark = pytest.mark.skipif(
    not all(path.exists() for path in (MODEL, TRAIN, VALID, WIKITEXT)),
    reason="needs a model and texts that are not in the repository: ../shared/models and ../shared/data",
)


def _prune(target: Path, **settings: object) -> Path:
    recipe = PruneRecipe(calibration=str(TRAIN), nsamples=32, seqlen=SEQLEN, **settings)  # type: ignore[arg-type]
    prune_checkpoint(MODEL, target, recipe, device="cpu")
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wanda at 50 % in float32 and in float16, and what packing makes of the latter."""
    folder = tmp_path_factory.mktemp("tinystories")
    _prune(folder / "wanda")
    _prune(folder / "wanda-16", dtype="float16")
    pack_checkpoint(folder / "wanda-16", folder / "packed")
    return folder


def _perplexity(model: Path, text: Path = VALID, limit: int | None = None, dtype: str = "float32") -> float:
    loaded = macko_llm.load(model, dtype=dtype, device="cpu")
    words = calibration.evaluation_text(str(text))
    windows = perplexity.cut_text(models.load_tokenizer(MODEL), words, loaded.config, seqlen=SEQLEN, limit=limit)
    report = perplexity.evaluate(loaded, windows, dataset=text.name)
    assert report.windows == limit or report.windows >= WINDOWS
    return report.perplexity


def test_the_dense_model() -> None:
    assert _perplexity(MODEL) == pytest.approx(30.18, abs=0.05)


def test_magnitude(tmp_path: Path) -> None:
    assert _perplexity(_prune(tmp_path / "out", method="magnitude")) == pytest.approx(68.97, rel=0.01)


def test_wanda(folder: Path) -> None:
    assert _perplexity(folder / "wanda") == pytest.approx(57.97, rel=0.02)


@pytest.mark.parametrize(("sparsity", "expected"), [(0.3, 33.87), (0.6, 109.6)])
def test_wanda_at_other_sparsities(sparsity: float, expected: float, tmp_path: Path) -> None:
    assert _perplexity(_prune(tmp_path / "out", sparsity=sparsity)) == pytest.approx(expected, rel=0.03)


def test_packing_costs_no_perplexity(folder: Path) -> None:
    assert _perplexity(folder / "packed") == pytest.approx(_perplexity(folder / "wanda"), rel=1e-3)
    few = {"limit": 20, "dtype": "float16"}
    assert _perplexity(folder / "packed", **few) == pytest.approx(_perplexity(folder / "wanda-16", **few), rel=1e-3)


def test_wikitext(folder: Path) -> None:
    """Far from what the model was trained on, so that only the order is known."""
    dense, wanda, packed = (
        _perplexity(model, WIKITEXT, limit=40) for model in (MODEL, folder / "wanda", folder / "packed")
    )
    assert dense < wanda
    assert packed == pytest.approx(wanda, rel=1e-3)


def test_packed_is_smaller_and_unpacks_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    report = inspect_checkpoint(folder / "packed")
    assert report.sparsity == pytest.approx(0.5, abs=0.001)
    assert report.kept_dense == []
    assert checkpoint.folder_bytes(folder / "packed") < 0.85 * checkpoint.folder_bytes(folder / "wanda-16")
    unpack_checkpoint(folder / "packed", tmp_path / "unpacked")
    pruned, unpacked = (
        macko_llm.load(path, device="cpu").state_dict() for path in (folder / "wanda-16", tmp_path / "unpacked")
    )
    assert pruned.keys() == unpacked.keys()
    assert all(
        torch.equal(tensor.view(torch.int16), unpacked[name].view(torch.int16)) for name, tensor in pruned.items()
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_packed_model_writes_what_the_pruned_one_writes(dtype: str, folder: Path) -> None:
    tokenizer = models.load_tokenizer(MODEL)
    prompts = [encode_prompt(tokenizer, prompt) for prompt in PROMPTS]
    texts = []
    for name in ("wanda-16", "packed"):
        model = macko_llm.load(folder / name, dtype=dtype, device="cpu")
        made = [generation.generate(model, tokenizer, prompt, max_new_tokens=60, stop_ids=()) for prompt in prompts]
        texts.append([(one.new_tokens, one.text) for one in made])
    assert texts[0] == texts[1]
    assert [count for count, _ in texts[0]] == [60] * len(PROMPTS)
