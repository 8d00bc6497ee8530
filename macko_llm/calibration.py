"""Text for calibration and evaluation, and the seeded draw of token sequences from it.

A source is "c4" or "wikitext2" (fetched with `datasets`), or a path: a .txt file (one document), a .jsonl file (field `text`,
a document a line), a .parquet file (column `text`), a folder of such files, or, for calibration only, a .safetensors file with
int64 `tokens` [nsamples, seqlen].
"""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors import SafetensorError, safe_open

from macko_llm.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "test"]
DATASETS = ("c4", "wikitext2")

_TOKENS_SUFFIX = ".safetensors"
# In C4 about one document in 50 is longer than 2048 tokens; this many short ones in a row mean that the text cannot serve.
_DRAWS_IN_A_ROW = 10_000
_C4_TEST_DOCUMENTS = 1100


def load_documents(source: str, split: Split) -> Sequence[str]:
    """The documents of a source.

    Args:
        source: see the module.
        split: which part of c4 or wikitext2; a path has only one.

    Returns:
        At least one document. As in locuslab's reference, wikitext2's training split is one document, its lines joined by
        spaces; its test split is its lines; c4 is the first shard of the split, of the test split the first 1100 documents.

    Raises:
        CalibrationError: the source is missing, unreadable or empty, or the dataset cannot be fetched.
    """
    if source == "c4":
        shard = "en/c4-train.00000-of-01024.json.gz" if split == "train" else "en/c4-validation.00000-of-00008.json.gz"
        texts = _fetch("allenai/c4", data_files=shard)
        return texts if split == "train" else texts[:_C4_TEST_DOCUMENTS]
    if source == "wikitext2":
        lines = _fetch("Salesforce/wikitext", name="wikitext-2-raw-v1", split=split)
        return [" ".join(lines)] if split == "train" else lines
    return _read_path(Path(source).expanduser())


def evaluation_text(source: str) -> str:
    """The test text of a source: its documents joined by an empty line.

    Raises:
        CalibrationError: see `load_documents`.
    """
    return "\n\n".join(load_documents(source, "test"))


def is_token_file(source: str) -> bool:
    """Whether the source holds tokens, which are used as they are, and not text."""
    return source.endswith(_TOKENS_SUFFIX)


def calibration_tokens(
    source: str, tokenizer: "PreTrainedTokenizerBase | None", nsamples: int, seqlen: int, seed: int
) -> torch.Tensor:
    """Calibration sequences of a source.

    Args:
        source: see the module.
        tokenizer: the model's; None will do for a .safetensors source.
        nsamples: sequences to draw.
        seqlen: tokens in each of them.
        seed: of the draw.

    Returns:
        int64 [nsamples, seqlen] on the CPU; a .safetensors source decides its own shape.

    Raises:
        CalibrationError: the source is missing, unreadable or too short.
    """
    if is_token_file(source):
        return load_tokens(Path(source).expanduser())
    if tokenizer is None:
        raise CalibrationError(f"The text of {source} needs a tokenizer; give one, or tokens in a .safetensors file.")
    return draw_tokens(tokenizer, load_documents(source, "train"), nsamples, seqlen, seed)


def draw_tokens(
    tokenizer: "PreTrainedTokenizerBase", documents: Sequence[str], nsamples: int, seqlen: int, seed: int
) -> torch.Tensor:
    """Draw token sequences as locuslab's reference does (github.com/locuslab/wanda, lib/data.py).

    For each sequence documents are drawn, with replacement, until one has more than `seqlen` tokens (with the special
    tokens that the tokenizer adds), then a start in [0, tokens - seqlen - 1]. From a single document only the start is drawn.

    Returns:
        int64 [nsamples, seqlen] on the CPU.

    Raises:
        CalibrationError: no document is long enough.
    """
    generator = random.Random(seed)
    long_enough: dict[int, list[int]] = {}
    too_short: set[int] = set()
    longest = 0
    sequences = []
    for _ in range(nsamples):
        for _ in range(_DRAWS_IN_A_ROW):
            index = generator.randint(0, len(documents) - 1) if len(documents) > 1 else 0
            if index in long_enough:
                break
            if index not in too_short:
                tokens = tokenizer(documents[index], verbose=False)["input_ids"]
                longest = max(longest, len(tokens))
                if len(tokens) > seqlen:
                    long_enough[index] = tokens
                    break
                too_short.add(index)
            if len(too_short) == len(documents):
                raise _too_short(seqlen, len(documents), longest)
        else:
            raise _too_short(seqlen, len(too_short), longest)
        tokens = long_enough[index]
        start = generator.randint(0, len(tokens) - seqlen - 1)
        sequences.append(tokens[start : start + seqlen])
    return torch.tensor(sequences, dtype=torch.int64)


