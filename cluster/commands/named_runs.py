"""The runs that a command line names."""

from cluster.commands.arguments import RUN, STORAGE
from cluster.commands.command import Arguments
from cluster.output.progress import say
from cluster.storage.uris import Storage


def named_run(arguments: Arguments, what: str) -> Storage:
    """Finds the run that stands as `RUN`, and says which it is. Raises `UserError` for what is no
    run."""
    (run,) = named_runs(what, [arguments[RUN]], arguments[STORAGE])
    return run


def named_runs(what: str, references: list[str], storage_uri: str) -> list[Storage]:
    """Finds the runs and says which they are. Raises `UserError` for what is no run."""
    from jobs.run.find_run import find_run

    runs = [find_run(reference, storage_uri) for reference in references]
    say(f"{what}: {' and '.join(run.uri for run in runs)}")
    return runs
