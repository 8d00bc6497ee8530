"""A naive second opinion on the tiled layout (csrc/cuda/tiled.cuh): an encoder and decoders, against which kernels are held."""

import ctypes

import numpy as np
import torch
from sliced_reference import divided_up, patterns
from torch import Tensor

from macko_llm.layouts.tiled import TiledMatrix
from macko_llm.layouts.tiled_plan import TiledPlan
from macko_llm.native import TiledStruct

# Where each position of a tile of 8 x 64 lies: in which step of 16 columns, in which of its mask words, at which place of the
# values there, which is four for each of eight lanes, and at which bit, which is eight for each of a lane's four columns.
_ROW, _COLUMN = np.meshgrid(np.arange(8), np.arange(64), indexing="ij")
_STEP = _COLUMN // 32 * 2 + _COLUMN % 8 // 4
_WORD = _ROW // 2
_LANE = _ROW % 2 * 4 + _COLUMN % 32 // 8
_PLACE = _LANE * 4 + _COLUMN % 4
_BIT = _COLUMN % 4 * 8 + _LANE
_VALUE_ORDER = np.lexsort((_PLACE.ravel(), _WORD.ravel(), _STEP.ravel()))
"""Positions of a tile in the order in which their values lie."""


def cut_rows(rows: int, strips: int) -> list[range]:
    """The tiles of each strip: as many as they can be alike, the longer strips first."""
    tiles = np.array_split(np.arange(divided_up(rows, 8)), strips)
    return [range(int(part[0]), int(part[-1]) + 1) for part in tiles]


def pairs(tiles: int) -> list[slice]:
    """The tiles of each head: two, or the last one alone."""
    return [slice(first, min(first + 2, tiles)) for first in range(0, tiles, 2)]


def in_order(of_words: np.ndarray, pair: slice) -> np.ndarray:
    """A head's part of [tiles, words, steps]: [halves][words][tiles][steps of a half]."""
    part = of_words[pair]
    return np.ascontiguousarray(part.reshape(len(part), 4, 2, 2).transpose(2, 1, 0, 3))


def encode_record(tiles: np.ndarray) -> bytes:
    """A record of [tiles, 8, 64] bit patterns, up to a multiple of 16 bytes."""
    masks, offsets = np.zeros((len(tiles), 4, 4), np.uint32), np.zeros((len(tiles), 4, 4), np.uint16)
    values: list[int] = []
    for tile, bits in enumerate(tiles):
        nonzero = (bits & 0x7FFF) != 0
        np.bitwise_or.at(masks[tile], (_WORD, _STEP), nonzero.astype(np.uint32) << _BIT.astype(np.uint32))
        for step in range(4):
            for word in range(4):
                offsets[tile, word, step] = 2 * len(values)
                here = _VALUE_ORDER[(step * 4 + word) * 32 :][:32]
                values += bits.ravel()[here][nonzero.ravel()[here]].tolist()
    heads = [in_order(part, pair).tobytes() for pair in pairs(len(tiles)) for part in (masks, offsets)]
    record = b"".join(heads) + np.array(values, np.uint16).tobytes()
    return record + bytes(-len(record) % 16)


