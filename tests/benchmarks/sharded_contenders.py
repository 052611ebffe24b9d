"""The contenders of `bench_sharded`: raymill with each way to shard, DistributedDataParallel, FSDP2
in several ways."""

from functools import partial
from typing import Protocol, get_args

import torch
from torch import Tensor

from cluster.settings.run import RunConfig
from raymill.state.shard import Shard
from raymill.state.state_shares import StateShares
from raymill.workers.worker_group import WorkerGroup
from tests.benchmarks.exact_workers import ExactTrainer
from tests.benchmarks.stock_steps import StockTrainer, Wrap, ddp, fsdp2

RAYMILL: dict[str, Shard] = {f"raymill {shard}": shard for shard in get_args(Shard)}
"""The way to shard, by contender."""

STOCK: dict[str, Wrap] = {
    "DDP": ddp,
    "FSDP2": fsdp2,
    "FSDP2, prefetched": partial(fsdp2, prefetches=True),
    "FSDP2, weights kept": partial(fsdp2, keeps_weights=True),
    "FSDP2, gradients kept": partial(fsdp2, keeps_gradients=True),
}
"""How each wraps the model, which computes with plain operations."""

OUR_OPERATIONS = "FSDP2, our operations"
"""FSDP2 around the very model that raymill trains: the difference that is left comes from
sharding."""

CONTENDERS = [*RAYMILL, *STOCK, OUR_OPERATIONS]


class Trainer(Protocol):
    def step(self, number: int) -> float: ...

    def kept(self) -> dict[str, list[Tensor]]:
        """Returns what a rank keeps of weights, gradients and moments."""

    def weights(self, *, step: int) -> dict[str, Tensor]:
        """Returns the whole weights after a step, on rank 0 at least; all ranks call together."""

    def close(self) -> None: ...


class RaymillTrainer(ExactTrainer):
    def kept(self) -> dict[str, list[Tensor]]:
        state = self.state
        return {
            "weights": [state.values],
            "gradients": [state.gradient],
            "moments": [*state.vectors.values()],
        }

    def weights(self, *, step: int) -> dict[str, Tensor]:
        state, flat = self.state, self.state.values
        if state.gathered:
            flat = torch.empty(state.layout.size if state.sharding.rank == 0 else 0)
            for number, bucket in enumerate(state.layout.buckets):
                values = StateShares(state).brought("values", bucket, bucket=number)
                if len(flat):
                    bucket.of(flat).copy_(values)
        return state.by_parameter(flat) if len(flat) else {}

    def close(self) -> None:
        self.gradient.close()
        self.state.close()


def config_of(
    contender: str, model: dict[str, str | int], train: dict[str, str | int]
) -> RunConfig:
    settings = {"compute": "plain" if contender in STOCK else "cpu", "precision": "fp32"}
    scaling = {"shard": RAYMILL.get(contender, "none")}
    return RunConfig.model_validate({"model": model, "train": settings | train, "scaling": scaling})


def trainer_of(contender: str, config: RunConfig, group: WorkerGroup) -> Trainer:
    if contender in RAYMILL:
        return RaymillTrainer(config, group)
    return StockTrainer(config, group, STOCK.get(contender, fsdp2))
