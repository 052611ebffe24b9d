"""What watches a step sees all of it in order, and changes nothing."""

from collections.abc import Sequence
from itertools import groupby

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from raymill import AdamW, ExactEngine, StepObserver

NUM_LANES = 4
TARGETS = torch.arange(6.0).view(3, 2)


class Diary(StepObserver):
    """Notes what it is told, by name."""

    def __init__(self) -> None:
        self.events: list[tuple[str, object]] = []

    def begin(self, plan: object, buffers: Sequence[Tensor]) -> None:
        self.events.append(("begin", None))

    def gradient(self, numbers: Sequence[int], name: str, values: Tensor) -> None:
        self.events.append(("gradient", tuple(numbers)))

    def partial_sum(self, values: Tensor) -> None:
        self.events.append(("partial_sum", None))

    def subtree(self, lanes: range, bundle: object, values: Tensor) -> None:
        self.events.append(("subtree", lanes))

    def node(self, lanes: range, bundle: object, span: object, values: Tensor) -> None:
        self.events.append(("node", lanes))

    def update(self, measured: object, *, learning_rate: float) -> None:
        self.events.append(("update", learning_rate))

    def end(self, measured: object) -> None:
        self.events.append(("end", None))


class NoiseScale(StepObserver):
    """The simple noise scale of gradients (arXiv 1812.06162, appendix A.1), from those of lanes and
    their mean: in lanes."""

    def __init__(self, num_lanes: int) -> None:
        self._num_lanes = num_lanes
        self._of_lanes: dict[int, float] = {}
        self.lanes = 0.0

    def gradient(self, numbers: Sequence[int], name: str, values: Tensor) -> None:
        # The engine divides a lane's loss by the number of lanes
        square = float((values * self._num_lanes).square().sum())
        self._of_lanes[numbers[0]] = self._of_lanes.get(numbers[0], 0.0) + square

    def update(self, measured: object, *, learning_rate: float) -> None:
        small = sum(self._of_lanes.values()) / self._num_lanes
        large = measured.norm**2  # type: ignore[attr-defined]
        noise = (small - large) / (1 - 1 / self._num_lanes)
        signal = (self._num_lanes * large - small) / (self._num_lanes - 1)
        self.lanes = noise / signal
        self._of_lanes.clear()


def batch_of(lane: int) -> Tensor:
    return torch.rand(3, 5, generator=torch.Generator().manual_seed(lane))


def trained(*observers: StepObserver) -> tuple[str, ExactEngine[Tensor]]:
    torch.manual_seed(0)
    engine = ExactEngine(
        nn.Linear(5, 2),
        lambda model, batch: mse_loss(model(batch), TARGETS),
        num_lanes=NUM_LANES,
        rule=AdamW(0.9, 0.95, 0.1),
        observers=observers,
    )
    for _ in range(2):
        engine.step(batch_of, learning_rate=0.1)
    engine.close()
    return engine.weights_hash(), engine


def test_a_step_announces_itself_in_order_and_has_the_bits_of_one_that_nobody_sees() -> None:
    diary = Diary()
    weights, _ = trained(diary)
    assert weights == trained()[0]
    of_step = diary.events[: len(diary.events) // 2]
    assert diary.events == of_step * 2
    kinds = [kind for kind, _ in groupby(name for name, _ in of_step)]
    assert (kinds[0], kinds[-3:]) == ("begin", ["subtree", "update", "end"])
    gradients = [numbers for name, numbers in of_step if name == "gradient"]
    assert gradients == [(lane,) for lane in range(NUM_LANES) for _ in ("weight", "bias")]
    # Lane 1 is added to lane 0, and lane 3 to lane 2; a sum of two such is no lane's
    assert [name for name, _ in of_step].count("partial_sum") == 4
    assert [lanes for name, lanes in of_step if name == "subtree"] == [range(NUM_LANES)]


def test_a_users_own_observer_measures_the_noise_of_gradients() -> None:
    noise = NoiseScale(NUM_LANES)
    torch.manual_seed(0)
    model = nn.Linear(5, 2)
    gradients: list[Tensor] = []
    for lane in range(NUM_LANES):
        model.zero_grad()
        mse_loss(model(batch_of(lane)), TARGETS).backward()
        gradients.append(torch.cat([one.grad.flatten() for one in model.parameters()]))  # type: ignore[union-attr]
    stacked = torch.stack(gradients)
    mean = stacked.mean(0)
    variance = float(stacked.var(0).sum())  # the trace of the covariance
    signal = float(mean.square().sum()) - variance / NUM_LANES
    engine = ExactEngine(
        model,
        lambda model, batch: mse_loss(model(batch), TARGETS),
        num_lanes=NUM_LANES,
        rule=AdamW(0.9, 0.95, 0.1),
        observers=[noise],
    )
    engine.step(batch_of, learning_rate=0.1)
    engine.close()
    assert noise.lanes == pytest.approx(variance / signal, rel=1e-4)
