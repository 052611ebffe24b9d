"""Compares a step's gradient on a device with float64 autograd: the largest error of a parameter, and that of the whole."""

from dataclasses import dataclass

import torch

from cluster.settings.run import RunConfig
from tests.gpu.float64_gpt2 import loss_and_gradients
from tests.gpu.made_runs import MadeRun


@dataclass(frozen=True)
class GradientError:
    """Norms of differences, as shares of the norm."""

    whole: float
    worst: float  # of a parameter
    worst_name: str
    loss: float  # difference in nats per token
    norm: float  # of the whole gradient's norm, which decides about clipping

    def __str__(self) -> str:
        return f"{self.whole:.1e} in all, {self.worst:.1e} at {self.worst_name}, loss {self.loss:.1e}, norm {self.norm:.1e}"


def gradient_error(config: RunConfig, device: torch.device) -> GradientError:
    """Takes the gradient of step 1 with all of its lanes, as training does."""
    run = MadeRun(config, device)
    loss, expected = loss_and_gradients(run.state.model, config.model, *run.batch(1), eot_id=run.eot_id)
    measured = run.gradient_of(1)
    found = {name: grad.double() for name, grad in run.state.by_parameter(run.state.gradient).items()}
    run.close()
    squares = {name: float((found[name] - whole).square().sum()) for name, whole in expected.items()}
    norms = {name: float(whole.square().sum()) for name, whole in expected.items()}
    shares = {name: (squares[name] / norms[name]) ** 0.5 for name in expected}
    worst, norm = max(shares, key=lambda name: shares[name]), sum(norms.values()) ** 0.5
    return GradientError(
        whole=sum(squares.values()) ** 0.5 / norm,
        worst=shares[worst],
        worst_name=worst,
        loss=abs(measured.loss - loss),
        norm=abs(measured.norm / norm - 1),
    )
