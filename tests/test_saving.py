"""What `save_pretrained` and `push_to_hub` of a packed model write besides config and weights, and what they leave alone."""

import copy
import gc
import json
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import make_tokenizer, save_model
from helpers import copy_model
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoModelForCausalLM

import macko_llm
from macko_llm import outputs
from macko_llm.errors import UsageError
from macko_llm.packing import pack_checkpoint
from macko_llm.pruning import prune_checkpoint
from macko_llm.recipe import PruneRecipe
from macko_llm.unpacking import unpack_checkpoint

ADDED = ("macko.json", "README.md")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_model(folder / "dense", "llama", torch.float16)
    prune_checkpoint(folder / "dense", folder / "pruned", PruneRecipe(method="magnitude"), device="cpu")
    pack_checkpoint(folder / "pruned", folder / "packed")
    return folder / "packed"


def _load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def _record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "macko.json").read_text())


def _without_list(folder: Path) -> dict[str, Any]:
    return {key: value for key, value in _record(folder).items() if key != "files"}


def _added(folder: Path) -> list[str]:
    return [name for name in ADDED if (folder / name).exists()]


# The list of files


def test_the_list_names_what_is_there_and_all_of_it_may_be_replaced(packed: Path, tmp_path: Path) -> None:
    _load(packed).save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    names = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert {*ADDED, "config.json", "model.safetensors.index.json"} <= set(names)
    assert _record(tmp_path / "saved")["files"] == names
    assert _without_list(tmp_path / "saved") == _without_list(packed)
    assert (tmp_path / "saved" / "README.md").read_bytes() == (packed / "README.md").read_bytes()
    make_tokenizer().save_pretrained(tmp_path / "saved")  # whose files are known by their names
    unpack_checkpoint(packed, tmp_path / "saved", overwrite=True)
    assert not (tmp_path / "saved" / "README.md").exists()


def test_what_others_wrote_stays_and_is_not_listed(packed: Path, tmp_path: Path) -> None:
    for name in ("README.md", "notes.txt"):
        (tmp_path / name).write_text("mine")
    for _ in range(2):
        _load(packed).save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text() == "mine"
        assert not {"README.md", "notes.txt"} & set(_record(tmp_path)["files"])
    with pytest.raises(UsageError, match=r"holds README\.md, which neither macko nor transformers wrote"):
        outputs.check_output(tmp_path, overwrite=True)


def test_the_card_of_another_packed_model_is_replaced(packed: Path, tmp_path: Path) -> None:
    other = copy_model(packed, tmp_path / "other")
    (other / "README.md").write_text("another card")
    _load(packed).save_pretrained(other)
    assert {name: (other / name).read_bytes() for name in ADDED} == {
        name: (packed / name).read_bytes() for name in ADDED
    }


# Where they come from


def test_they_are_those_of_the_moment_of_loading(packed: Path, tmp_path: Path) -> None:
    source = copy_model(packed, tmp_path / "source")
    (source / "README.md").write_bytes(b"my own words,\r\nas they are")
    overwritten, gone = _load(source), macko_llm.load(source, device="cpu")
    for name in ADDED:
        (source / name).write_text("{}")
    overwritten.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "README.md").read_bytes() == b"my own words,\r\nas they are"
    assert _without_list(tmp_path / "saved") == _without_list(packed)
    shutil.rmtree(source)
    gone.save_pretrained(tmp_path / "again")
    assert {name: (tmp_path / "again" / name).read_bytes() for name in ADDED} == {
        name: (tmp_path / "saved" / name).read_bytes() for name in ADDED
    }


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_model_without_a_macko_json_that_can_be_read_loads_and_is_saved_without(
    content: str | None, packed: Path, tmp_path: Path
) -> None:
    source = copy_model(packed, tmp_path / "source")
    (source / "macko.json").unlink()
    if content is not None:
        (source / "macko.json").write_text(content)
    model = _load(source)
    (source / "macko.json").write_bytes((packed / "macko.json").read_bytes())  # too late to be the model's
    model.save_pretrained(tmp_path / "saved")
    assert _added(tmp_path / "saved") == []


def test_a_damaged_macko_json_is_replaced(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "macko.json").write_text("{")
    _load(packed).save_pretrained(tmp_path)
    assert _without_list(tmp_path) == _without_list(packed)


@pytest.mark.parametrize(
    ("load", "cast"),
    [
        (lambda folder: _load(folder, dtype=torch.float32), {"dtype": "float32", "value_dtype": "float16"}),
        (
            lambda folder: macko_llm.load(folder, dtype="bfloat16", device="cpu"),
            {"dtype": "bfloat16", "value_dtype": "bfloat16"},
        ),
    ],
    ids=["dense weights", "all weights"],
)
def test_a_model_that_was_cast_says_so_once(load: Any, cast: dict[str, str], packed: Path, tmp_path: Path) -> None:
    load(packed).save_pretrained(tmp_path / "cast")
    before = _record(packed)["pack"]
    assert _record(tmp_path / "cast")["pack"] == {**before, "cast": [cast]}
    card = (tmp_path / "cast" / "README.md").read_text()
    assert card.startswith((packed / "README.md").read_text())
    assert f"dense weights as {cast['dtype']} and packed ones as {cast['value_dtype']}" in card
    _load(tmp_path / "cast").save_pretrained(tmp_path / "again")
    for name in ADDED:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "cast" / name).read_bytes()


