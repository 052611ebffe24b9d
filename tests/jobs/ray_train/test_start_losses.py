"""A group that loses a worker while it starts is planned again; no other error of the controller is."""

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.train import ControllerError, FailureConfig

from jobs.ray_train.worker_backend import StartLosses


@pytest.mark.parametrize(
    ("error", "decision"),
    [
        (ActorDiedError(), "RETRY"),
        (ActorUnavailableError("for a moment", b"0" * 16), "RETRY"),
        (ValueError("a defect"), "RAISE"),
    ],
)
def test_only_a_lost_worker__begins_the_group_again(error: Exception, decision: str) -> None:
    policy = StartLosses(FailureConfig(max_failures=-1))
    for _ in range(3):
        assert policy.make_decision(ControllerError(error)).name == decision
