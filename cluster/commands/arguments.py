"""The arguments of each command of `raymill`, added to its parser when the command is the one that is asked for.

Only then is the configuration tree of its flags imported.
"""

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

from cluster.stages.stage_module import STAGES


def imported(reference: str) -> Any:
    """Returns what `module:name` names."""
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)


def stage(parser: argparse.ArgumentParser) -> None:
    _config_argument(parser)
    _add_settings(parser, "cluster.settings.run:RunConfig")


def pretrain(parser: argparse.ArgumentParser) -> None:
    _config_argument(parser)
    parser.add_argument(
        "--chaos",
        nargs="+",
        default=[],
        metavar="FAULT@STEP",
        help="inject faults on the local cluster: kill-worker@20 kill-node@40 add-node@60 kill-head@80",
    )
    _add_settings(parser, "cluster.settings.run:RunConfig")


def submit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "stage", choices=list(STAGES), help="; ".join(f"{name}: {about}" for name, (_, about) in STAGES.items())
    )
    _config_argument(parser)
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--address", metavar="URL", help="Jobs API of a Ray cluster, such as http://head:8265")
    place.add_argument("--kuberay", metavar="OVERLAY", help="as a RayJob: dev, gpu, spot, kueue or your kustomization")
    _namespace_argument(parser, help_text="on Kubernetes, instead of the overlay's own")
    parser.add_argument(
        "--dry-run", action="store_true", help="check all, start nothing; with --kuberay print the objects"
    )
    _token_argument(parser)
    _add_settings(parser, "cluster.settings.run:RunConfig")


def list_jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", metavar="URL", help="those of this Ray cluster instead, whatever their storage")
    _token_argument(parser)
    storage(parser)


def job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_id", metavar="RUN", help="run id")
    _token_argument(parser)
    storage(parser)


def logs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the job ends; exit code 1 if not well")
    parser.add_argument("--all", action="store_true", help="of all launches that are kept, not only of the last one")
    parser.add_argument("--tail", type=int, metavar="N", help="only the last N lines")
    parser.add_argument("--ray", action="store_true", help="also the lines of Ray and of its workers' processes")
    job(parser)


def storage_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("uri", metavar="URI", help="a path, file:// or s3://bucket/prefix")


def store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", nargs="?", help="folder, manifest or key of a token store; the only one when unset")
    storage(parser)


def dashboard_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prometheus-url", metavar="URL", help="of the data source, as Grafana reaches it")


def dashboard_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="such as k8s/monitoring")
    dashboard_push(parser)


def plan(parser: argparse.ArgumentParser) -> None:
    imported("cluster.commands.plan_command:add_plan_arguments")(parser)


def inspect(parser: argparse.ArgumentParser) -> None:
    imported("cluster.commands.shapes_command:add_inspect_arguments")(parser)


def evaluate(parser: argparse.ArgumentParser) -> None:
    _checkpoint_argument(parser)
    _config_option(parser)
    _add_settings(parser, "cluster.settings.run:EvaluateConfig")


def export(parser: argparse.ArgumentParser) -> None:
    _checkpoint_argument(parser)
    parser.add_argument("destination", help="folder or s3:// URI to make")
    storage(parser)


def report(parser: argparse.ArgumentParser) -> None:
    _run_argument(parser)
    parser.add_argument("--price", type=float, help="dollars for an hour of a GPU, or of a CPU where there is none")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="what `raymill plan --json` printed, to compare with")
    storage(parser)


def compare(parser: argparse.ArgumentParser) -> None:
    _runs_argument(parser, nargs="+")
    storage(parser)


def one_run(parser: argparse.ArgumentParser) -> None:
    _runs_argument(parser, nargs=1)
    storage(parser)


def replay(parser: argparse.ArgumentParser) -> None:
    _runs_argument(parser, nargs=1)
    parser.add_argument("--steps", default="..", metavar="A..B", help="first and last step; all when unset")
    parser.add_argument("--workers", type=int, default=1, help="processes that train; 1 when unset")
    storage(parser)


def diff(parser: argparse.ArgumentParser) -> None:
    _runs_argument(parser, nargs=2)
    storage(parser)


def track(parser: argparse.ArgumentParser) -> None:
    _run_argument(parser)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--wandb", metavar="PROJECT", help="a project of Weights & Biases")
    where.add_argument("--mlflow", metavar="EXPERIMENT", help="an experiment of MLflow")
    parser.add_argument("--follow", action="store_true", help="go on until the run has ended")
    storage(parser)


def lend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_id", metavar="RUN", help="run id")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--workers", type=int, choices=range(1, 65), metavar="N", help="workers that it does without")
    what.add_argument("--return", dest="give_back", action="store_true", help="ends the loan")
    parser.add_argument("--for", dest="for_s", type=float, default=300.0, metavar="SECONDS", help="300 when unset")
    storage(parser)


