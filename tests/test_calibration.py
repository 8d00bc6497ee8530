"""Calibration: reading sources, and the seeded draw against a transcript of its rule."""

import gzip
import hashlib
import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset
from families import SENTENCES, make_tokenizer, random_tokens
from helpers import assert_plain
from safetensors.torch import save_file

from macko_llm.calibration import (
    calibration_tokens,
    check_source,
    draw_from_stream,
    draw_tokens,
    evaluation_text,
    load_documents,
    load_tokens,
    tokens_sha256,
    used_split,
)
from macko_llm.errors import CalibrationError, UsageError

LONG = " ".join(SENTENCES * 3)


def test_one_document_draws_only_starts() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer(LONG)["input_ids"]
    random.seed(7)
    expected = []
    for _ in range(20):
        start = random.randint(0, len(ids) - 32 - 1)
        expected.append(ids[start : start + 32])
    tokens = draw_tokens(tokenizer, [LONG], 20, 32, seed=7)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == expected


def test_documents_are_drawn_until_one_is_long_enough() -> None:
    tokenizer = make_tokenizer()
    documents = [SENTENCES[0], LONG, SENTENCES[1], SENTENCES[2] * 3, "", LONG[::-1]]
    random.seed(3)
    expected = []
    for _ in range(30):
        while True:
            ids = tokenizer(documents[random.randint(0, len(documents) - 1)])["input_ids"]
            if len(ids) > 64:
                break
        start = random.randint(0, len(ids) - 64 - 1)
        expected.append(ids[start : start + 64])
    assert draw_tokens(tokenizer, documents, 30, 64, seed=3).tolist() == expected


