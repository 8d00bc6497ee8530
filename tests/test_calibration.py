"""Calibration: reading sources, and the seeded draw against a transcript of its rule."""

import hashlib
import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset
from families import SENTENCES, make_tokenizer, random_tokens
from safetensors.torch import save_file

from macko_llm.calibration import (
    calibration_tokens,
    draw_tokens,
    evaluation_text,
    load_documents,
    load_tokens,
    tokens_sha256,
)
from macko_llm.errors import CalibrationError

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
        "for source in ('c4', 'wikitext2'):\n"
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
    ]
    assert done.stdout.count("check the network") == 2


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
    assert evaluation_text("c4") == "\n\n".join(test[:1100])


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
