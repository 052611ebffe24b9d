"""What a worker computes with is given back: a self-test and an attempt leave no byte of the
device's memory behind."""

import gc

import pytest
import torch
from torch import Tensor

from jobs.exact.self_test import self_test
from tests.gpu.made_runs import MadeRun, as_in_training, made_config


def allocated_bytes(device: torch.device) -> int:
    """Returns the bytes of all tensors on the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    tensors = [value for value in gc.get_objects() if issubclass(type(value), Tensor)]
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors
    }
    return sum(storages.values())


@pytest.mark.parametrize("compute", ["auto", pytest.param("plain", marks=pytest.mark.more)])
def test_a_self_test_and_an_attempt_leave_no_memory_behind(
    device: torch.device, compute: str
) -> None:
    """After a first one, which makes what the libraries keep: workspaces, and compiled kernels on a
    GPU."""
    config = made_config(device, precision="bf16", compute=compute)
    allocated = []
    for _ in range(2):
        with as_in_training(config):
            self_test(config, device)
        allocated.append(allocated_bytes(device))
        run = MadeRun(config, device)
        run.step(1)
        run.step(2)
        run.close()
        assert allocated_bytes(device) >= allocated[-1] + 4 * run.state.values.nbytes, (
            "the state itself is seen"
        )
        del run
        allocated.append(allocated_bytes(device))
    print(allocated)
    assert len(set(allocated[1:])) == 1
