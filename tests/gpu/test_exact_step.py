"""The exact step on a device: the gradient is float64 autograd's, and the bits are the same for any
number of ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jobs.exact.batch_gradient import BatchGradient
from jobs.exact.compute import autocast
from jobs.exact.run_state import run_state
from jobs.exact.self_test import self_test
from jobs.training.validation import measured
from model.generation.generate import generate
from model.generation.sampling import SamplingParams
from model.gpt import GPT
from raymill.step_timer import StepTimer
from raymill.sums.step_totals import Measured
from raymill.workers.worker_group import WorkerGroup
from tests.gpu.float64_gpt2 import loss_and_gradients
from tests.gpu.gradient_error import gradient_error
from tests.gpu.made_runs import MadeRun, as_in_training, made_config
from tests.gpu.worlds import CASES, WORLDS
from tests.repository import REPOSITORY
from tests.time_limits import limit_s


@pytest.mark.parametrize("document_mask", [False, True], ids=["whole rows", "documents"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("compute", ["auto", "plain"])
def test_the_gradient_is_that_of_float64_autograd(
    device: torch.device, compute: str, precision: str, tied: bool, document_mask: bool
) -> None:
    """`auto` is compiled kernels on a GPU."""
    shape, settings = (
        {"tie_word_embeddings": tied},
        {"compute": compute, "document_mask": document_mask},
    )
    config = made_config(device, num_lanes=3, model=shape, precision=precision, **settings)
    error = gradient_error(config, device)
    print(error)
    assert error.is_rounding, error


def test_an_error_of_the_gradient_is_seen(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that the test above can fail."""
    of_step = BatchGradient.of_step

    def with_an_error(gradient: BatchGradient, step: int, timer: StepTimer) -> Measured:
        measured = of_step(gradient, step, timer)
        parameter = gradient._state.model.transformer.wte.weight
        assert parameter.grad is not None
        parameter.grad.mul_(0.9)
        return measured

    monkeypatch.setattr(BatchGradient, "of_step", with_an_error)
    assert not gradient_error(made_config(device, precision="bf16"), device).is_rounding


def test_the_bits_do_not_depend_on_the_number_of_ranks(
    device: torch.device, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tests.gpu.worlds", device.type, str(tmp_path)]
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=limit_s(120), check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == CASES[device.type].keys()
    for case, worlds in found.items():
        assert [size for size, _, _ in worlds] == WORLDS
        assert len({digest for _, hashes, _ in worlds for digest in hashes}) == 1, (case, worlds)
        assert len({tuple(losses) for _, _, losses in worlds}) == 1, (case, worlds)
    assert len({worlds[0][1][0] for worlds in found.values()}) == len(found), "the cases differ"


@pytest.mark.parametrize("document_mask", [False, True], ids=["whole rows", "documents"])
def test_a_workers_own_test_passes(device: torch.device, document_mask: bool) -> None:
    config = made_config(device, precision="bf16", document_mask=document_mask)
    with as_in_training(config):
        self_test(config, device)


@pytest.mark.parametrize("compute", ["auto", "plain"])
def test_computing_activations_again_changes_no_bit(device: torch.device, compute: str) -> None:
    shape = {"dropout": 0.1}
    gradients = []
    for recompute in (False, True):
        run = MadeRun(
            made_config(
                device, model=shape, precision="bf16", compute=compute, recompute=recompute
            ),
            device,
        )
        run.gradient_of(1)
        gradients.append(run.state.gradient.clone())
        run.close()
    assert torch.equal(*gradients)


def test_a_lane_of_several_micro_batches_has_their_gradient(device: torch.device) -> None:
    """Up to rounding, as a sum of four has another order then."""
    gradients = []
    for size in (1, 2):
        config = made_config(device)
        half = {
            "micro_batch_size": config.train.micro_batch_size // 2,
            "micro_batches_per_lane": size,
        }
        run = MadeRun(made_config(device, **half), device)
        run.gradient_of(1)
        gradients.append(run.state.gradient.clone())
        run.close()
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_an_update_is_adamws(device: torch.device, weight_decay: float) -> None:
    """Two steps, against the formula in float64."""
    config = made_config(device, weight_decay=weight_decay, grad_clip=0.0)
    run, rate, betas = MadeRun(config, device), 1e-2, (config.train.beta1, config.train.beta2)
    weights = {name: value.detach().double() for name, value in run.state.model.named_parameters()}
    first, second = (
        {name: torch.zeros_like(value) for name, value in weights.items()} for _ in range(2)
    )
    for step in (1, 2):
        run.step(step, learning_rate=rate)
        for name, grad in run.state.by_parameter(run.state.gradient).items():
            first[name] = betas[0] * first[name] + (1 - betas[0]) * grad.double()
            second[name] = betas[1] * second[name] + (1 - betas[1]) * grad.double() ** 2
            mean, root = (
                first[name] / (1 - betas[0] ** step),
                (second[name] / (1 - betas[1] ** step)).sqrt(),
            )
            decay = weight_decay if grad.dim() >= 2 else 0.0
            weights[name] = weights[name] * (1 - rate * decay) - rate * mean / (root + 1e-8)
    run.close()
    for name, value in run.state.model.named_parameters():
        torch.testing.assert_close(
            value.detach().double(), weights[name], rtol=1e-5, atol=1e-6, msg=name
        )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_validation_and_samples_are_allowed_in_exact_mode(
    device: torch.device, precision: str
) -> None:
    """PyTorch raises in it for an operation whose order is not fixed."""
    config = made_config(device, precision=precision, document_mask=True)
    run = MadeRun(config, device)
    rows, group = run.rows, WorkerGroup(0, 1)
    with as_in_training(config):
        figures = [
            measured(rows, config=config, state=run.state, group=group, eot_id=run.eot_id)  # type: ignore[arg-type]
            for _ in range(2)
        ]
        model = run.state.model.eval()
        with run.state.weights_in_use(), autocast(config, device):
            answers = [
                generate(
                    model,
                    [3, 1, 4],
                    max_tokens=12,
                    params=SamplingParams(temperature=0.8, top_p=0.9, seed=7),
                )
                for _ in range(2)
            ]
    run.close()
    assert figures[0] == figures[1]
    batch = [part.to(device) for part in rows.rows(range(10))]
    weights = run.state.by_parameter(run.state.values)
    expected, _ = loss_and_gradients(weights, config.model, batch[0], batch[1], eot_id=run.eot_id)
    assert figures[0].figures["val_loss"] == pytest.approx(
        expected, abs={"fp32": 1e-5, "bf16": 1e-2}[precision]
    )
    assert answers[0] == answers[1]
    assert len(answers[0]) == 12


def test_a_run_has_the_losses_that_it_has_on_a_cpu(device: torch.device) -> None:
    """In fp32, up to rounding, at a rate that does not enlarge it."""
    config = made_config(device, num_lanes=2)
    runs = [MadeRun(config, place) for place in (device, torch.device("cpu"))]
    found, expected = (
        [run.step(step, learning_rate=1e-4) for step in range(1, 11)] for run in runs
    )
    for run in runs:
        run.close()
    assert found == pytest.approx(expected, abs=1e-3)
    assert len(set(found)) == 10


def test_weights_are_drawn_on_the_host_whatever_the_device(device: torch.device) -> None:
    config = made_config(device)
    model = GPT(config.model)
    model.init_weights(0)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    state = run_state(model, config.train, device=device)
    for name, value in state.model.state_dict().items():
        assert torch.equal(value.cpu(), expected[name])
        assert value.device.type == device.type
