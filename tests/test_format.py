"""The format, byte by byte: golden bytes, docs/format.md itself, and a naive packer in plain Python that shares no code.

`format.py` (the specification in torch) and the native library behind `ops` must agree with it everywhere. Values are
compared as 16-bit patterns.
"""

import random
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from macko_llm import format as spec
from macko_llm import native
from macko_llm.errors import FormatError, NonFiniteError
from macko_llm.format import MackoMatrix, packed_nbytes, validate
from macko_llm.layouts import canonical

DOCUMENT = (Path(__file__).parents[1] / "docs" / "format.md").read_text(encoding="utf-8")
DTYPES = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80}  # and the bits of its infinity
SPECIAL = [0x0001, 0x8001, 0x8000]  # smallest subnormal of either sign, -0.0
SPANS = {"format": spec.row_spans, "native": native.cpu_row_spans}

Bits = list[list[int]]
Packer = tuple[Callable[[torch.Tensor], MackoMatrix], Callable[[MackoMatrix], torch.Tensor]]


def packer_with(instructions: int) -> Packer:
    """The library's packing, with a set of instructions that this CPU has."""

    def pack(weight: torch.Tensor) -> MackoMatrix:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "cpu_instructions", lambda: instructions)
            return canonical.pack(weight)

    return pack, canonical.unpack


PACKERS: dict[str, Packer] = {"format": (spec.pack, spec.unpack)} | {
    name: packer_with(number)
    for number, name in enumerate(native.INSTRUCTIONS[: native.library().macko_cpu_instructions() + 1])
}


def naive_pack(rows: Bits) -> tuple[bytes, bytes, bytes]:
    """Walk over each row counting skipped zeros; a zero that would be the 16th in a row becomes an entry."""
    entries: list[tuple[int, int]] = []
    starts = [0]
    for row in rows:
        last = max((column for column, bits in enumerate(row) if bits & 0x7FFF), default=-1)
        skipped = 0
        for bits in row[: last + 1]:
            zero = not bits & 0x7FFF
            if zero and skipped < 15:
                skipped += 1
            else:
                entries.append((0 if zero else bits, skipped))
                skipped = 0
        starts.append(len(entries))
    entries += [(0, 0)] * (-len(entries) % 8)
    deltas = bytes(entries[i][1] + 16 * entries[i + 1][1] for i in range(0, len(entries), 2))
    return (
        struct.pack(f"<{len(entries)}H", *(bits for bits, _ in entries)),
        deltas,
        struct.pack(f"<{len(starts)}i", *starts),
    )


