"""Text for calibration and evaluation, and the seeded draw of token sequences from it.

A source is one of:
- "c4" or "wikitext2", by the rules under which their results are published;
- a dataset of the hub, "owner/name" or "owner/name:configuration", or a local folder laid out as one, such as
  data/train-00000.parquet; of it a split and a column are read, as they come and no further than needed;
- a path: a .txt or .md file (one document), a .jsonl, .json or .parquet file (a document a record, field `text` or another),
  each also with .gz behind it, or a folder of such files, of which README.md tells about the others and is left out;
- for calibration only, a .safetensors file with int64 `tokens` [nsamples, seqlen].

With a chat template a document may also be a conversation: a list of messages, each with a string `role` and `content`.
"""

import gzip
import hashlib
import io
import itertools
import json
import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias, cast

from safetensors import SafetensorError, safe_open

from macko_llm.errors import CalibrationError, UsageError

if TYPE_CHECKING:  # the checks of what is asked for do without
    import torch
    from datasets import IterableDataset, IterableDatasetDict
    from transformers import PreTrainedTokenizerBase

DATASETS = ("c4", "wikitext2")
Split = Literal["train", "test"]
TEXT_COLUMN = "text"
MESSAGES_COLUMN = "messages"
"""Read instead where conversations are welcome and there is no `TEXT_COLUMN`."""
Conversation: TypeAlias = list[dict[str, Any]]
Document: TypeAlias = str | Conversation

_TOKENS_SUFFIX = ".safetensors"
# In C4 about one document in 50 is longer than 2048 tokens; this many short ones in a row mean that the text cannot serve.
_DRAWS_IN_A_ROW = 10_000
_C4_TEST_DOCUMENTS = 1100
_C4_TEST_WINDOWS = 256
# A dataset's rows are shuffled as many at a time, which is about what a file of the hub gives at once.
_ROWS_AT_ONCE = 1000
_HUB_DATASET = re.compile(r"\w[\w.-]*/[\w.-]+(:[^/:]+)?")
_SUFFIXES = ".txt, .md, .json, .jsonl or .parquet"


def check_source(
    source: str, split: str | None = None, text_column: str | None = None, *, chat_template: bool = False
) -> None:
    """Refuse, before anything is read or fetched, a path that leads nowhere and settings that the source does not know.

    Args:
        source: see the module.
        split: of a dataset; None is its usual one.
        text_column: of a dataset, or the field of .json, .jsonl and .parquet files; None is "text".
        chat_template: whether the documents shall be put into a chat template.

    Raises:
        UsageError: a split or a column of a source that has none to choose, a chat template for tokens.
        CalibrationError: there is no such path.
    """
    if source in DATASETS:
        if split is not None or text_column is not None:
            raise UsageError(
                f"{source} is read by its published rule; leave split and text column out, or name a dataset as owner/name."
            )
        return
    path = Path(source).expanduser()
    if is_dataset(source, split):
        return
    if not path.exists():
        raise _nothing_there(path)
    if chat_template and is_token_file(source):
        raise UsageError(f"{path} holds tokens, which no chat template can hold; drop --chat-template, or give text.")
    if split is not None:
        raise UsageError(f"{path} is a file and has no splits; leave the split out.")
    if text_column is not None:
        kinds = {_kind(file) for file in (_text_files(path) if path.is_dir() else [path])}
        if kinds.isdisjoint(_WITH_COLUMNS):
            raise UsageError(
                f"{path} has no columns, which .json, .jsonl and .parquet have; leave the text column out."
            )


def is_dataset(source: str, split: str | None = None) -> bool:
    """Whether `datasets` reads the source by split and column: a dataset of the hub, or a folder laid out as one.

    A folder with text files of its own is one only where a split or a configuration is asked for.
    """
    if source in DATASETS:
        return False
    path, configuration = _split_configuration(source)
    if (folder := Path(path).expanduser()).is_dir():
        laid_out = not _text_files(folder) and any(inner.is_dir() for inner in folder.iterdir())
        return split is not None or configuration is not None or laid_out
    return bool(_HUB_DATASET.fullmatch(source)) and not Path(source).exists() and _kind(Path(source)) not in _READERS


def used_split(source: str, usual: Split, split: str | None = None) -> str | None:
    """The split that is read of a source, None where it has none."""
    return (split or usual) if source in DATASETS or is_dataset(source, split) else None


