"""A third architecture is laid out block by block, as GPT-2 and Llama are."""

import pytest

from model.shapes import parameter_shapes
from raymill.state.flat_layout import FlatLayout
from tests.gated_gpt2 import add_gated_gpt2, gated_config


def test_flat_layout__of_a_third_architecture__has_its_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add_gated_gpt2(monkeypatch)
    shapes = parameter_shapes(gated_config(n_layer=12))
    assert "decoder.h.11.mlp.c_up.weight" in shapes
    layout = FlatLayout.of(shapes)
    matrices = [
        name
        for name, place in layout.places.items()
        if ".h." in name and place.stop <= layout.boundary
    ]
    assert len(layout.decoder_blocks) == 12
    assert sum(map(len, layout.decoder_blocks)) >= sum(
        len(layout.places[name]) for name in matrices
    )
