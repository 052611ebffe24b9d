"""Checks on a worker's first lanes that a loss can be summed exactly, before anything is trained:
that it depends on nothing but its lane."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from jobs.exact.any_module import AnyModule


def fault_of(
    model: AnyModule,
    backward: Callable[[int], object],
    lanes: Sequence[int],
) -> str | None:
    """Computes each of some lanes twice, by `backward`, and says what is wrong; None if nothing is.
    The parameters' gradients are as before."""
    parameters = dict(model.named_parameters())
    kept = {name: parameter.grad for name, parameter in parameters.items()}
    try:
        for lane in lanes:
            fault = _fault_of_lane(model, parameters, backward, lane)
            if fault is not None:
                return fault
    finally:
        for name, parameter in parameters.items():
            parameter.grad = kept[name]
    return None


def _fault_of_lane(
    model: AnyModule,
    parameters: Mapping[str, nn.Parameter],
    backward: Callable[[int], object],
    lane: int,
) -> str | None:
    buffers = {name: buffer.clone() for name, buffer in model.module.named_buffers()}
    counts = dict.fromkeys(parameters, 0)
    with _counted(parameters, counts):
        first = _gradients(parameters, backward, lane)
    for name, count in counts.items():
        if count == 0:
            return (
                f"the loss of lane {lane} gives {name} no gradient. Every lane must give every "
                "parameter one: freeze it (requires_grad_(False)), or let the loss use it, times zero"
            )
        if count > 1:
            return (
                f"{name} gets its gradient in {count} parts, as re-entrant activation checkpointing does: "
                "use torch.utils.checkpoint with use_reentrant=False"
            )
    for name, buffer in model.module.named_buffers():
        if not torch.equal(buffer, buffers[name]):
            return (
                f"the forward pass changes the buffer {name}, which then depends on which lanes a worker "
                "computes, as the running averages of BatchNorm do: use a norm without (GroupNorm, "
                "LayerNorm), or set that module to eval()"
            )
    again = _gradients(parameters, backward, lane)
    for name, gradient in first.items():
        if not torch.equal(gradient.view(torch.int32), again[name].view(torch.int32)):
            return (
                f"lane {lane} gave {name} another gradient when it was computed a second time. Its batch "
                "or its loss depends on something else than the lane, such as a random generator that "
                "is not torch's default one, or adds up in no fixed order"
            )
    return None


def _gradients(
    parameters: Mapping[str, nn.Parameter], backward: Callable[[int], object], lane: int
) -> dict[str, Tensor]:
    for parameter in parameters.values():
        parameter.grad = None
    backward(lane)
    gradients: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            gradients[name] = parameter.grad.contiguous()
    return gradients


@contextmanager
def _counted(parameters: Mapping[str, nn.Parameter], counts: dict[str, int]) -> Iterator[None]:
    """Counts how often backward gives each parameter a gradient."""

    def count(name: str, _: nn.Parameter) -> None:
        counts[name] += 1

    handles = [
        parameter.register_post_accumulate_grad_hook(partial(count, name))
        for name, parameter in parameters.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
