"""Which layout of a GPU is chosen, and that layers are arranged in it; GPUs and their layouts are stand-ins here."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sliced_reference import LOW, random_matrix
from sliced_reference import make as sliced_group
from tiled_reference import decode
from tiled_reference import make as make_tiled

from macko_llm import linear, native
from macko_llm.defaults import LAYOUTS
from macko_llm.format import MackoMatrix
from macko_llm.layouts import canonical, choice, sliced, tiled
from macko_llm.layouts.bitmap import BitmapMatrix
from macko_llm.layouts.choice import choose
from macko_llm.layouts.sliced import SlicedMatrix
from macko_llm.layouts.tiled import TiledGroup, TiledMatrix
from macko_llm.layouts.tiled_plan import choose_strips
from macko_llm.linear import MackoLinear, arrange_group, group_of
from macko_llm.vllm_plugin.product import arrange

ROWS, COLS = 24, 172
MULTIPROCESSORS = 6
NEW, OLD = (9, 0), (7, 5)


def test_one_token_is_for_slices_and_several_are_for_tiles() -> None:
    for sparsity in (-7.0, 0.0, 0.5, 1.0):  # entries are padded: a tiny matrix has more of them than elements
        assert choose("auto", sparsity, 1, NEW) == "sliced"
        assert choose("auto", sparsity, 6, NEW) == "tiled"
        assert choose("auto", sparsity, 1000, (8, 0)) == "tiled"


def test_thresholds_are_by_sparsity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_TILED_FROM", ((0.5, 2), (0.8, 5), (1.0, 9)))
    least = {
        sparsity: [choose("auto", sparsity, n, NEW) for n in range(20)].index("tiled")
        for sparsity in (0, 0.5, 0.6, 0.8, 0.9)
    }
    assert least == {0: 2, 0.5: 2, 0.6: 5, 0.8: 5, 0.9: 9}


def test_the_table_of_thresholds_has_a_row_for_every_sparsity() -> None:
    limits = [limit for limit, _ in choice._TILED_FROM]
    assert limits == sorted(set(limits))
    assert limits[-1] == 1.0


def test_what_is_asked_for_is_chosen_where_the_gpu_can() -> None:
    for tokens in (1, 8):
        assert [choose(name, 0.5, tokens, NEW) for name in LAYOUTS[1:]] == ["sliced", "tiled"]
        assert {choose(name, 0.5, tokens, OLD) for name in LAYOUTS} == {"sliced"}


def test_a_layout_that_there_is_not_is_refused() -> None:
    sentence = "^layout is 'tield'; it can be auto, sliced or tiled$"
    with pytest.raises(ValueError, match=sentence):
        choose("tield", 0.5, 1, NEW)
    with pytest.raises(ValueError, match=sentence):
        MackoLinear(COLS, ROWS, 8, device="meta", layout="tield")


def test_a_layer_is_for_one_token_in_whatever_layout_unless_told() -> None:
    layer = MackoLinear(COLS, ROWS, 8, device="meta")
    assert (layer.layout, layer.tokens) == ("auto", 1)
    layer = MackoLinear(COLS, ROWS, 8, device="meta", layout="tiled", tokens=8)
    assert (layer.layout, layer.tokens) == ("tiled", 8)


class Gpu:
    """A GPU of a capability, on which layouts are made in the CPU's memory, tiles only if they suit."""

    capability = NEW
    tiles_suit = True

    def tiled(self, matrices: Sequence[MackoMatrix]) -> list[TiledMatrix] | None:
        if not self.tiles_suit:
            return None
        strips = choose_strips([matrix.shape[0] for matrix in matrices], MULTIPROCESSORS)
        return [make_tiled(canonical.unpack(matrix), own) for matrix, own in zip(matrices, strips, strict=True)]

    def unpack_tiles(self, matrix: TiledMatrix) -> torch.Tensor:
        return torch.from_numpy(decode(matrix.data.numpy(), matrix.plan).view(np.int16)).view(matrix.dtype)

    def sliced(self, matrices: Sequence[MackoMatrix]) -> list[SlicedMatrix]:
        weight = torch.cat([canonical.unpack(matrix) for matrix in matrices])
        return sliced_group(weight.dtype, tuple(matrix.shape[0] for matrix in matrices), LOW, 4, weight=weight).members


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    gpu = Gpu()
    monkeypatch.setattr(MackoLinear, "device_type", "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: gpu.capability)
    properties = SimpleNamespace(multi_processor_count=MULTIPROCESSORS)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(tiled, "arrange_group", gpu.tiled)
    monkeypatch.setattr(native, "cuda_tiled_unpack", gpu.unpack_tiles)
    monkeypatch.setattr(sliced, "arrange_group", gpu.sliced)
    return gpu


def make_layers(count: int = 1, *, layout: str = "auto", tokens: int = 1) -> list[MackoLinear]:
    layers = []
    for seed in range(count):
        layer = MackoLinear.from_matrix(canonical.pack(random_matrix(ROWS, COLS, 0.5, torch.float16, seed)))
        layer.layout, layer.tokens = layout, tokens
        layers.append(layer)
    return layers


@pytest.mark.parametrize(
    ("layout", "tokens", "capability", "kind"),
    [
        ("auto", 1, NEW, SlicedMatrix),
        ("auto", 8, NEW, TiledMatrix),
        ("auto", 8, OLD, SlicedMatrix),
        ("sliced", 8, NEW, SlicedMatrix),
        ("tiled", 1, NEW, TiledMatrix),
        ("tiled", 1, OLD, SlicedMatrix),
    ],
)
def test_a_layer_is_arranged_in_its_layout(
    gpu: Gpu, layout: str, tokens: int, capability: tuple[int, int], kind: type
) -> None:
    gpu.capability = capability
    (layer,) = make_layers(layout=layout, tokens=tokens)
    layer.arrange()
    assert type(layer.packed) is kind
    assert layer.weight_layout is layer.packed.data


@pytest.mark.parametrize(
    ("sparsity", "sequences", "capability", "kind"),
    [
        (0.5, 2, NEW, SlicedMatrix),
        (0.5, 3, NEW, TiledMatrix),
        (0.5, 256, NEW, TiledMatrix),
        (0.9, 5, NEW, SlicedMatrix),
        (0.9, 6, NEW, TiledMatrix),
        (0.5, 256, OLD, SlicedMatrix),
    ],
)
def test_vllm_s_number_of_sequences_decides_as_docs_serving_says(
    gpu: Gpu, sparsity: float, sequences: int, capability: tuple[int, int], kind: type
) -> None:
    gpu.capability = capability
    matrix = canonical.pack(random_matrix(ROWS, COLS, sparsity, torch.float16))
    assert type(arrange(matrix, sequences)) is kind


def test_vllm_s_number_of_sequences_decides_nothing_on_a_cpu() -> None:
    matrix = canonical.pack(random_matrix(ROWS, COLS, 0.5, torch.float16))
    assert {type(arrange(matrix, sequences)) for sequences in (1, 3, 256)} == {BitmapMatrix}


@pytest.mark.parametrize(("capability", "most"), [((8, 0), 64), ((9, 0), 1024), ((10, 0), 64), ((12, 0), 64)])
def test_more_than_64_tokens_are_multiplied_packed_on_hopper_alone(
    gpu: Gpu, capability: tuple[int, int], most: int
) -> None:
    gpu.capability = capability
    tiles = make_tiled(random_matrix(ROWS, COLS, 0.5, torch.float16), 2)
    there = replace(tiles, data=SimpleNamespace(is_cuda=True, device="cuda"))
    assert (there.few_tokens(torch.float16), there.few_tokens(torch.float32)) == (most, 0)


def test_a_layer_that_tiles_do_not_suit_is_sliced(gpu: Gpu) -> None:
    gpu.tiles_suit = False
    for count in (1, 3):
        layers = make_layers(count, layout="tiled")
        arrange_group(layers)
        assert {type(layer.packed) for layer in layers} == {SlicedMatrix}


@pytest.mark.usefixtures("gpu")
def test_a_group_shares_its_slices_but_not_its_tiles() -> None:
    for layout, buffers, kind in (("sliced", 1, SlicedMatrix), ("tiled", 3, TiledGroup)):
        layers = make_layers(3, layout=layout)
        arrange_group(layers)
        assert isinstance(group_of(layers), kind)
        assert len({id(layer.packed.data) for layer in layers}) == buffers
        before = [layer.packed for layer in layers]
        arrange_group(layers)  # once more is nothing more
        assert all(layer.packed is packed for layer, packed in zip(layers, before, strict=True))


@pytest.mark.usefixtures("gpu")
def test_tiles_that_were_cut_alone_are_cut_again_for_their_group() -> None:
    layers = make_layers(3, layout="tiled")
    for strips, arranged in ((3, [[layer] for layer in layers]), (2, [layers])):
        for group in arranged:
            arrange_group(group)
        assert [layer.packed.plan.strips for layer in layers] == [strips] * 3
        assert group_of(layers).members == tuple(layer.packed for layer in layers)
        assert group_of(layers).is_cut_together == (strips == 2)


@pytest.mark.usefixtures("gpu")
def test_tiled_layers_with_other_columns_or_dtypes_are_no_group() -> None:
    for other in (random_matrix(ROWS, COLS + 64, 0.5, torch.float16), random_matrix(ROWS, COLS, 0.5, torch.bfloat16)):
        layers = [*make_layers(2, layout="tiled"), MackoLinear.from_matrix(canonical.pack(other))]
        layers[2].layout = "tiled"
        for layer in layers:
            layer.arrange()
        assert group_of(layers) is None
        assert group_of(layers[:2]) is not None
        assert group_of(layers[2:]) is not None


@pytest.mark.usefixtures("gpu")
def test_a_group_of_which_one_is_to_be_tiled_is_arranged_one_by_one() -> None:
    layers = [*make_layers(2), *make_layers(layout="tiled")]
    arrange_group(layers)
    assert [type(layer.packed) for layer in layers] == [SlicedMatrix, SlicedMatrix, TiledMatrix]
    assert group_of(layers[:2]) is None


@pytest.mark.usefixtures("gpu")
def test_the_sparsity_that_decides_is_the_layers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def note(layout: str, sparsity: float, tokens: int, capability: tuple[int, int]) -> str:
        asked.append((layout, sparsity, tokens, capability))
        return "tiled"

    monkeypatch.setattr(linear.choice, "choose", note)
    (layer,) = make_layers(layout="auto", tokens=5)
    share = 1 - int(layer.weight_row_offsets[-1]) / (ROWS * COLS)
    layer.arrange()
    assert asked == [("auto", pytest.approx(share, abs=8 / (ROWS * COLS)), 5, NEW)]
    assert 0.4 < share < 0.6