def encode(weight: Tensor, strips: int) -> tuple[bytes, np.ndarray]:
    """All records of a matrix with at least one row, and [records + 1] starts in 16 bytes."""
    rows, cols = weight.shape
    padded = np.zeros((divided_up(rows, 8) * 8, divided_up(cols, 64) * 64), np.uint16)
    padded[:rows, :cols] = patterns(weight)
    tiles = padded.reshape(len(padded) // 8, 8, -1, 64).transpose(0, 2, 1, 3)
    records = [
        encode_record(tiles[[*strip], panel]) for strip in cut_rows(rows, strips) for panel in range(tiles.shape[1])
    ]
    return b"".join(records), np.cumsum([0, *(len(record) // 16 for record in records)])


def decode_record(record: np.ndarray, count: int) -> np.ndarray:
    """[count, 8, 64] bit patterns of a record: each position looks its value up by itself."""
    masks, offsets = np.zeros((count, 4, 4), np.uint32), np.zeros((count, 4, 4), np.uint16)
    for pair in pairs(count):
        here = pair.stop - pair.start
        head = record[pair.start * 96 : pair.stop * 96]
        for half in range(2):
            for word in range(4):
                for tile in range(here):
                    for step in range(2):
                        at = ((half * 4 + word) * here + tile) * 2 + step
                        place = pair.start + tile, word, half * 2 + step
                        masks[place] = head[at * 4 : at * 4 + 4].view(np.uint32)[0]
                        offset = here * 64 + at * 2
                        offsets[place] = head[offset : offset + 2].view(np.uint16)[0]
    values = record[count * 96 :].view(np.uint16)
    bits_of_places = np.arange(32, dtype=np.uint32) % 4 * 8 + np.arange(32, dtype=np.uint32) // 4
    bits = masks[..., None] >> bits_of_places & 1
    before = np.cumsum(bits, axis=-1) - bits
    assert (offsets % 2 == 0).all()
    places = offsets[:, _WORD, _STEP] // 2 + before[:, _WORD, _STEP, _PLACE]
    is_there = bits[:, _WORD, _STEP, _PLACE] == 1
    assert sorted(places[is_there]) == [*range(int(bits.sum()))]  # each value belongs to one position
    assert len(record) == divided_up(count * 96 + 2 * int(bits.sum()), 16) * 16
    return np.where(is_there, values[np.where(is_there, places, 0)] if len(values) else 0, 0).astype(np.uint16)


def decode_arrays(records: np.ndarray, starts: np.ndarray, rows: int, cols: int, strips: int) -> np.ndarray:
    """The [rows, cols] bit patterns of a matrix; what lies beyond its rows and columns must be empty."""
    panels = divided_up(cols, 64)
    assert starts[0] == 0
    assert len(starts) == strips * panels + 1
    weight = np.zeros((divided_up(rows, 8) * 8, panels * 64), np.uint16)
    for strip, tiles in enumerate(cut_rows(rows, strips)):
        for panel in range(panels):
            index = strip * panels + panel
            record = records[int(starts[index]) * 16 : int(starts[index + 1]) * 16]
            part = decode_record(record, len(tiles)).reshape(-1, 64)
            weight[tiles.start * 8 : tiles.stop * 8, panel * 64 : panel * 64 + 64] = part
    assert not weight[rows:].any()
    assert not weight[:, cols:].any()
    return weight[:rows, :cols]


def decode(buffer: np.ndarray, plan: TiledPlan) -> np.ndarray:
    """The [rows, cols] bit patterns of a matrix's buffer."""
    count = plan.strips * divided_up(plan.cols, 64) + 1
    starts = buffer[len(buffer) - count * 4 :].view(np.uint32)
    longest = int(np.diff(starts.astype(np.int64)).max()) * 16
    assert plan.record_bytes == divided_up(longest, 128) * 128
    return decode_arrays(buffer, starts, plan.rows, plan.cols, plan.strips)


def decode_struct(matrix: TiledMatrix) -> np.ndarray:
    """The bit patterns of a matrix in the CPU's memory, of which only the struct is known."""
    struct = TiledStruct.from_address(matrix.address)
    count = struct.strips * divided_up(struct.cols, 64) + 1
    starts = np.array((ctypes.c_uint32 * count).from_address(struct.starts))
    records = np.array((ctypes.c_uint8 * (int(starts[-1]) * 16)).from_address(struct.records))
    return decode_arrays(records, starts, struct.rows, struct.cols, struct.strips)


def make(weight: Tensor, strips: int) -> TiledMatrix:
    """A matrix in the CPU's memory, where nothing multiplies it."""
    records, starts = encode(weight, strips)
    longest = int(np.diff(starts).max())
    plan = TiledPlan.of((weight.shape[0], weight.shape[1]), weight.dtype, strips, int(starts[-1]), longest)
    buffer = np.zeros(plan.nbytes, np.uint8)
    buffer[: len(records)] = np.frombuffer(records, np.uint8)
    buffer[plan.starts_offset :] = np.frombuffer(starts.astype(np.uint32).tobytes(), np.uint8)
    return TiledMatrix(torch.from_numpy(buffer), plan)
