"""`macko bench spmv` on the CPU: what it says, that its figures agree with each other, and how it refuses."""

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_plain
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from macko_llm.benchmarks import machine, plots, timing, weights
from macko_llm.benchmarks.spmv import LLAMA_2_7B, SPARSITIES, TOKENS, Case, Conditions, Method, SpmvReport
from macko_llm.cli.bench_spmv import parse_shape, parse_tokens
from macko_llm.cli.main import app
from macko_llm.cli.options import parse_list, parse_sparsity
from macko_llm.linear import MackoLinear, arrange_group

CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--shape", "96x160", "--sparsity", "0.5"]


def macko(*arguments: object, exit_code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["bench", "spmv", *map(str, arguments)])
    assert result.exit_code == exit_code, result.output
    return result


WHOLE_READ_BYTES = machine.READ_BYTES["cpu"]


@pytest.fixture(scope="module", autouse=True)
def _small_measurements() -> Iterator[None]:
    """Fewer copies of weights are made, and less memory is read, than makes figures true; one test asks for the memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "MAX_COPIES", 32)
        patch.setitem(machine.READ_BYTES, "cpu", 2**20)
        yield


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    arguments = ["--device", "cpu", "--shape", "96x160,64x300", "--shape", "33x172", "--tokens", "1,3", "--json"]
    content = json.loads(macko(*arguments, "--sparsity", "0", "--sparsity", "0.5").stdout)
    assert isinstance(content, dict)
    return content


def test_every_combination_is_a_case(report: dict[str, Any]) -> None:
    found = [(case["rows"], case["cols"], case["sparsity"], case["tokens"]) for case in report["cases"]]
    shapes = [(96, 160), (64, 300), (33, 172)]
    assert found == [(*shape, sparsity, tokens) for shape in shapes for sparsity in (0.0, 0.5) for tokens in (1, 3)]


def test_json_names_the_conditions(report: dict[str, Any]) -> None:
    conditions = report["conditions"]
    assert (conditions["device"], conditions["dtype"], conditions["torch"]) == ("cpu", "float16", torch.__version__)
    assert conditions["driver"] is conditions["l2_bytes"] is None
    assert conditions["threads"] == torch.get_num_threads()
    assert conditions["read_gigabytes_per_second"] > 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", conditions["date"])
    assert report["command"] == (
        "macko bench spmv --shape 96x160,64x300,33x172 --sparsity 0.0,0.5 --tokens 1,3 --dtype float16 --device cpu"
        " --layout auto"
    )


def test_figures_agree_with_each_other(report: dict[str, Any]) -> None:
    for case in report["cases"]:
        rows, cols, tokens = case["rows"], case["cols"], case["tokens"]
        dense, packed = case["dense"], case["macko"]
        assert dense["nbytes"] == rows * cols * 2
        # The CPU's layout: values with 32 more behind them, a bit a column, starts of rows, each filled up to 64 bytes.
        values = rows * (cols - int(cols * case["sparsity"])) + 32
        arrays = values * 2, rows * -(-cols // 32) * 4, (rows + 1) * 4
        assert packed["nbytes"] == sum(-(-nbytes // 64) * 64 for nbytes in arrays)
        assert case["bytes_moved"] == packed["nbytes"] + tokens * (rows + cols) * 2
        seconds = packed["timing"]["microseconds"] / 1e6
        assert case["gigabytes_per_second"] == pytest.approx(case["bytes_moved"] / seconds / 1e9)
        assert case["bandwidth_share"] == pytest.approx(
            case["gigabytes_per_second"] / case["read_gigabytes_per_second"]
        )
        assert case["speedup"] == pytest.approx(dense["timing"]["microseconds"] / packed["timing"]["microseconds"])


def test_each_case_names_the_layout_of_its_packed_layers(report: dict[str, Any]) -> None:
    assert {case["layout"] for case in report["cases"]} == {"bitmap"}


def test_numbers_of_tokens_that_layers_are_arranged_alike_for_share_their_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a choice like a GPU's, of two layouts that a CPU has: the order of the first of each stays."""

    def arrange(layer: MackoLinear) -> None:
        if layer.layout == "tiled" or (layer.layout == "auto" and layer.tokens > 1):
            arrange_group([layer])

    monkeypatch.setattr(MackoLinear, "arrange", arrange)
    for layout, expected in (("auto", [[1], [2, 8]]), ("tiled", [[1, 2, 8]]), ("sliced", [[1, 2, 8]])):
        assert weights.in_layouts((8, 64), 0.5, torch.float16, CPU, layout, [1, 2, 8]) == expected
    sets = weights.make_weight_sets(
        (8, 64), 0.5, torch.float16, CPU, csr_dtype=None, rotation_bytes=1, layout="auto", tokens=8
    )
    assert {weights.layout_name(layer) for layer in sets.packed} == {"bitmap"}


