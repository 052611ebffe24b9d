"""The life of a submitted job: submitted once however often it is asked for, reported, stopped."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.local.jobs_api import ClusterError, JobsApi, ray_token
from cluster.output.job_log import Ended, LogReader, Started, launches
from cluster.settings.run import RunConfig, run_storage
from cluster.stages.run_mirrored import SILENCE_S, lease_key, stop_key
from cluster.stages.stage_module import FINAL, OVER_BUDGET
from cluster.storage.lease import living_holder
from cluster.storage.process_identity import ProcessIdentity
from cluster.storage.uris import Storage, storage_flag
from cluster.submission.backend import JobBackend
from cluster.submission.local_backend import LocalJobs
from cluster.submission.record import Backend, JobRecord, JobState, read_record, write_record
from cluster.wings import added
from raymill.errors import UserError

_SUBMITTING_S = 60.0
"""Age up to which a job that its backend does not know counts as one that is just being
submitted."""


@dataclass(frozen=True)
class JobView:
    """A view of a run's job: its state, its newest launch in the log and how that ended; `note` is
    for people."""

    state: JobState
    record: JobRecord
    launch: str | None
    ended: Ended | None
    note: str = ""


def backend_at(
    backend: Backend,
    where: str = "",
    *,
    token_file: Path | None = None,
    overlay: str | None = None,
) -> JobBackend:
    """Returns the backend of the kind at `where`. Ray and Kubernetes' client are imported only if
    it needs them."""
    if backend is Backend.RAY:
        from cluster.submission.ray_backend import RayJobs  # noqa: PLC0415

        return RayJobs(JobsApi(where, ray_token(token_file)))
    if backend is Backend.KUBERAY:
        for kube_jobs in added(lambda wing: wing.jobs):
            jobs: JobBackend = kube_jobs(where or None, overlay)
            return jobs
        raise UserError("this raymill runs no job on Kubernetes: cluster/kube is not there")
    return LocalJobs()


def living_job(config: RunConfig, stage: str, token_file: Path | None) -> JobView | None:
    """Returns the job of this stage that the run has now, if any. Raises `UserError` if the run has
    another job."""
    view = view_job(run_storage(config), token_file)
    if view is None or not view.state.is_live:
        return None
    if view.record.stage != stage:
        raise UserError(
            f"run {config.run_id} has another job, {view.record.stage}, which is {view.state}: wait for its end, or "
            f"`raymill stop {config.run_id}{storage_flag(config.storage.uri)}`"
        )
    return view


def submit_job(
    config: RunConfig, stage: str, backend: JobBackend, token_file: Path | None
) -> tuple[JobView, bool]:
    """Returns the run's job and whether it is new: of several submissions at once, one starts a
    job. A job that has ended is followed by another one, which resumes the run. Raises `UserError`
    if the job is refused, or if the place has a job of the run that no record names."""
    run = run_storage(config)
    while True:
        found = read_record(run)
        # Another process was faster
        if (living := living_job(config, stage, token_file)) is not None:
            return living, False
        number, version = (found[0].number + 1, found[1]) if found else (1, None)
        record = backend.record(config, stage, number=number)
        _clear_way(backend, record, found[0] if found else None, config)
        taken = write_record(run, record, replaces=version)
        if taken is not None:
            break
    try:
        started = backend.start(config, record)
    except UserError as error:
        if _may_be_there(backend, record):
            raise UserError(
                f"{error}; the job {record.job} may be there all the same: `raymill submit` again completes it, and "
                f"`raymill stop {config.run_id}{storage_flag(config.storage.uri)}` ends it"
            ) from None
        write_record(run, replace(record, refused=str(error)), replaces=taken)
        raise
    except BaseException:
        if not _may_be_there(backend, record):
            write_record(
                run, replace(record, refused="the submission was interrupted"), replaces=taken
            )
        raise
    if started != record:
        write_record(run, started, replaces=taken)
    return JobView(JobState.PENDING, started, None, None), True


def _clear_way(
    backend: JobBackend, record: JobRecord, before: JobRecord | None, config: RunConfig
) -> None:
    """Ends what is left of the run's last job, which is over. Raises `UserError` for a job that no
    record names."""
    strays = backend.strays(record)
    if before is not None and before.backend is record.backend and strays == [before.job]:
        backend.stop(before)
    elif strays:
        raise UserError(
            f"{record.where} has another job of run {config.run_id}, {', '.join(strays)}: `raymill stop "
            f"{config.run_id}{storage_flag(config.storage.uri)}` ends it"
        )


def _may_be_there(backend: JobBackend, record: JobRecord) -> bool:
    """Says whether the job may have been taken although its submission failed: an answer can be
    lost."""
    try:
        return backend.may_be_there(record)
    except ClusterError:
        return True


def view_job(run: Storage, token_file: Path | None) -> JobView | None:
    """Returns what the run's job is doing, or None if it never had one. The backend is asked first;
    where it is gone, or there is none, the run's storage says."""
    found = read_record(run)
    launch, started, ended = _newest_launch(run, found and found[0].job)
    if found:
        record = found[0]
    elif started:
        run_id = run.uri.rpartition("/")[2]
        record = JobRecord(
            run_id, started.stage, Backend.HAND, started.host, started.job, 0, started.time
        )
    else:
        return None
    if record.refused:
        return JobView(JobState.FAILED, record, launch, ended, f"it was refused: {record.refused}")
    # KubeRay follows a failed launch by another one, on a new cluster; one without hope ends at
    # once (`run_mirrored`).
    is_final = ended is not None and ended.exit_code in (0, *FINAL)
    has_ended = is_final or (ended is not None and record.backend is not Backend.KUBERAY)
    if has_ended or record.backend is Backend.HAND:
        return _seen_in_storage(run, record, launch, ended)
    try:
        state = backend_at(record.backend, record.where, token_file=token_file).state(record)
        note = ""
    except ClusterError as error:
        state, note = None, str(error)
    is_young = time.time() - record.submitted < _SUBMITTING_S
    if state is None and launch is None and is_young and not record.stopped:
        return JobView(JobState.PENDING, record, None, None, note or "it is being submitted")
    if state is None:
        return _seen_in_storage(run, record, launch, ended, note)
    if state is JobState.FAILED and record.stopped:
        state = JobState.STOPPED
    return JobView(state, record, launch, ended, note)


