"""`macko prune`, `pack`, `unpack` and `inspect`: what they write, say of it, and leave alone in a dry run."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli_helpers import calibrated, macko, macko_json, write_models_and_texts
from helpers import quiet_transformers, weights

from macko_llm.cli.console import megabytes

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models_and_texts(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def _in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(folder)
    with quiet_transformers():
        yield


def test_prune(tmp_path: Path) -> None:
    content = macko_json("prune", "dense", "-o", tmp_path / "out", *calibrated())
    assert {"sparsity", "layers", "seconds", "calibration_sha256"} <= content.keys()
    assert content["sparsity"] == 0.5
    assert content["layers"][UP] == 0.5
    assert len(content["layers"]) == 14
    assert re.fullmatch(r"[0-9a-f]{64}", content["calibration_sha256"])
    record = json.loads((tmp_path / "out" / "macko.json").read_text())["prune"]
    assert (record["method"], record["nsamples"], record["seqlen"]) == ("wanda", 4, 24)
    result = macko("prune", "dense", "-o", tmp_path / "out", "--method", "magnitude", "--overwrite")
    assert re.fullmatch(r"Pruned 14 layers to 50\.0% sparsity with magnitude in .* s: .*out\n", result.stdout)
    assert "pruning blocks: 0/2" in result.stderr.splitlines()


def test_pack_and_unpack(tmp_path: Path) -> None:
    packed, dense = tmp_path / "packed", tmp_path / "dense"
    content = macko_json("pack", "pruned", "-o", packed)
    assert {"bytes_dense", "bytes_packed", "layers", "kept_dense", "seconds"} <= content.keys()
    assert content["bytes_packed"] == sum(tensor.nbytes for tensor in weights(packed).values()) < content["bytes_dense"]
    assert content["layers"][UP] == {
        "rows": 160,
        "cols": 64,
        "sparsity": 0.5,
        "entries": 160 * 32,
        "bytes_dense": 160 * 64 * 2,
        "bytes_packed": 160 * 32 * 5 // 2 + 161 * 4,
        "packed": True,
    }
    said = macko("pack", "pruned", "-o", packed, "--overwrite", "--dtype", "bfloat16").stdout
    assert re.fullmatch(
        r"Packed .* into .* \(1\.\d\dx smaller, 50\.0% sparsity\): .*packed\n"
        r"\d+ weights of \d+ tensors were rounded to bfloat16, by 0\.0\d+ of .*\n",
        said,
    )
    macko("pack", "pruned", "-o", packed, "--overwrite")
    content = macko_json("unpack", packed, "-o", dense)
    assert content["bytes_dense"] == (dense / "model.safetensors").stat().st_size
    assert all(torch.equal(tensor, weights(dense)[name]) for name, tensor in weights(Path("pruned")).items())
    assert macko("unpack", packed, "-o", dense, "--overwrite").stdout.startswith("Unpacked ")


def test_closing_lines_and_cards_name_update_and_allocation(tmp_path: Path) -> None:
    pruned, packed = tmp_path / "pruned", tmp_path / "packed"
    said = macko("prune", "dense", "-o", pruned, *calibrated("--update", "admm", "--allocation", "owl")).stdout
    assert re.fullmatch(r"Pruned 14 layers to 50\.\d% sparsity with wanda \+ admm, owl in .* s: .*pruned\n", said)
    macko("pack", pruned, "-o", packed)
    assert "(pruned by wanda + admm, owl)" in (packed / "README.md").read_text()
    assert "pruned by: wanda + admm, owl;" in macko("inspect", packed).stdout


def test_pack_says_what_stays_dense(tmp_path: Path) -> None:
    content = macko_json("pack", "dense", "-o", tmp_path / "packed")
    assert content["kept_dense"] == list(content["layers"])
    said = macko("pack", "dense", "-o", tmp_path / "packed", "--overwrite").stdout
    assert "All layers stay dense, because packing would make them larger; prune the model first" in said


def test_a_dry_run_of_pack_weighs_each_kind_of_layer_as_packing_does() -> None:
    content = macko_json("pack", "pruned", "--dry-run")
    assert (content["output"], content["dry_run"]) == (None, True)
    kinds = content["kinds"]
    projections = [f"self_attn.{name}_proj" for name in "qkvo"] + [
        f"mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    assert list(kinds) == projections
    dense, packed = weights(Path("pruned")), weights(Path("packed"))
    for kind, found in kinds.items():
        tensors = [tensor for name, tensor in dense.items() if name.endswith(f"{kind}.weight")]
        assert found["layers"] == len(tensors) == 2
        assert found["bytes_dense"] == sum(tensor.nbytes for tensor in tensors)
        assert found["bytes_packed"] == sum(tensor.nbytes for name, tensor in packed.items() if f".{kind}." in name)
        assert found["sparsity"] == torch.cat([(tensor == 0).float().flatten() for tensor in tensors]).mean().item()
    table = macko("pack", "pruned", "--dry-run").stdout
    assert re.search(r"mlp\.up_proj +2 +40\.96 kB +26\.89 kB +1\.52x +50\.0%", table)
    rest = sum(tensor.nbytes for name, tensor in dense.items() if not name.endswith("_proj.weight"))
    assert re.search(rf"all other tensors +{megabytes(rest)} +{megabytes(rest)} +1\.00x", table)
    whole = [megabytes(sum(tensor.nbytes for tensor in tensors.values())) for tensors in (dense, packed)]
    assert re.search(rf"total +14 +{whole[0]} +{whole[1]} +1\.\d\dx +50\.0%", table)
    assert table.splitlines()[-1].startswith(f"Would pack {whole[0]} into {whole[1]} (")
    assert macko("pack", "pruned", exit_code=2).stderr == (
        "macko: There is no folder to write; give -o OUT, or --dry-run to see only how large it would be.\n"
    )


def test_inspect() -> None:
    content = macko_json("inspect", "packed")
    assert content["valid"] is True
    assert content["layers"] == macko_json("pack", "pruned", "-o", "unused", "--dry-run")["layers"]
    assert content["provenance"]["prune"]["method"] == "magnitude"
    table = macko("inspect", "packed").stdout
    assert re.search(rf"{UP} +160 x 64 +50\.0% +20\.48 kB +13\.44 kB", table)
    assert "14 of 14 layers packed as float16" in table
    assert "Every packed matrix is valid, every other tensor finite, and the files hold the whole model." in table


def test_dry_runs_write_nothing(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    planned = macko_json("prune", "dense", "-o", "unused", "--dry-run", "--sparsity", 0.7)
    assert planned["layers"][UP] == [160, 64]
    assert planned["sparsity"] == pytest.approx(0.7, abs=0.02)
    assert "nothing was written" in macko("prune", "dense", "-o", "unused", "--dry-run").stdout
    assert macko_json("pack", "pruned", "-o", "unused", "--dry-run")["dry_run"] is True
    assert "Would pack" in macko("pack", "pruned", "-o", "unused", "--dry-run").stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