def test_the_seed_decides() -> None:
    tokenizer = make_tokenizer()
    first, again, other = (draw_tokens(tokenizer, [LONG], 8, 32, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_document_must_be_longer_than_seqlen() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer(LONG)["input_ids"]
    length = len(ids)
    # Of two places for length - 1 tokens only the first is ever drawn: locuslab's reference never uses the last token.
    assert draw_tokens(tokenizer, [LONG], 8, length - 1, 0).tolist() == [ids[:-1]] * 8
    with pytest.raises(CalibrationError, match=f"text has {length} tokens.*at most {length - 1}"):
        draw_tokens(tokenizer, [LONG], 2, length, 0)
    with pytest.raises(CalibrationError, match=rf"longest of 6 calibration documents has {length} tokens"):
        draw_tokens(tokenizer, [*SENTENCES, LONG], 2, length, 0)


def test_readers_agree_on_the_documents(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    documents = ["Ein Fuchs\nim Wald.", "line separator \u2028 inside", "  spaces stay  "]
    lines = [json.dumps({"text": document, "id": 1}, ensure_ascii=False) for document in documents]
    (tmp_path / "b.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": documents}), tmp_path / "a.parquet")
    (tmp_path / "c.txt").write_text("one document\nof two lines\n", encoding="utf-8")
    (tmp_path / "notes.rst").write_text("not read")
    (tmp_path / "README.md").write_text("about the others")
    assert load_documents(str(tmp_path / "b.jsonl"), "train") == documents
    assert load_documents(str(tmp_path / "a.parquet"), "train") == documents
    assert load_documents(str(tmp_path / "c.txt"), "test") == ["one document\nof two lines\n"]
    assert load_documents(str(tmp_path), "train") == [*documents, *documents, "one document\nof two lines\n"]
    assert evaluation_text(str(tmp_path / "b.jsonl")) == "\n\n".join(documents)


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("suffix", ["txt", "md", "json", "jsonl", "parquet"])
def test_every_kind_of_file_is_read_with_and_without_gzip(tmp_path: Path, suffix: str, compressed: bool) -> None:
    texts, titles = ["Ein Fuchs\nim Wald.", "line separator \u2028 inside"], ["Fuchs", "Zeile"]
    records = [{"text": text, "title": title} for text, title in zip(texts, titles, strict=True)]
    plain = tmp_path / f"plain.{suffix}"
    if suffix == "parquet":
        Dataset.from_list(records).to_parquet(plain)
    elif suffix == "json":
        plain.write_text(json.dumps(records), encoding="utf-8")
    elif suffix == "jsonl":
        plain.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    else:
        plain.write_text("# One\n\ndocument\n", encoding="utf-8")
        texts = ["# One\n\ndocument\n"]
    file = tmp_path / "texts" / (plain.name + ".gz" * compressed)
    file.parent.mkdir()
    file.write_bytes(gzip.compress(plain.read_bytes()) if compressed else plain.read_bytes())
    assert load_documents(str(file), "train") == texts
    assert load_documents(str(file.parent), "test") == texts
    if suffix in ("json", "jsonl", "parquet"):
        assert load_documents(str(file), "train", text_column="title") == titles
        assert load_documents(str(file.parent), "train", text_column="title") == titles
    else:
        with pytest.raises(UsageError, match=rf"{file.name} has no columns.*; leave the text column out"):
            load_documents(str(file), "train", text_column="title")


def test_a_json_list_of_strings_is_a_list_of_documents(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('["one", {"text": "two"}, "three"]')
    assert load_documents(str(tmp_path / "a.json"), "train") == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("name", "content", "column", "words"),
    [
        ("a.json", b'{"text": "x"}', None, r"a\.json is not a JSON list"),
        ("a.json", b'[{"text": "x"', None, r"a\.json is not JSON"),
        ("a.json", b"caf\xe9", None, r"a\.json is not UTF-8 text \(byte 3\)"),
        ("a.json", b'[{"text": "x"}, 3]', None, r"a\.json, item 2, is not a JSON object"),
        ("a.json", b'[{"text": "x"}, {"id": 1, "body": ""}]', None, 'item 2, has no field "text".* one of id, body'),
        ("a.json", b'["x"]', "body", 'item 1, is a string without a field "body"; leave the text column out'),
        ("a.jsonl", b'{"text": "x", "id": 1}', "body", r'a\.jsonl, line 1, has no field "body".* one of text, id'),
        ("a.jsonl", b'{"text": "x", "id": 1}', "id", r'field "id" of .*a\.jsonl, line 1, is not text'),
        ("a.txt.gz", b"not compressed", None, r"a\.txt\.gz is not a whole gzip file"),
        ("a.txt.gz", gzip.compress(b"a longer text" * 9, mtime=0)[:-9], None, r"a\.txt\.gz is not a whole gzip file"),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0), None, r"a\.parquet\.gz is not a parquet file"),
        ("a.csv.gz", gzip.compress(b"text", mtime=0), None, r"a\.csv\.gz is not text that can be read; give a \.txt"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(
    tmp_path: Path, name: str, content: bytes, column: str | None, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=words) as caught:
        load_documents(str(tmp_path / name), "train", text_column=column)
    assert_plain(str(caught.value))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"caf\xe9 au lait", r"not UTF-8 text \(byte 3\)"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', "line 2"),
        ("a.jsonl", b'{"text": "x"}\n\n["y"]\n', "line 3"),
        ("a.jsonl", b'{"text": 3}\n', "line 1"),
        ("a.jsonl", b'{"text": "x"\n', "line 1"),
        ("a.parquet", b"PAR1 is not enough", "not a parquet file"),
        ("a.csv", b"text\nx\n", r"give a \.txt, \.md, \.json, \.jsonl or \.parquet"),
        ("a.safetensors", b"", "holds tokens where text is needed"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=words):
        load_documents(str(tmp_path / name), "train")


def test_missing_and_empty_sources(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"no text or dataset .*wikitext3; use c4, wikitext2"):
        load_documents("wikitext3", "train")
    with pytest.raises(CalibrationError, match="holds no text"):
        load_documents(str(tmp_path), "train")


def test_parquet_without_a_text_column(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "body.parquet")
    parquet.write_table(pyarrow.table({"text": [1]}), tmp_path / "numbers.parquet")
    with pytest.raises(
        CalibrationError, match=r'body\.parquet has no column "text"; set the text column to one of body'
    ):
        load_documents(str(tmp_path / "body.parquet"), "train")
    with pytest.raises(CalibrationError, match=r'column "text" of .*numbers\.parquet is not text'):
        load_documents(str(tmp_path / "numbers.parquet"), "train")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "datasets", None)  # makes the import fail, as where it is not installed
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CalibrationError, match="pip install datasets"):
        load_documents("c4", "train")
    with pytest.raises(CalibrationError, match="pip install pyarrow"):
        load_documents(str(tmp_path / "a.parquet"), "train")


