"""`raymill submit|list|status|logs|stop`: jobs that outlive the command that started them.

A job's record and log lie in the run's storage, so a run id and `--storage.uri` find them on any
machine.
"""

import json
import sys
import time
from typing import Any

from cluster.commands.arguments import (
    ADDRESS,
    ALL_LAUNCHES,
    FOLLOW_LOG,
    KUBERAY,
    ONLY_CHECK,
    OVERLAYS_NAMESPACE,
    RUN_ID,
    SHOWS_RAY,
    STAGE,
    STORAGE,
    TOKEN_FILE,
)
from cluster.commands.command import Arguments, Result
from cluster.local.jobs_api import ClusterError
from cluster.output.job_log import LogReader, launches
from cluster.output.progress import RayFilter, say
from cluster.output.result_text import date_of, put, table
from cluster.output.spoken_names import for_people
from cluster.settings.parser import ConfigError
from cluster.settings.run import RunConfig
from cluster.storage.uris import NotFoundError, Storage, StorageError, open_storage, storage_flag
from cluster.submission.backend import JobBackend
from cluster.submission.preflight import AdmissionError, Folders, check_run
from cluster.submission.record import Backend, JobState, recorded_runs
from cluster.submission.submit import (
    JobView,
    backend_at,
    describe,
    living_job,
    stop_job,
    stray_jobs,
    submit_job,
    view_job,
)
from raymill.errors import UserError

_STOP_TIMEOUT_S = 90.0
_LOCAL_POLL_S, _REMOTE_POLL_S = 0.5, 2.0
_STATE_INTERVAL_S = 10.0
_TAIL_BYTES = 64 << 10  # of a ledger, which are read first
_WIDER = 8  # times as many are read next
_STEPS_OF_PACE = 100


def submit(arguments: Arguments) -> Result:
    config = arguments.config(RunConfig)
    backend, stage, is_dry = _backend(arguments, config), arguments[STAGE], arguments[ONLY_CHECK]
    say(
        f"submit: {stage} of run {config.run_id}; checking the storage, the sources and the settings"
    )
    backend.probe()
    living = None if is_dry else living_job(config, stage, arguments[TOKEN_FILE])
    if living is not None:
        is_there = backend.starts_in_parts and living.record.where == backend.where
        # Its submission may have been interrupted
        if is_there and living.state is JobState.PENDING:
            backend.check(config, stage, checked_needs(config, backend.folders))
            backend.complete(config, living.record)
        return _submitted(config, living, is_new=False)
    backend.check(config, stage, checked_needs(config, backend.folders))
    if not is_dry:
        view, is_new = submit_job(config, stage, backend, arguments[TOKEN_FILE])
        return _submitted(config, view, is_new=is_new)
    manifests = backend.manifests(config, stage)
    if manifests is None:
        return Result({"run_id": config.run_id, "admitted": True})
    return Result.of_manifests(manifests, run_id=config.run_id)


def checked_needs(config: RunConfig, folders: Folders) -> dict[str, Any]:
    """Checks what does not depend on the nodes, and returns what a worker needs of them. Raises
    `AdmissionError`."""
    check_run(config, folders)

    from jobs.plan.memory import worker_needs

    needs = worker_needs(config)
    if needs["problems"]:
        raise AdmissionError("; ".join(needs["problems"]))
    return needs


def _submitted(config: RunConfig, view: JobView, *, is_new: bool) -> Result:
    uri = config.storage.uri
    where = f"{config.run_id}{storage_flag(uri)}"
    hint = f"raymill logs -f {where}"
    if not is_new:
        say(
            f"run {config.run_id} has this job already, which is {view.state}, so no other was submitted; "
            f"`raymill stop {where}` saves and ends it"
        )
    return Result(describe(view) | {"new": is_new, "storage": uri, "logs": hint})


def _backend(arguments: Arguments, config: RunConfig) -> JobBackend:
    address = arguments[ADDRESS] or config.cluster.address
    overlay = arguments[KUBERAY]
    if overlay is not None:
        return backend_at(Backend.KUBERAY, arguments[OVERLAYS_NAMESPACE] or "", overlay=overlay)
    if address is not None:
        return backend_at(Backend.RAY, address, token_file=arguments[TOKEN_FILE])
    return backend_at(Backend.LOCAL)


