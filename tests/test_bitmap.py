"""What is the bitmap's alone: its bytes, against a naive reader, and which instructions read it (else test_cpu_layouts.py)."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_ops import HALVES, assert_within_rounding, sparse
from torch import Tensor

from macko_llm import native
from macko_llm.errors import NativeError
from macko_llm.layouts import bitmap, canonical
from macko_llm.layouts.bitmap import BitmapMatrix

pytestmark = pytest.mark.usefixtures("instructions")


def arrange(weight: Tensor) -> BitmapMatrix:
    return bitmap.arrange(canonical.pack(weight))


@pytest.mark.parametrize("dtype", HALVES)
def test_the_bytes_are_values_bits_and_starts(dtype: torch.dtype) -> None:
    weight = sparse(7, 45, 0.5, dtype)
    weight[2, 44], weight[3] = 1, 0
    matrix = arrange(weight)
    data, kept = matrix.data.numpy(), weight != 0
    count = int(kept.sum())
    ends = [64 * -(-nbytes // 64) for nbytes in ((count + 32) * 2, 7 * 2 * 4, 8 * 4)]
    assert len(data) == sum(ends)
    assert np.array_equal(data[: 2 * count].view(np.int16), weight[kept].view(torch.int16).numpy())
    bits = np.unpackbits(data[ends[0] : ends[0] + 7 * 8].reshape(7, 8), axis=1, bitorder="little")
    assert np.array_equal(bits[:, :45], kept.numpy())
    assert not bits[:, 45:].any()
    starts = data[ends[0] + ends[1] :][: 8 * 4].view(np.int32)
    assert starts.tolist() == [0, *kept.sum(1).cumsum(0).tolist()]
    assert (matrix.count, matrix.smallest) == (count, int(weight[kept].abs().view(torch.int16).min()))


def test_zeros_that_bridge_nothing_are_left_out() -> None:
    """They are valid, though `pack` writes none."""
    packed = canonical.pack(torch.ones(2, 8, dtype=torch.float16))
    packed.values[3], packed.values[9] = 0.0, -0.0
    matrix = bitmap.arrange(canonical.validate(packed, "it"))
    assert matrix.count == 14
    assert torch.equal(matrix.dense(), packed.dense())


def test_full_words_of_rows_that_are_else_empty() -> None:
    weight = torch.zeros(5, 1000, dtype=torch.bfloat16)
    for row, count in enumerate([16, 17, 24, 31, 32]):
        weight[row, 480 : 480 + count] = torch.randn(count).bfloat16()
    x = torch.randn(1, 1000).bfloat16()
    assert_within_rounding(arrange(weight).linear(x, None), x, weight, None)


def test_the_environment_names_instructions_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: SimpleNamespace(macko_cpu_instructions=lambda: 1))
    monkeypatch.setattr(native, "INSTRUCTIONS", ("portable", "avx2", "avx512"))
    for name, number in (("portable", 0), ("avx2", 1), ("", 1)):
        monkeypatch.setenv("MACKO_CPU", name)
        native.cpu_instructions.cache_clear()
        assert native.cpu_instructions() == number
    for name in ("avx512", "AVX2", "neon"):
        monkeypatch.setenv("MACKO_CPU", name)
        native.cpu_instructions.cache_clear()
        with pytest.raises(NativeError, match=f"^MACKO_CPU is '{name}'; here it can be portable or avx2, or unset\\.$"):
            native.cpu_instructions()
