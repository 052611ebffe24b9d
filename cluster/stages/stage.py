"""Runs a stage as a Ray job, with live logs, an exit code and one JSON result.

A job's working directory is a snapshot of the four code folders and the resolved `run.yaml`, so a
cluster needs no installation of this package, and a run records exactly which settings it had.
"""

import asyncio
import dataclasses
import json
import logging
import os
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.job_submission import JobStatus, JobSubmissionClient

from cluster.local.jobs_api import ClusterError, JobsApi, ray_token
from cluster.local.local_cluster import STOP_WAIT_S, LocalCluster
from cluster.output.progress import ProgressView, doing, say
from cluster.output.result_text import printable
from cluster.settings.code_folders import snapshot_code
from cluster.settings.flags import read_config, settled
from cluster.settings.parser import ConfigError
from cluster.settings.run import ClusterConfig, RunConfig, write_config
from cluster.settings.serve import ServeConfig
from cluster.settings.stages import EvaluateConfig, IndexConfig
from cluster.stages.run_mirrored import entrypoint
from cluster.stages.stage_module import (
    ERROR_MARK,
    HOPELESS,
    MAY_SUCCEED,
    MISUSED,
    OVER_BUDGET,
    RESULT_MARK,
    OverBudgetError,
    StageFailedError,
    parse_result,
)
from cluster.storage.uris import StorageError, open_storage
from model.hardware.processor import num_gpus_here
from raymill.errors import UserError

_POLL_S = 0.5
_NO_AGENT = "No available agent"
_AGENT_TIMEOUT_S = 60.0
_STOP_MARGIN_S = 5.0
_MAX_LOST_HEADS = 3  # for one stage

Config = TypeVar("Config", RunConfig, ServeConfig, EvaluateConfig, IndexConfig)
StageConfig = RunConfig | ServeConfig | EvaluateConfig | IndexConfig


@dataclasses.dataclass(frozen=True)
class Connection:
    """A cluster that takes jobs."""

    api: JobsApi
    local: LocalCluster | None


@contextmanager
def connected(
    config: ClusterConfig, *, cpus_per_node: int, gpus_together: int = 1
) -> Iterator[Connection]:
    """Gives the cluster at `config.address`, or a local one that lives as long as the context, with
    the GPUs of this machine."""
    if config.address is not None:
        api = JobsApi(config.address, ray_token())
        api.probe()
        yield Connection(api, None)
        return
    with LocalCluster(
        num_nodes=config.num_nodes,
        cpus_per_node=config.cpus_per_node or cpus_per_node,
        num_gpus=num_gpus_here(),
        gpus_together=gpus_together,
    ) as cluster:
        yield Connection(cluster.jobs_api, cluster)


