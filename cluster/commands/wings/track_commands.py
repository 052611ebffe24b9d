"""The command that sends a run's curves elsewhere."""

from cluster.commands.arguments import EXPERIMENT, FOLLOW_RUN, RUN, STORAGE
from cluster.commands.command import Arguments, Command, CommandSection, Result
from cluster.commands.named_runs import named_run
from cluster.output.progress import reports_shown


def track(arguments: Arguments) -> Result:
    run = named_run(arguments, "track")

    from jobs.watching.track_run import track as track_run

    with reports_shown():
        return Result(track_run(run, mlflow=arguments[EXPERIMENT], follow=arguments[FOLLOW_RUN]))


TRACK = CommandSection(
    "look at runs and checkpoints",
    (
        Command(
            "track", "send a run's curves to MLflow", track, [RUN, EXPERIMENT, FOLLOW_RUN, STORAGE]
        ),
    ),
)
