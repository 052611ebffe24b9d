"""Says what each choice of `scaling.shard` divides among the workers; nothing else compares these
words."""

from typing import Literal, NamedTuple, assert_never

Shard = Literal["none", "optimizer", "gradients", "parameters"]


class Divided(NamedTuple):
    """The parts of the training state of which each worker keeps only its own values."""

    vectors: bool = False  # those that the optimizer keeps beside the weights
    gradient: bool = False  # while it is summed, too
    values: bool = False  # the weights


NOTHING = Divided()
WHOLE: Shard = "none"


def divided_by(shard: Shard) -> Divided:
    match shard:
        case "none":
            return NOTHING
        case "optimizer":  # ZeRO-1 (arXiv 1910.02054)
            return Divided(vectors=True)
        case "gradients":  # ZeRO-2
            return Divided(vectors=True, gradient=True)
        case "parameters":  # ZeRO-3
            return Divided(vectors=True, gradient=True, values=True)
        case _:
            assert_never(shard)
