"""Compares a step's gradient on a device with float64 autograd: the largest error of a parameter,
and that of the whole."""

from dataclasses import dataclass

import torch

from cluster.settings.run import RunConfig
from tests.gpu.float64_gpt2 import loss_and_gradients
from tests.gpu.made_runs import MadeRun

BOUNDS = {"fp32": (1e-5, 1e-4), "bf16": (2e-2, 8e-2)}
"""The largest errors of the whole gradient and of a parameter's. On a CPU the whole one's were
2.4e-7 to 3.7e-7 in fp32 and 5e-3 in bf16, as large as those of PyTorch's own autocast, and 2e-2
with ReLU."""


@dataclass(frozen=True)
class GradientError:
    """Norms of differences, as shares of the norm."""

    precision: str
    whole: float
    worst: float  # of a parameter
    worst_name: str
    loss: float  # difference in nats per token
    norm: float  # of the whole gradient's norm, which decides about clipping

    @property
    def is_rounding(self) -> bool:
        """Whether the precision alone explains the errors."""
        whole, worst = BOUNDS[self.precision]
        return self.whole < whole and self.worst < worst and self.norm < whole and self.loss < whole

    def __str__(self) -> str:
        return f"{self.whole:.1e} in all, {self.worst:.1e} at {self.worst_name}, loss {self.loss:.1e}, norm {self.norm:.1e}"


def gradient_error(config: RunConfig, device: torch.device) -> GradientError:
    """Takes the gradient of step 1 with all of its lanes, as training does."""
    run = MadeRun(config, device)
    weights = run.state.by_parameter(run.state.values)
    loss, expected = loss_and_gradients(weights, config.model, *run.batch(1), eot_id=run.eot_id)
    measured = run.gradient_of(1)
    found = {
        name: grad.double() for name, grad in run.state.by_parameter(run.state.gradient).items()
    }
    run.close()
    squares = {
        name: float((found[name] - whole).square().sum()) for name, whole in expected.items()
    }
    norms = {name: float(whole.square().sum()) for name, whole in expected.items()}
    shares = {name: (squares[name] / norms[name]) ** 0.5 for name in expected}
    worst, norm = max(shares, key=lambda name: shares[name]), sum(norms.values()) ** 0.5
    return GradientError(
        precision=config.train.precision,
        whole=sum(squares.values()) ** 0.5 / norm,
        worst=shares[worst],
        worst_name=worst,
        loss=abs(measured.loss - loss),
        norm=abs(measured.norm / norm - 1),
    )