def _newest_launch(
    run: Storage, job: str | None
) -> tuple[str | None, Started | None, Ended | None]:
    """Returns the newest launch of the job (of any, if it is None), and how it began and ended."""
    for launch in reversed(launches(run)):
        reader = LogReader(run, launch)
        started = reader.started()
        if job in (None, started.job.partition("+")[0]):  # see `run_stage`
            return launch, started, reader.ended()
    return None, None, None


def _seen_in_storage(
    run: Storage, record: JobRecord, launch: str | None, ended: Ended | None, note: str = ""
) -> JobView:
    if ended is None:
        if holder := living_holder(run, lease_key(record.stage), timeout_s=SILENCE_S):
            return JobView(
                JobState.RUNNING,
                record,
                launch,
                None,
                note or f"on {holder.host} since {holder.since}",
            )
        state = JobState.STOPPED if record.stopped else JobState.LOST
    elif ended.exit_code == 0:
        state = JobState.SUCCEEDED
    else:
        is_spent = ended.exit_code == OVER_BUDGET
        state = JobState.STOPPED if ended.stopped or record.stopped or is_spent else JobState.FAILED
        note = "its budget is spent: a higher scaling.max_cost continues it" if is_spent else note
    return JobView(state, record, launch, ended, note)


def stray_jobs(job: JobRecord, token_file: Path | None) -> list[str]:
    """Returns the names of living jobs of the run that its record does not name."""
    if job.backend is not Backend.KUBERAY:
        return []
    return backend_at(job.backend, job.where, token_file=token_file).strays(job)


def stop_job(run: Storage, view: JobView, token_file: Path | None) -> None:
    """Asks the run's job to save and end. Of a process that no backend reaches from here, such as
    one that was started by hand, the storage asks it."""
    job = view.record
    is_elsewhere = (
        job.backend is Backend.LOCAL
        and not ProcessIdentity(job.machine, job.pid, job.started_s).is_here
    )
    if job.backend is Backend.HAND or is_elsewhere:
        if view.launch is None:
            raise UserError(
                f"run {job.run_id} has no launch yet that could be asked to end; ask again in a moment"
            )
        run.write_bytes(stop_key(view.launch), b"")
        return
    backend_at(job.backend, job.where, token_file=token_file).stop(job)
    while (
        (found := read_record(run)) is not None and found[0].job == job.job and not found[0].stopped
    ):
        write_record(run, replace(found[0], stopped=True), replaces=found[1])


def describe(view: JobView) -> dict[str, Any]:
    """Returns the view as a result, for `--json` and for people."""
    record = view.record
    return {
        "run_id": record.run_id,
        "state": str(view.state),
        "stage": record.stage,
        "job": record.job,
        "backend": str(record.backend),
        "where": record.where,
        "submitted": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.submitted)),
        "number": record.number,
        "launch": view.launch,
        "exit_code": view.ended.exit_code if view.ended else None,
    } | ({"note": view.note} if view.note else {})
