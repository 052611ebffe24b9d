"""Gives every rank of an attempt its part of the state from which it continues."""

from functools import partial

import torch

from cluster.settings.run import state_scaling
from cluster.storage.registry import metadata_of
from jobs.exact.compute import first_weights
from jobs.exact.frozen import freeze
from jobs.exact.run_state import run_state
from jobs.exact.run_values import run_sharding
from jobs.exact.stored_state import restored
from jobs.run.checkpoints import RunCheckpoints
from jobs.run.sharded_checkpoints import stored_state
from jobs.run.storage_retry import patiently
from jobs.snapshots.snapshots import Snapshots
from jobs.training.guards import GuardState
from jobs.training.opening.start import Opening, Start
from model.decoders.adapted import AdaptedModel
from model.decoders.make import new_decoder
from raymill.state.train_state import TrainState


def restored_state(
    opening: Opening, start: Start, snapshots: Snapshots
) -> tuple[TrainState, GuardState, int]:
    """Returns the state of the snapshot or the checkpoint, or fresh weights, with its guard and its
    step."""
    plan, group = opening.plan, opening.group
    config = plan.config
    state = _state_without_values(opening)
    opening.opened.callback(state.close)
    if start.snapshot:
        guard = GuardState.from_json(snapshots.restore(start.snapshot, state)["guard"])
        group.prove(start.snapshot.header.step, opening.device)  # a checkpoint of it may be due
        return state, guard, start.snapshot.header.step
    if start.checkpoint is None:
        state.load_weights(first_weights(config, config.train.seed))
        return state, GuardState(), 0
    checkpoints = RunCheckpoints(plan.run)
    metadata = metadata_of(checkpoints.uri(start.checkpoint))
    assert metadata is not None, "rank 0 has found it"
    stored, name = stored_state(checkpoints, start.checkpoint), start.checkpoint
    restored(state, stored, group, checksum=metadata.state_checksum, name=name)
    guard = (
        GuardState.from_json(metadata.guard)
        if metadata.guard
        else GuardState(last_applied=metadata.step)
    )
    return state, guard, metadata.step


def _state_without_values(opening: Opening) -> TrainState:
    """Returns the state of the run's model, whose frozen weights, if it has any, are there."""
    plan, group, device = opening.plan, opening.group, opening.device
    config = plan.config
    with torch.device("meta"):
        model = new_decoder(config.model)
    divide = partial(
        run_sharding, rank=group.rank, world_size=group.world_size, nodes=opening.workers.nodes
    )
    frozen = None
    if isinstance(model, AdaptedModel):
        assert plan.base is not None, "an adapter stands on a base"
        folder = patiently(partial(plan.base.folder, config.storage.uri), "the base")
        frozen = freeze(model, folder, device=device, sharding=divide(config.scaling), group=group)
    return run_state(
        model,
        config.train,
        device=device,
        group=group,
        sharding=divide(state_scaling(config)),
        frozen=frozen,
    )
