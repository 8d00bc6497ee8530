"""Attention of a decoded token at its edges: splits, windows, what must not be read, refusals."""

import math
from typing import Any

import pytest
import torch
from decode_helpers import EPSILON, HALVES, like, normal, normalised, rotated, zeros
from torch import Tensor

from macko_llm import native_decode
from macko_llm.dtypes import CODES
from macko_llm.errors import NativeError
from macko_llm.native_decode import MAX_SPLITS, Attention

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture
def random(cuda: torch.device) -> torch.Generator:
    return torch.Generator(cuda).manual_seed(0)


class Texts:
    """A cache of random keys and values of `texts` texts that end at one slot, and the new token."""

    def __init__(
        self, generator: torch.Generator, dtype: torch.dtype, *, earlier: int, heads: int, kv_heads: int, head_dim: int
    ) -> None:
        device = generator.device
        texts, self.earlier, self.heads, self.kv_heads = 2, earlier, heads, kv_heads
        capacity = earlier + 4
        self.qkv = normal(generator, texts, heads + 2 * kv_heads, head_dim, dtype=dtype)
        self.keys, self.values = (
            normal(generator, texts, kv_heads, capacity, head_dim, dtype=dtype) for _ in ("keys", "values")
        )
        angles = torch.rand(capacity, head_dim // 2, device=device, generator=generator) * 6
        self.cosines, self.sines = (torch.cat((f(angles), f(angles)), dim=-1).to(dtype) for f in (torch.cos, torch.sin))
        self.norm = normal(generator, head_dim, dtype=dtype)
        self.first = torch.tensor([0, earlier // 3], dtype=torch.int32, device=device)
        self.slot = torch.tensor([earlier], dtype=torch.int32, device=device)
        self.scale = head_dim**-0.5

    def attend(self, *, splits: int = 1, window: int = 0, normalise: bool = False) -> Tensor:
        """[texts, heads, head_dim] of the kernel, which leaves this cache alone."""
        texts, kv_heads, capacity, head_dim = self.keys.shape
        keys, values = self.keys.clone(), self.values.clone()
        y = torch.full((texts, self.heads, head_dim), torch.nan, **like(self.qkv))
        partial = torch.full((texts * self.heads * splits * (head_dim + 2),), torch.nan, device=y.device)
        tickets = torch.zeros(texts * self.heads, dtype=torch.int32, device=y.device)
        norms = (self.norm, self.norm) if normalise else (None, None)
        arrays = (self.qkv, keys, values, self.cosines, self.sines, *norms, self.slot, self.first, y, partial, tickets)
        attention = Attention(
            *(None if array is None else array.data_ptr() for array in arrays),
            *(self.scale, EPSILON, texts, self.heads, kv_heads, head_dim, capacity, window, splits),
            CODES[y.dtype],
        )
        native_decode.decode_attention(attention, y)
        torch.cuda.synchronize(y.device)  # the arrays go away
        assert not tickets.any()
        return y

    def rotated_queries(self, *, normalise: bool = False) -> Tensor:
        return self._rotated(self.qkv[:, : self.heads], normalise)

    def expected(self, *, window: int = 0, normalise: bool = False) -> tuple[Tensor, Tensor]:
        """What attention is, in float64, and the largest value of each head by dimension."""
        keys, values = self.keys[:, :, : self.earlier + 1].double(), self.values[:, :, : self.earlier + 1].double()
        new_keys, new_values = self.qkv[:, self.heads :].split(self.kv_heads, dim=1)
        keys[:, :, -1], values[:, :, -1] = self._rotated(new_keys, normalise).double(), new_values.double()
        keys, values = (states.repeat_interleave(self.heads // self.kv_heads, dim=1) for states in (keys, values))
        queries = self.rotated_queries(normalise=normalise).double()
        scores = torch.einsum("thd,thsd->ths", queries, keys) * self.scale
        slots = torch.arange(self.earlier + 1, device=scores.device)
        hidden = slots < self.first[:, None]
        if window:
            hidden |= slots <= self.earlier - window
        # What is hidden may be NaN.
        shares = scores.masked_fill(hidden[:, None], -math.inf).softmax(dim=-1)
        seen = values.masked_fill(hidden[:, None, :, None], 0)
        return torch.einsum("ths,thsd->thd", shares, seen), seen.abs().amax(dim=2)

    def _rotated(self, heads: Tensor, normalise: bool) -> Tensor:
        position = self.earlier - self.first.long()
        turn = [table[position][:, None] for table in (self.cosines, self.sines)]
        return rotated(normalised(heads, self.norm if normalise else None), *turn)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 128), (12, 2, 64), (6, 1, 256), (8, 2, 16)])
@pytest.mark.parametrize(("earlier", "window"), [(3, 0), (60, 0), (60, 20), (4000, 0), (4000, 700)])
def test_any_number_of_splits_attends_to_the_same(
    random: torch.Generator, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, earlier: int, window: int
) -> None:
    """Also more splits than there are slots."""
    texts = Texts(random, dtype, earlier=earlier, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    expected, largest = texts.expected(window=window)
    for splits in (1, 2, 5, 33, MAX_SPLITS):
        y = texts.attend(splits=splits, window=window)
        assert ((y.double() - expected).abs() <= 2 * torch.finfo(dtype).eps * largest).all()


@pytest.mark.parametrize("splits", [1, 3, 16])
@pytest.mark.parametrize("window", [0, 1, 50])
@pytest.mark.parametrize("normalise", [False, True])
def test_slots_that_are_not_seen_are_not_read(
    random: torch.Generator, splits: int, window: int, normalise: bool
) -> None:
    """NaN before a text, behind the new slot, in it, and outside the window: one that is multiplied by 0 would show."""
    texts = Texts(random, torch.float16, earlier=300, heads=8, kv_heads=2, head_dim=64)
    clean = texts.attend(splits=splits, window=window, normalise=normalise)
    for states in (texts.keys, texts.values):
        states[:, :, 300:] = torch.nan
        for text, first in enumerate(texts.first.tolist()):
            states[text, :, : max(first, 301 - window if window else 0)] = torch.nan
    y = texts.attend(splits=splits, window=window, normalise=normalise)
    assert torch.equal(y, clean)
    expected, largest = texts.expected(window=window, normalise=normalise)
    assert ((y.double() - expected).abs() <= 8 * torch.finfo(y.dtype).eps * largest).all()


@pytest.mark.parametrize("splits", [1, 4])
def test_windows_of_one_and_of_more_than_there_is(random: torch.Generator, splits: int) -> None:
    texts = Texts(random, torch.bfloat16, earlier=200, heads=8, kv_heads=2, head_dim=128)
    values = texts.qkv[:, 10:].repeat_interleave(4, dim=1)
    assert torch.equal(texts.attend(splits=splits, window=1), values)
    assert torch.equal(texts.attend(splits=splits, window=201), texts.attend(splits=splits))
    assert torch.equal(texts.attend(splits=splits, window=10_000), texts.attend(splits=splits))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("place", [100, 107, 255, 299, 300])
def test_one_score_far_above_all_others_takes_all(
    random: torch.Generator, dtype: torch.dtype, splits: int, place: int
) -> None:
    """Scores of about +500 and -500, of which a sum of exponentials would overflow; 300 is the new slot."""
    texts = Texts(random, dtype, earlier=300, heads=4, kv_heads=4, head_dim=128)
    texts.scale = 4.0
    queries = texts.rotated_queries()
    texts.keys[:] = -queries[:, :, None]
    texts.qkv[:, 4:8] = texts.qkv[:, :4] * (1 if place == 300 else -1)
    if place < 300:
        texts.keys[:, :, place] = queries
    values = texts.qkv[:, 8:] if place == 300 else texts.values[:, :, place]
    assert torch.equal(texts.attend(splits=splits), values)


@pytest.mark.parametrize(
    "change",
    [
        {"heads": 3},  # no multiple of the 2 heads of keys
        {"heads": 0},
        {"texts": 0},
        {"capacity": 0},
        {"window": -1},
        {"splits": 0},
        {"splits": MAX_SPLITS + 1},
        {"splits": 2, "partial": None},
        {"splits": 2, "tickets": None},
        {"dtype": 2},  # float32
        {"slot": None},
        {"qkv": 8},  # beside a multiple of 16
        {"keys": None},
    ],
    ids=str,
)
def test_attention_refuses_what_makes_no_sense(cuda: torch.device, change: dict[str, int | None]) -> None:
    memory = zeros(cuda, 4096)
    pointers = ["qkv", "keys", "values", "cosines", "sines", "slot", "first", "y", "partial", "tickets"]
    sizes = {"texts": 1, "heads": 2, "kv_heads": 2, "head_dim": 16, "capacity": 4, "splits": 1, "scale": 1.0}
    fields: dict[str, Any] = {**dict.fromkeys(pointers, memory.data_ptr()), **sizes}
    native_decode.decode_attention(Attention(**fields), memory)  # as it is, it is fine: slot 0 of zeros
    if change.get("qkv") is not None:
        change = {"qkv": memory.data_ptr() + 8}
    with pytest.raises(NativeError):
        native_decode.decode_attention(Attention(**{**fields, **change}), memory)
    torch.cuda.synchronize(cuda)
