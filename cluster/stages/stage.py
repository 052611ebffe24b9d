"""How a stage runs: as a Ray job of a snapshot of the code, with live logs, an exit code and one JSON result.

A job's working directory is a snapshot of the four code folders and the resolved `run.yaml`, so a cluster needs no
installation of this package and a run says exactly which settings it had.
"""

import asyncio
import dataclasses
import logging
import os
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.job_submission import JobStatus, JobSubmissionClient

from cluster.local.local_cluster import STOP_WAIT_S, ClusterError, LocalCluster, cpus_per_node
from cluster.output.progress import ProgressView, doing, say
from cluster.settings.code_folders import snapshot_code
from cluster.settings.flags import add_config_arguments, config_from_arguments
from cluster.settings.parser import ConfigError, Parser
from cluster.settings.run import ClusterConfig, EvaluateConfig, RunConfig, write_config
from cluster.settings.serve import ServeConfig
from cluster.stages.jobs_api import JobsApi, ray_token
from cluster.stages.run_mirrored import entrypoint
from cluster.stages.stage_module import ERROR_MARK, MISUSED, StageFailedError, parse_result, print_result
from cluster.storage.uris import open_storage
from model.errors import UserError

_POLL_S = 0.5
_NO_AGENT = "No available agent"
_AGENT_TIMEOUT_S = 60.0
_STOP_MARGIN_S = 5.0
_MAX_LOST_HEADS = 3  # for one stage

Config = TypeVar("Config", RunConfig, ServeConfig, EvaluateConfig)


class HeadLostError(ClusterError):
    """The local cluster's head has ended, and the stage's job with it."""


@dataclasses.dataclass(frozen=True)
class Connection:
    """A cluster that takes jobs."""

    jobs_url: str
    headers: dict[str, str]
    local: LocalCluster | None


@contextmanager
def connected(config: ClusterConfig, *, cpus_per_node: int) -> Iterator[Connection]:
    """The cluster at `config.address`, or a local one that lives as long as the context."""
    if config.address is not None:
        api = JobsApi(config.address, ray_token())
        api.probe()
        yield Connection(api.url, api.headers, None)
        return
    with ExitStack() as stack:
        with doing(f"starting a local cluster of {config.num_nodes} node{'s' * (config.num_nodes > 1)}"):
            nodes = LocalCluster(num_nodes=config.num_nodes, cpus_per_node=config.cpus_per_node or cpus_per_node)
            cluster = stack.enter_context(nodes)
        yield Connection(cluster.jobs_url, {"Authorization": f"Bearer {cluster.token}"}, cluster)


def run_stage(
    connection: Connection,
    module: str,
    config: RunConfig | ServeConfig | EvaluateConfig,
) -> dict[str, Any]:
    """Runs `python -m MODULE run.yaml` on the cluster, shows its log as it comes, and returns its result.

    Where the head of a local cluster is lost, and the job with it, both are started again: a stage finds what it has
    done, and a run goes on under its id.

    Raises `StageFailedError` when the job ends without one, `ConfigError` when it found itself misused, and
    `ClusterError` when the cluster cannot be reached.
    """
    for _ in range(_MAX_LOST_HEADS):
        try:
            return _run_job(connection, module, config)
        except HeadLostError as error:
            say(f"{error}; it is started again, and then the job")
            assert connection.local is not None
            connection.local.restart_head()
    return _run_job(connection, module, config)


def _run_job(connection: Connection, module: str, config: RunConfig | ServeConfig | EvaluateConfig) -> dict[str, Any]:
    """Raises `HeadLostError`, and what `run_stage` raises."""
    try:
        return _submit_and_follow(connection, module, config)
    except UserError:
        raise
    except Exception as error:  # of several kinds, when nobody answers any more
        if connection.local is None or not connection.local.lost_head():
            raise
        raise HeadLostError("the head of the local cluster was lost") from error


def _submit_and_follow(
    connection: Connection, module: str, config: RunConfig | ServeConfig | EvaluateConfig
) -> dict[str, Any]:
    client, job = _jobs_client(connection), f"raymill-{secrets.token_hex(8)}"
    folder_of_logs = open_storage(config.storage.uri).local_path("logs") or Path(".raymill/logs")
    job_id = None
    try:
        with ProgressView(folder_of_logs.absolute() / f"{module}-{job}.log", waiting="starting the job") as view:
            job_id = submit_stage(connection, module, config, job=job)
            return _follow(client, job_id, view)
    except BaseException:
        if job_id is not None and client.get_job_status(job_id) in (JobStatus.PENDING, JobStatus.RUNNING):
            with doing("stopping: the job saves and ends"):
                client.stop_job(job_id)
                _wait_for_end(client, job_id)
            if words := [line for line in client.get_job_logs(job_id).splitlines() if line.startswith(ERROR_MARK)]:
                say(words[-1].removeprefix(ERROR_MARK))  # such as which step it has saved
        raise


