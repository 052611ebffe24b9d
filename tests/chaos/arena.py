"""A place to disturb runs: a local cluster, one corpus, and the undisturbed run that all others
must equal."""

import os
import signal
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.settings.flags import validate_config
from cluster.settings.run import RunConfig, max_steps, run_storage
from cluster.stages.stage import Connection, run_stage
from cluster.storage.uris import open_storage
from jobs.run.ledger import Ledger
from tests.jobs.corpora import number_texts
from tests.paced_steps import Pace
from tests.time_limits import limit_s

NUM_STEPS = 160
NUM_LONG_STEPS = 400
STEP_S = 0.1  # while a run is disturbed
LONG_STEP_S = 0.25

ALARMS = ("corruption", "undecided", "named", "refuted", "asked_again")

SETTINGS: dict[str, Any] = {
    "model": {"preset": "tiny", "dropout": 0.1},
    "data": {"vocab_size": 300, "val_fraction": 0.2},
    "train": {
        "max_tokens": NUM_STEPS * 64 * 64,
        "global_batch_size": 64,
        "micro_batch_size": 8,
        "seq_len": 64,
        "learning_rate": 3e-3,
        "eval_every_steps": 80,
        "audit_every_steps": 10,
    },
    "checkpoint": {"save_every_steps": 40},
}


class Watch:
    """A running attempt as its ledger shows it."""

    def __init__(self, config: RunConfig) -> None:
        self._run = run_storage(config)
        self.ended = threading.Event()

    def ledger(self) -> Ledger:
        return Ledger.read(self._run)

    def wait(self, condition: Callable[[Ledger], bool], *, timeout_s: float = 180) -> None:
        deadline_s = time.monotonic() + limit_s(timeout_s)
        while not condition(self.ledger()):
            if self.ended.wait(0.05) or time.monotonic() > deadline_s:
                raise TimeoutError("the run never got there")

    def wait_for_workers(self, number: int) -> dict[str, Any]:
        """Waits until an attempt has that many workers, and returns its `start` event."""
        self.wait(lambda ledger: bool(ledger.world_sizes) and ledger.world_sizes[-1] >= number)
        return self.ledger().events("start")[-1]

    def wait_for_step(self, step: int, *, after_attempt: int = 0) -> dict[str, Any]:
        """Waits until an attempt later than `after_attempt` has completed the step, and returns its
        `start` event."""

        def reached(ledger: Ledger) -> bool:
            starts = ledger.events("start")
            lines = [line for line in ledger.lines if "event" not in line]
            return bool(starts and lines) and (
                starts[-1]["attempt"] > after_attempt
                and lines[-1]["attempt"] == starts[-1]["attempt"]
                and lines[-1]["step"] >= step
            )

        self.wait(reached)
        return self.ledger().events("start")[-1]


class Arena:
    """A local cluster, and the runs that are disturbed on it."""

    def __init__(
        self, connection: Connection, folder: Path, pace: Pace, *, compute: str, shard: str
    ) -> None:
        assert connection.local is not None
        self.connection, self.cluster, self.folder = connection, connection.local, folder
        self._pace = pace
        self._compute, self._shard = compute, "none"
        self.lost_steps: list[int] = []  # by all recoveries so far
        number_texts(folder / "corpus")
        quiet = self.config("quiet", min_workers=2, max_workers=2)
        self.quiet = run_stage(self.connection, "jobs.pretrain", quiet)
        self._shard = shard

    def config(self, run_id: str, *, storage_uri: str | None = None, **scaling: Any) -> RunConfig:
        storage = {"uri": storage_uri or str(self.folder / "storage")}
        values = SETTINGS | {
            "scaling": scaling | {"shard": self._shard},
            "storage": storage,
            "run_id": run_id,
        }
        values["data"] = values["data"] | {"source": str(self.folder / "corpus")}
        values["train"] = values["train"] | {"compute": self._compute}
        return validate_config(values, RunConfig)

    def long_config(self, run_id: str) -> RunConfig:
        """Returns the settings of a run with two workers that takes minutes at `LONG_STEP_S`."""
        config = self.config(run_id, min_workers=2, max_workers=2)
        train = {"max_tokens": NUM_LONG_STEPS * 64 * 64}
        return config.model_copy(update={"train": config.train.model_copy(update=train)})

    def losses(self, config: RunConfig) -> list[float]:
        steps = Watch(config).ledger().steps
        assert [line["step"] for line in steps] == list(range(1, max_steps(config) + 1))
        return [line["loss"] for line in steps]

    def run(
        self,
        config: RunConfig,
        inject: Callable[[Watch], None],
        *,
        quiet: dict[str, Any] | None = None,
        step_s: float = STEP_S,
        is_faulty: bool = False,
    ) -> tuple[dict[str, Any], Ledger]:
        """Returns the run's result while `inject` disturbs it from a thread, in steps of at least
        `step_s`; its bits must be those of the quiet run. Unless a node computes wrong, no audit may
        say that one does."""
        quiet = quiet or self.quiet
        watch, problems = Watch(config), []

        def disturb() -> None:
            try:
                with self._pace.slow(step_s):
                    inject(watch)
            except Exception as error:  # raised below, in the thread that pytest sees
                problems.append(error)

        thread = threading.Thread(target=disturb)
        thread.start()
        try:
            result = run_stage(self.connection, "jobs.pretrain", config)
        finally:
            watch.ended.set()
            thread.join()
        assert not problems, problems
        ledger = watch.ledger()
        assert result["parameter_hash"] == quiet["parameter_hash"]
        assert self.losses(config) == [
            line["loss"] for line in Ledger.read(open_storage(quiet["run_dir"])).steps
        ]
        assert is_faulty or not ledger.events(*ALARMS)
        self.lost_steps += [recovery.lost_steps for recovery in ledger.recoveries()]
        return result, ledger

    def most_lost_steps(self, ledger: Ledger) -> int:
        """Returns how many steps the loss of a node may cost: one, or of a state of which each node
        has a part alone, those of five seconds, as its shares are copied to second nodes every
        second or two."""
        if self._shard == "none":
            return 1
        return round(5 / statistics.median(line["wall_s"] for line in ledger.steps))

    def restore_nodes(self, count: int) -> None:
        """Adds nodes until the cluster has so many workers again."""
        while len(self.cluster.node_names) < count + 1:
            self.cluster.add_node()


def kill(worker: dict[str, Any], number: int = signal.SIGKILL) -> None:
    os.kill(worker["pid"], number)