def load_documents(
    source: str,
    usual: Split,
    split: str | None = None,
    text_column: str | None = None,
    *,
    conversations: bool = False,
) -> Sequence[Document]:
    """The documents of a source, all of them.

    Args:
        source: see the module.
        usual: what the text is for, and the split that is read where none is asked for.
        split: another split of a dataset.
        text_column: of a dataset, or the field of .json, .jsonl and .parquet files; None is "text".
        conversations: whether documents may be lists of messages; without a column "text", the column "messages" is read.

    Returns:
        At least one document, all of them texts unless conversations are welcome. As in locuslab's reference, wikitext2's
        training split is one document, its lines joined by spaces; its test split is its lines; c4 is the first shard of the
        split, of the test split the first 1100 documents.

    Raises:
        UsageError: see `check_source`.
        CalibrationError: the source is missing, unreadable or empty, or the dataset cannot be fetched.
    """
    check_source(source, split, text_column)
    if source == "c4":
        shard = "en/c4-train.00000-of-01024.json.gz" if usual == "train" else "en/c4-validation.00000-of-00008.json.gz"
        texts = _fetch("allenai/c4", data_files=shard)
        return texts if usual == "train" else texts[:_C4_TEST_DOCUMENTS]
    if source == "wikitext2":
        lines = _fetch("Salesforce/wikitext", name="wikitext-2-raw-v1", split=usual)
        return [" ".join(lines)] if usual == "train" else lines
    field = _Field(text_column, conversations)
    if is_dataset(source, split):
        documents = list(_column(source, _open_split(source, split or usual), field))
    else:
        documents = _read_path(Path(source).expanduser(), field)
    if not any(documents):
        raise CalibrationError(f"{source} holds no text; give another text, or {_SUFFIXES} files with some.")
    return documents


def evaluation_text(source: str, split: str | None = None, text_column: str | None = None) -> str:
    """The text of a source, by default of its test split: its documents joined by an empty line, those of c4 by a space.

    Raises:
        UsageError, CalibrationError: see `load_documents`.
    """
    texts = cast(Sequence[str], load_documents(source, "test", split, text_column))
    return (" " if source == "c4" else "\n\n").join(texts)


def evaluation_windows(source: str) -> int | None:
    """To how many windows, without overlap, the text of a source is cut by its published rule; None where to none."""
    return _C4_TEST_WINDOWS if source == "c4" else None


def is_token_file(source: str) -> bool:
    """Whether the source holds tokens, which are used as they are, and not text."""
    return source.endswith(_TOKENS_SUFFIX)


def calibration_tokens(
    source: str,
    tokenizer: "PreTrainedTokenizerBase | None",
    nsamples: int,
    seqlen: int,
    seed: int,
    split: str | None = None,
    text_column: str | None = None,
    chat_template: bool = False,
    columns_read: set[str] | None = None,
) -> "torch.Tensor":
    """Calibration sequences of a source.

    Args:
        source: see the module.
        tokenizer: the model's; None will do for a .safetensors source.
        nsamples: sequences to draw.
        seqlen: tokens in each of them.
        seed: of the draw.
        split: of a dataset; None is "train".
        text_column: of a dataset, or the field of .json, .jsonl and .parquet files; None is "text".
        chat_template: put each document into the tokenizer's chat template before the draw. A conversation is rendered as
            it is; a text becomes what the user says, the one turn that every template takes alone.
        columns_read: gets the names of the columns of a dataset that documents came from.

    Returns:
        int64 [nsamples, seqlen] on the CPU; a .safetensors source decides its own shape.

    Raises:
        UsageError: see `check_source`; the tokenizer has no chat template, or the template refuses a conversation.
        CalibrationError: the source is missing, unreadable or too short.
    """
    check_source(source, split, text_column, chat_template=chat_template)
    if is_token_file(source):
        return load_tokens(Path(source).expanduser())
    if tokenizer is None:
        raise CalibrationError(f"The text of {source} needs a tokenizer; give one, or tokens in a .safetensors file.")
    if chat_template:
        from macko_llm.text import require_chat_template

        require_chat_template(tokenizer, "--chat-template")  # before anything is fetched
    if is_dataset(source, split):
        rows, field = _open_split(source, split or "train"), _Field(text_column, chat_template)
        stream = _column(source, rows, field, columns_read)
        return draw_from_stream(tokenizer, stream, nsamples, seqlen, seed, chat_template=chat_template)
    documents = load_documents(source, "train", None, text_column, conversations=chat_template)
    return draw_tokens(tokenizer, documents, nsamples, seqlen, seed, chat_template=chat_template)