def run_stage(
    connection: Connection,
    module: str,
    config: StageConfig,
    *,
    job: str = "",
    command: str = "",
    when_submitted: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Runs `python -m MODULE run.yaml` on the cluster, shows its log as it comes, and returns its
    result. `job` is its name there, a random one if empty; `command` is what a person types to
    continue it.

    A lost head of a local cluster is restarted, and then the job: a stage finds what it has done,
    and a run continues under its id. Raises `StageFailedError` if the job ends without a result,
    `ConfigError` if it found itself misused, and `ClusterError` if the cluster cannot be reached.
    """
    job, lost_heads = job or f"raymill-{secrets.token_hex(8)}", 0
    while True:
        attempt = f"{job}+{lost_heads}" if lost_heads else job  # Ray takes a name once
        try:
            return _submit_and_follow(connection, module, config, attempt, command, when_submitted)
        except UserError:
            raise
        except Exception as error:  # of several kinds, when nothing answers any more
            if connection.local is None or not connection.local.lost_head():
                raise
            if lost_heads == _MAX_LOST_HEADS:
                raise ClusterError("the head of the local cluster was lost") from error
        lost_heads += 1
        say("the head of the local cluster was lost; it is restarted, and then the job")
        connection.local.restart_head()


def _submit_and_follow(
    connection: Connection,
    module: str,
    config: StageConfig,
    job: str,
    command: str,
    when_submitted: Callable[[], None],
) -> dict[str, Any]:
    client = _jobs_client(connection)
    folder_of_logs = open_storage(config.storage.uri).local_path("logs") or Path(".raymill/logs")
    job_id = None
    try:
        with ProgressView(
            folder_of_logs.absolute() / f"{module}-{job}.log", waiting="starting the job"
        ) as view:
            job_id = submit_stage(connection, module, config, job=job, command=command)
            when_submitted()
            return asyncio.run(_follow(client, job_id, view))
    except BaseException:
        if job_id is not None and client.get_job_status(job_id) in (
            JobStatus.PENDING,
            JobStatus.RUNNING,
        ):
            with doing(_words_of_stop(config)):
                client.stop_job(job_id)
                deadline_s = time.monotonic() + STOP_WAIT_S + _STOP_MARGIN_S  # then Ray kills it
                while (
                    client.get_job_status(job_id) == JobStatus.RUNNING
                    and time.monotonic() < deadline_s
                ):
                    time.sleep(_POLL_S)
            if words := [
                line
                for line in client.get_job_logs(job_id).splitlines()
                if line.startswith(ERROR_MARK)
            ]:
                say(words[-1].removeprefix(ERROR_MARK))  # such as which step it has saved
        raise


def _words_of_stop(config: StageConfig) -> str:
    """Says what a job does that is asked to end: that of a run saves, and the others have nothing
    to save."""
    return (
        "stopping: the job saves and ends"
        if isinstance(config, RunConfig)
        else "stopping: the job ends"
    )


def submit_stage(
    connection: Connection, module: str, config: StageConfig, *, job: str, command: str = ""
) -> str:
    """Starts `python -m MODULE run.yaml` on the cluster as the job of that name, which it returns.
    Raises `ClusterError` if the cluster cannot be reached, `RuntimeError` if it refuses."""
    words = ["python", "-m", module, "run.yaml"]
    if isinstance(config, RunConfig):
        # The run's storage keeps what its jobs print
        words = entrypoint(module, "run.yaml", job=job, command=command)
    with tempfile.TemporaryDirectory(prefix="raymill-job-") as folder:
        snapshot_code(Path(folder))
        write_config(config, Path(folder) / "run.yaml")
        return _submit(
            _jobs_client(connection),
            submission_id=job,
            entrypoint=f"exec {shlex.join(words)}",
            runtime_env={"working_dir": folder, "env_vars": _job_environment(connection)},
        )


def _submit(client: JobSubmissionClient, **job: Any) -> str:
    """Returns the job's id. A cluster that has just started answers before the agent that starts
    jobs is there."""
    deadline_s = time.monotonic() + _AGENT_TIMEOUT_S
    while True:
        try:
            return client.submit_job(**job)
        except RuntimeError as error:
            if _NO_AGENT not in str(error) or time.monotonic() > deadline_s:
                raise
        time.sleep(_POLL_S)


def stage_main(run: Callable[[Config], dict[str, Any]], root: type[Config]) -> int:
    """Runs a stage module in its Ray job, `python -m MODULE run.yaml`: joins the job's cluster,
    prints one JSON result as a line for `parse_result`, or the error for the user, and returns the
    exit code."""
    try:
        if len(sys.argv) != 2 or "RAY_ADDRESS" not in os.environ:
            raise ConfigError(
                "a stage runs in a Ray job, with a file of settings: `raymill` submits it (see --help)"
            )
        config = settled(read_config(Path(sys.argv[1]), root))
        ray.init(log_to_driver=True, logging_level=logging.WARNING)
        result = run(config)
    except UserError as error:
        sys.stderr.write(f"{ERROR_MARK}{printable(str(error))}\n")
        return _exit_code(error)
    sys.stdout.write(f"{RESULT_MARK}{json.dumps(result)}\n")
    return 0


def _exit_code(error: UserError) -> int:
    """Returns the exit code that tells whether another attempt may succeed: after an outage, or a
    stop on request."""
    if isinstance(error, ConfigError):
        return MISUSED
    if isinstance(error, StageFailedError):
        return error.exit_code
    return MAY_SUCCEED if isinstance(error, (StorageError, ClusterError)) else HOPELESS


def _job_environment(connection: Connection) -> dict[str, str]:
    """Returns variables that a job needs from its submitter: where S3 is. Credentials are the
    cluster's own; a local cluster's nodes inherit this process's."""
    names = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")
    variables = {name: os.environ[name] for name in names if name in os.environ} | {
        "PYTHONUNBUFFERED": "1"
    }
    # Ray Train's actors look for their cluster, and may find another
    if connection.local is not None:
        variables["RAY_ADDRESS"] = connection.local.address
    return variables


def _jobs_client(connection: Connection) -> JobSubmissionClient:
    for logger in (
        "ray.dashboard.modules.dashboard_sdk",
        "ray.dashboard.modules.job.sdk",
        "ray._private.runtime_env",
    ):
        logging.getLogger(logger).setLevel(logging.WARNING)  # uploads and web sockets are no news
    try:
        return JobSubmissionClient(connection.api.url, headers=connection.api.headers)
    except (ConnectionError, RuntimeError) as error:
        raise ClusterError(
            f"no Ray Jobs API answers at {connection.api.url}: {str(error).splitlines()[0]}"
        ) from None


async def _follow(client: JobSubmissionClient, job_id: str, view: ProgressView) -> dict[str, Any]:
    """Shows the job's log as it comes, and returns the result in it."""
    result, error, rest = None, "", ""
    async for text in client.tail_job_logs(job_id):
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            if (found := parse_result(line)) is not None:
                result = found
            elif line.startswith(ERROR_MARK):  # shown once, by the command that reports the failure
                error = line.removeprefix(ERROR_MARK)
                view.keep(line)
            else:
                view.line(line)
    while (status := client.get_job_status(job_id)) in (JobStatus.PENDING, JobStatus.RUNNING):
        await asyncio.sleep(_POLL_S)
    if status == JobStatus.SUCCEEDED and result is not None:
        return result
    code = client.get_job_info(job_id).driver_exit_code
    kinds = {MISUSED: ConfigError, OVER_BUDGET: OverBudgetError}
    raise kinds.get(code or 0, StageFailedError)(
        f"{error or f'job {job_id} ended with exit code {code}'} (the whole log is in {view.log})"
    )