def list_jobs(arguments: Arguments) -> Result:
    runs = open_storage(arguments[STORAGE]).child("runs")
    rows = []
    for run in map(runs.child, recorded_runs(runs)):
        try:
            if view := view_job(run, arguments[TOKEN_FILE]):
                progress = _progress(_recent_lines(run))
                rows.append(describe(view) | progress | {"started": date_of(view.record.submitted)})
        except StorageError as error:
            say(f"{run.uri.rpartition('/')[2]} is left out: {error}")
    for row in rows:
        if problem := row.get("not_stored"):
            say(f"{row['run_id']} has {problem}")
    rows.sort(key=lambda row: str(row["submitted"]))
    if not rows:
        start = "`raymill pretrain` or `raymill submit` starts one"
        say(f"no runs in {arguments[STORAGE]}: {start}; --storage.uri names another place")
    columns = ("run_id", "stage", "state", "step", "loss", "started", "kind of job", "place", "job")
    text = table(columns, [for_people(row) for row in rows])
    return Result({"jobs": rows}, text=text)


def status(arguments: Arguments) -> Result:
    run = _run(arguments)
    view = _view(arguments, run)
    lines = _recent_lines(run)
    shown = describe(view) | _progress(lines) | _left_out(run)
    if "step" in shown:
        shown |= _rest(run, lines, is_live=view.state.is_live)
    if view.ended is not None and view.ended.result is not None:
        shown["result"] = view.ended.result
    command = view.launch and LogReader(run, view.launch).started().command
    if view.state.is_bad and command:
        shown["continue_with"] = command
    return Result(shown, is_bad=view.state.is_bad)


def _recent_lines(run: Storage) -> list[dict[str, Any]]:
    """Returns the last lines of the run's ledger, as many as say how far its checkpoints are stored;
    all that are signed, if any are. Raises `StorageError` where it is damaged."""
    entry = run.stat("ledger.jsonl")
    if entry is None:
        return []
    from jobs.run.signed_lines import newest_stated_line, shown_ledger
    from jobs.run.storage_retry import not_stored

    if newest_stated_line(run) is not None:
        return shown_ledger(run).lines
    tail_bytes = _TAIL_BYTES
    while True:
        lines = _last_lines(run, entry.size, tail_bytes=tail_bytes)
        events = {line.get("event") for line in lines}
        is_known = "checkpoint" in events or ("start" in events and not not_stored(lines))
        if is_known or tail_bytes >= entry.size:
            return lines
        tail_bytes *= _WIDER


