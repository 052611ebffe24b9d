"""Jobs on a local cluster of their own, which a background process (`run_local_job`) starts, owns
and ends."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

from cluster.local.jobs_api import ClusterError
from cluster.local.local_cluster import cpus_per_node, gpus_per_node
from cluster.output.progress import doing
from cluster.output.result_text import counted
from cluster.settings.code_folders import CODE_ROOT
from cluster.settings.run import RunConfig, write_config
from cluster.stages.stage_module import STAGES
from cluster.storage.process_identity import ProcessIdentity
from cluster.submission.backend import JobBackend
from cluster.submission.preflight import Folders, check_rooms
from cluster.submission.record import Backend, JobRecord, JobState
from model.hardware.processor import num_gpus_here


class LocalJobs(JobBackend):
    """Jobs known by their owner's process; other machines know only their logs."""

    kind, where, folders = Backend.LOCAL, socket.gethostname(), Folders.SAME

    def check(self, config: RunConfig, stage: str, needs: dict[str, Any]) -> None:
        memory = psutil.virtual_memory().total
        count = max(1, config.cluster.num_nodes - 1)
        cpus = config.cluster.cpus_per_node or cpus_per_node(config)
        # All nodes share the memory of this machine.
        share = gpus_per_node(num_gpus_here(), config.cluster.num_nodes)
        nodes = [{"CPU": float(cpus), "memory": memory / count, "GPU": float(share)}] * count
        check_rooms(config, stage, needs, nodes=nodes, where="this machine")

    def record(self, config: RunConfig, stage: str, *, number: int) -> JobRecord:
        record = super().record(config, stage, number=number)
        # Until its owner runs
        return dataclasses.replace(record, **dataclasses.asdict(ProcessIdentity.of()))

    def start(self, config: RunConfig, record: JobRecord) -> JobRecord:
        """Returns once the cluster is up and has the job, after some ten seconds."""
        with tempfile.TemporaryDirectory(prefix="raymill-submit-") as name:
            folder = Path(name)
            write_config(config, folder / "run.yaml")
            with (folder / "errors").open("wb") as errors:
                stage, path = STAGES[record.stage], str(folder / "run.yaml")
                owner = subprocess.Popen(
                    # -P: a folder here may have the name of one of our packages.
                    [
                        sys.executable,
                        "-P",
                        "-m",
                        "cluster.submission.run_local_job",
                        stage,
                        path,
                        record.job,
                    ],
                    env=os.environ | {"PYTHONPATH": str(CODE_ROOT)},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    start_new_session=True,  # outlives the terminal
                )
            assert owner.stdout is not None, "its output is piped"
            try:
                with doing(
                    f"starting a local cluster of {counted(config.cluster.num_nodes, 'node')} in the background"
                ):
                    ready = owner.stdout.readline()
            except BaseException:
                owner.terminate()
                raise
            if not ready:
                owner.wait()
                said = (folder / "errors").read_text(errors="replace").strip().splitlines() or [
                    "it said nothing"
                ]
                raise ClusterError(
                    f"the local cluster could not start the job: {said[-1].removeprefix('error: ')}"
                )
        return dataclasses.replace(record, **dataclasses.asdict(ProcessIdentity.of(owner.pid)))

    def state(self, record: JobRecord) -> JobState | None:
        return None if _owner(record).is_gone() else JobState.RUNNING

    def stop(self, record: JobRecord) -> None:
        owner = _owner(record)
        if not owner.is_gone():
            os.kill(owner.pid, signal.SIGTERM)


def _owner(record: JobRecord) -> ProcessIdentity:
    owner = ProcessIdentity(record.machine, record.pid, record.started_s)
    if not owner.is_here:
        raise ClusterError(
            f"the job runs, or ran, on {record.where}; only there can its processes be seen and stopped"
        )
    return owner
