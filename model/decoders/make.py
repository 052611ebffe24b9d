"""Makes the decoder of a shape: `GPT` for the shapes that it computes, else transformers' own
module."""

from collections.abc import Iterator
from typing import assert_never

from torch import Tensor

from model import gpt
from model.config import GPTConfig, Shape
from model.decoder import Decoder
from model.decoders import adapted, foreign
from model.foreign_config import ForeignConfig


def new_decoder(shape: Shape) -> Decoder:
    """Returns a decoder without weights, of parameters on torch's default device, or `meta`."""
    match shape:
        case GPTConfig():
            return gpt.GPT(shape)
        case ForeignConfig(adapter=None):
            return foreign.ForeignModel(shape)
        case ForeignConfig():
            return adapted.AdaptedModel(shape)
        case _:
            assert_never(shape)


def initial_weights(shape: Shape, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yields fresh weights, one parameter after the other, which depend on the seed alone."""
    match shape:
        case GPTConfig():
            return gpt.initial_weights(shape, seed)
        case ForeignConfig(adapter=None):
            return foreign.initial_weights(shape, seed)
        case ForeignConfig():
            return adapted.initial_weights(shape, seed)
        case _:
            assert_never(shape)