def test_a_dataset_out_of_reach_is_a_plain_error(tmp_path: Path) -> None:
    script = (
        "from macko_llm.calibration import load_documents\n"
        "from macko_llm.errors import CalibrationError\n"
        "for source in ('c4', 'wikitext2', 'owner/name', 'owner/name:part'):\n"
        "    try:\n        load_documents(source, 'test')\n"
        "    except CalibrationError as error:\n        print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}  # offline, with an empty cache
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert [line.split(" could not be fetched")[0] for line in done.stdout.splitlines()] == [
        "allenai/c4",
        "Salesforce/wikitext",
        "owner/name",
        "owner/name:part",
    ]
    assert done.stdout.count("check the network") == 4


def test_token_files_are_used_as_they_are(tmp_path: Path) -> None:
    tokens = random_tokens(3, 5)
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    assert torch.equal(calibration_tokens(str(tmp_path / "tokens.safetensors"), None, 99, 99, 99), tokens)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"tokens": torch.zeros(2, 3, dtype=torch.int32)}, r"int32 \[2, 3\]"),
        ({"tokens": torch.zeros(2, 3)}, r"float32 \[2, 3\]"),
        ({"tokens": torch.zeros(6, dtype=torch.int64)}, r"int64 \[6\]"),
        ({"tokens": torch.zeros(0, 3, dtype=torch.int64)}, r"int64 \[0, 3\]"),
        ({"ids": torch.zeros(2, 3, dtype=torch.int64)}, 'no tensor "tokens"'),
    ],
)
def test_other_token_files_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], words: str) -> None:
    save_file(tensors, tmp_path / "tokens.safetensors")
    with pytest.raises(CalibrationError, match=words):
        load_tokens(tmp_path / "tokens.safetensors")


def test_damaged_and_missing_token_files(tmp_path: Path) -> None:
    (tmp_path / "tokens.safetensors").write_bytes(b"\x08\x00")
    with pytest.raises(CalibrationError, match="corrupt or truncated"):
        load_tokens(tmp_path / "tokens.safetensors")
    with pytest.raises(CalibrationError, match="no text or dataset"):
        load_tokens(tmp_path / "absent.safetensors")


def test_hash_covers_shape_and_values() -> None:
    tokens = torch.tensor([[1, 2, 3], [4, 5, 2**40]])
    expected = hashlib.sha256(struct.pack("<8q", 2, 3, 1, 2, 3, 4, 5, 2**40)).hexdigest()
    assert tokens_sha256(tokens) == expected
    assert tokens_sha256(tokens.t().contiguous().t()) == expected  # whatever the strides
    assert tokens_sha256(tokens.reshape(3, 2)) != expected


# Datasets by split and column, from folders that `datasets` loads as it loads those of the hub


