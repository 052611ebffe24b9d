"""The values of the exact engine that a run's settings stand for, as far as a planner needs them: this
module does not import PyTorch."""

from collections.abc import Sequence
from typing import assert_never

from cluster.settings.run import ScalingConfig
from cluster.settings.train import TrainConfig
from model.kernels.update_rules import PortableAdamW, PortableMuon
from model.numerics import FP32
from raymill.rules.adamw import AdamW
from raymill.rules.muon import Muon, ProductType
from raymill.rules.update_rule import UpdateRule
from raymill.state.shard import divided_by
from raymill.state.sharding import Sharding


def run_sharding(
    scaling: ScalingConfig,
    *,
    rank: int,
    world_size: int,
    nodes: Sequence[object] = (),
) -> Sharding:
    """Returns how so many workers divide a run's state; `nodes` has the node of each rank, if it is
    known."""
    return Sharding.of(
        divided_by(scaling.shard),
        num_holders=scaling.group_size(world_size),
        rank=rank,
        world_size=world_size,
        nodes=nodes,
    )


def update_rule(train: TrainConfig) -> UpdateRule:
    is_portable = train.compute == "portable"
    rule = PortableAdamW if is_portable else AdamW
    adamw = rule(beta1=train.beta1, beta2=train.beta2, weight_decay=train.weight_decay)
    match train.optimizer:
        case "adamw":
            return adamw
        case "muon" if is_portable:
            return PortableMuon(train.momentum, train.weight_decay, others=adamw)
        case "muon":
            # A plan may ask before the precision is settled, for what does not depend on it
            numerics = FP32 if train.precision == "auto" else train.numerics
            products: ProductType = "bfloat16" if numerics.is_rounded else "float32"
            return Muon(train.momentum, train.weight_decay, others=adamw, products=products)
        case _:
            assert_never(train.optimizer)
