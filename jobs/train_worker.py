"""What Ray Train runs in each worker: it meets the others and trains, as often as one of them is lost and replaced.

It imports no more than that needs, as a replacement starts as fast as its imports.
"""

from typing import Any

import ray.train
from ray.util import get_current_placement_group

from jobs.incidents import noting_user_errors, write_down
from jobs.outage import patiently
from jobs.pulse import watched
from jobs.rendezvous import FruitlessError, Rendezvous
from jobs.run_plan import RunPlan
from jobs.run_writer import RunWriter
from jobs.train_callbacks import signals
from jobs.train_loop import train
from jobs.watchdog import Place, Waits


def train_worker(settings: dict[str, Any]) -> None:
    """`settings` are the run's `plan` and the `address` of the launch's meeting place."""
    context, plan = ray.train.get_context(), settings["plan"]
    assert isinstance(plan, RunPlan)
    rank, world_size, scaling = context.get_world_rank(), context.get_world_size(), plan.config.scaling
    place = get_current_placement_group()
    assert place is not None, "Ray Train places its workers"
    with (
        noting_user_errors(plan.run, rank=rank),
        watched(plan.run.uri, rank=rank, hang_timeout_s=scaling.hang_timeout_s) as pulse,
    ):
        rendezvous = Rendezvous(
            settings["address"],
            group=place.id.hex(),
            rank=rank,
            world_size=world_size,
            backend="nccl" if scaling.use_gpu else "gloo",
            is_waiting=lambda: Waits.WORKERS in pulse.beat().waits_for,
            progress=lambda: pulse.num_steps,
            max_fruitless=scaling.max_fruitless_attempts,
        )
        try:
            while not rendezvous.attend(
                lambda: train(plan, rank=rank, world_size=world_size, pulse=pulse, signals=signals)
            ):
                pulse.at(Place.AROUND)
        except FruitlessError as error:
            pulse.at(Place.AROUND)
            if rank == 0:
                writer = RunWriter(plan)
                patiently(lambda: write_down(plan.run, writer.ledger), "incidents")
                writer.give_up(str(error))
