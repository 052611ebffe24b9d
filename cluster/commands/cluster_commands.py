"""The commands of `raymill` for jobs, clusters and storage. Each imports what it alone needs."""

import shlex
from typing import Any

from cluster.commands.arguments import (
    ADDRESS,
    ALL_LAUNCHES,
    CONFIG,
    FOLLOW_LOG,
    KUBERAY,
    NO_PUBLISH,
    ONLY_CHECK,
    OVERLAYS_NAMESPACE,
    RUN_ID,
    RUN_SETTINGS,
    SHOWS_RAY,
    STAGE,
    STORAGE,
    TOKEN_FILE,
    YES,
)
from cluster.commands.command import Argument, Arguments, Command, CommandSection, OneOf, Result
from cluster.commands.completion import run_ids
from cluster.output.progress import say
from cluster.output.result_text import counted, table
from cluster.storage.uris import Storage, absolute_uri, open_storage
from raymill.errors import UserError

_PLACE = Argument[str]("uri", "a path, file:// or s3://bucket/prefix", metavar="URI")
_DELETED_RUN = Argument[str | None]("run_id", "run id", nargs="?", metavar="RUN", completer=run_ids)
_ENDED = Argument[str | None](
    "--endpoint",
    "forget this endpoint, which has ended: its runs can be deleted then",
    metavar="NAME",
)


def submit(arguments: Arguments) -> Result:
    from cluster.commands import job_commands

    return job_commands.submit(arguments)


def list_jobs(arguments: Arguments) -> Result:
    from cluster.commands import job_commands

    return job_commands.list_jobs(arguments)


def status(arguments: Arguments) -> Result:
    from cluster.commands import job_commands

    return job_commands.status(arguments)


def logs(arguments: Arguments) -> Result:
    from cluster.commands import job_commands

    return job_commands.logs(arguments)


def stop(arguments: Arguments) -> Result:
    from cluster.commands import job_commands

    return job_commands.stop(arguments)


def storage_check(arguments: Arguments) -> Result:
    from cluster.submission.storage_check import check_storage

    uri = absolute_uri(arguments[_PLACE])
    checks, problem = check_storage(uri)
    values = {"storage": uri, "usable": not problem, "passed": checks, "problem": problem}
    return Result(values, is_bad=bool(problem))


def delete(arguments: Arguments) -> Result:
    run_id, storage_uri = arguments[_DELETED_RUN], arguments[STORAGE]
    storage = open_storage(storage_uri)
    if run_id is None:
        return _forgotten(arguments, storage)
    run = storage.child(f"runs/{run_id}")
    if "/" in run_id or not any(run.list()):
        raise UserError(f"no run {run_id} in {storage_uri}; `raymill list` shows which there are")

    from jobs.run.housekeeping import delete_run

    return _housekept(arguments, delete_run(run, storage, yes=arguments[YES]))


def _forgotten(arguments: Arguments, storage: Storage) -> Result:
    from cluster.endpoint.remembered import forget

    name = arguments[_ENDED]
    assert name is not None, "one of the two is given"
    values = forget(storage, name, yes=arguments[YES])
    if not values["checked"]:
        say(f"whether {name} has ended cannot be seen from here: its name is not an address")
    kept = ", ".join(values["kept_for_it"] or []) or "nothing"
    done = "is forgotten; it kept" if values["forgotten"] else "would be forgotten; it keeps"
    text = f"endpoint {name} {done}: {kept}\n"
    after = "" if values["forgotten"] else f"`raymill {shlex.join([*arguments.words, '--yes'])}`"
    return Result(values, text=text, next=after)


def gc(arguments: Arguments) -> Result:
    say(f"gc: looking for what no run in {arguments[STORAGE]} needs")

    from jobs.run.housekeeping import collect

    return _housekept(arguments, collect(open_storage(arguments[STORAGE]), yes=arguments[YES]))


def _housekept(arguments: Arguments, values: dict[str, Any]) -> Result:
    rows = [
        {"files": row["num_files"], "MB": row["num_bytes"] / 1e6, **row}
        for row in values["leftovers"]
    ]
    if not rows:
        return Result(values, text="nothing to delete\n")
    done = "deleted" if values["deleted"] else "would be deleted"
    total = f"{counted(len(rows), 'folder')} of {values['bytes'] / 1e6:,.1f} MB {done}\n"
    after = "" if values["deleted"] else f"`raymill {shlex.join([*arguments.words, '--yes'])}`"
    return Result(values, text=table(("files", "MB", "why", "uri"), rows) + total, next=after)


CLUSTER = CommandSection(
    "jobs, clusters and storage",
    (
        Command(
            "submit",
            "start a stage as a background job; submitting the same run twice starts one job",
            submit,
            [
                STAGE,
                CONFIG,
                OneOf((ADDRESS, KUBERAY)),
                OVERLAYS_NAMESPACE,
                ONLY_CHECK,
                TOKEN_FILE,
                RUN_SETTINGS,
                NO_PUBLISH,
            ],
        ),
        Command(
            "list",
            "list the jobs of a storage's runs, and what they are doing",
            list_jobs,
            [TOKEN_FILE, STORAGE],
        ),
        Command(
            "status",
            "show a run's job; exit code 1 if it failed, was stopped or is lost",
            status,
            [RUN_ID, TOKEN_FILE, STORAGE],
        ),
        Command(
            "logs",
            "print what a run's job and its workers printed, even after the cluster is gone",
            logs,
            [FOLLOW_LOG, ALL_LAUNCHES, SHOWS_RAY, RUN_ID, TOKEN_FILE, STORAGE],
        ),
        Command(
            "stop",
            "save and stop a run, submitted or started by hand; the same run id resumes it",
            stop,
            [RUN_ID, TOKEN_FILE, STORAGE],
        ),
        Command(
            "storage check",
            "check that a storage does all that runs need, and say what is wrong if not",
            storage_check,
            [_PLACE],
        ),
        Command(
            "delete",
            "delete a run, or forget an endpoint; says what that is, and does it with --yes",
            delete,
            [OneOf((_DELETED_RUN, _ENDED), required=True), YES, STORAGE],
        ),
        Command(
            "gc",
            "find token stores, checkpoints and runs that nothing needs; deletes them with --yes",
            gc,
            [YES, STORAGE],
        ),
    ),
    groups={"storage": "check a storage"},
    wings_at=5,
)
