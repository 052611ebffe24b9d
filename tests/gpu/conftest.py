"""Runs each test here in a quick variant on the CPU, and on the GPU where there is one (`make
test-gpu`)."""

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("PyTorch finds no CUDA device on this machine")
    return torch.device(request.param)