def load_tokens(path: Path) -> torch.Tensor:
    """The int64 `tokens` [nsamples, seqlen] of a safetensors file, on the CPU.

    Raises:
        CalibrationError: the file is missing or corrupt, or holds something else.
    """
    _require_file(path)
    try:
        with safe_open(path, framework="pt") as reader:
            tokens = reader.get_tensor("tokens") if "tokens" in reader.keys() else None  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise CalibrationError(f"{path} is corrupt or truncated ({error}); write the tokens again.") from error
    if tokens is None:
        raise CalibrationError(f'{path} has no tensor "tokens"; save int64 tokens [nsamples, seqlen] under that name.')
    if tokens.dtype != torch.int64 or tokens.ndim != 2 or tokens.numel() == 0:
        raise CalibrationError(
            f"The tokens in {path} are {str(tokens.dtype).removeprefix('torch.')} {list(tokens.shape)}; "
            "save them as int64 [nsamples, seqlen]."
        )
    return tokens


def tokens_sha256(tokens: torch.Tensor) -> str:
    """SHA-256 (hex) of tokens: the shape, then the values row by row, all as little-endian int64."""
    values = tokens.to("cpu", torch.int64).contiguous().numpy()
    shape = b"".join(size.to_bytes(8, "little") for size in values.shape)
    return hashlib.sha256(shape + values.astype("<i8").tobytes()).hexdigest()


def _fetch(repository: str, *, split: Split = "train", **options: str) -> Sequence[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CalibrationError(
            f"The package datasets, which fetches {repository}, is missing; pip install datasets, or give a path to text."
        ) from error
    try:
        # no_checks: a single shard of c4 cannot match the sizes that its card gives for the whole.
        texts: Sequence[str] = load_dataset(repository, split=split, verification_mode="no_checks", **options)["text"]
    except Exception as error:  # datasets, its file systems and its HTTP clients each raise their own
        raise CalibrationError(
            f"{repository} could not be fetched ({type(error).__name__}); check the network, or give a path to text."
        ) from error
    return texts


def _read_path(path: Path) -> list[str]:
    if path.suffix == _TOKENS_SUFFIX:
        raise CalibrationError(f"{path} holds tokens where text is needed; give a .txt, .jsonl or .parquet file.")
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _READERS)
        documents = [document for file in files for document in _read_file(file)]
    else:
        _require_file(path)
        if path.suffix not in _READERS:
            raise CalibrationError(f"{path} is not text that can be read; give a .txt, .jsonl or .parquet file.")
        documents = _read_file(path)
    if not any(documents):
        raise CalibrationError(f"{path} holds no text; give .txt, .jsonl or .parquet files with some.")
    return documents


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise CalibrationError(f"There is no text or dataset {path}; use {', '.join(DATASETS)} or an existing path.")


def _read_file(file: Path) -> list[str]:
    try:
        return _READERS[file.suffix](file)
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{file} is not UTF-8 text (byte {error.start}); convert it to UTF-8.") from error
    except OSError as error:
        raise CalibrationError(f"{file} cannot be read ({error}); check its permissions.") from error


def _read_txt(file: Path) -> list[str]:
    return [file.read_text(encoding="utf-8")]


def _read_jsonl(file: Path) -> list[str]:
    documents = []
    # Line by line from the file: str.splitlines would also break at U+2028, which JSON allows inside strings.
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise CalibrationError(f'{file}, line {number}, is not a JSON object with a string "text"; mend it.')
            documents.append(text)
    return documents


def _read_parquet(file: Path) -> list[str]:
    try:
        import pyarrow  # type: ignore[import-untyped]
        from pyarrow import parquet
    except ImportError as error:
        raise CalibrationError(
            f"The package pyarrow, which reads {file}, is missing; pip install pyarrow, or give a .txt file."
        ) from error
    try:
        column = parquet.read_table(file, columns=["text"]).column("text")
    except (pyarrow.ArrowException, KeyError) as error:
        raise CalibrationError(f'{file} is not a parquet file with a column "text"; give another file.') from error
    documents: list[str] = column.drop_null().to_pylist()
    if not all(isinstance(document, str) for document in documents):
        raise CalibrationError(f'The column "text" of {file} does not hold strings; give another file.')
    return documents


_READERS: dict[str, Callable[[Path], list[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _too_short(seqlen: int, documents: int, longest: int) -> CalibrationError:
    what = "The calibration text has" if documents == 1 else f"The longest of {documents} calibration documents has"
    hint = f"give longer text or a seqlen of at most {longest - 1}" if longest > 1 else "give longer text"
    return CalibrationError(f"{what} {longest} tokens, too few for sequences of {seqlen}; {hint}.")
