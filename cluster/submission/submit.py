"""The life of a submitted job: taken once however often it is asked for, told of, stopped."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from cluster.local.local_cluster import ClusterError
from cluster.output.job_log import Ended, LogReader, launches
from cluster.settings.parser import ConfigError
from cluster.settings.run import RunConfig
from cluster.stages.run_mirrored import SILENCE_S, lease_key
from cluster.storage.lease import living_holder
from cluster.storage.uris import Storage, open_storage
from cluster.submission.backend import JobBackend
from cluster.submission.preflight import NeedsOf, check_run
from cluster.submission.record import Backend, JobRecord, JobState, read_record, write_record
from model.errors import UserError

Backends = Callable[[JobRecord], JobBackend]
"""The backend that a record is of."""

_SUBMITTING_S = 60.0
"""For which a job that its backend does not know is taken for one that is just being handed over."""


@dataclass(frozen=True)
class JobView:
    """What is known of a run's job. `launch` is its newest in the log, `ended` how that ended; `note` is for people."""

    state: JobState
    record: JobRecord | None  # None for a job that was started otherwise than by `raymill submit`
    launch: str | None
    ended: Ended | None
    note: str = ""


def submit_job(
    config: RunConfig, stage: str, backend: JobBackend, backends: Backends, needs_of: NeedsOf
) -> tuple[JobView, bool]:
    """The run's job, and whether it is a new one: one that lives already is given back as it is.

    A job that has ended is followed by another one, which resumes the run. Raises `UserError` where the job is refused.
    """
    run = open_storage(config.storage.uri).child(f"runs/{config.run_id}")
    backend.probe()
    if (living := _living(config, run, stage, backends)) is not None:
        return living, False
    _check(config, stage, backend, needs_of)
    while True:
        found = read_record(run)
        number, version = (found[0].number + 1, found[1]) if found else (1, None)
        record = backend.record(config, stage, number=number, submitted=time.time())
        taken = write_record(run, record, replaces=version)
        if taken is not None:
            break
        if (living := _living(config, run, stage, backends)) is not None:  # somebody else was faster
            return living, False
    try:
        started = backend.start(config, record)
    except UserError as error:
        write_record(run, replace(record, refused=str(error)), replaces=taken)
        raise
    if started != record:
        write_record(run, started, replaces=taken)
    return JobView(JobState.PENDING, started, None, None), True


def check_only(config: RunConfig, stage: str, backend: JobBackend, needs_of: NeedsOf) -> None:
    """All that comes before a job is spent. Raises `UserError`."""
    backend.probe()
    _check(config, stage, backend, needs_of)


def _check(config: RunConfig, stage: str, backend: JobBackend, needs_of: NeedsOf) -> None:
    backend.check(config, stage, check_run(config, backend.folders, needs_of))


def _living(config: RunConfig, run: Storage, stage: str, backends: Backends) -> JobView | None:
    view = view_job(run, backends, stage=stage)
    if view is None or not view.state.is_live:
        return None
    if view.record is not None and view.record.stage != stage:
        raise UserError(
            f"run {config.run_id} has another job, {view.record.stage}, which is {view.state}: wait for its end, or "
            f"`raymill stop {config.run_id}`"
        )
    return view


def view_job(run: Storage, backends: Backends, *, stage: str = "") -> JobView | None:
    """What the run's job is doing; None where it never had one. `stage`: of which one that somebody else started may
    be running. Whoever runs it is asked first; where he is gone, the run's storage tells."""
    found = read_record(run)
    record = found[0] if found else None
    launch, ended = _newest_launch(run, record)
    if record is None:
        return _told_by_storage(run, None, launch, ended, stage) if launch or stage else None
    if record.refused:
        return JobView(JobState.FAILED, record, launch, ended, f"it was refused: {record.refused}")
    # KubeRay follows a launch that failed by another one, on a new cluster.
    if ended is not None and (ended.exit_code == 0 or record.backend is not Backend.KUBERAY):
        return _told_by_storage(run, record, launch, ended, record.stage)
    return _told_by_backend(run, backends, record, launch, ended)


def _told_by_backend(
    run: Storage, backends: Backends, record: JobRecord, launch: str | None, ended: Ended | None
) -> JobView:
    try:
        state, note = backends(record).state(record), ""
    except ClusterError as error:
        state, note = None, str(error)
    if state is None and launch is None and time.time() - record.submitted < _SUBMITTING_S:
        return JobView(JobState.PENDING, record, None, None, note or "it is being submitted")
    if state is None:
        return _told_by_storage(run, record, launch, ended, record.stage, note)
    if state is JobState.FAILED and record.stopped:
        state = JobState.STOPPED
    return JobView(state, record, launch, ended, note)


def _newest_launch(run: Storage, record: JobRecord | None) -> tuple[str | None, Ended | None]:
    """Of the record's job, or of any where there is no record; and how it ended."""
    for launch in reversed(launches(run)):
        reader = LogReader(run, launch)
        if record is None or reader.started().job == record.job:
            return launch, reader.ended()
    return None, None


def _told_by_storage(
    run: Storage, record: JobRecord | None, launch: str | None, ended: Ended | None, stage: str, note: str = ""
) -> JobView:
    if ended is None:
        stage = stage or LogReader(run, launch).started().stage if launch else stage
        if holder := living_holder(run, lease_key(stage), timeout_s=SILENCE_S):
            return JobView(JobState.RUNNING, record, launch, None, note or f"on {holder.host} since {holder.since}")
        state = JobState.STOPPED if record and record.stopped else JobState.LOST
    elif ended.exit_code == 0:
        state = JobState.SUCCEEDED
    else:
        state = JobState.STOPPED if ended.stopped or (record and record.stopped) else JobState.FAILED
    return JobView(state, record, launch, ended, note)


def stop_job(run: Storage, run_id: str, backends: Backends) -> tuple[JobView, bool]:
    """Asks the run's job to save and end; its view before, and whether there was one to stop."""
    view = view_job(run, backends)
    if view is None:
        raise UserError(f"run {run_id} has no job: `raymill list` shows which ones there are")
    if not view.state.is_live:
        return view, False
    if view.record is None:
        raise ConfigError(f"run {run_id} was not submitted by `raymill submit`, but started by hand: end it there")
    backends(view.record).stop(view.record)
    while (found := read_record(run)) is not None and found[0].job == view.record.job and not found[0].stopped:
        write_record(run, replace(found[0], stopped=True), replaces=found[1])
    return view, True


def describe(view: JobView, run_id: str) -> dict[str, Any]:
    """For `--json`, and for people."""
    record, ended = view.record, view.ended
    described: dict[str, Any] = {"run_id": run_id, "state": str(view.state)}
    if record is not None:
        described |= {"stage": record.stage, "job": record.job, "backend": str(record.backend), "where": record.where}
        submitted = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.submitted))
        described |= {"submitted": submitted, "number": record.number}
    described |= {"launch": view.launch, "exit_code": ended.exit_code if ended else None}
    if view.note:
        described["note"] = view.note
    return described
