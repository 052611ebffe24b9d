"""The trainer that a careful user of plain Ray Train writes: DDP, a checkpoint each step, unlimited
failures, defaults.

Run as `stock_trainer SETTINGS`, a JSON object, against the cluster of RAY_ADDRESS. Every worker
adds a line to the step log for each step.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model

from model.config import GPTConfig
from model.gpt import GPT
from tests.repository import REPOSITORY


class Loss(torch.nn.Module):
    """The loss as a forward pass, which DistributedDataParallel wraps."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.loss(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()


def train_worker(settings: dict[str, Any]) -> None:
    context = ray.train.get_context()
    rank, num_rows = context.get_world_rank(), settings["batch"] // context.get_world_size()
    model = GPT(GPTConfig(**settings["model"]))
    model.init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    step = 0
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            saved = torch.load(Path(folder) / "state.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    loss_of = prepare_model(Loss(model))
    with Path(settings["log"]).open("a") as log:
        while True:
            step += 1
            generator = torch.Generator().manual_seed(1000 * step + rank)
            tokens = torch.randint(
                model.config.vocab_size, (num_rows, settings["seq_len"] + 1), generator=generator
            )
            loss = loss_of(tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            line = {"time": time.time(), "step": step, "rank": rank, "pid": os.getpid()}
            log.write(json.dumps(line) + "\n")
            log.flush()
            with tempfile.TemporaryDirectory() as folder:
                if rank == 0:
                    state = {
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "step": step,
                    }
                    torch.save(state, Path(folder) / "state.pt")
                ray.train.report(
                    {"loss": float(loss)}, checkpoint=Checkpoint(folder) if rank == 0 else None
                )


def main(settings: dict[str, Any]) -> None:
    repository = str(REPOSITORY)
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": repository}}, log_to_driver=False)
    TorchTrainer(
        train_worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=settings["num_workers"]),
        run_config=RunConfig(
            name="stock",
            storage_path=settings["storage"],
            failure_config=FailureConfig(max_failures=-1),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    ).fit()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
