"""Which parameters of any module are matrices of its layers, by names and shapes alone."""

from raymill.rules.hidden_matrix import HiddenMatrix, hidden_matrices_by_name


def test_two_sided_parameters_of_layers_are_matrices_and_nothing_else_is() -> None:
    shapes = {
        "embedding.weight": (7, 3),
        "0.weight": (3, 5),
        "blocks.11.mlp.weight": (5, 3),
        "blocks.11.mlp.bias": (5,),
        "blocks.11.convolution.weight": (2, 3, 4),
    }
    matrices = hidden_matrices_by_name(shapes)
    assert matrices == {
        "0.weight": HiddenMatrix((3, 5), 0, (3,)),
        "blocks.11.mlp.weight": HiddenMatrix((5, 3), 0, (5,)),
    }
    assert matrices["0.weight"].piece_shapes == [(3, 5)]
