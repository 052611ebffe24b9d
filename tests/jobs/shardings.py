"""Ways to divide a state among ranks, as a run's settings would say them."""

from cluster.settings.run import ScalingConfig
from jobs.exact.run_values import run_sharding
from raymill.state.shard import Shard
from raymill.state.sharding import Sharding


def sharding(shard: Shard, *, rank: int = 0, world_size: int, group: int | None = None) -> Sharding:
    """Returns the sharding of one of so many ranks, of which `group` hold a copy together: all of
    them if None."""
    scaling = ScalingConfig(shard=shard, shard_group=group, max_workers=1)
    return run_sharding(scaling, rank=rank, world_size=world_size)


def in_groups(rank: int, world_size: int, group: int = 1) -> Sharding:
    """Returns the sharding of ranks that sum gradients in groups; each alone in groups of one."""
    if group == 1:
        return Sharding(rank=rank, world_size=world_size)
    return sharding("gradients", rank=rank, world_size=world_size, group=group)