TRAIN = [SENTENCES[0], LONG, LONG[::-1], "", SENTENCES[1], LONG * 2]
TEST = ["A fox.", "", "Two foxes."]


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A dataset with two splits, the longer one in two files."""
    # What a stream that is not read to its end waits for its threads.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)
    data = tmp_path / "dataset" / "data"
    data.mkdir(parents=True)
    for number, part in enumerate([TRAIN[:3], TRAIN[3:]]):
        rows = {"text": part, "upper": [text.upper() for text in part], "id": list(range(len(part)))}
        Dataset.from_dict(rows).to_parquet(data / f"train-0000{number}-of-00002.parquet")
    rows = {"text": TEST, "upper": ["A FOX.", None, "TWO FOXES."], "id": [0, 1, 2]}
    Dataset.from_dict(rows).to_parquet(data / "test-00000-of-00001.parquet")
    (data.parent / "README.md").write_text("# A dataset card, and no part of the texts\n")
    return str(data.parent)


def test_a_dataset_is_evaluated_on_its_split_and_column(dataset: str) -> None:
    assert evaluation_text(dataset) == "\n\n".join(TEST)
    assert evaluation_text(dataset, split="train") == "\n\n".join(TRAIN)
    assert evaluation_text(dataset, text_column="upper") == "A FOX.\n\nTWO FOXES."  # a row without a text is none


def test_only_what_has_splits_has_one(dataset: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A fox.")
    assert used_split(dataset, "train") == "train"
    assert used_split(dataset, "test", "validation") == "validation"
    assert used_split("c4", "test") == used_split("owner/name", "test") == used_split("o/n:part", "test") == "test"
    assert used_split(str(tmp_path / "a.txt"), "test") is None
    assert used_split(str(tmp_path), "test") is None


def test_a_folder_of_texts_is_a_dataset_where_a_split_is_asked_for(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    assert load_documents(str(tmp_path), "test") == ["test", "train"]
    assert load_documents(str(tmp_path), "test", split="train") == ["train"]


def test_sequences_come_from_the_shuffled_rows_of_a_dataset(dataset: str) -> None:
    tokenizer = make_tokenizer()
    for seed in (0, -5):
        random.seed(seed)
        documents = list(TRAIN)
        random.shuffle(documents)
        long_ones = [ids for document in documents if len(ids := tokenizer(document)["input_ids"]) > 64]
        assert len(long_ones) == 3
        expected = []
        for index in range(5):
            ids = long_ones[index % 3]
            start = random.randint(0, len(ids) - 64 - 1)
            expected.append(ids[start : start + 64])
        assert calibration_tokens(dataset, tokenizer, 5, 64, seed).tolist() == expected
    upper = calibration_tokens(dataset, tokenizer, 5, 64, 0, text_column="upper")
    assert tokenizer.decode(upper[0]).isupper()
    tests = [tokenizer(text)["input_ids"] for text in TEST]
    (row,) = calibration_tokens(dataset, tokenizer, 1, 2, 0, split="test").tolist()
    assert any(row == ids[start : start + 2] for ids in tests for start in range(len(ids) - 2))


def test_no_more_of_a_stream_is_read_than_needed() -> None:
    tokenizer = make_tokenizer()
    documents = iter(["short", LONG] * 500 + [LONG, "never read"])
    assert draw_from_stream(tokenizer, documents, 500, 64, seed=0).shape == (500, 64)
    assert list(documents) == [LONG, "never read"]
    documents = iter(["x"] * 1000 + [LONG] * 1000 + ["x"] * 10_001)
    assert draw_from_stream(tokenizer, documents, 1001, 64, seed=0).shape == (1001, 64)
    assert list(documents) == ["x"]
    with pytest.raises(CalibrationError, match="longest of 10000 calibration documents has"):
        draw_from_stream(tokenizer, iter(["x"] * 10_001), 2, 64, seed=0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"split": "validation"}, r"has no split validation; set the split to one of train, test\."),
        ({"text_column": "body"}, r'has no column "body"; set the text column to one of text, upper, id\.'),
        ({"text_column": "id"}, r'The column "id" of .* is not text; set the text column to another\.'),
    ],
)
def test_a_dataset_says_which_splits_and_columns_it_has(dataset: str, settings: dict[str, Any], words: str) -> None:
    for read in (
        lambda: evaluation_text(dataset, **settings),
        lambda: calibration_tokens(dataset, make_tokenizer(), 2, 8, 0, **settings),
    ):
        with pytest.raises(CalibrationError, match=words) as caught:
            read()
        assert_plain(str(caught.value))


def test_a_dataset_says_which_configurations_it_has(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").write_text(json.dumps({"text": name}))
    entries = "".join(f"- config_name: {name}\n  data_files: {name}/*\n" for name in ("first", "second"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{entries}---\n")
    assert evaluation_text(f"{tmp_path}:second", split="train") == "second"
    with pytest.raises(CalibrationError, match=r"needs a configuration; write .*:first, or another of first, second"):
        evaluation_text(str(tmp_path))
    with pytest.raises(CalibrationError, match=r"has no configuration third; write .*:first"):
        evaluation_text(f"{tmp_path}:third")


def test_a_folder_that_is_no_dataset_is_a_plain_error(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(CalibrationError, match=r"could not be read as a dataset .*; lay it out"):
        load_documents(str(tmp_path), "train")
    (tmp_path / "data" / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(CalibrationError, match=r"could not be read as a dataset .*; lay it out"):
        load_documents(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("source", "settings", "words"),
    [
        ("c4", {"split": "train"}, "c4 is read by its published rule; leave split and text column out"),
        ("wikitext2", {"text_column": "text"}, "wikitext2 is read by its published rule"),
        ("a.txt", {"split": "train"}, r"a\.txt is a file and has no splits; leave the split out"),
        ("a.txt.gz", {"text_column": "text"}, r"a\.txt\.gz has no columns"),
        ("tokens.safetensors", {"text_column": "text"}, r"tokens\.safetensors has no columns"),
    ],
)
def test_settings_that_a_source_does_not_know_are_refused_unread(
    source: str, settings: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "a.txt.gz", "tokens.safetensors"):
        (tmp_path / name).touch()
    check_source(source)
    with pytest.raises(UsageError, match=words) as caught:
        check_source(source, **settings)
    assert_plain(str(caught.value))


def test_a_misspelt_path_is_not_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for source in ("texts/a.txt", "texts/a.jsonl.gz", "./texts", "../texts", "/texts/more", "texts", "~/a/b"):
        with pytest.raises(CalibrationError, match="There is no text or dataset"):
            check_source(source)
    for source in ("owner/name", "owner/name-2.0_b", "owner/name:part"):
        check_source(source, "validation", "body")


class FakeHub:
    """Stands for `datasets.load_dataset`: each part of each dataset has lines that name it."""

    def __init__(self, lines: int) -> None:
        self.lines = lines

    def __call__(
        self,
        path: str,
        name: str | None = None,
        *,
        data_files: str | None = None,
        split: str,
        verification_mode: str,
    ) -> Dataset:
        assert verification_mode == "no_checks"
        part = f"{path}/{name or data_files} {split}"
        return Dataset.from_dict({"text": self.texts(part), "url": ["-"] * self.lines})

    def texts(self, part: str) -> list[str]:
        return [f"{part}: {index}" for index in range(self.lines)]


@pytest.mark.parametrize("lines", [1, 1100, 1103])
def test_c4_is_its_first_shard_and_1100_documents_of_the_first_for_tests(
    lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub(lines)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    train = hub.texts("allenai/c4/en/c4-train.00000-of-01024.json.gz train")
    test = hub.texts("allenai/c4/en/c4-validation.00000-of-00008.json.gz train")  # a file by itself is called train
    assert list(load_documents("c4", "train")) == train
    assert list(load_documents("c4", "test")) == test[:1100]
    assert evaluation_text("c4") == " ".join(test[:1100])


def test_wikitext2_is_one_document_to_calibrate_and_lines_to_evaluate(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(3)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    part = "Salesforce/wikitext/wikitext-2-raw-v1"
    assert list(load_documents("wikitext2", "train")) == [f"{part} train: 0 {part} train: 1 {part} train: 2"]
    assert list(load_documents("wikitext2", "test")) == hub.texts(f"{part} test")
    assert evaluation_text("wikitext2") == f"{part} test: 0\n\n{part} test: 1\n\n{part} test: 2"


def test_sequences_of_wikitext2_run_across_its_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Dataset.from_dict({"text": SENTENCES}))
    tokenizer = make_tokenizer()
    longest = max(len(tokenizer(sentence)["input_ids"]) for sentence in SENTENCES)
    tokens = calibration_tokens("wikitext2", tokenizer, 4, longest + 5, seed=0)
    joined = tokenizer.decode(tokenizer(" ".join(SENTENCES))["input_ids"])
    assert tokens.shape == (4, longest + 5)
    assert all(tokenizer.decode(row) in joined for row in tokens)