def draw_tokens(
    tokenizer: "PreTrainedTokenizerBase",
    documents: Sequence[Document],
    nsamples: int,
    seqlen: int,
    seed: int,
    *,
    chat_template: bool = False,
) -> "torch.Tensor":
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
                tokens = _token_ids(tokenizer, documents[index], chat_template)
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
    return _token_tensor(sequences)


def draw_from_stream(
    tokenizer: "PreTrainedTokenizerBase",
    documents: Iterator[Document],
    nsamples: int,
    seqlen: int,
    seed: int,
    *,
    chat_template: bool = False,
) -> "torch.Tensor":
    """Draw token sequences from documents that come one by one, and read no more of them than needed.

    A thousand documents at a time are read and shuffled. The first `nsamples` with more than `seqlen` tokens give a sequence
    each, from a start that is drawn as in `draw_tokens`. Where they are fewer (the documents end, or 10,000 in a row are too
    short), they take turns. `datasets` shuffles streams too, but each of its releases in another order.

    Returns:
        int64 [nsamples, seqlen] on the CPU.

    Raises:
        CalibrationError: no document is long enough.
    """
    long_enough: list[list[int]] = []
    read = since_last = longest = 0
    generator = random.Random(seed)
    for document in _shuffled(documents, generator):
        tokens = _token_ids(tokenizer, document, chat_template)
        read, since_last, longest = read + 1, since_last + 1, max(longest, len(tokens))
        if len(tokens) > seqlen:
            long_enough.append(tokens)
            since_last = 0
        if len(long_enough) == nsamples or since_last == _DRAWS_IN_A_ROW:
            break
    if not long_enough:
        raise _too_short(seqlen, read, longest)
    sequences = []
    for index in range(nsamples):
        tokens = long_enough[index % len(long_enough)]
        start = generator.randint(0, len(tokens) - seqlen - 1)
        sequences.append(tokens[start : start + seqlen])
    return _token_tensor(sequences)


def _token_ids(tokenizer: "PreTrainedTokenizerBase", document: Document, chat_template: bool) -> list[int]:
    if not chat_template:
        return cast(list[int], tokenizer(cast(str, document), verbose=False)["input_ids"])
    if not document:
        return []
    from macko_llm.text import render_conversation

    messages = [{"role": "user", "content": document}] if isinstance(document, str) else document
    rendered = render_conversation(tokenizer, messages, option="--chat-template")
    # A template writes its own special tokens.
    return cast(list[int], tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"])


def _shuffled(documents: Iterator[Document], generator: random.Random) -> Iterator[Document]:
    while some := list(itertools.islice(documents, _ROWS_AT_ONCE)):
        generator.shuffle(some)
        yield from some


def _token_tensor(sequences: list[list[int]]) -> "torch.Tensor":
    import torch

    return torch.tensor(sequences, dtype=torch.int64)


def load_tokens(path: Path) -> "torch.Tensor":
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
    import torch

    if tokens.dtype != torch.int64 or tokens.ndim != 2 or tokens.numel() == 0:
        raise CalibrationError(
            f"The tokens in {path} are {str(tokens.dtype).removeprefix('torch.')} {list(tokens.shape)}; "
            "save them as int64 [nsamples, seqlen]."
        )
    return tokens


def tokens_sha256(tokens: "torch.Tensor") -> str:
    """SHA-256 (hex) of tokens: the shape, then the values row by row, all as little-endian int64."""
    import torch

    values = tokens.to("cpu", torch.int64).contiguous().numpy()
    shape = b"".join(size.to_bytes(8, "little") for size in values.shape)
    return hashlib.sha256(shape + values.astype("<i8").tobytes()).hexdigest()


def _datasets(source: str) -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"The package datasets, which fetches {source}, is missing; pip install datasets, or give a path to text."
        ) from error
    return datasets


def _fetch(repository: str, *, split: Split = "train", **options: str) -> Sequence[str]:
    datasets = _datasets(repository)
    try:
        # no_checks: a single shard of c4 cannot match the sizes that its card gives for the whole.
        dataset = datasets.load_dataset(repository, split=split, verification_mode="no_checks", **options)
        texts: Sequence[str] = dataset["text"]
    except Exception as error:  # datasets, its file systems and its HTTP clients each raise their own
        raise _out_of_reach(repository, error) from error
    return texts