def naive_unpack(values: list[int], deltas: bytes, starts: list[int], cols: int) -> Bits:
    weight = [[0] * cols for _ in starts[1:]]
    for row, (begin, end) in enumerate(pairwise(starts)):
        column = -1
        for entry in range(begin, end):
            nibble = deltas[entry // 2] // 16 if entry % 2 else deltas[entry // 2] % 16
            column += nibble + 1
            weight[row][column] = values[entry]
    return weight


def tensor_of(bits: Bits, cols: int, dtype: torch.dtype) -> torch.Tensor:
    signed = torch.tensor([b - 0x10000 if b > 0x7FFF else b for row in bits for b in row], dtype=torch.int16)
    return signed.reshape(len(bits), cols).view(dtype)


def bits_of(tensor: torch.Tensor) -> list:
    return (tensor.view(torch.int16).to(torch.int32) & 0xFFFF).tolist()


def bytes_of(matrix: MackoMatrix) -> tuple[bytes, bytes, bytes]:
    arrays = (matrix.values.view(torch.int16), matrix.deltas, matrix.row_offsets)
    return tuple(array.numpy().tobytes() for array in arrays)  # type: ignore[return-value]


def without_negative_zero(bits: Bits) -> Bits:
    return [[0 if b == 0x8000 else b for b in row] for row in bits]


def random_bits(infinity: int, rng: random.Random) -> int:
    return rng.choice([*SPECIAL, infinity - 1, 0x8000 | infinity - 1, rng.randrange(infinity), rng.randrange(infinity)])


def make_row(style: str, cols: int, infinity: int, rng: random.Random) -> list[int]:
    if style == "empty":
        return [rng.choice([0, 0x8000]) for _ in range(cols)]
    if style == "full":
        return [rng.randrange(1, infinity) for _ in range(cols)]
    if style == "gaps":
        row = [0] * cols
        column = -1
        while (column := column + 1 + rng.choice([0, 14, 15, 16, 17, 30, 31, 32, 47, 48])) < cols:
            row[column] = rng.randrange(1, infinity)
        return row
    density = rng.choice([0.01, 0.05, 0.3, 0.5, 0.9])
    return [random_bits(infinity, rng) if rng.random() < density else 0 for _ in range(cols)]


@st.composite
def weights(draw: st.DrawFn) -> tuple[Bits, int, torch.dtype]:
    dtype = draw(st.sampled_from(list(DTYPES)))
    cols = draw(st.sampled_from([1, 8, 15, 16, 17, 31, 32, 33, 172, 300]) | st.integers(1, 300))
    styles = draw(st.lists(st.sampled_from(["empty", "full", "gaps", "random", "random"]), max_size=40))
    rng = random.Random(draw(st.integers(0, 2**32)))
    return [make_row(style, cols, DTYPES[dtype], rng) for style in styles], cols, dtype


@given(weights())
@settings(max_examples=300, deadline=None)
def test_packing_matches_the_naive_packer_byte_for_byte(weight: tuple[Bits, int, torch.dtype]) -> None:
    bits, cols, dtype = weight
    expected = naive_pack(bits)
    dense = without_negative_zero(bits)
    tensor = tensor_of(bits, cols, dtype)
    for pack, unpack in PACKERS.values():
        matrix = pack(tensor)
        assert bytes_of(matrix) == expected
        assert matrix.shape == (len(bits), cols)
        assert matrix.values.dtype == dtype
        assert matrix.nbytes == sum(map(len, expected)) == packed_nbytes(len(bits), int(matrix.row_offsets[-1]))
        assert bits_of(unpack(matrix)) == dense
        for spans in SPANS.values():
            validate(matrix, row_spans=spans)
            assert spans(matrix.deltas, matrix.row_offsets).tolist() == [
                max((column + 1 for column, b in enumerate(row) if b), default=0) for row in dense
            ]


@pytest.mark.parametrize(
    ("gap", "deltas"),
    [(0, [0]), (14, [14]), (15, [15]), (16, [15, 0]), (17, [15, 1]), (31, [15, 15]), (32, [15, 15, 0]), (47, [15] * 3)],
)
@pytest.mark.parametrize("packer", PACKERS)
def test_gaps_around_a_bridge(packer: str, gap: int, deltas: list[int]) -> None:
    pack, unpack = PACKERS[packer]
    weight = torch.zeros(1, gap + 3, dtype=torch.float16)
    weight[0, gap] = 2.0
    matrix = pack(weight)
    stored = len(deltas)
    assert matrix.row_offsets.tolist() == [0, stored]
    assert matrix.values.tolist() == [0.0] * (stored - 1) + [2.0] + [0.0] * (8 - stored)
    nibbles = [nibble for byte in matrix.deltas.tolist() for nibble in (byte & 15, byte >> 4)]
    assert nibbles == deltas + [0] * (8 - stored)
    assert torch.equal(unpack(matrix), weight)


@pytest.mark.parametrize("packer", PACKERS)
def test_golden_example(packer: str) -> None:
    weight = torch.zeros(1, 32, dtype=torch.float16)
    weight[0, 31] = 1.0
    matrix = PACKERS[packer][0](weight)
    assert bytes_of(matrix) == (
        bytes.fromhex("0000 003c") + bytes(12),
        bytes([0xFF, 0, 0, 0]),
        bytes([0] * 4 + [2, 0, 0, 0]),
    )


def documented_examples() -> list[dict[str, list[str]]]:
    examples = []
    for block in re.findall(r"```example\n(.*?)```", DOCUMENT, flags=re.DOTALL):
        fields: dict[str, list[str]] = {}
        for line in block.splitlines():
            key, *rest = line.split(maxsplit=1)
            fields.setdefault(key, []).append("".join(rest))
        examples.append(fields)
    return examples


@pytest.mark.parametrize("example", documented_examples(), ids=lambda example: example["shape"][0])
def test_examples_of_the_document(example: dict[str, list[str]]) -> None:
    rows, _, cols, dtype_name = example["shape"][0].split()
    weight = torch.tensor([[float(number) for number in row.split()] for row in example["weight"]])
    weight = weight.to(getattr(torch, dtype_name))
    assert weight.shape == (int(rows), int(cols))
    golden = tuple(bytes.fromhex(example[array][0]) for array in ("values", "deltas", "row_offsets"))
    assert naive_pack(bits_of(weight)) == golden
    for pack, unpack in PACKERS.values():
        assert bytes_of(pack(weight)) == golden
        assert torch.equal(unpack(pack(weight)), weight)


def test_the_document_has_its_examples() -> None:
    assert {"1 x 32 float16", "2 x 6 float16", "3 x 17 bfloat16"} <= {e["shape"][0] for e in documented_examples()}


@given(weights())
@settings(max_examples=30, deadline=None)
def test_code_of_the_document(weight: tuple[Bits, int, torch.dtype]) -> None:
    bits, cols, dtype = weight
    namespace: dict[str, Callable] = {}
    for block in re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL):
        exec(block, namespace)
    numbers = tensor_of(bits, cols, dtype).tolist()
    values, deltas, row_offsets = namespace["pack"](numbers)
    matrix = spec.pack(tensor_of(bits, cols, dtype))
    assert (values, deltas, row_offsets) == (
        matrix.values.tolist(),
        matrix.deltas.tolist(),
        matrix.row_offsets.tolist(),
    )
    assert namespace["unpack"](values, deltas, row_offsets, len(bits), cols) == numbers


