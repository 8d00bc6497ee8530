"""The draw and the cut behind published numbers, against transcripts of their rule, and the draws that no machine may change.

The references below are written from the rule as locuslab's code states it (github.com/locuslab/wanda, lib/data.py and
lib/eval.py), with a real tokenizer over a tiny dataset, and use nothing of macko but its errors.
"""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset
from helpers import assert_plain
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from macko_llm import perplexity
from macko_llm.calibration import (
    calibration_tokens,
    draw_from_stream,
    evaluation_text,
    evaluation_windows,
    load_documents,
    tokens_sha256,
)
from macko_llm.demo.run import MODEL_FOLDER
from macko_llm.errors import CalibrationError, UsageError

SEQLEN = 48
CONFIG: Any = SimpleNamespace(max_position_embeddings=512, vocab_size=2048)
CONFIG.get_text_config = lambda: CONFIG


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_FOLDER)


def story(number: int, sentences: int) -> str:
    names = ("Tom", "Ann", "the fox", "an owl")
    return " ".join(f"{names[(number + i) % 4]} found {number * 7 + i} red balls." for i in range(sentences))


SHARD = [story(number, number % 9) for number in range(60)]
"""Documents of 0 to 8 sentences, of which about half are longer than SEQLEN tokens."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What `datasets` gives, by file or split; anything else is an error."""
    files = {
        "en/c4-train.00000-of-01024.json.gz": SHARD,
        "en/c4-validation.00000-of-00008.json.gz": [story(number, 1 + number % 3) for number in range(1200)],
        "train": ["", " = Foxes = \n", story(1, 30) + "\n", "", story(2, 20) + "\n"],
        "test": ["", " = Owls = \n", story(3, 30) + "\n", ""],
    }

    def load_dataset(path: str, *, split: str, name: str = "", data_files: str = "", verification_mode: str) -> Dataset:
        assert verification_mode == "no_checks"
        assert (path, name) in (("allenai/c4", ""), ("Salesforce/wikitext", "wikitext-2-raw-v1"))
        return Dataset.from_dict({"text": files[data_files or split]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return files


@pytest.mark.parametrize("seed", [0, 17])
def test_c4_calibration_draws_long_documents_and_a_window_of_each(
    hub: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, seed: int
) -> None:
    shard = hub["en/c4-train.00000-of-01024.json.gz"]
    random.seed(seed)
    expected, passed_over = [], 0
    for _ in range(40):
        while True:
            ids = tokenizer(shard[random.randint(0, len(shard) - 1)])["input_ids"]
            if len(ids) > SEQLEN:
                break
            passed_over += 1
        start = random.randint(0, len(ids) - SEQLEN - 1)
        expected.append(ids[start : start + SEQLEN])
    assert passed_over > 5
    assert len({row[0] for row in expected}) > 5  # windows begin anywhere, not only at the BOS
    assert calibration_tokens("c4", tokenizer, 40, SEQLEN, seed).tolist() == expected


def test_wikitext2_calibration_draws_windows_of_the_training_lines_joined_by_spaces(
    hub: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = tokenizer(" ".join(hub["train"]))["input_ids"]
    random.seed(5)
    starts = [random.randint(0, len(ids) - SEQLEN - 1) for _ in range(12)]
    expected = [ids[start : start + SEQLEN] for start in starts]
    assert calibration_tokens("wikitext2", tokenizer, 12, SEQLEN, 5).tolist() == expected


def scored_windows(tokenizer: PreTrainedTokenizerBase, dataset: str, seqlen: int, **settings: Any) -> list[list[int]]:
    text, cut = evaluation_text(dataset), evaluation_windows(dataset)
    return perplexity.cut_text(tokenizer, text, CONFIG, seqlen=seqlen, cut=cut, **settings).batches.tolist()


def test_wikitext2_evaluation_cuts_all_test_lines_joined_by_empty_lines(
    hub: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = tokenizer("\n\n".join(hub["test"]))["input_ids"]
    count = len(ids) // SEQLEN
    assert count >= 3
    expected = [ids[i * SEQLEN : (i + 1) * SEQLEN] for i in range(count)]
    assert scored_windows(tokenizer, "wikitext2", SEQLEN) == expected


def test_c4_evaluation_cuts_1100_documents_joined_by_a_space_to_256_windows(
    hub: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase
) -> None:
    documents = hub["en/c4-validation.00000-of-00008.json.gz"]
    ids = tokenizer(" ".join(documents[:1100]))["input_ids"]
    assert len(ids) > 256 * SEQLEN
    kept = ids[: 256 * SEQLEN]
    expected = [kept[i * SEQLEN : (i + 1) * SEQLEN] for i in range(256)]
    assert scored_windows(tokenizer, "c4", SEQLEN) == expected
    # A shorter stride makes more windows of the same tokens, a limit takes the first of them.
    half = scored_windows(tokenizer, "c4", SEQLEN, stride=SEQLEN // 2)
    assert half == [kept[i * SEQLEN // 2 : i * SEQLEN // 2 + SEQLEN] for i in range(2 * 256 - 1)]
    assert scored_windows(tokenizer, "c4", SEQLEN, limit=3) == expected[:3]
    # At a seqlen for which they are too short, the 1100 documents give fewer.
    assert len(scored_windows(tokenizer, "c4", 512)) == len(ids) // 512 < 256


@pytest.mark.usefixtures("hub")
def test_a_seed_draws_these_tokens_on_every_machine(tokenizer: PreTrainedTokenizerBase) -> None:
    """Hashes as macko.json records them; what changes one changes every published calibration."""
    torch.manual_seed(1)  # no generator but that of the seed has a say
    random.seed(2)
    c4 = calibration_tokens("c4", tokenizer, 16, SEQLEN, 0)
    wikitext2 = calibration_tokens("wikitext2", tokenizer, 16, SEQLEN, 0)
    stream = draw_from_stream(tokenizer, iter(SHARD * 20), 16, SEQLEN, 0)
    assert [tokens_sha256(tokens) for tokens in (c4, wikitext2, stream)] == GOLDEN


GOLDEN = [
    "e55c69f2ec677115827dcde36e035b4236257d0dc27818f68ab93cd8fb910c9a",
    "987a97fe9da15f7f58f25bd7ddafc6e0239fd10fc1ed2b95afbc47440a214b0c",
    "9ba36994440de96a14085dff08ed5123c80f134691c1a7517f82b43b85329203",
]


# Chat templates


TEMPLATE = (
    "<|bos|>{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}<|eos|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def chat_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def conversation(number: int) -> list[dict[str, str]]:
    roles = ("user", "assistant") * 3
    return [{"role": role, "content": story(number + i, 4)} for i, role in enumerate(roles)]


CHATS = [conversation(number) for number in range(30)] + [[{"role": "user", "content": "Hi."}]]


def expected_chat_draw(tokenizer: PreTrainedTokenizerBase, rendered: list[str], nsamples: int, seed: int) -> list[Any]:
    random.seed(seed)
    expected = []
    for _ in range(nsamples):
        while True:
            ids = tokenizer(rendered[random.randint(0, len(rendered) - 1)], add_special_tokens=False)["input_ids"]
            if len(ids) > SEQLEN:
                break
        start = random.randint(0, len(ids) - SEQLEN - 1)
        expected.append(ids[start : start + SEQLEN])
    return expected


def by_hand(messages: list[dict[str, str]]) -> str:
    return "<|bos|>" + "".join(f"[{message['role']}] {message['content']}<|eos|>" for message in messages)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("column", ["messages", "chat"])
def test_conversations_of_files_are_rendered_as_they_are(
    suffix: str, column: str, tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    records = [{"id": number, column: messages} for number, messages in enumerate(CHATS)]
    file = tmp_path / f"chats.{suffix}"
    if suffix == "parquet":
        Dataset.from_list(records).to_parquet(file)
    else:
        file.write_text(json.dumps(records) if suffix == "json" else "\n".join(map(json.dumps, records)))
    tokens = calibration_tokens(
        str(file),
        chat_tokenizer,
        12,
        SEQLEN,
        3,
        text_column=None if column == "messages" else column,
        chat_template=True,
    )
    assert tokens.tolist() == expected_chat_draw(chat_tokenizer, list(map(by_hand, CHATS)), 12, 3)


def test_conversations_of_a_dataset_are_streamed_and_rendered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"prompt": ["-"] * len(CHATS), "messages": CHATS}).to_parquet(
        tmp_path / "data/train-00000.parquet"
    )
    shuffled = list(CHATS)
    random.seed(4)
    random.shuffle(shuffled)
    ids = [chat_tokenizer(by_hand(messages), add_special_tokens=False)["input_ids"] for messages in shuffled]
    long_ones = [row for row in ids if len(row) > SEQLEN][:5]
    starts = [random.randint(0, len(row) - SEQLEN - 1) for row in long_ones]
    expected = [row[start : start + SEQLEN] for row, start in zip(long_ones, starts, strict=True)]
    # `macko prune` records "text" as the column of a dataset for which none was asked.
    for column in (None, "text", "messages"):
        settings: dict[str, Any] = {"text_column": column, "chat_template": True}
        assert calibration_tokens(str(tmp_path), chat_tokenizer, 5, SEQLEN, 4, **settings).tolist() == expected


def test_a_text_becomes_what_the_user_says(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [story(number, 8) for number in range(9)]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text, "messages": "-"}) for text in texts))
    rendered = [f"<|bos|>[user] {text}<|eos|>" for text in texts]
    tokens = calibration_tokens(str(tmp_path / "texts.jsonl"), chat_tokenizer, 9, SEQLEN, 8, chat_template=True)
    assert tokens.tolist() == expected_chat_draw(chat_tokenizer, rendered, 9, 8)
    (tmp_path / "one.txt").write_text(texts[0])
    length = len(chat_tokenizer(rendered[0], add_special_tokens=False)["input_ids"])
    whole = calibration_tokens(str(tmp_path / "one.txt"), chat_tokenizer, 1, length - 1, 8, chat_template=True)
    assert chat_tokenizer.decode(whole[0]) == rendered[0].removesuffix("<|eos|>")


def test_entries_that_a_message_lacks_are_not_there_in_parquet_either(tmp_path: Path) -> None:
    """Arrow gives both messages a tool, the second one None, which some releases of transformers would hand to templates."""
    chat = [{"role": "user", "content": "Hi", "tool": "ball"}, {"role": "assistant", "content": "Ho"}]
    Dataset.from_list([{"messages": chat}]).to_parquet(tmp_path / "chat.parquet")
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": chat}))
    for name in ("chat.parquet", "chat.jsonl"):
        assert load_documents(str(tmp_path / name), "train", conversations=True) == [chat]


@pytest.mark.parametrize(
    ("messages", "settings", "words"),
    [
        (["Hi"], {}, 'neither text nor a list of messages with a string "role" and "content"; set the text column'),
        ([{"role": "user"}], {}, "neither text nor a list of messages"),
        ([{"from": "human", "value": "Hi"}], {}, "neither text nor a list of messages"),
        (CHATS[0], {"chat_template": False, "text_column": "messages"}, "or read conversations with --chat-template"),
        (CHATS[0], {"chat_template": False}, 'has no field "text"; set the text column to one of messages'),
    ],
)
def test_what_is_no_conversation_is_refused(
    messages: Any, settings: dict[str, Any], words: str, tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}))
    with pytest.raises(CalibrationError, match=words) as caught:
        calibration_tokens(
            str(tmp_path / "chats.jsonl"), chat_tokenizer, 1, 2, 0, **{"chat_template": True, **settings}
        )
    assert_plain(str(caught.value))


def test_templates_that_cannot_be_used_are_plain_errors(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(UsageError, match=r"has no chat template; use a chat model, or drop --chat-template\."):
        calibration_tokens("c4", tokenizer, 1, 2, 0, chat_template=True)  # before anything is fetched
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": [{"role": "system", "content": "Be brief."}]}))
    with pytest.raises(UsageError, match=r"refuses these messages \(System role not supported\); drop --chat-template"):
        calibration_tokens(str(tmp_path / "chats.jsonl"), chat_tokenizer, 1, 2, 0, chat_template=True)
    save_file({"tokens": torch.ones(1, 4, dtype=torch.int64)}, tmp_path / "tokens.safetensors")
    with pytest.raises(UsageError, match=r"holds tokens, which no chat template can hold; drop --chat-template"):
        calibration_tokens(str(tmp_path / "tokens.safetensors"), chat_tokenizer, 1, 2, 0, chat_template=True)