# The model


def test_copies_of_a_model_are_saved_as_themselves(packed: Path, tmp_path: Path) -> None:
    model = _load(packed)
    twin = copy.deepcopy(model)
    del model
    with torch.no_grad():
        twin.model.norm.weight.fill_(0.25)
    torch.save(twin, tmp_path / "pickled")
    torch.load(tmp_path / "pickled", weights_only=False).save_pretrained(tmp_path / "saved")
    assert set(_load(tmp_path / "saved").model.norm.weight.tolist()) == {0.25}
    assert _added(tmp_path / "saved") == list(ADDED)


def test_a_packed_model_frees_its_memory_with_its_last_reference(packed: Path) -> None:
    model = _load(packed)
    gc.collect()
    gc.disable()
    try:
        weight = weakref.ref(model.model.norm.weight)
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_what_is_not_saved_or_not_packed_gets_nothing(packed: Path, tmp_path: Path) -> None:
    _load(packed).save_pretrained(tmp_path / "other-process", is_main_process=False)
    assert _added(tmp_path / "other-process") == []
    (tmp_path / "file").write_text("mine")
    _load(packed).save_pretrained(tmp_path / "file")  # transformers logs an error
    assert (tmp_path / "file").read_text() == "mine"
    _load(packed.parent / "pruned").save_pretrained(tmp_path / "dense")
    assert _added(tmp_path / "dense") == []


# The hub


@pytest.fixture
def uploaded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, bytes]]:
    """The files of each commit that transformers sends to owner/name, which is new."""
    commits: list[dict[str, bytes]] = []

    def create_commit(_: HfApi, *, operations: list[Any], **__: Any) -> None:
        commits.append({each.path_in_repo: Path(each.path_or_fileobj).read_bytes() for each in operations})

    def no_card(*_: Any, **__: Any) -> ModelCard:
        raise EntryNotFoundError("there is none")

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: SimpleNamespace(repo_id="owner/name"))
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(ModelCard, "load", no_card)
    return commits


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
@pytest.mark.parametrize("card", [None, "---\nlicense: mit\n---\n# A card that is there\n"])
def test_a_push_is_one_commit_of_a_whole_folder(
    way: str,
    card: str | None,
    packed: Path,
    tmp_path: Path,
    uploaded: list[dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A card that the hub has stays; what transformers makes where there is none gives way to the checkpoint's."""
    if card is not None:
        monkeypatch.setattr(ModelCard, "load", lambda *_, **__: ModelCard(card))
    model = _load(packed)
    if way == "push_to_hub":
        model.push_to_hub("owner/name")
    else:
        model.save_pretrained(tmp_path / "name", push_to_hub=True)
        assert all((tmp_path / "name" / name).read_bytes() == content for name, content in uploaded[0].items())
    (files,) = uploaded
    assert {*ADDED, "config.json", "generation_config.json", "model.safetensors"} == set(files)
    assert files["README.md"] == ((packed / "README.md").read_bytes() if card is None else card.encode())
    record = json.loads(files["macko.json"])
    assert {key: value for key, value in record.items() if key != "files"} == _without_list(packed)
    assert set(record["files"]) <= set(files)


def test_tags_of_a_push_come_to_the_card(packed: Path, uploaded: list[dict[str, bytes]]) -> None:
    _load(packed).push_to_hub("owner/name", tags=["mine", "macko"])
    card = ModelCard(uploaded[0]["README.md"].decode())
    assert card.data.tags == ["macko", "pruned", "sparse", "mine"]
    assert card.text == ModelCard((packed / "README.md").read_text()).text


def test_what_a_folder_of_the_hubs_cache_lacks_is_not_asked_for_in_loading(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only in saving; and a hub that does not give it is no error."""
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("c" * 40)
    copy_model(packed, snapshot)
    for name in ADDED:
        (snapshot / name).unlink()
    asked: list[tuple[Any, ...]] = []

    def give(repository: str, name: str, *, revision: str, cache_dir: str, subfolder: str | None) -> None:
        asked.append((repository, name, revision, Path(cache_dir), subfolder))
        raise OSError("no network")

    monkeypatch.setattr("macko_llm.saving.hf_hub_download", give)
    model = _load(snapshot)
    assert asked == []
    model.save_pretrained(tmp_path / "saved")
    assert asked == [("owner/name", name, "c" * 40, tmp_path, None) for name in ADDED]
    assert _added(tmp_path / "saved") == []
