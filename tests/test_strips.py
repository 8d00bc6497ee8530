"""What is the strips' alone: their bytes, against a naive reader, and which matrices get them (else test_cpu_layouts.py)."""

import numpy as np
import pytest
import torch
from test_cpu_layouts import threads
from test_ops import HALVES, sparse
from torch import Tensor

from macko_llm import native
from macko_llm.errors import NativeError
from macko_llm.layouts import bitmap, canonical, strips
from macko_llm.layouts.bitmap import BitmapMatrix
from macko_llm.layouts.strips import StripsMatrix
from macko_llm.linear import MackoLinear

pytestmark = pytest.mark.usefixtures("instructions")


def make(weight: Tensor) -> StripsMatrix:
    return strips.make(bitmap.arrange(canonical.pack(weight)))


def pruned(rows: int, cols: int, sparsity: float, dtype: torch.dtype) -> Tensor:
    """Rows that are alike, as pruning leaves them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, cols, generator=generator)
    return (weight * (torch.rand(rows, cols, generator=generator) >= sparsity)).to(dtype)


def arranged(weight: Tensor) -> StripsMatrix | None:
    """As on one thread, for which any number of rows is enough."""
    with threads(1):
        return strips.arrange(bitmap.arrange(canonical.pack(weight)))


@pytest.mark.parametrize("dtype", HALVES)
def test_the_bytes_are_groups_lengths_rows_and_starts(dtype: torch.dtype) -> None:
    """Read by a loop that follows csrc/macko.h, which finds the rows sorted."""
    rows, cols = 300, 200
    weight = sparse(rows, cols, 0.9, dtype)
    matrix = make(weight)
    data = matrix.data.numpy()
    sizes = [matrix.groups * 96, 2 * 2 * 16, 2 * 2 * 256, 3 * 8]
    ends = np.cumsum([64 * -(-size // 64) for size in sizes]).tolist()
    assert len(data) == ends[3]
    lengths = data[ends[0] : ends[0] + sizes[1]].reshape(2, 2, 16)
    ids = data[ends[1] : ends[1] + sizes[2]].reshape(2, 2, 16, 16)
    starts = data[ends[2] : ends[2] + sizes[3]].view(np.int64)
    assert (np.diff(lengths.astype(int), axis=2) <= 0).all()
    assert starts.tolist() == [0, int(lengths[0].sum()), int(lengths.sum())]
    read, at = torch.zeros(512, 256, dtype=torch.int16), 0
    for chunk, strip, tile in np.ndindex(2, 2, 16):
        for _ in range(lengths[chunk, strip, tile]):
            group = data[at * 96 : at * 96 + 96]
            values = group[32:].view(np.int16)
            for slot in range(32):
                row = ids[chunk, strip, tile, slot // 2 if dtype == torch.bfloat16 else slot % 16]
                if values[slot]:
                    read[chunk * 256 + int(row), strip * 128 + int(group[slot])] = int(values[slot])
            at += 1
    assert torch.equal(read[:rows, :cols], (weight + 0.0).view(torch.int16))
    assert not read[rows:].any()
    assert not read[:, cols:].any()
    assert (matrix.count, matrix.smallest) == (int((weight != 0).sum()), make(weight[weight != 0][:, None]).smallest)


def test_rows_between_chunks_are_refused() -> None:
    matrix = make(sparse(600, 10, 0.5, torch.float16))
    for first, count in ((1, 599), (0, 300), (256, 300), (512, 89)):
        with pytest.raises(NativeError, match="refused its arguments"):
            matrix.unpack_rows(first, torch.empty(count, 10, dtype=torch.float16))


# Which matrices become strips


@pytest.mark.parametrize("dtype", HALVES)
def test_strips_are_for_sparse_matrices_with_avx512(dtype: torch.dtype, instructions: str) -> None:
    kinds = [arranged(pruned(1024, 1024, sparsity, dtype)) for sparsity in (0.5, 0.8, 0.9, 0.95)]
    assert [kind is not None for kind in kinds] == [False, False, *([instructions == "avx512"] * 2)]


def test_strips_take_hardly_more_memory_than_the_bitmap() -> None:
    """Wherever rows are even, and wherever they are not."""
    for weight in (pruned(512, 512, 0.93, torch.float16), sparse(512, 512, 0.95, torch.float16)):
        bits, matrix = bitmap.arrange(canonical.pack(weight)), arranged(weight)
        assert matrix is None or matrix.data.nbytes <= 1.05 * bits.data.nbytes
    assert arranged(pruned(8, 64, 0.95, torch.float16)) is None  # room for 256 rows


def test_strips_that_would_take_too_much_memory_are_planned_and_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    filled = []
    monkeypatch.setattr(native, "cpu_strips_fill", lambda *structs: filled.append(structs))
    weight = pruned(1024, 1024, 0.87, torch.float16)
    assert (
        3 * int(weight.count_nonzero()) < 1.05 * bitmap.arrange(canonical.pack(weight)).data.nbytes
    )  # but for padding
    assert arranged(weight) is None
    assert not filled


def test_threads_do_not_idle_for_want_of_chunks(instructions: str) -> None:
    bits = bitmap.arrange(canonical.pack(pruned(512, 1024, 0.95, torch.float16)))
    found = []
    for count in (2, 3):
        with threads(count):
            found.append(strips.arrange(bits) is not None)
    assert found == [instructions == "avx512", False]


def test_a_layer_is_arranged_in_strips_and_its_state_is_canonical(instructions: str) -> None:
    weight = pruned(1024, 512, 0.95, torch.bfloat16)
    packed = canonical.pack(weight)
    layer = MackoLinear.from_matrix(packed, torch.randn(1024).bfloat16())
    with threads(1):
        layer.arrange()
    assert type(layer.packed) is (StripsMatrix if instructions == "avx512" else BitmapMatrix)
    state = layer.state_dict()
    for name in ("values", "deltas", "row_offsets"):
        assert torch.equal(state["weight_" + name], getattr(packed, name))
    x = torch.randn(3, 512, requires_grad=True)
    y = layer(x)
    upstream = torch.randn(3, 1024)
    y.backward(upstream)
    assert torch.equal(x.grad, upstream @ weight.float())
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        assert torch.equal(compiled(x.detach().bfloat16()), layer(x.detach().bfloat16()))