def test_a_layout_that_unpacks_for_so_many_tokens_is_said() -> None:
    few = weights.packed_layer(torch.ones(4, 64, dtype=torch.float16)).packed.few_tokens(torch.float16)
    said = macko(*SMALL, "--tokens", f"{few},{few + 1}").stdout
    assert said.count(f"A bitmap layer is unpacked to multiply more than {few} tokens") == 1
    assert "unpacked" not in macko(*SMALL, "--tokens", few).stdout


def test_methods_are_as_right_as_their_dtype(report: dict[str, Any]) -> None:
    """A wrong product is off by about 1; rounding the result to float16 costs about 2e-4."""
    for case in report["cases"]:
        for name in ("dense", "csr", "macko"):
            method = case[name]
            if method is None:  # this build of torch has no CSR product
                continue
            assert 0 < method["relative_error"] < (1e-6 if method["dtype"] == "float32" else 1e-3)
            assert method["timing"]["cuda_graph"] is False
            assert method["timing"]["replays"] >= 15


def test_what_small_shapes_mean_is_said(report: dict[str, Any]) -> None:
    for case in report["cases"]:
        assert case["macko"]["copies"] == weights.MAX_COPIES
        assert any("caches" in note for note in case["notes"])


def test_table(tmp_path: Path) -> None:
    said = macko(*SMALL, "--dtype", "bfloat16", "--tokens", 1, "--tokens", "2").stdout
    assert re.match(r"cpu, \d+ threads?, torch .*, bfloat16, [\d.]+( to [\d.]+)? GB/s read", said)
    number = r"\*?[\d.]+"
    for tokens in (1, 2):
        row = rf"96 x 160 +50\.0% +{tokens} +bf16( +{number}){{3}}( +({number}|-)){{2}} +{number}( +{number}x){{2}}.* 17\.79 kB"
        assert re.search(row, said), said
    assert re.search(rf"geometric mean +bf16 +{number}x +{number}x +{number}%", said), said
    assert "--dtype bfloat16" in said
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def both() -> dict[str, Any]:
    content = json.loads(macko(*SMALL, "--dtype", "bfloat16,float16", "--shape", "64x300", "--json").stdout)
    assert isinstance(content, dict)
    return content


def test_packed_in_each_dtype_meets_dense_in_all(both: dict[str, Any]) -> None:
    assert [(case["rows"], case["dtype"]) for case in both["cases"]] == [
        (rows, dtype) for rows in (96, 64) for dtype in ("bfloat16", "float16")
    ]
    for case in both["cases"]:
        assert case["dense"]["dtype"] == case["macko"]["dtype"] == case["dtype"]
        methods = [case["dense"], *case["dense_others"]]
        assert {method["dtype"] for method in methods} == {"float32", "bfloat16", "float16"}
        size = {"float32": 4, "bfloat16": 2, "float16": 2}
        for method in methods:
            assert method["nbytes"] == case["rows"] * case["cols"] * size[method["dtype"]]
            # Rounding y costs up to half a unit of its last place, of 24, 8 or 11 bits.
            assert 0 < method["relative_error"] < {"float32": 1e-6, "bfloat16": 4e-3, "float16": 1e-3}[method["dtype"]]
        fastest = min(method["timing"]["microseconds"] for method in methods)
        assert case["speedup_over_fastest"] == pytest.approx(fastest / case["macko"]["timing"]["microseconds"])


