"""Sums a rank's lanes along the tree as backward brings their gradients, parameter by parameter.

A hook of autograd stores each parameter's gradient in a flat buffer, or adds it there, at once,
unless backward has written it there itself: nothing is zeroed or cloned between lanes. A lane of
several micro-batches adds them up in order first, in fp32. In the last lane, a bucket whose
parameters are all done is final.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from weakref import WeakMethod

import torch
from torch import Tensor, nn

from raymill.loans import Scratch, gradient_sinks, lent, scratch_memory
from raymill.memory import large_zeros
from raymill.observer import StepObserver
from raymill.state.flat_layout import FlatLayout
from raymill.state.train_state import TrainState
from raymill.sums.exact_reduce import LaneStep
from raymill.sums.step_faults import OddGradient
from raymill.sums.step_plan import StepPlan


class FinalBuckets:
    """Counts the gradients that a backward pass has finished, and calls `on_final` with each bucket
    whose gradients are all finished: in the order of buckets, the same on every rank, in whatever
    order backward takes them."""

    def __init__(self, layout: FlatLayout, on_final: Callable[[int], None]) -> None:
        self._on_final = on_final
        self._buckets: dict[str, list[int]] = {name: [] for name in layout.places}  # by parameter
        self._num_parameters: list[int] = []  # by bucket
        for number, bucket in enumerate(layout.buckets):
            names = [name for name, place in layout.places.items() if place.meets(bucket)]
            self._num_parameters.append(len(names))
            for name in names:
                self._buckets[name].append(number)

    def begin(self) -> None:
        self._num_unfinished = [*self._num_parameters]
        self._next = 0
        self._report()

    def finish(self, name: str) -> None:
        for bucket in self._buckets[name]:
            self._num_unfinished[bucket] -= 1
        self._report()

    def _report(self) -> None:
        while self._next < len(self._num_unfinished) and not self._num_unfinished[self._next]:
            self._on_final(self._next)
            self._next += 1


def hand_over_gradients(
    parameters: Mapping[str, nn.Parameter], take: Callable[[str, nn.Parameter], None]
) -> None:
    """Lets backward call `take`, a method, with the name and the parameter whenever it has finished
    a gradient, for as long as the method's object lives.

    The hooks hold that object weakly. PyTorch keeps them in C++, where Python's garbage collector
    does not see a cycle: held strongly, the object would keep the parameters, and all that they are
    views of, for the life of the process.
    """
    taker = WeakMethod(take)

    def hook(name: str, parameter: nn.Parameter) -> None:
        living_take = taker()
        if living_take is not None:
            living_take(name, parameter)

    for name, parameter in parameters.items():
        parameter.register_post_accumulate_grad_hook(partial(hook, name))


class LaneSums:
    """Sums into `buffers`, flat buffers (P,) each; calls `on_final` with each bucket, in order,
    when it is final.

    With `lends` the first backward pass of a lane is lent the buffers as sinks: `model.cpu_ops`
    writes gradients there.
    """

    def __init__(
        self,
        state: TrainState,
        buffers: list[Tensor],
        *,
        lends: bool,
        on_final: Callable[[int], None],
    ) -> None:
        self._lends = lends
        self._final = FinalBuckets(state.layout, on_final)
        self._parameters = dict(state.model.named_parameters())
        # In each buffer
        self._views: dict[str, list[Tensor]] = {name: [] for name in self._parameters}
        for buffer in buffers:
            for name, view in state.by_parameter(buffer).items():
                self._views[name].append(view)
        self.odd: OddGradient | None = None
        """The first gradient of the step that came in another number of parts than one."""
        self._step: LaneStep | None = None
        self._observers: Sequence[StepObserver] = ()
        self._numbers: Sequence[int] = ()  # of the turn's micro-batches
        # Those whose gradients are fp32, as the buffers are
        full = [one for one in self._parameters.values() if one.dtype == torch.float32]
        self._largest = max(full, key=nn.Parameter.numel)
        self._second: Tensor | None = None
        # Sums of a lane's micro-batches so far, of the other ones
        self._begun: dict[str, Tensor] = {}
        self._scratch = Scratch()
        hand_over_gradients(self._parameters, self._take)

    @contextmanager
    def turn(
        self, plan: StepPlan, turn: int, observers: Sequence[StepObserver] = ()
    ) -> Iterator[None]:
        """Lasts for the forward and backward passes of one lane."""
        self._step = plan.steps[turn]
        self._lane = plan.turns[turn][0] // plan.num_micro_batches
        self._is_last = turn == len(plan.turns) - 1
        if self._is_last:
            self._final.begin()
        with self._passes(plan, plan.turns[turn], observers):
            yield

    @contextmanager
    def again(
        self, plan: StepPlan, numbers: Sequence[int], observers: Sequence[StepObserver]
    ) -> Iterator[None]:
        """Lasts for the passes of a lane whose gradients only the observers want."""
        self._step = None
        with self._passes(plan, numbers, observers):
            yield

    @contextmanager
    def _passes(
        self, plan: StepPlan, numbers: Sequence[int], observers: Sequence[StepObserver]
    ) -> Iterator[None]:
        self._numbers, self._observers = numbers, observers
        self._num_passes = dict.fromkeys(self._parameters, 0)
        self._num_micro_batches = plan.num_micro_batches
        for parameter in self._parameters.values():
            parameter.grad = None
        self._sinks = self._sinks_of(self._step) if self._lends else {}
        try:
            with lent(gradient_sinks, self._sinks), lent(scratch_memory, self._scratch):
                yield
            if self._step:
                self._note_odd()
        finally:
            self._step = None
            self._observers = ()
            self._begun.clear()
            for name, parameter in self._parameters.items():
                view = self._views[name][0]
                parameter.grad = view if parameter.dtype == view.dtype else None

    def _note_odd(self) -> None:
        """Notes a parameter of which the lane's passes brought no gradient, or several. Its buckets
        are final all the same, with sums that nobody applies: other ranks wait for them."""
        for name, num_passes in self._num_passes.items():
            if num_passes == self._num_micro_batches:
                continue
            num_parts = num_passes if num_passes > self._num_micro_batches else 0
            self.odd = self.odd or OddGradient(self._lane, name, num_parts)
            if not num_parts and self._is_last:
                self._final.finish(name)

    def _sinks_of(self, step: LaneStep | None) -> dict[nn.Parameter, Tensor]:
        if step and not step.adds:
            sinks: dict[nn.Parameter, Tensor] = {}
            for name, parameter in self._parameters.items():
                view = self._views[name][step.buffer]
                if parameter.dtype == view.dtype:
                    sinks[parameter] = view
            return sinks
        # A tied embedding without a sink has two whole gradients, which autograd adds.
        if self._second is None:
            flat = large_zeros(self._largest.numel(), device=self._largest.device)
            self._second = flat.view_as(self._largest)
        return {self._largest: self._second}

    def _take(self, name: str, parameter: nn.Parameter) -> None:
        if self._step is None and not self._observers:
            return
        self._sinks.pop(parameter, None)  # the next micro-batch would write over it
        gradient = self._gradient_of_lane(name, parameter)
        if gradient is None:
            return
        for observer in self._observers:
            observer.gradient(self._numbers, name, gradient)
        if self._step:
            self._add(name, gradient, self._step)
        parameter.grad = None
        if self._step and self._is_last:
            self._final.finish(name)

    def _gradient_of_lane(self, name: str, parameter: nn.Parameter) -> Tensor | None:
        """Returns the gradient of all micro-batches of the lane, None before the last one.

        Autograd adds up those of an fp32 parameter. Those of a rounded matrix are rounded, and
        their sum is not.
        """
        gradient = parameter.grad
        assert gradient is not None
        self._num_passes[name] += 1
        is_last = self._num_passes[name] == self._num_micro_batches
        if self._num_micro_batches == 1 or gradient.dtype == torch.float32:
            return gradient if is_last else None
        parameter.grad = None
        if name in self._begun:
            self._begun[name].add_(gradient)
        else:
            self._begun[name] = gradient.float()
        return self._begun.pop(name) if is_last else None

    def _add(self, name: str, gradient: Tensor, step: LaneStep) -> None:
        views = self._views[name]
        target = views[step.buffer]
        if step.adds:
            target.add_(gradient)
            for observer in self._observers:
                observer.partial_sum(target)
        elif gradient.data_ptr() != target.data_ptr():
            target.copy_(gradient)
        add_up(views, step)


def add_up(views: list[Tensor], step: LaneStep) -> None:
    """Adds up the subtrees that a step completes, into lower and lower buffers; each buffer has a
    view of one place."""
    for number in range(step.merges):
        right = step.buffer - number
        views[right - 1].add_(views[right])
