"""Runs all stages one after another on a local cluster, for the demo and for a rehearsal on a small scale."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from cluster.commands.chaos import Fault, chaos
from cluster.endpoint.endpoint import Endpoint, deploy
from cluster.local.local_cluster import cpus_per_node, free_port
from cluster.output.progress import say
from cluster.settings.run import EvaluateConfig, RunConfig
from cluster.settings.serve import ServeConfig
from cluster.stages.stage import connected, run_stage
from jobs.report.make_report import make_report
from jobs.run.find_run import find_run


@dataclass
class River:
    """The results of the stages, and how long each took."""

    tokens: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    endpoint: Endpoint | None = None
    stage_s: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        say(f"\n== {title}")
        start = time.monotonic()
        yield
        self.stage_s[name] = round(time.monotonic() - start, 3)
        say(f"   {self.stage_s[name]:.1f} s")


@contextmanager
def river(config: RunConfig, *, faults: Sequence[Fault] = (), serving: ServeConfig | None = None) -> Iterator[River]:
    """Runs from the corpus to an evaluated checkpoint, and with `serving` to an endpoint, on a free port, that is up
    while the context lasts."""
    found = River()
    with ExitStack() as stack:
        with found.stage("cluster", "a Ray cluster on this machine"):
            connection = stack.enter_context(connected(config.cluster, cpus_per_node=cpus_per_node(config)))
        with found.stage("tokenize", "tokenizing"):
            found.tokens = run_stage(connection, "jobs.tokenize_corpus", config)
        title = "training, with a node killed and one added on purpose" if faults else "training"
        with found.stage("train", title), chaos(faults, cluster=connection.local, config=config):
            found.run = run_stage(connection, "jobs.pretrain", config)
        with found.stage("evaluate", "evaluating"):
            evaluation = EvaluateConfig(checkpoint=found.run["checkpoint"], storage=config.storage)
            found.evaluation = run_stage(connection, "jobs.evaluate", evaluation)
        with found.stage("report", "drawing the report"):
            found.report = make_report(find_run(found.run["run_dir"], config.storage.uri))
        if serving is not None:
            with found.stage("serve", f"serving with {serving.replicas.max_replicas} replicas"):
                found.endpoint = deploy(connection, serving.model_copy(update={"port": free_port()}))
        yield found
