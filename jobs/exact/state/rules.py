"""Chooses the rule that updates a run's weights."""

from cluster.settings.train import TrainConfig
from jobs.exact.state.adamw import AdamW
from jobs.exact.state.update_rule import UpdateRule


def update_rule(train: TrainConfig) -> UpdateRule:
    return AdamW(beta1=train.beta1, beta2=train.beta2, weight_decay=train.weight_decay)