def test_sizes_of_the_document() -> None:
    table = re.findall(r"^\| (\d+) % \| (\d+\.\d+) \| (\d+) % \|$", DOCUMENT, flags=re.MULTILINE)
    assert len(table) >= 10
    rows, cols = 64, 8192  # wide, because the zeros after a row's last nonzero cost nothing
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(rows, cols, generator=generator)
    for sparsity, bits, share in table:
        density = 1 - int(sparsity) / 100
        formula = 20 * density / (1 - (1 - density) ** 16)
        assert bits == f"{formula:.2f}"
        assert share == f"{formula / 16:.0%}".removesuffix("%")
        matrix = canonical.pack((uniform < density).to(torch.float16))
        measured = matrix.nbytes * 8 / (rows * cols)
        assert measured == pytest.approx(formula + 32 / cols, rel=0.02)
        if sparsity != "20":
            assert (measured < 16) == (int(sparsity) > 20)


@st.composite
def loose_arrays(draw: st.DrawFn) -> tuple[MackoMatrix, int]:
    """Arrays of the right types and lengths, filled with anything: mostly no valid matrix, never a canonical one."""
    rows = draw(st.integers(1, 5))
    counts = draw(st.lists(st.integers(0, 9), min_size=rows, max_size=rows))
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + count)
    padded = -(-offsets[-1] // 8) * 8
    nibbles = draw(st.lists(st.integers(0, 15), min_size=offsets[-1], max_size=offsets[-1]))
    nibbles += [0] * (padded - len(nibbles))
    values = draw(st.lists(st.sampled_from([0, 0x8000, 0x3C00, 0x0001]), min_size=offsets[-1], max_size=offsets[-1]))
    values += [0] * (padded - len(values))
    matrix = MackoMatrix(
        tensor_of([values], padded, torch.float16)[0],
        torch.tensor([a | b << 4 for a, b in zip(nibbles[0::2], nibbles[1::2], strict=True)], dtype=torch.uint8),
        torch.tensor(offsets, dtype=torch.int32),
        (rows, draw(st.integers(1, 80))),
    )
    return matrix, max(sum(nibbles[a:b]) + b - a for a, b in pairwise(offsets))


@given(loose_arrays())
@settings(max_examples=150, deadline=None)
def test_whatever_validates_unpacks_as_the_naive_reader_does(arrays: tuple[MackoMatrix, int]) -> None:
    matrix, reach = arrays
    for spans in SPANS.values():
        if reach > matrix.shape[1]:
            with pytest.raises(FormatError, match=f"reaches column {reach - 1} of {matrix.shape[1]}"):
                validate(matrix, row_spans=spans)
        else:
            validate(matrix, row_spans=spans)
    wide = replace(matrix, shape=(matrix.shape[0], max(reach, 1)))
    expected = naive_unpack(bits_of(wide.values), bytes(wide.deltas.tolist()), wide.row_offsets.tolist(), wide.shape[1])
    for _, unpack in PACKERS.values():
        assert bits_of(unpack(wide)) == expected


VALID = spec.pack(
    torch.tensor([[1, 0, 0, -2, 0, 0.5], [0, 0, 0, 0, 0, 0], [0, 0, 1.5, 0, 3, 0]], dtype=torch.float16)
)  # 5 entries, deltas 0 2 1 | | 2 1, offsets 0 3 3 5


def put(array: str, index: int, value: float) -> Callable[[MackoMatrix], MackoMatrix]:
    def lie(matrix: MackoMatrix) -> MackoMatrix:
        changed = getattr(matrix, array).clone()
        changed[index] = value
        return replace(matrix, **{array: changed})

    return lie


def become(array: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[MackoMatrix], MackoMatrix]:
    return lambda matrix: replace(matrix, **{array: make(getattr(matrix, array))})


LIES: dict[str, tuple[Callable[[MackoMatrix], MackoMatrix], str]] = {
    "values of another dtype": (become("values", torch.Tensor.float), "values are not float16 or bfloat16"),
    "values in two dimensions": (become("values", lambda v: v.view(2, 4)), "values are not"),
    "deltas of another dtype": (become("deltas", lambda d: d.to(torch.int8)), "deltas are not uint8"),
    "deltas in two dimensions": (become("deltas", lambda d: d.view(2, 2)), "deltas are not"),
    "offsets of another dtype": (become("row_offsets", torch.Tensor.long), r"torch.int64 \[4\], not int32 \[4\]"),
    "too few offsets": (become("row_offsets", lambda o: o[:-1]), r"torch.int32 \[3\], not int32 \[4\]"),
    "too many offsets": (become("row_offsets", lambda o: torch.cat([o, o[-1:]])), r"\[5\], not int32 \[4\]"),
    "offsets in two dimensions": (become("row_offsets", lambda o: o.view(2, 2)), "row offsets are"),
    "no columns": (lambda matrix: replace(matrix, shape=(3, 0)), "shape is 3 x 0"),
    "negative rows": (lambda m: replace(m, shape=(-1, 6), row_offsets=m.row_offsets[:0]), "shape is -1 x 6"),
    "offsets do not start at 0": (put("row_offsets", 0, 1), "start at 1, not 0"),
    "offsets start below 0": (put("row_offsets", 0, -8), "start at -8, not 0"),
    "offsets decrease": (put("row_offsets", 1, 4), "row offsets decrease"),
    "offsets end below 0": (put("row_offsets", 3, -1), "row offsets decrease"),
    "offsets end past the arrays": (put("row_offsets", 3, 9), "8 values for 9 entries, not 16"),
    "offsets end far past the arrays": (put("row_offsets", 3, 2**31 - 1), "8 values for 2147483647 entries"),
    "offsets end before the arrays": (put("row_offsets", 3, 3), "tail of the values"),
    "values too long": (become("values", lambda v: torch.cat([v, v.new_zeros(8)])), "16 values for 5 entries, not 8"),
    "values not padded": (become("values", lambda v: v[:5]), "5 values for 5 entries, not 8"),
    "values of odd length": (become("values", lambda v: v[:7]), "7 values for 5 entries, not 8"),
    "values missing": (become("values", lambda v: v[:0]), "0 values for 5 entries"),
    "deltas too short": (become("deltas", lambda d: d[:3]), "3 bytes of deltas for 8 values"),
    "deltas too long": (become("deltas", lambda d: torch.cat([d, d])), "8 bytes of deltas for 8 values"),
    "tail of the values": (put("values", 5, 1.0), "tail of the values is not zero"),
    "end of the values": (put("values", 7, float("nan")), "tail of the values is not zero"),
    "tail nibble": (put("deltas", 2, 0x11), "tail of the deltas is not zero"),
    "tail byte": (put("deltas", 3, 0x01), "tail of the deltas is not zero"),
    "first row reaches past cols": (put("deltas", 1, 0x22), "row 0 reaches column 6 of 6"),
    "last row reaches past cols": (put("deltas", 1, 0xF1), "row 2 reaches column 17 of 6"),
    "fewer columns than stored": (lambda matrix: replace(matrix, shape=(3, 5)), "row 0 reaches column 5 of 5"),
    "NaN": (put("values", 0, float("nan")), "NaN or infinity"),
    "infinity": (put("values", 4, float("-inf")), "NaN or infinity"),
}


@pytest.mark.parametrize("spans", SPANS)
@pytest.mark.parametrize("lie", LIES)
def test_validate_refuses(lie: str, spans: str) -> None:
    change, message = LIES[lie]
    validate(VALID, row_spans=SPANS[spans])
    with pytest.raises(FormatError, match=rf"blocks\.0\.up is not valid MACKO data \(.*{message}"):
        validate(change(VALID), "blocks.0.up", SPANS[spans])


def test_tail_nibble_of_an_even_number_of_entries() -> None:
    matrix = spec.pack(torch.ones(1, 2, dtype=torch.bfloat16))
    for index in range(1, 4):
        with pytest.raises(FormatError, match="tail of the deltas"):
            validate(put("deltas", index, 0x10)(matrix))
    full = spec.pack(torch.ones(2, 4, dtype=torch.bfloat16))  # no tail at all
    validate(full)
    assert len(full.values) == 8


@pytest.mark.parametrize("packer", PACKERS)
def test_refuses_what_it_cannot_hold(packer: str) -> None:
    pack = PACKERS[packer][0]
    for weight in (
        torch.ones(2, 3),
        torch.ones(2, 3, dtype=torch.float64),
        torch.ones(2, 3, dtype=torch.int16),
        torch.ones(3, dtype=torch.float16),
        torch.ones(1, 2, 3, dtype=torch.float16),
        torch.ones(3, 0, dtype=torch.float16),
    ):
        with pytest.raises(FormatError, match="convert it to a float16 or bfloat16 matrix"):
            pack(weight)
    for dtype in DTYPES:
        for value in (float("nan"), float("inf"), float("-inf")):
            weight = torch.zeros(2, 3, dtype=dtype)
            weight[1, 2] = value
            with pytest.raises(NonFiniteError, match="NaN or infinity"):
                pack(weight)


def test_check_packable_names_the_matrix() -> None:
    with pytest.raises(FormatError, match=r"^blocks\.0\.up is \[2, 3\] torch\.float32; convert"):
        spec.check_packable(torch.ones(2, 3), "blocks.0.up")


def test_too_many_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "MAX_ENTRIES", 5)
    spec.pack(torch.ones(1, 5, dtype=torch.float16))
    with pytest.raises(FormatError, match="1 x 6 matrix with 6 entries does not fit int32 offsets; keep it dense"):
        spec.pack(torch.ones(1, 6, dtype=torch.float16))


@pytest.mark.parametrize("packer", PACKERS)
def test_packs_any_memory_layout(packer: str) -> None:
    weight = torch.randn(6, 40, dtype=torch.bfloat16).relu()
    expected = bytes_of(spec.pack(weight))
    assert bytes_of(PACKERS[packer][0](weight.t().contiguous().t())) == expected
    assert bytes_of(PACKERS[packer][0](torch.cat([weight, weight], dim=1)[:, :40])) == expected