def _progress(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns figures of the newest step of a ledger's last lines, and how far it is proven, if that
    is audited."""
    steps = _steps(lines)
    if not steps:
        return {}
    from jobs.run.storage_retry import not_stored
    from jobs.sentinel.proven_part import proven_part

    figures = {name: steps[-1][name] for name in ("step", "tokens_seen", "loss", "world_size")}
    problem = not_stored(lines)
    more = proven_part(lines).fields() | ({"not_stored": problem} if problem else {})
    return figures | _money(lines) | more


def _money(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns what the run has cost, and its budget, as its newest line with a cost says; nothing
    without a price."""
    newest: dict[str, Any] = next((line for line in reversed(lines) if "cost" in line), {})
    return {name: newest[name] for name in ("cost", "max_cost") if name in newest}


def _rest(run: Storage, lines: list[dict[str, Any]], *, is_live: bool) -> dict[str, Any]:
    """Returns the steps of the whole run, and while it trains the seconds that the rest will take at
    the pace of its last steps; nothing where this version does not know its settings."""
    from statistics import median

    from cluster.settings.run import max_steps
    from jobs.run.history import recorded_config

    try:
        planned = max_steps(recorded_config(run))
    except UserError:
        return {}
    steps = _steps(lines)[-_STEPS_OF_PACE:]
    walls_s = [line["wall_s"] for line in steps if "wall_s" in line]
    if not is_live or not walls_s:
        return {"planned_steps": planned}
    left_s = (planned - steps[-1]["step"]) * median(walls_s)
    return {"planned_steps": planned, "seconds_left": round(left_s, 1)}


def _steps(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if "step" in line and "event" not in line]


def _last_lines(run: Storage, num_bytes: int, *, tail_bytes: int) -> list[dict[str, Any]]:
    """Returns the lines at the end of a ledger of so many bytes. Raises `StorageError` for a damaged
    one."""
    start = max(0, num_bytes - tail_bytes)
    content = run.read_bytes("ledger.jsonl", start=start).rpartition(b"\n")[0]
    whole = content.split(b"\n")[start > 0 :]  # the first line may be cut
    try:
        return [{**json.loads(text)} for text in whole if text]
    except (ValueError, TypeError):
        raise StorageError(
            f"{run.uri}/ledger.jsonl has a damaged line; `raymill report` says which"
        ) from None


def _left_out(run: Storage) -> dict[str, Any]:
    """Returns the nodes of the run's storage that get no training worker, if there are any."""
    from jobs.workers.left_out_nodes import left_out

    storage = open_storage(run.uri.rpartition("/runs/")[0])
    nodes = sorted(str(place["node"]) for place in left_out(storage))
    return {"nodes_left_out": nodes} if nodes else {}


def logs(arguments: Arguments) -> Result:
    run = _run(arguments)
    names = launches(run)
    if not names:
        _view(arguments, run)  # which may be one that waits
    if arguments[FOLLOW_LOG]:
        return _follow(arguments, run)
    is_all = arguments[ALL_LAUNCHES]
    chosen = names if is_all else names[-1:]
    lines: list[str] = []
    for name in chosen:
        lines += _lines(run, name, header=is_all, rays=arguments[SHOWS_RAY])
    ended = LogReader(run, names[-1]).ended() if names else None
    last = (
        "stopped, as requested; the same run id continues it\n"
        if ended is not None and ended.stopped
        else ""
    )
    text = "".join(f"{line}\n" for line in lines) + last
    return Result({"run_id": arguments[RUN_ID], "launches": chosen, "lines": lines}, text=text)


def _lines(run: Storage, launch: str, *, header: bool, rays: bool) -> list[str]:
    reader, ray_filter = LogReader(run, launch), RayFilter()
    started = reader.started()
    title = [f"== {started.stage} on {started.host}, {launch}"] if header else []
    lines = "".join(reader.new_text()).splitlines()
    if rays:
        return title + lines
    return title + [shown for line in lines if (shown := ray_filter.shown(line)) is not None]


def _follow(arguments: Arguments, run: Storage) -> Result:
    """Prints the log until the job ends, through every launch that follows a failed one."""
    pause_s = _REMOTE_POLL_S if run.local_path("") is None else _LOCAL_POLL_S
    shown, reader, looked_s, ray_filter = "", None, 0.0, RayFilter()
    while True:
        newest = launches(run)[-1:]
        if newest and newest[0] != shown:
            shown = newest[0]
            reader = LogReader(run, shown)
        ended = reader.ended() if reader else None  # before its last lines are read
        for line in "".join(reader.new_text()).splitlines() if reader else ():
            shown_line = line if arguments[SHOWS_RAY] else ray_filter.shown(line)
            if shown_line is not None:
                put(f"{shown_line}\n", sys.stderr if arguments.is_json else sys.stdout)
        if ended is not None or time.monotonic() - looked_s > _STATE_INTERVAL_S:
            looked_s = time.monotonic()
            view = _view(arguments, run)
            if not view.state.is_live and view.launch in (shown or None, None):
                if view.state.is_bad and not arguments.is_json:
                    raise UserError(f"the job of run {arguments[RUN_ID]}: {view.state}")
                result = view.ended.result if view.ended else None
                return Result(describe(view) | {"result": result}, is_bad=view.state.is_bad)
        time.sleep(pause_s)


def stop(arguments: Arguments) -> Result:
    run = _run(arguments)
    view = _view(arguments, run)
    strays: list[str] = []
    try:
        strays = stray_jobs(view.record, arguments[TOKEN_FILE])
    except ClusterError as error:  # which does not keep a job that has ended from being told of
        say(f"other jobs of the run were not looked for: {error}")
    if was_live := view.state.is_live or bool(strays):
        stop_job(run, view, arguments[TOKEN_FILE])
    deadline_s = time.monotonic() + _STOP_TIMEOUT_S
    while view.state.is_live and time.monotonic() < deadline_s:
        time.sleep(1)
        view = _view(arguments, run)
    if view.state.is_live:
        say(
            f"run {arguments[RUN_ID]} was asked to end and has not done so within {_STOP_TIMEOUT_S:.0f} s"
        )
    return Result(describe(view) | {"was_live": was_live})


def _run(arguments: Arguments) -> Storage:
    run_id = arguments[RUN_ID]
    if not run_id or "/" in run_id or run_id.startswith("."):
        raise ConfigError(f"{run_id!r} is no run id; give its storage with --storage.uri")
    return open_storage(arguments[STORAGE]).child(f"runs/{run_id}")


def _view(arguments: Arguments, run: Storage) -> JobView:
    if view := view_job(run, arguments[TOKEN_FILE]):
        return view
    hint = "`raymill list` shows which runs have one, and --storage.uri is where it looks"
    raise NotFoundError(f"run {arguments[RUN_ID]} has no job in {arguments[STORAGE]}: {hint}")