def _open_split(source: str, split: str) -> "IterableDataset":
    """A split of a dataset, of which nothing is read yet."""
    splits = _open_dataset(source)
    if split not in splits:
        raise CalibrationError(f"{source} has no split {split}; set the split to one of {', '.join(splits)}.")
    return splits[split]


def _open_dataset(source: str) -> "IterableDatasetDict":
    datasets = _datasets(source)
    path, configuration = _split_configuration(source)
    path = str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else path
    try:
        try:
            return datasets.load_dataset(path, configuration, streaming=True)
        except ValueError:
            known = datasets.get_dataset_config_names(path)
            if configuration in known or (configuration is None and len(known) == 1):
                raise
    except datasets.exceptions.DatasetNotFoundError as error:
        raise CalibrationError(
            f"The hub gives no dataset {path}; check the spelling, and `hf auth login` for private and gated datasets."
        ) from error
    except Exception as error:  # as in _fetch
        raise _out_of_reach(source, error) from error
    wrong = "needs a configuration" if configuration is None else f"has no configuration {configuration}"
    raise CalibrationError(f"{path} {wrong}; write {path}:{known[0]}, or another of {', '.join(known)}.")


def _column(source: str, rows: "IterableDataset", field: "_Field", names: set[str] | None = None) -> Iterator[Document]:
    """The documents of a dataset's rows; rows without one are passed over. `names` gets those of the columns."""
    try:
        for row in rows:
            name = field.name_among(row)
            if row.get(name, "") is not None:
                if names is not None:
                    names.add(name)
                yield _document_of(row, field, source, "column")
    except CalibrationError:
        raise
    except Exception as error:  # as in _fetch
        raise _out_of_reach(source, error) from error


def _out_of_reach(source: str, error: Exception) -> CalibrationError:
    if Path(_split_configuration(source)[0]).expanduser().is_dir():
        return CalibrationError(
            f"The folder {source} could not be read as a dataset ({type(error).__name__}); "
            "lay it out as `datasets` loads it, such as data/train-00000.parquet."
        )
    return CalibrationError(
        f"{source} could not be fetched ({type(error).__name__}); check the network, or give a path to text."
    )


def _split_configuration(source: str) -> tuple[str, str | None]:
    """The two parts of "owner/name:configuration"; a path may have a colon of its own."""
    if Path(source).expanduser().exists():
        return source, None
    path, colon, configuration = source.rpartition(":")
    return (path, configuration) if colon else (source, None)


def _kind(path: Path) -> str:
    """The suffix that tells how a file is read, whether .gz follows it or not."""
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _text_files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.is_file() and _kind(file) in _READERS)
    return [file for file in files if file.name != "README.md"]


@dataclass(frozen=True)
class _Field:
    """Which entry of a record is its document, and whether that may be a conversation."""

    asked: str | None
    conversations: bool

    @property
    def name(self) -> str:
        return self.asked or TEXT_COLUMN

    def name_among(self, known: Iterable[str]) -> str:
        instead = self.conversations and self.name == TEXT_COLUMN and TEXT_COLUMN not in known
        return MESSAGES_COLUMN if instead and MESSAGES_COLUMN in known else self.name

    def document(self, value: Any) -> Document | None:
        """The value as a document, None if it is none."""
        if isinstance(value, str):
            return value
        if not self.conversations or not isinstance(value, list) or not all(map(_is_message, value)):
            return None
        # Arrow gives every message the entries of all, which JSON leaves out.
        return [{key: part for key, part in message.items() if part is not None} for message in value]


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _read_path(path: Path, field: _Field) -> list[Document]:
    if path.suffix == _TOKENS_SUFFIX:
        raise CalibrationError(f"{path} holds tokens where text is needed; give a {_SUFFIXES} file.")
    if path.is_dir():
        return [document for file in _text_files(path) for document in _read_file(file, field)]
    if _kind(path) not in _READERS:
        raise CalibrationError(f"{path} is not text that can be read; give a {_SUFFIXES} file.")
    return _read_file(path, field)


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise _nothing_there(path)


def _nothing_there(path: Path) -> CalibrationError:
    return CalibrationError(
        f"There is no text or dataset {path}; use {', '.join(DATASETS)}, a dataset of the hub such as owner/name, "
        "or an existing path."
    )


def _read_file(file: Path, field: _Field) -> list[Document]:
    try:
        with cast(IO[bytes], gzip.open(file)) if file.suffix == ".gz" else file.open("rb") as content:
            return _READERS[_kind(file)](file, content, field)
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{file} is not UTF-8 text (byte {error.start}); convert it to UTF-8.") from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise CalibrationError(f"{file} is not a whole gzip file ({error}); compress it again.") from error
    except OSError as error:
        raise CalibrationError(f"{file} cannot be read ({error}); check its permissions.") from error


