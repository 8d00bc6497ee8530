"""`macko bench spmv` on a GPU, end to end, and its timing."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from macko_llm.benchmarks import timing
from macko_llm.cli.main import app
from macko_llm.layouts.choice import TILED_CAPABILITY


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_one_small_shape(cuda: torch.device, dtype: str) -> None:
    """Two million weights: small, and yet few enough copies of them fill the L2 several times."""
    arguments = ["--device", str(cuda), "--shape", "1024x2048", "--sparsity", "0.5", "--tokens", "1,4,16"]
    result = CliRunner().invoke(app, ["bench", "spmv", *arguments, "--dtype", dtype, "--json"])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    conditions = content["conditions"]
    assert conditions["device"] == torch.cuda.get_device_name(cuda)
    assert conditions["cuda"] == torch.version.cuda
    assert conditions["l2_bytes"] > 0
    assert conditions["read_gigabytes_per_second"] > 10
    assert [case["tokens"] for case in content["cases"]] == [1, 4, 16]
    several = "tiled" if torch.cuda.get_device_capability(cuda) >= TILED_CAPABILITY else "sliced"
    assert [case["layout"] for case in content["cases"]] == ["sliced", several, several]
    for case in content["cases"]:
        assert case["dense"]["timing"]["cuda_graph"] is True
        assert case["csr"]["dtype"] in (dtype, "float32")  # bfloat16 needs a newer GPU
        for name in ("dense", "csr", "macko"):
            method = case[name]
            assert 0 < method["relative_error"] < (2e-3 if dtype == "float16" else 1.2e-2)
            assert method["timing"]["microseconds"] > 0
            assert method["copies"] * method["nbytes"] >= conditions["rotation_bytes"]
            assert method["timing"]["replays"] >= 15


def test_the_layout_that_is_asked_for(cuda: torch.device) -> None:
    asked = "tiled" if torch.cuda.get_device_capability(cuda) >= TILED_CAPABILITY else "sliced"
    arguments = ["--device", str(cuda), "--shape", "512x512", "--sparsity", "0.5", "--layout", asked, "--tokens", "1,2"]
    result = CliRunner().invoke(app, ["bench", "spmv", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    assert [case["layout"] for case in json.loads(result.stdout)["cases"]] == [asked, asked]


@pytest.mark.usefixtures("cuda")
def test_table_and_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    arguments = ["--device", "cuda", "--shape", "512x512", "--sparsity", "0.3,0.9", "--plot", str(tmp_path / "x.png")]
    result = CliRunner().invoke(app, ["bench", "spmv", *arguments])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(torch.cuda.get_device_name())
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_graph_holds_every_call(cuda: torch.device) -> None:
    """Each call adds to a counter: three times before the replays, and in every one of them."""
    counters = [torch.zeros((), dtype=torch.int64, device=cuda) for _ in range(3)]
    measured = timing.measure([functools.partial(counter.add_, 1) for counter in counters], cuda)
    assert measured.cuda_graph is True
    assert measured.graph_failure is None
    replayed = (timing.WARMUP_REPLAYS + timing.REPLAYS) * measured.launches // len(counters)
    assert [int(counter) for counter in counters] == [replayed + 3] * len(counters)


def test_time_is_that_of_one_launch(cuda: torch.device) -> None:
    """A million clock cycles last 200 us or more, for no GPU runs at 5 GHz; less would be a division by too much."""
    assert timing.measure([lambda: torch.cuda._sleep(1_000_000)] * 2, cuda).microseconds >= 200


@pytest.mark.parametrize("wait", [torch.Tensor.item, lambda _: torch.cuda.synchronize()])
def test_what_cannot_be_captured_is_timed_and_said(cuda: torch.device, wait: Callable[[torch.Tensor], object]) -> None:
    """Nothing is left of a capture that failed: the next succeeds, and the current stream is what it was."""
    x = torch.ones(1000, device=cuda)
    measured = timing.measure([lambda: wait(x.sum())], cuda)
    assert measured.cuda_graph is False
    assert measured.graph_failure
    assert measured.microseconds > 0
    assert timing.measure([x.sum], cuda).cuda_graph is True
    assert torch.cuda.current_stream(cuda) == torch.cuda.default_stream(cuda)
    torch.cuda.empty_cache()
