"""What Ray takes the cluster for when it plans an elastic group."""

import ray

_ANSWER_S = 2.0


def renew_view() -> None:
    """Has Ray look at the cluster's nodes, which an elastic group is planned by, now: it does each 20 s by itself."""
    try:
        coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
    except ValueError:  # there is none where no group is elastic
        return
    ray.wait([coordinator._tick.remote()], timeout=_ANSWER_S)