def one_checkpoint(parser: argparse.ArgumentParser) -> None:
    _checkpoint_argument(parser)
    storage(parser)


def serve(parser: argparse.ArgumentParser) -> None:
    _checkpoint_argument(parser)
    parser.add_argument("--follow", metavar="RUN", help="promote each newer checkpoint of a run as it appears")
    _config_option(parser)
    _add_settings(parser, "cluster.settings.serve:ServeConfig")


def complete(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt")
    parser.add_argument("--url", help="endpoint, such as http://127.0.0.1:8000")
    parser.add_argument("--api-key-file", type=Path, help="file with the API key")
    parser.add_argument("--max-tokens", type=int, help="64 when unset, or as many as fit behind the prompt")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int)
    storage(parser)


def promote(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", nargs="?", help="path or URI of a checkpoint's or run's folder, or `latest`")
    parser.add_argument("--canary", type=float, metavar="PERCENT", help="share of the requests that it serves first")
    parser.add_argument("--finish", action="store_true", help="give all requests to the canary that is on")
    parser.add_argument("--follow", metavar="RUN", help="promote each newer checkpoint of a run as it appears")
    parser.add_argument("--watch-s", type=float, help="seconds in which it may be rolled back; the endpoint's own")
    parser.add_argument(
        "--gate-source",
        metavar="FILE",
        help="held-out text, or token rows as .json, on which its loss is compared with the live version's; the run's "
        "validation rows when unset, `none` for no comparison",
    )
    parser.add_argument("--max-loss-increase", type=float, help="nats per token that it may be worse; the endpoint's")
    operator(parser)


def operator(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", help="endpoint, such as http://127.0.0.1:8000")
    parser.add_argument("--admin-key-file", type=Path, help="file with the admin key")
    storage(parser)


def render(parser: argparse.ArgumentParser) -> None:
    _namespace_argument(parser, help_text="instead of the overlay's own")
    parser.add_argument(
        "overlay", metavar="OVERLAY", help="dev, gpu, spot, kueue, or the folder of a kustomization of yours"
    )
    parser.add_argument(
        "--component", help="only this one: platform, tokenize, pretrain, evaluate, completions, shared"
    )


def apply(parser: argparse.ArgumentParser) -> None:
    render(parser)
    parser.add_argument("--dry-run", action="store_true", help="let Kubernetes check it, and change nothing")


def scale(parser: argparse.ArgumentParser) -> None:
    _namespace_argument(parser)
    parser.add_argument("name", metavar="NAME", help="such as shared or rayjob/pretrain")
    parser.add_argument("--group", help="worker group; the only one when unset")
    parser.add_argument("--min", type=int, dest="lowest", help="pods that are always there")
    parser.add_argument("--max", type=int, dest="most", help="pods under load")
    state = parser.add_mutually_exclusive_group()
    state.add_argument("--suspend", action="store_true", help="no pods, of the group or (without --group) at all")
    state.add_argument("--resume", action="store_true", help="as before")


def kube_objects(parser: argparse.ArgumentParser) -> None:
    _namespace_argument(parser)
    parser.add_argument("name", metavar="NAME", nargs="?", help="such as shared or rayjob/pretrain; all when unset")


def why_not_idle(parser: argparse.ArgumentParser) -> None:
    _namespace_argument(parser)
    parser.add_argument("name", metavar="NAME", help="such as shared or rayjob/pretrain")
    parser.add_argument(
        "--url",
        default="http://127.0.0.1:8265",
        help="its dashboard, such as `kubectl port-forward svc/NAME-head-svc 8265` makes it; the token comes from "
        "RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN",
    )


def demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keep", action="store_true", help="keep the endpoint up until Ctrl-C")
    storage(parser)


def _config_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", type=Path, help="YAML file; flags override its settings")


def _config_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="YAML file; flags override its settings")


def _add_settings(parser: argparse.ArgumentParser, tree: str) -> None:
    """Adds one flag for each setting of the tree `module:class`."""
    imported("cluster.settings.flags:add_config_arguments")(parser, imported(tree))


def _checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="path or URI of a checkpoint's or run's folder, or `latest`")


def _run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_uri", metavar="RUN", help="run id, or path or URI of a run's folder")


def _runs_argument(parser: argparse.ArgumentParser, *, nargs: int | str) -> None:
    parser.add_argument("runs", nargs=nargs, metavar="RUN", help="run id, or path or URI of a run's folder")


def storage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--storage.uri", dest="storage.uri", default=".raymill", metavar="URI", help="root of runs and registry"
    )


def _token_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="holds the Ray cluster's token; RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN when unset",
    )


def _namespace_argument(parser: argparse.ArgumentParser, *, help_text: str = "raymill when unset") -> None:
    parser.add_argument("--namespace", "-n", help=help_text)
