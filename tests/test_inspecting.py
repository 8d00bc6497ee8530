"""What inspecting a packed checkpoint reports, against its files and the report of packing."""

from dataclasses import replace
from pathlib import Path

import pytest
from helpers import copy_model, edit_weights, weights
from packing_helpers import UP, packed_llama
from torch import Tensor

from macko_llm.inspecting import inspect_checkpoint
from macko_llm.linear import ARRAY_NAMES
from macko_llm.packing import pack_checkpoint


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_llama(tmp_path_factory.mktemp("llama"))


def _entries(weight: Tensor) -> int:
    """Stored entries of a matrix: its nonzeros, and one for every 16 columns of a gap between them."""
    count = 0
    for row in weight.tolist():
        previous = -1
        for column, value in enumerate(row):
            if value != 0:
                count += 1 + (column - previous - 1) // 16
                previous = column
    return count


def test_inspect_reports_what_is_inside(llama: Path, tmp_path: Path) -> None:
    pruned = copy_model(llama / "pruned", tmp_path / "pruned")
    edit_weights(pruned, {f"{UP}.weight": weights(pruned)[f"{UP}.weight"].tril(-40)})  # empty rows, long gaps
    packed_report = pack_checkpoint(pruned, tmp_path / "packed")
    report = inspect_checkpoint(tmp_path / "packed")
    assert replace(report, seconds=0) == replace(packed_report, seconds=0)
    dense, stored = weights(pruned), weights(tmp_path / "packed")
    assert report.bytes_dense == sum(tensor.nbytes for tensor in dense.values())
    assert report.bytes_packed == sum(tensor.nbytes for tensor in stored.values())
    zeros = elements = 0
    for name, layer in report.layers.items():
        weight = dense[f"{name}.weight"]
        assert (layer.rows, layer.cols) == weight.shape
        assert layer.sparsity == pytest.approx((weight == 0).float().mean().item())
        assert layer.entries == _entries(weight)
        assert layer.bytes_dense == weight.nbytes
        assert layer.bytes_packed == sum(stored[f"{name}.{array}"].nbytes for array in ARRAY_NAMES)
        zeros, elements = zeros + int((weight == 0).sum()), elements + weight.numel()
    assert report.sparsity == pytest.approx(zeros / elements)


def test_a_dry_run_reports_the_same_and_writes_nothing(llama: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in llama.rglob("*")}
    dry = pack_checkpoint(llama / "pruned", None)
    assert {path: path.stat().st_mtime_ns for path in llama.rglob("*")} == before
    assert replace(dry, seconds=0) == replace(inspect_checkpoint(llama / "packed"), seconds=0)
