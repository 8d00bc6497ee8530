"""A pruning job whose journal or files were damaged is refused, and begins anew without --resume."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_plain
from resume_helpers import BLOCKS, cut_off, partial_folder, quick_recipe, run_job, with_settings, write_model_and_text

from macko_llm.errors import MackoError
from macko_llm.pruning.journal import JOURNAL_FILE
from macko_llm.recipe import PruneRecipe


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_and_text(tmp_path_factory.mktemp("resume"))


@pytest.fixture
def recipe(here: Path) -> PruneRecipe:
    return quick_recipe(here)


def _edited(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda content: {**content, **changes}


def _without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda content: {key: value for key, value in content.items() if key != name}


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no object": lambda _: [1, 2],
    "no job": _without("job"),
    "unknown key": _edited(more=1),
    "a job that is none": _edited(job="wanda"),
    "a job without a recipe": lambda content: {**content, "job": _without("recipe")(content["job"])},
    "a recipe that is none": lambda content: {**content, "job": {**content["job"], "recipe": 3}},
    "versions that are none": lambda content: {**content, "job": {**content["job"], "versions": None}},
    "blocks in words": _edited(blocks="three"),
    "blocks below zero": _edited(blocks=-1),
    "more blocks than written": _edited(blocks=BLOCKS),
    "amounts that are none": _edited(amounts=[0.5]),
    "amounts of other layers": _edited(amounts={"lm_head": 0.5}),
    "amounts in words": _edited(amounts={"lm_head": "half"}),
    "zeros that are none": _edited(zeros=[]),
    "zeros of no layer": _edited(zeros={}),
    "zeros in words": _edited(zeros={"model.layers.0.mlp.up_proj": "many"}),
    "seconds in words": _edited(seconds="long"),
    "a sink that is none": _edited(sink=[]),
    "an empty sink": _edited(sink={}),
    "a sink of numbers": _edited(sink={"model.norm.weight": 7}),
    "a sink of other entries": _edited(sink={"model.norm.weight": {"shard": 1}}),
    "a sink of words": _edited(
        sink={"model.norm.weight": {"shard": "1", "dtype": "F16", "shape": [32], "begin": 0, "end": 64}}
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_journal_is_refused(
    damage: Callable[[dict[str, Any]], Any], here: Path, tmp_path: Path, recipe: PruneRecipe
) -> None:
    cut_off(here, tmp_path / "out", recipe, 2)
    file = partial_folder(tmp_path / "out") / JOURNAL_FILE
    file.write_text(json.dumps(damage(json.loads(file.read_text()))))
    _assert_damaged(here, tmp_path / "out", recipe)


def _assert_damaged(here: Path, target: Path, recipe: PruneRecipe, packed: bool = False) -> None:
    with pytest.raises(MackoError, match="is damaged; drop --resume to begin again") as caught:
        run_job(here, target, recipe, packed, resume=True)
    assert_plain(str(caught.value))
    run_job(here, target, recipe, packed)


@pytest.mark.parametrize("packed", [False, True])
def test_a_truncated_journal_is_refused(packed: bool, here: Path, tmp_path: Path, recipe: PruneRecipe) -> None:
    cut_off(here, tmp_path / "out", recipe, 2, packed=packed)
    file = partial_folder(tmp_path / "out") / JOURNAL_FILE
    file.write_text(file.read_text()[:-50])
    _assert_damaged(here, tmp_path / "out", recipe, packed)


@pytest.mark.parametrize(
    "change",
    [
        {"packed": {}},
        {"packed": []},
        {"packed": {"layers": {"model.layers.0.mlp.up_proj": {}}, "bytes_dense": 0, "bytes_packed": 0, "rounding": {}}},
        {"shards": []},
        {"packed": {"layers": {}, "bytes_dense": 0, "bytes_packed": 0, "rounding": {}}},
    ],
)
def test_a_damaged_journal_of_a_packed_checkpoint_is_refused(
    change: dict[str, Any], here: Path, tmp_path: Path, recipe: PruneRecipe
) -> None:
    cut_off(here, tmp_path / "out", recipe, 2, packed=True)
    file = partial_folder(tmp_path / "out") / JOURNAL_FILE
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "sink": {**content["sink"], **change}}))
    _assert_damaged(here, tmp_path / "out", recipe, packed=True)


@pytest.mark.parametrize("damage", ["gone", "short"])
def test_blocks_that_are_no_longer_there_are_not_made_up(
    damage: str, here: Path, tmp_path: Path, recipe: PruneRecipe
) -> None:
    how = with_settings(recipe, method="magnitude")  # which reads no block again
    cut_off(here, tmp_path / "out", how, 2)
    file = partial_folder(tmp_path / "out") / "shard-00001.part"
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:1000])
    _assert_damaged(here, tmp_path / "out", how)
