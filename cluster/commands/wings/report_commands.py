"""The commands that draw, compare and measure runs."""

from cluster.commands.arguments import PRICE, RUN, RUNS, STORAGE
from cluster.commands.command import Arguments, Command, CommandSection, Result
from cluster.commands.named_runs import named_run, named_runs
from cluster.output.progress import reports_shown


def report(arguments: Arguments) -> Result:
    run = named_run(arguments, "report")

    from jobs.report.make_report import make_report

    with reports_shown():
        return Result(make_report(run, price=arguments[PRICE]))


def compare(arguments: Arguments) -> Result:
    runs = named_runs("compare", arguments[RUNS], arguments[STORAGE])

    from jobs.report.compare_runs import compare as compare_runs

    with reports_shown():
        compared = compare_runs(*runs, storage_uri=arguments[STORAGE])
    return Result(compared.json(), text=compared.text())


def why_slow(arguments: Arguments) -> Result:
    run = named_run(arguments, "why-slow")

    from jobs.report.why_slow import why_run_is_slow

    with reports_shown():
        return Result(why_run_is_slow(run).json())


def probe(arguments: Arguments) -> Result:
    run = named_run(arguments, "probe")

    from jobs.report.probe_run import probe_run

    with reports_shown():
        return Result(probe_run(run))


REPORT = CommandSection(
    "look at runs and checkpoints",
    (
        Command(
            "report",
            "draw a run: loss, workers, throughput, a step's time, cost",
            report,
            [RUN, PRICE, STORAGE],
        ),
        Command("compare", "compare curves, settings and figures", compare, [RUNS, STORAGE]),
        Command(
            "why-slow", "say what bounds a run, and by which numbers", why_slow, [RUN, STORAGE]
        ),
        Command(
            "probe", "measure each checkpoint's copying, induction, few-shot", probe, [RUN, STORAGE]
        ),
    ),
)
