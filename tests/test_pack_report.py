"""How a report puts layers together."""

import pytest

from macko_llm.pack_report import KindReport, LayerReport, PackReport


def test_layers_of_a_kind_are_those_of_one_place_in_all_blocks() -> None:
    def layer(rows: int, sparsity: float) -> LayerReport:
        return LayerReport(rows, 10, sparsity, 0, 20 * rows, 11 * rows, True)

    layers = {
        "model.layers.0.mlp.experts.0.up_proj": layer(1, 0.2),
        "model.layers.0.mlp.experts.1.up_proj": layer(3, 0.6),
        "model.layers.10.mlp.experts.0.up_proj": layer(4, 0.5),
        "model.decoder.layers.3.fc1": layer(2, 0.7),
        "lm_head": layer(5, 0.0),
    }
    kinds = PackReport("float16", 0, 0, layers, 0.0).kinds
    assert list(kinds) == ["mlp.experts.*.up_proj", "fc1", "lm_head"]
    assert kinds["mlp.experts.*.up_proj"] == KindReport(3, 160, 88, pytest.approx((0.2 + 3 * 0.6 + 4 * 0.5) / 8))
    assert kinds["lm_head"] == KindReport(1, 100, 55, 0.0)
