"""Gives the exact engine's state the values that a run's settings stand for."""

import torch

from cluster.settings.train import TrainConfig
from jobs.exact.run_values import update_rule
from model.decoder import Decoder
from model.gpt import GPT
from model.operations import product_type
from raymill.state.gathered_weights import GatheredWeights, Rounding
from raymill.state.sharding import Sharding
from raymill.state.train_state import ALONE, TrainState
from raymill.trainable import Trainable
from raymill.workers.worker_group import WorkerGroup


def run_state(
    model: Trainable,
    train: TrainConfig,
    *,
    device: torch.device,
    group: WorkerGroup = ALONE,
    sharding: Sharding | None = None,
    frozen: GatheredWeights | None = None,
) -> TrainState:
    """Returns the training state of a model as a run's settings have it."""
    return TrainState(
        model,
        update_rule(train),
        device=device,
        grad_clip=train.grad_clip,
        rounding=_rounding(model, train, device),
        group=group,
        sharding=sharding,
        frozen=frozen,
    )


def decoder_of(state: TrainState) -> Decoder:
    """Returns the model, which is a decoder in every run."""
    assert isinstance(state.model, Decoder), "this is no decoder"
    return state.model


def _rounding(model: Trainable, train: TrainConfig, device: torch.device) -> Rounding | None:
    """Returns how matrices of blocks are rounded; None where they are not. DistributedDataParallel
    would sum their gradients in the type of products.

    Rounded matrices lie as autocast's copies would. For our own shapes' operations on a CPU they
    lie as in the layout: the place of a matrix decides which kernels are chosen.
    """
    if not train.exact or not model.rounds_matrices or not train.numerics.is_rounded:
        return None
    is_for_cpus = device.type == "cpu" and train.compute in ("auto", "cpu")
    return Rounding(
        product_type(train.numerics), apart=not (isinstance(model, GPT) and is_for_cpus)
    )
