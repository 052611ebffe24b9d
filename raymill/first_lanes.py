"""Checks on a worker's first lanes that a loss can be summed exactly, before anything is trained:
that it depends on nothing but its lane."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from raymill.any_module import AnyModule
from raymill.sums.step_faults import odd_parts

_NO_BUFFERS = (
    "Its values then depend on which lanes a worker computes, and no file has them, as with the running averages of "
    "BatchNorm: use a norm without (GroupNorm, LayerNorm), or set that module to eval()"
)


def fault_of(
    model: AnyModule, backward: Callable[[int], object], lanes: Sequence[int]
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


def buffers_of(model: AnyModule) -> dict[str, str]:
    """Returns the SHA-256 of each buffer of the module, by name."""
    digests: dict[str, str] = {}
    for name, buffer in model.module.named_buffers():
        content = buffer.detach().cpu().contiguous().flatten().view(torch.uint8)
        digests[name] = hashlib.sha256(content.numpy().data).hexdigest()
    return digests


def changed_buffer(model: AnyModule, before: Mapping[str, str]) -> str | None:
    """Says which buffer is not as it was before; None if none has changed."""
    if not before:
        return None
    for name, digest in buffers_of(model).items():
        if before.get(name, digest) != digest:
            return f"the buffer {name} has changed since the first step. {_NO_BUFFERS}"
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
        if count != 1:
            return f"the loss of lane {lane} gives {name} {odd_parts(count)}"
    for name, gradient in first.items():
        if gradient.layout is not torch.strided:
            return (
                f"the gradient of {name} is sparse, and sums are dense: leave out sparse=True where the module "
                "is made"
            )
    for name, buffer in model.module.named_buffers():
        if name in buffers and not torch.equal(buffer, buffers[name]):
            return f"the forward pass changes the buffer {name}. {_NO_BUFFERS}"
    again = _gradients(parameters, backward, lane)
    for name, gradient in first.items():
        if not torch.equal(_bits(gradient), _bits(again[name])):
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
            gradients[name] = parameter.grad
    return gradients


def _bits(gradient: Tensor) -> Tensor:
    return gradient.contiguous().view(torch.int32)


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
