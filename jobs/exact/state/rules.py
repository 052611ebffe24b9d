"""Chooses the rule that updates a run's weights."""

from typing import assert_never

from cluster.settings.train import TrainConfig
from jobs.exact.state.adamw import AdamW
from jobs.exact.state.update_rule import UpdateRule


def update_rule(train: TrainConfig) -> UpdateRule:
    match train.optimizer:
        case "adamw":
            return AdamW(beta1=train.beta1, beta2=train.beta2, weight_decay=train.weight_decay)
        case _:
            assert_never(train.optimizer)
