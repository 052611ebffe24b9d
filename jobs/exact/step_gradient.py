"""Chooses how the gradient of a run's steps is computed."""

from cluster.settings.run import RunConfig
from jobs.exact.batch_gradient import BatchGradient
from jobs.exact.lane_passes import LanePasses
from jobs.exact.stock_gradient import StockGradient
from jobs.tokens.token_stream import TokenStream
from raymill.state.train_state import TrainState
from raymill.workers.worker_group import WorkerGroup


def step_gradient(
    config: RunConfig,
    state: TrainState,
    rows: TokenStream,
    group: WorkerGroup,
    *,
    eot_id: int | None,
    has_holes: bool = False,
) -> BatchGradient | StockGradient:
    """Returns what computes the gradient of each step: the exact sum, or where the settings say
    `exact: false`, stock DistributedDataParallel. With `eot_id`, documents in a row see nothing of
    each other. `has_holes` is for texts of which some tokens are forgotten."""
    passes = LanePasses(
        config, state, rows, group.meeting.progress, eot_id=eot_id, has_holes=has_holes
    )
    new = BatchGradient if config.train.exact else StockGradient
    return new(passes, state, group)
