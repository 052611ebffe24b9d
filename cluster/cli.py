"""The `raymill` command: one subcommand a task, `--help` as the manual, one clear line and an exit code on errors.

Exit codes: 0 done, 1 failed, 2 misused. With --json the last line of standard output is one JSON object; everything
that is said on the way goes to standard error.
"""

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from cluster import commands, dashboard_commands, delivery_commands, plan_command, shapes_command
from cluster.config import EvaluateConfig, RunConfig
from cluster.flags import ConfigError, Parser, add_config_arguments
from cluster.job_backend import STAGES
from cluster.job_commands import add_job_commands
from cluster.kube_commands import add_cluster_commands
from cluster.printable import printable
from cluster.serve_config import ServeConfig
from cluster.stage import ModuleFailedError
from model.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, _exit_on_signal)
    try:
        arguments = command_parser().parse_args(argv)
        arguments.show = lambda result: _show(result, as_json=arguments.json)
        result = arguments.run(arguments)
    except UserError as error:
        if not isinstance(error, ModuleFailedError):  # which has said it itself
            sys.stderr.write(f"error: {printable(str(error))}\n")
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    if result is not None:
        arguments.show(result)
    return 0


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # once is enough
    sys.exit(128 + number)  # as a shell reports it; contexts on the way out end what they started