# Each takes the file's name, for errors, its content, and the field or column that is asked for.


def _read_txt(_file: Path, content: IO[bytes], _field: _Field) -> list[Document]:
    return [_decoded(content).read()]


def _read_json(file: Path, content: IO[bytes], field: _Field) -> list[Document]:
    try:
        records = json.load(_decoded(content))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{file} is not JSON ({error}); mend it.") from error
    if not isinstance(records, list):
        raise CalibrationError(
            f"{file} is not a JSON list; write a list of strings, or of objects with a text in each."
        )
    documents: list[Document] = []
    for number, record in enumerate(records, start=1):
        if isinstance(record, str):
            if field.asked is not None:
                raise CalibrationError(
                    f'{file}, item {number}, is a string without a field "{field.asked}"; leave the text column out.'
                )
            documents.append(record)
        else:
            documents.append(_document_of(record, field, f"{file}, item {number},", "field"))
    return documents


def _read_jsonl(file: Path, content: IO[bytes], field: _Field) -> list[Document]:
    documents = []
    # Line by line from the file: str.splitlines would also break at U+2028, which JSON allows inside strings.
    for number, line in enumerate(_decoded(content), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        documents.append(_document_of(record, field, f"{file}, line {number},", "field"))
    return documents


def _read_parquet(file: Path, content: IO[bytes], field: _Field) -> list[Document]:
    try:
        import pyarrow  # type: ignore[import-untyped]
        from pyarrow import parquet
    except ImportError as error:
        raise CalibrationError(
            f"The package pyarrow, which reads {file}, is missing; pip install pyarrow, or give a .txt file."
        ) from error
    try:
        # From the end to the front, which is slow in a gzip stream.
        table = parquet.ParquetFile(io.BytesIO(content.read()) if file.suffix == ".gz" else content)
        columns = table.schema_arrow.names
        name = field.name_among(columns)
        if name not in columns:
            raise _no_column(str(file), "column", name, columns)
        column = table.read(columns=[name]).column(name)
    except pyarrow.ArrowException as error:
        raise CalibrationError(f"{file} is not a parquet file that can be read; write it again.") from error
    values = column.drop_null().to_pylist()
    documents = [document for value in values if (document := field.document(value)) is not None]
    if len(documents) < len(values):
        raise _no_text(str(file), "column", name, field)
    return documents


_READERS: dict[str, Callable[[Path, IO[bytes], _Field], list[Document]]] = {
    ".txt": _read_txt,
    ".md": _read_txt,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
_WITH_COLUMNS = (".json", ".jsonl", ".parquet")


def _decoded(content: IO[bytes]) -> io.TextIOWrapper:
    return io.TextIOWrapper(content, encoding="utf-8")


def _document_of(record: Any, field: _Field, where: str, what: str) -> Document:
    """The document in a record, which `where` names and whose entries are called `what`."""
    if not isinstance(record, Mapping):
        raise CalibrationError(f'{where} is not a JSON object with a string "{field.name}"; mend it.')
    name = field.name_among(record)
    if name not in record:
        raise _no_column(where, what, name, record)
    document = field.document(record[name])
    if document is None:
        raise _no_text(where, what, name, field)
    return document


def _no_column(where: str, what: str, name: str, known: Iterable[str]) -> CalibrationError:
    return CalibrationError(f'{where} has no {what} "{name}"; set the text column to one of {", ".join(known)}.')


def _no_text(where: str, what: str, name: str, field: _Field) -> CalibrationError:
    if field.conversations:
        return CalibrationError(
            f'The {what} "{name}" of {where} is neither text nor a list of messages with a string "role" and "content"; '
            "set the text column to another."
        )
    hint = ", or read conversations with --chat-template" if name == MESSAGES_COLUMN else ""
    return CalibrationError(f'The {what} "{name}" of {where} is not text; set the text column to another{hint}.')


def _too_short(seqlen: int, documents: int, longest: int) -> CalibrationError:
    what = "The calibration text has" if documents == 1 else f"The longest of {documents} calibration documents has"
    hint = f"give longer text or a seqlen of at most {longest - 1}" if longest > 1 else "give longer text"
    return CalibrationError(f"{what} {longest} tokens, too few for sequences of {seqlen}; {hint}.")