def submit_stage(
    connection: Connection, module: str, config: RunConfig | ServeConfig | EvaluateConfig, *, job: str, attempt: int = 0
) -> str:
    """Starts `python -m MODULE run.yaml` on the cluster as the job of that name; gives the attempt's, which is another
    one each time: Ray takes a name once.

    Raises `ClusterError` when the cluster cannot be reached, `RuntimeError` when it does not take the job, such as one
    of a name that it knows.
    """
    is_run = isinstance(config, RunConfig)  # whose storage keeps what its jobs print
    command = entrypoint(module, "run.yaml", job=job) if is_run else ["python", "-m", module, "run.yaml"]
    with tempfile.TemporaryDirectory(prefix="raymill-job-") as folder:
        snapshot_code(Path(folder))
        write_config(config, Path(folder) / "run.yaml")
        return _submit(
            _jobs_client(connection),
            submission_id=attempt_name(job, attempt),
            entrypoint=f"exec {shlex.join(command)}",
            runtime_env={"working_dir": folder, "env_vars": _job_environment(connection)},
            metadata=_metadata(config, module),
        )


def attempt_name(job: str, attempt: int) -> str:
    """By which Ray knows it."""
    return f"{job}+{attempt}" if attempt else job


def _metadata(config: RunConfig | ServeConfig | EvaluateConfig, module: str) -> dict[str, str]:
    """What `raymill list --address` tells of a job."""
    run = {"raymill_run_id": str(config.run_id)} if isinstance(config, RunConfig) else {}
    return {"raymill_module": module, "raymill_storage": config.storage.uri} | run


def _submit(client: JobSubmissionClient, **job: Any) -> str:
    """The job's id. A cluster that has just started answers before the agent that starts jobs is there."""
    deadline_s = time.monotonic() + _AGENT_TIMEOUT_S
    while True:
        try:
            return client.submit_job(**job)
        except RuntimeError as error:
            if _NO_AGENT not in str(error) or time.monotonic() > deadline_s:
                raise
        time.sleep(_POLL_S)


def _wait_for_end(client: JobSubmissionClient, job_id: str) -> None:
    """A stage that was told to stop may still save; Ray kills it after `STOP_WAIT_S`."""
    deadline = time.monotonic() + STOP_WAIT_S + _STOP_MARGIN_S
    while client.get_job_status(job_id) == JobStatus.RUNNING and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def stage_main(
    run: Callable[[Config], dict[str, Any]],
    root: type[Config] = RunConfig,  # type: ignore[assignment]
    *,
    needs_ray: bool = True,
) -> int:
    """The whole command line of a stage module: settings in, one JSON result out, and the exit code.

    Inside a Ray job it joins the job's cluster; started by hand it starts a local one and submits itself there.
    """
    # Run as a script, the module is called __main__; its spec knows the real name.
    module = str(sys.modules["__main__"].__spec__.name)  # type: ignore[union-attr]

    def result() -> dict[str, Any]:
        parser = Parser(prog=f"python -m {module}", description=sys.modules["__main__"].__doc__)
        parser.add_argument("config", nargs="?", type=Path, help="YAML file; flags override its settings")
        add_config_arguments(parser, root)
        config = config_from_arguments(parser.parse_args(), root)
        if needs_ray and "RAY_ADDRESS" not in os.environ and not isinstance(config, ServeConfig):
            with connected(config.cluster, cpus_per_node=cpus_per_node(config)) as connection:
                return run_stage(connection, module, config)
        if needs_ray:
            ray.init(log_to_driver=True, logging_level=logging.WARNING)
        return run(config)

    return print_result(result)


def _job_environment(connection: Connection) -> dict[str, str]:
    """Variables that a job needs from its submitter: where S3 is. Credentials are the cluster's own affair; a local
    cluster's nodes inherit this process's."""
    names = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")
    variables = {name: os.environ[name] for name in names if name in os.environ} | {"PYTHONUNBUFFERED": "1"}
    if connection.local is not None:  # Ray Train's actors look for their cluster, and may find another one's
        variables["RAY_ADDRESS"] = connection.local.address
    return variables


def _jobs_client(connection: Connection) -> JobSubmissionClient:
    for logger in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env"):
        logging.getLogger(logger).setLevel(logging.WARNING)  # uploads and web sockets are no news
    try:
        return JobSubmissionClient(connection.jobs_url, headers=connection.headers)
    except (ConnectionError, RuntimeError) as error:
        raise ClusterError(f"no Ray Jobs API answers at {connection.jobs_url}: {str(error).splitlines()[0]}") from None


def _follow(client: JobSubmissionClient, job_id: str, view: ProgressView) -> dict[str, Any]:
    result: dict[str, Any] | None = None
    error = ""

    async def tail() -> None:
        nonlocal result, error
        rest = ""
        async for text in client.tail_job_logs(job_id):
            *lines, rest = (rest + text).split("\n")
            for line in lines:
                found = parse_result(line)
                result = result if found is None else found
                if line.startswith(ERROR_MARK):  # the stage's last word, said once: by whoever reports its failure
                    error = line.removeprefix(ERROR_MARK)
                    view.keep(line)
                elif found is None:
                    view.line(line)

    asyncio.run(tail())
    while (status := client.get_job_status(job_id)) in (JobStatus.PENDING, JobStatus.RUNNING):
        time.sleep(_POLL_S)
    if status == JobStatus.SUCCEEDED and result is not None:
        return result
    code = client.get_job_info(job_id).driver_exit_code
    kind = ConfigError if code == MISUSED else StageFailedError
    raise kind(f"{error or f'job {job_id} ended with exit code {code}'} (the whole log is in {view.log})")