def command_parser() -> Parser:
    parser = Parser(prog="raymill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], dict[str, Any] | None], about: str) -> Parser:
        sub = subparsers.add_parser(name, help=about, description=about)
        sub.add_argument("--json", action="store_true", help="print one JSON object as the last line of output")
        sub.set_defaults(run=run)
        return sub

    for name, (_, about) in STAGES.items():
        sub = command(name, commands.stage(name), about)
        sub.add_argument("config", nargs="?", type=Path, help="YAML file; flags override its settings")
        if name == "pretrain":
            sub.add_argument(
                "--chaos",
                nargs="+",
                default=[],
                metavar="FAULT@STEP",
                help="inject faults on the local cluster: kill-worker@20 kill-node@40 add-node@60 kill-head@80",
            )
        add_config_arguments(sub, RunConfig)

    add_job_commands(command)

    _commands_with_commands(subparsers)

    plan_command.add_plan_arguments(
        command("plan", plan_command.plan, "what a run will take: operations, days, cost, memory, checkpoints, links")
    )

    shapes_command.add_inspect_arguments(
        command("inspect", shapes_command.inspect, "the shape and bytes of a batch at every stage of the model")
    )

    sub = command("evaluate", commands.evaluate, "loss, perplexity and bits per byte of a checkpoint")
    _checkpoint_argument(sub)
    _config_option(sub)
    add_config_arguments(sub, EvaluateConfig)

    sub = command("export", commands.export, "copy a checkpoint without its training state, ready for Hugging Face")
    _checkpoint_argument(sub)
    sub.add_argument("destination", help="folder or s3:// URI to make")
    _storage_argument(sub)

    sub = command(
        "report",
        commands.report,
        "draw a run: loss, workers, throughput, a step's time, cost, plan and actual",
    )
    sub.add_argument("run_uri", metavar="RUN", help="run id, or path or URI of a run's folder")
    sub.add_argument("--price", type=float, help="dollars for an hour of a GPU, or of a CPU where there is none")
    sub.add_argument("--plan", type=Path, metavar="FILE", help="what `raymill plan --json` printed, to compare with")
    _storage_argument(sub)

    sub = command("compare", commands.compare, "put runs side by side: curves, settings that differ, final figures")
    sub.add_argument("runs", nargs="+", metavar="RUN", help="run id, or path or URI of a run's folder")
    _storage_argument(sub)

    for name, (_, about) in commands.RUN_COMMANDS.items():
        _run_arguments(command(name, commands.look_at_run(name), about), name)

    _track_arguments(command("track", commands.track, "bring a run's curves to Weights & Biases or MLflow"))

    _lend_arguments(
        command("lend", commands.lend_workers, "have a running elastic run shrink for a while, and grow again")
    )

    sub = command("publish", commands.publish_checkpoint, "make a checkpoint the latest one")
    _checkpoint_argument(sub)
    _storage_argument(sub)

    sub = subparsers.add_parser("checkpoint", help="look at checkpoints", description="look at checkpoints")
    commands_of_checkpoint = sub.add_subparsers(metavar="COMMAND", required=True)
    for name, run, about in (
        ("show", commands.checkpoint_show, "verify a checkpoint and print its hashes"),
        ("list", commands.checkpoint_list, "list the published checkpoints"),
    ):
        sub = commands_of_checkpoint.add_parser(name, help=about, description=about)
        sub.add_argument("--json", action="store_true", help="print one JSON object as the last line of output")
        sub.set_defaults(run=run)
        if name == "show":
            _checkpoint_argument(sub)
        _storage_argument(sub)

    _endpoint_commands(command)

    add_cluster_commands(subparsers)

    sub = command(
        "demo", commands.demo, "a corpus to a served model on a 3-node local cluster, with a node killed on purpose"
    )
    sub.add_argument("--keep", action="store_true", help="keep the endpoint up until Ctrl-C")
    _storage_argument(sub)
    return parser


def _commands_with_commands(subparsers: Any) -> None:
    _storage_commands(subparsers)
    _data_commands(subparsers)
    _dashboard_commands(subparsers)


def _storage_commands(subparsers: Any) -> None:
    about = "whether a storage does all that runs ask of it, and in words what is wrong if not"
    commands_of_storage = subparsers.add_parser("storage", help=about, description=about).add_subparsers(
        metavar="COMMAND", required=True
    )
    sub = commands_of_storage.add_parser("check", help=about, description=about)
    sub.add_argument("--json", action="store_true", help="print one JSON object as the last line of output")
    sub.set_defaults(run=commands.storage_check)
    sub.add_argument("uri", metavar="URI", help="a path, file:// or s3://bucket/prefix")


def _data_commands(subparsers: Any) -> None:
    data_commands = subparsers.add_parser("data", help=commands.DATA, description=commands.DATA).add_subparsers(
        metavar="COMMAND", required=True
    )
    for name, about in commands.DATA_COMMANDS.items():
        sub = data_commands.add_parser(name, help=about, description=about)
        sub.add_argument("--json", action="store_true", help="print one JSON object as the last line of output")
        sub.set_defaults(run=commands.data_preview if name == "preview" else commands.data_command(name))
        if name == "preview":
            sub.add_argument("config", nargs="?", type=Path, help="YAML file; flags override its settings")
            add_config_arguments(sub, RunConfig)
        else:
            sub.add_argument(
                "store", nargs="?", help="folder, manifest or key of a token store; the only one when unset"
            )
            _storage_argument(sub)


def _dashboard_commands(subparsers: Any) -> None:
    about = dashboard_commands.ABOUT
    commands_of_dashboards = subparsers.add_parser(
        "dashboards",
        help=about,
        description=f"{about}. Grafana is the one at GRAFANA_URL; its token is in GRAFANA_TOKEN, or in the file that "
        "GRAFANA_TOKEN_FILE names.",
    ).add_subparsers(metavar="COMMAND", required=True)
    for name, about in dashboard_commands.COMMANDS.items():
        sub = commands_of_dashboards.add_parser(name, help=about, description=about)
        sub.add_argument("--json", action="store_true", help="print one JSON object as the last line of output")
        sub.set_defaults(run=getattr(dashboard_commands, name))
        if name == "export":
            sub.add_argument("folder", help="such as k8s/monitoring")
        if name != "diff":
            sub.add_argument("--prometheus-url", metavar="URL", help="of the data source, as Grafana reaches it")


def _run_arguments(parser: Parser, name: str) -> None:
    num_runs = 2 if name == "diff" else 1
    parser.add_argument("runs", nargs=num_runs, metavar="RUN", help="run id, or path or URI of a run's folder")
    if name == "replay":
        parser.add_argument("--steps", metavar="A..B", help="first and last step; all when unset")
        parser.add_argument("--workers", type=int, help="processes that train; 1 when unset")
    _storage_argument(parser)


def _endpoint_commands(command: Callable[..., Parser]) -> None:
    sub = command(
        "serve", commands.serve, "serve a checkpoint behind an OpenAI-compatible endpoint until SIGTERM or Ctrl-C"
    )
    _checkpoint_argument(sub)
    sub.add_argument("--follow", metavar="RUN", help="promote each newer checkpoint of a run as it appears")
    _config_option(sub)
    add_config_arguments(sub, ServeConfig)

    sub = command("complete", commands.complete, "complete a prompt at the endpoint that `raymill serve` started here")
    sub.add_argument("prompt")
    sub.add_argument("--url", help="endpoint, such as http://127.0.0.1:8000")
    sub.add_argument("--api-key-file", type=Path, help="file with the API key")
    sub.add_argument("--max-tokens", type=int, default=64)
    sub.add_argument("--temperature", type=float, default=0.8)
    sub.add_argument("--seed", type=int)
    _storage_argument(sub)

    sub = command("promote", delivery_commands.promote, "make the running endpoint serve another checkpoint")
    sub.add_argument("checkpoint", nargs="?", help="path or URI of a checkpoint's or run's folder, or `latest`")
    sub.add_argument("--canary", type=float, metavar="PERCENT", help="share of the requests that it serves first")
    sub.add_argument("--finish", action="store_true", help="give all requests to the canary that is on")
    sub.add_argument("--follow", metavar="RUN", help="promote each newer checkpoint of a run as it appears")
    sub.add_argument("--watch-s", type=float, help="seconds in which it may be rolled back; the endpoint's own")
    sub.add_argument(
        "--gate-source",
        metavar="FILE",
        help="held-out text, or token rows as .json, on which its loss is compared with the live version's; the run's "
        "validation rows when unset, `none` for no comparison",
    )
    sub.add_argument("--max-loss-increase", type=float, help="nats per token that it may be worse; the endpoint's")
    _operator_arguments(sub)

    sub = command("rollback", delivery_commands.rollback, "make the running endpoint serve the version before")
    _operator_arguments(sub)


def _operator_arguments(parser: Parser) -> None:
    parser.add_argument("--url", help="endpoint, such as http://127.0.0.1:8000")
    parser.add_argument("--admin-key-file", type=Path, help="file with the admin key")
    _storage_argument(parser)


def _track_arguments(parser: Parser) -> None:
    parser.add_argument("run_uri", metavar="RUN", help="run id, or path or URI of a run's folder")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--wandb", metavar="PROJECT", help="a project of Weights & Biases")
    where.add_argument("--mlflow", metavar="EXPERIMENT", help="an experiment of MLflow")
    parser.add_argument("--follow", action="store_true", help="go on until the run has ended")
    _storage_argument(parser)


def _lend_arguments(parser: Parser) -> None:
    parser.add_argument("run_id", metavar="RUN", help="run id")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--workers", type=int, choices=range(1, 65), metavar="N", help="workers that it does without")
    what.add_argument("--return", dest="give_back", action="store_true", help="ends the loan")
    parser.add_argument("--for", dest="for_s", type=float, default=300.0, metavar="SECONDS", help="300 when unset")
    _storage_argument(parser)


def _checkpoint_argument(parser: Parser) -> None:
    parser.add_argument("checkpoint", help="path or URI of a checkpoint's or run's folder, or `latest`")


def _config_option(parser: Parser) -> None:
    parser.add_argument("--config", type=Path, help="YAML file; flags override its settings")


def _storage_argument(parser: Parser) -> None:
    parser.add_argument(
        "--storage.uri", dest="storage.uri", default=".raymill", metavar="URI", help="root of runs and registry"
    )


def _show(result: dict[str, Any], *, as_json: bool) -> None:
    sys.stdout.write((json.dumps(result) if as_json else "\n".join(_lines(result))) + "\n")
    sys.stdout.flush()


def _lines(result: dict[str, Any]) -> Iterator[str]:
    """A line a value; what is nested stands below its name, indented."""
    width = max(map(len, result), default=0)
    for name, value in result.items():
        inner = value if isinstance(value, list) else [value]
        if inner and all(isinstance(item, dict) for item in inner):
            yield name
            for item in inner:
                yield from (f"  {line}" for line in _lines(item))
        else:
            yield f"{printable(name, keep=''):{width}}  {printable(str(value), keep='')}"


if __name__ == "__main__":
    sys.exit(main())