def test_means_are_geometric_over_the_cases_of_a_dtype(both: dict[str, Any]) -> None:
    assert [means["dtype"] for means in both["means"]] == ["bfloat16", "float16"]
    for means in both["means"]:
        for name in ("speedup", "speedup_over_fastest", "bandwidth_share"):
            first, second = (case[name] for case in both["cases"] if case["dtype"] == means["dtype"])
            assert means[name] == pytest.approx((first * second) ** 0.5)


def test_scipy_multiplies_the_same_matrix() -> None:
    pytest.importorskip("scipy", reason="needs scipy")
    weight = weights.random_pruned((30, 70), 0.5, torch.float16, torch.Generator().manual_seed(0))
    csr = weights.scipy_csr(weights.to_csr(weight, torch.float32))
    for tokens in (1, 3):
        x = torch.randn(tokens, 70)
        torch.testing.assert_close(weights.scipy_product(x, csr), x @ weight.float().t(), rtol=1e-4, atol=1e-4)


def test_without_scipy_a_note_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    assert macko(*SMALL).stdout.count("SciPy is not installed") == 1


def test_the_read_bandwidth_is_of_memory_that_is_far_larger_than_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time is that of the bytes it says: with a clock of 1 s a call, all of them in a second."""
    monkeypatch.setitem(machine.READ_BYTES, "cpu", WHOLE_READ_BYTES)
    monkeypatch.setattr(machine, "measure", lambda rotation, _: timing.Timing(1e6, 1, len(rotation), False))
    assert machine.read_bandwidth(CPU) == pytest.approx(machine.READ_BYTES["cpu"] / 1e9)
    assert machine.READ_BYTES["cpu"] >= 512 * 2**20


def test_plot(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image", reason="needs matplotlib")
    several = ["--sparsity", "0.75", "--shape", "64x64", "--tokens", "1,4"]
    for name, more in (("sparsities.png", ["--sparsity", "0.75"]), ("tokens.PNG", several)):
        macko(*SMALL, *more, "--plot", tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        pixels = image.imread(tmp_path / name, format="png")
        assert pixels.shape[0] > 300
        assert pixels.shape[1] > 600
        assert pixels[..., :3].std() > 0.01  # not a blank page


def _case(shape: tuple[int, int], sparsity: float, tokens: int, speedup: float) -> Case:
    def method(microseconds: float) -> Method:
        return Method(timing.Timing(microseconds, 1, 1, True), 100, 2, 1e-4, "float16")

    return Case(
        *(*shape, sparsity, tokens, "float16", "tiled", method(10 * speedup), (), method(50), None, method(10)),
        *(100, 1.0, 1000.0, 0.5, speedup, speedup, ()),
    )


def test_the_plot_of_tokens_has_a_line_a_shape_and_one_of_dense(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    figure = pytest.importorskip("matplotlib.figure", reason="needs matplotlib").Figure
    drawn = []
    monkeypatch.setattr(figure, "savefig", lambda self, path: drawn.append((self, path)))
    speedups = {((64, 8), 0.5): [2.0, 1.5], ((32, 8), 0.5): [1.0, 0.5], ((64, 8), 0.7): [3.0, 2.5]}
    cases = [
        _case(shape, sparsity, tokens, speedup)
        for (shape, sparsity), both in speedups.items()
        for tokens, speedup in reversed([*zip((1, 8), both, strict=True)])
    ]
    conditions = Conditions("a GPU", None, None, "2", "1", 1, 1000.0, "today", "float16", 1, 1)
    plots.plot_spmv(SpmvReport(conditions, tuple(cases), ()), tmp_path / "speed.png")
    [(made, path)] = drawn
    assert path == tmp_path / "speed.png"
    assert [axes.get_title() for axes in made.axes] == ["50% sparse", "70% sparse"]
    for axes, sparsity in zip(made.axes, (0.5, 0.7), strict=True):
        lines = {line.get_label(): [list(values) for values in line.get_data()] for line in axes.lines}
        assert lines.pop("dense")[1] == [1, 1]
        assert lines == {
            f"{rows} x {cols}": [[1, 8], both] for ((rows, cols), of), both in speedups.items() if of == sparsity
        }


def test_a_plot_without_matplotlib_is_refused_before_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = macko(*SMALL, "--plot", tmp_path / "speed.png", exit_code=2)
    assert "pip install matplotlib" in result.stderr
    assert_plain(result.stderr.removeprefix("macko: ").removesuffix("\n"))
    assert (result.stdout, list(tmp_path.iterdir())) == ("", [])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "4096"], "'4096' is not a shape"),
        (["--shape", "0x8"], "'0x8' is not a shape"),
        (["--shape", "8x-8"], "'8x-8' is not a shape"),
        (["--shape", "8x8,"], "'' is not a shape"),
        (["--shape", "65536x65536"], "more than"),
        (["--sparsity", "half"], "'half' is not a sparsity"),
        (["--sparsity", "0.5,1"], "outside [0, 1)"),
        (["--sparsity", "nan"], "outside [0, 1)"),
        (["--sparsity=-0.1"], "outside [0, 1)"),
        (["--tokens", "0"], "'0' is not a number of tokens"),
        (["--tokens", "1,2.5"], "'2.5' is not a number of tokens"),
        (["--dtype", "float32"], "float16 or bfloat16"),
        (["--dtype", "float16,float64"], "float16 or bfloat16"),
        (["--dtype", "float16,bfloat16", "--plot", "speed.png"], "a single --dtype"),
        (["--device", "nowhere"], "nowhere"),
        (["--layout", "spiral"], "There is no layout 'spiral'"),
        (["--layout", "tiled", "--device", "cpu"], "an NVIDIA GPU's, and this runs on cpu"),
        (["--plot", "speed.pdf"], ".png"),
        (["--plot", "no/such/folder/speed.png"], "no/such/folder"),
    ],
)
def test_wrong_calls_are_one_sentence(arguments: list[str], words: str) -> None:
    if "--plot" in arguments:
        pytest.importorskip("matplotlib", reason="needs matplotlib")
    result = macko(*arguments, exit_code=2)
    sentence = result.stderr.splitlines()[-1]
    assert sentence.startswith("macko: ")
    assert words in sentence
    assert_plain(sentence.removeprefix("macko: "))
    assert result.stdout == ""


def test_help_shows_an_example() -> None:
    said = macko("--help").stdout
    assert "macko bench spmv" in said.split("Examples:")[1]


def test_lists() -> None:
    assert parse_list(["4096x11008, 8X9", "4096x11008"], parse_shape) == [(4096, 11008), (8, 9)]
    assert parse_list(["0.5", "0,.25"], parse_sparsity) == [0.5, 0.0, 0.25]
    assert parse_list(["1,2,4", "16"], parse_tokens) == [1, 2, 4, 16]
    assert parse_list(None, parse_tokens) == []
    assert parse_list([",".join(map(str, TOKENS["cuda"]))], parse_tokens) == list(TOKENS["cuda"])
    assert parse_list([f"{rows}x{cols}" for rows, cols in LLAMA_2_7B], parse_shape) == list(LLAMA_2_7B)
    assert parse_list([",".join(map(str, SPARSITIES))], parse_sparsity) == list(SPARSITIES)


# What is measured


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 300),
    sparsity=st.floats(0, 1, exclude_max=True),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_rows_have_exactly_their_zeros(rows: int, cols: int, sparsity: float, dtype: torch.dtype) -> None:
    weight = weights.random_pruned((rows, cols), sparsity, dtype, torch.Generator().manual_seed(0))
    assert (weight.shape, weight.dtype) == ((rows, cols), dtype)
    assert ((weight == 0).sum(dim=1) == int(cols * sparsity)).all()


def test_zeros_lie_anywhere() -> None:
    weight = weights.random_pruned((400, 50), 0.5, torch.float16, torch.Generator().manual_seed(0))
    share = (weight == 0).double().mean(dim=0)
    assert ((share - 0.5).abs() < 0.15).all()  # six standard deviations


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 40), cols=st.integers(1, 100), tokens=st.integers(1, 3), sparsity=st.floats(0, 0.95))
def test_csr_is_the_same_matrix(rows: int, cols: int, tokens: int, sparsity: float) -> None:
    if weights.csr_dtype(torch.float32, CPU) is None:
        pytest.skip("this build of torch has no CSR product")
    generator = torch.Generator().manual_seed(0)
    weight = weights.random_pruned((rows, cols), sparsity, torch.float16, generator)
    csr = weights.to_csr(weight, torch.float32)
    assert csr.crow_indices().dtype == csr.col_indices().dtype == torch.int32
    assert torch.equal(csr.to_dense(), weight.float())
    stored = csr.values().numel()
    assert weights.weight_bytes(csr) == stored * (4 + 4) + (rows + 1) * 4
    x = torch.randn(tokens, cols, generator=generator)
    torch.testing.assert_close(weights.csr_product(x, csr), x @ weight.float().t(), rtol=1e-4, atol=1e-4)


def test_each_method_goes_round_enough_weights() -> None:
    """Every set adds up to the bytes asked for with not one copy too many, and all begin with the same weight."""
    wanted = 100_000
    sets = weights.make_weight_sets((64, 128), 0.5, torch.float16, CPU, csr_dtype=torch.float32, rotation_bytes=wanted)
    for copies in (sets.dense, sets.csr, sets.packed):
        each = weights.weight_bytes(copies[0])
        assert (len(copies) - 1) * each < wanted <= len(copies) * each
    assert len(sets.packed) > len(sets.dense)
    for dense, csr, packed in zip(sets.dense, sets.csr, sets.packed, strict=False):
        assert isinstance(packed, MackoLinear)
        assert torch.equal(csr.to_dense(), dense.float())
        torch.testing.assert_close(packed(torch.eye(128, dtype=torch.float16)), dense.t())
    assert not torch.equal(sets.dense[0], sets.dense[1])


def test_weight_sets_have_limits() -> None:
    def copies(rotation_bytes: int) -> list[int]:
        sets = weights.make_weight_sets((2, 8), 0.5, torch.float16, CPU, csr_dtype=None, rotation_bytes=rotation_bytes)
        return [len(sets.dense), len(sets.csr), len(sets.packed)]

    assert copies(1) == [weights.MIN_COPIES, 0, weights.MIN_COPIES]
    assert copies(2**30) == [weights.MAX_COPIES, 0, weights.MAX_COPIES]


def test_time_is_that_of_one_call() -> None:
    """Sleeping never takes less than asked for: a time of half of it would divide by too much."""
    calls: list[int] = []

    def call(number: int) -> None:
        calls.append(number)
        time.sleep(0.002)

    measured = timing.measure([lambda: call(0), lambda: call(1), lambda: call(2)], CPU)
    assert measured.microseconds >= 2000
    assert (measured.replays, measured.cuda_graph, measured.graph_failure) == (timing.REPLAYS, False, None)
    assert measured.launches % 3 == 0
    assert calls == [0, 1, 2] * (len(calls) // 3)


def test_fast_calls_share_a_replay() -> None:
    measured = timing.measure([lambda: None], CPU)
    assert measured.launches == timing.MIN_LAUNCHES
    assert measured.replays >= 15
