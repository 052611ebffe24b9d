"""The function that Ray Train runs in each worker: meets the other workers and trains, again after
each lost one.

It imports no more than it needs, as a replacement starts as fast as its imports.
"""

from collections.abc import Collection
from functools import partial

import ray.train
import torch.distributed

import cluster
from cluster.settings.run import way_to_compute
from jobs.ray_train.callbacks import group_name, signals
from jobs.run import storage_retry
from jobs.run.run_plan import RunPlan
from jobs.run.storage_retry import patiently
from jobs.saving import saving_thread, shard_writer
from jobs.tokens import token_stream
from jobs.training.kernels import SelfTest
from jobs.training.run_writer import RunWriter
from jobs.training.train_loop import train
from jobs.workers.heartbeat import WaitingPlaces, watched
from jobs.workers.incident_notes import noting_user_errors, write_down
from jobs.workers.rendezvous import FruitlessError, Rendezvous
from jobs.workers.watchdog import Place, Waits
from raymill.workers.worker_group import Meeting

WAITING_PLACES: WaitingPlaces = {
    Waits.WORKERS: (torch.distributed,),
    Waits.STORAGE: (token_stream, storage_retry, saving_thread, shard_writer, cluster),
}
"""The modules in which a healthy worker may wait for as long as other workers, or storage, take. It
waits for others too while it is in a message (`workers/progress`)."""


def train_worker(plan: RunPlan, *, address: str, sizes: Collection[int]) -> None:
    """Trains the run with the workers that it meets at the address. `sizes` are the numbers of
    workers with which the run goes on without a start."""
    context = ray.train.get_context()
    seat, scaling = context.get_world_rank(), plan.config.scaling
    with (
        noting_user_errors(plan.run, rank=seat),
        watched(
            plan.run.uri,
            rank=seat,
            hang_timeout_s=scaling.hang_timeout_s,
            waiting_places=WAITING_PLACES,
        ) as pulse,
    ):
        self_test = SelfTest(plan)
        if way_to_compute(plan.config) != "compiled":  # kernels come from those whom it meets
            self_test.found()  # while the others train
        rendezvous = Rendezvous(
            address,
            group=group_name(),
            seat=seat,
            num_seats=context.get_world_size(),
            use_gpu=scaling.use_gpu,
            is_waiting=lambda: Waits.WORKERS in pulse.beat().waits_for,
            progress=lambda: pulse.num_steps,
            max_fruitless=scaling.max_fruitless_attempts,
            pulse=pulse,
            hang_timeout_s=scaling.hang_timeout_s,
        )

        def train_together(meeting: Meeting) -> None:
            """Trains with the workers of this round."""
            train(
                plan,
                rank=rendezvous.rank,
                world_size=len(rendezvous.seats),
                meeting=meeting,
                pulse=pulse,
                signals=partial(signals, rendezvous.seats, sizes),
                self_test=self_test,
            )

        try:
            while not rendezvous.attend(train_together):
                pulse.at(Place.AROUND)
        except FruitlessError as error:
            pulse.at(Place.AROUND)
            if rendezvous.rank == 0:
                writer = RunWriter(plan)
                patiently(lambda: write_down(plan.run, writer.ledger), "incidents")
                writer.give_up(str(error))
