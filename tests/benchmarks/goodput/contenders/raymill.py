"""raymill as its users run it: `jobs.pretrain` as a job of the cluster, elastic, with its ledger as
the record."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from cluster.local.local_cluster import LocalCluster
from cluster.settings.flags import validate_config
from cluster.settings.run import RunConfig, run_storage
from jobs.run.ledger import LedgerTail, Line
from tests.benchmarks.bench_recovery import raymill_training
from tests.benchmarks.goodput.contenders.contract import (
    BATCH,
    HASH_EVERY_STEPS,
    MAX_NODES,
    PRESET,
    SEQ_LEN,
    VOCAB,
    Contender,
    Settings,
)
from tests.benchmarks.goodput.records import Event, Mark, Step
from tests.jobs.corpora import number_texts

_RUN = "spot"
_FOREVER = 1_000_000  # steps: the trace's end comes first


class Raymill(Contender):
    name = "raymill"

    def __init__(self, settings: Settings, folder: Path) -> None:
        super().__init__(settings, folder)
        self._config = _config(settings, folder)
        self._tail = LedgerTail(run_storage(self._config))
        self._failures: list[BaseException] = []
        self._marks: list[Mark] = []

    @contextmanager
    def training(self, cluster: LocalCluster) -> Iterator[None]:
        with raymill_training(cluster, self._config) as self._failures:
            yield

    def read(self) -> tuple[list[Step], list[Mark]]:
        self.tick()
        lines = self._tail.ledger.lines
        steps = [_step(line) for line in lines if "event" not in line]
        return steps, self._marks

    def tick(self) -> None:
        if self._failures:
            raise RuntimeError("raymill's run has ended by itself") from self._failures[0]
        for line in self._tail.read():
            if line.get("event") == "start":
                self._marks += _marks(line)


def _config(settings: Settings, folder: Path) -> RunConfig:
    values = {
        "run_id": _RUN,
        "model": {"preset": PRESET},
        "data": {
            "source": str(number_texts(folder / "corpus", num_words=2000)),
            "vocab_size": VOCAB,
            "val_fraction": 0.2,
        },
        "train": {
            "max_tokens": _FOREVER * BATCH * SEQ_LEN,
            "global_batch_size": BATCH,
            "micro_batch_size": 1,
            "seq_len": SEQ_LEN,
            "eval_every_steps": _FOREVER,
            "hash_every_steps": HASH_EVERY_STEPS,
            "precision": "fp32",  # as the others'
        },
        "scaling": {
            "min_workers": 1,
            "max_workers": MAX_NODES,
            "resize_check_s": settings.look_s,
        },
        "checkpoint": {"save_every_steps": settings.save_every_steps},
        "storage": {"uri": str(folder / "storage")},
    }
    return validate_config(values, RunConfig)


def _marks(start: Line) -> list[Mark]:
    """Returns the marks of an attempt, while its processes live. One that survived the attempt before
    began long ago."""
    marks = [Mark(start["time"] - start["opening_seconds"], Event.MET)]
    marks.append(Mark(start["time"], Event.LOADED))
    for worker in start["workers"]:
        with suppress(psutil.NoSuchProcess):
            marks.append(Mark(psutil.Process(worker["pid"]).create_time(), Event.STARTED))
    return marks


def _step(line: Line) -> Step:
    samples = tuple(range(*line["samples"]))
    return Step(
        line["time"], line["step"], line["world_size"], samples, line.get("parameter_hash") or ""
    )
