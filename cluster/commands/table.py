"""Every command of `raymill`: its line of help, the function that runs it, and its arguments.

Functions and settings are named, not imported: a command line imports only what its own command needs.
"""

import argparse
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from cluster.stages.stage_module import STAGES
from cluster.storage.uris import absolute_uri

Add = Callable[[Any], object]
"""Adds arguments to a parser or group, which happens only for the command that was asked for."""


def imported(reference: str) -> Any:
    """Returns what `module:name` names."""
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)


def argument(*names: str, **options: Any) -> Add:
    """Adds one argument; the parameters are those of `add_argument`."""
    return lambda parser: parser.add_argument(*names, **options)


def flag(*names: str, help: str, **options: Any) -> Add:  # noqa: A002 (as in `add_argument`)
    """Adds a flag without a value."""
    return argument(*names, action="store_true", help=help, **options)


def one_of(*arguments: Add, required: bool = False) -> Add:
    """Adds arguments that exclude each other."""

    def add(parser: argparse.ArgumentParser) -> None:
        group = parser.add_mutually_exclusive_group(required=required)
        for add_one in arguments:
            add_one(group)

    return add


def settings(tree: str, *, leave_out: Sequence[str] = ()) -> Add:
    """Adds one flag for each setting of the tree `module:class`, which takes a while to import."""
    add = "cluster.settings.flags:add_config_arguments"
    return lambda parser: imported(add)(parser, imported(tree), leave_out=leave_out)


RUN_SETTINGS = settings("cluster.settings.run:RunConfig")
CONFIG = argument("config", nargs="?", type=Path, help="YAML file; flags override its settings")
CONFIG_FLAG = argument("--config", type=Path, help="YAML file; flags override its settings")
STORAGE = argument(
    "--storage.uri",
    dest="storage_uri",
    type=absolute_uri,
    default=".raymill",
    metavar="URI",
    help="root of runs and registry",
)
CHECKPOINT = argument("checkpoint", help="path or URI of a checkpoint's or run's folder, or `latest`")
FOLLOW = argument("--follow", metavar="RUN", help="promote each newer checkpoint of a run as it appears")
RUN_ID = argument("run_id", metavar="RUN", help="run id")
URL = argument("--url", help="endpoint, such as http://127.0.0.1:8000")
ADMIN_KEY = argument("--admin-key-file", type=Path, help="file with the admin key")
TOKEN_FILE = argument(
    "--token-file",
    type=Path,
    metavar="FILE",
    help="file with the Ray cluster's token; RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN when unset",
)
JOB = (RUN_ID, TOKEN_FILE, STORAGE)
NAMESPACE = argument("--namespace", "-n", help="Kubernetes namespace; raymill when unset")
OVERLAYS_NAMESPACE = argument("--namespace", "-n", help="Kubernetes namespace, instead of the overlay's own")
OVERLAY = (
    OVERLAYS_NAMESPACE,
    argument("overlay", metavar="OVERLAY", help="dev, gpu, spot, kueue, or the folder of your own kustomization"),
    argument("--component", help="only this component: platform, tokenize, pretrain, evaluate, completions or shared"),
)
KUBE_OBJECT = argument("name", metavar="NAME", help="such as shared or rayjob/pretrain")
KUBE_OBJECTS = argument("name", metavar="NAME", nargs="?", help="such as shared or rayjob/pretrain; all when unset")
PROMETHEUS = argument("--prometheus-url", metavar="URL", help="the data source's address, as Grafana reaches it")
STORE = argument("store", nargs="?", help="folder, manifest or key of a token store; the only one when unset")


def runs(*, nargs: int | str = 1) -> Add:
    return argument("runs", nargs=nargs, metavar="RUN", help="run id, or path or URI of a run's folder")


class Command:
    """`run` is `module:function` of this folder: it takes the parsed arguments and returns the result to print."""

    def __init__(self, about: str, run: str, *arguments: Add) -> None:
        self.about, self.run, self.arguments = about, run, arguments


GROUPS = {
    "storage": "check a storage",
    "data": "look at a corpus before a job is spent, and at a token store afterwards",
    "dashboards": "manage dashboards and alerts (GRAFANA_URL, and GRAFANA_TOKEN or GRAFANA_TOKEN_FILE, name Grafana)",
    "checkpoint": "look at checkpoints",
    "cluster": "render and apply the manifests, scale their groups, and say why a pod is pending or stays",
}

COMMANDS: dict[str, Command] = {
    "tokenize": Command(STAGES["tokenize"][1], "run_commands:stage", CONFIG, RUN_SETTINGS),
    "pretrain": Command(
        STAGES["pretrain"][1],
        "run_commands:stage",
        CONFIG,
        argument(
            "--chaos",
            nargs="+",
            default=[],
            metavar="FAULT@STEP",
            help="inject faults on the local cluster: kill-worker@20 kill-node@40 add-node@60 kill-head@80",
        ),
        RUN_SETTINGS,
    ),
    "pipeline": Command(STAGES["pipeline"][1], "run_commands:stage", CONFIG, RUN_SETTINGS),
    "submit": Command(
        "start a stage as a background job; submitting the same run twice starts one job",
        "job_commands:submit",
        argument(
            "stage", choices=list(STAGES), help="; ".join(f"{name}: {about}" for name, (_, about) in STAGES.items())
        ),
        CONFIG,
        one_of(
            argument("--address", metavar="URL", help="Jobs API of a Ray cluster, such as http://head:8265"),
            argument("--kuberay", metavar="OVERLAY", help="as a RayJob: dev, gpu, spot, kueue or your kustomization"),
        ),
        OVERLAYS_NAMESPACE,
        flag("--dry-run", help="check all, start nothing; with --kuberay print the objects"),
        TOKEN_FILE,
        RUN_SETTINGS,
    ),
    "list": Command(
        "list the jobs of a storage's runs, and what they are doing",
        "job_commands:list_jobs",
        TOKEN_FILE,
        STORAGE,
    ),
    "status": Command(
        "show a run's job; exit code 1 if it failed, was stopped or is lost", "job_commands:status", *JOB
    ),
    "logs": Command(
        "print what a run's job and its workers printed, even after the cluster is gone",
        "job_commands:logs",
        flag("-f", "--follow", help="until the job ends; exit code 1 unless it succeeded"),
        flag("--all", help="print all launches that are kept, not only the last one"),
        flag("--ray", help="include the lines of Ray and of its workers' processes"),
        *JOB,
    ),
    "stop": Command("have a run's job save and end; submitting the run again resumes it", "job_commands:stop", *JOB),
    "storage check": Command(
        "check that a storage does all that runs need, and say what is wrong if not",
        "run_commands:storage_check",
        argument("uri", metavar="URI", help="a path, file:// or s3://bucket/prefix"),
    ),
    "data preview": Command(
        "estimate documents, tokens and drop rates of a corpus from a sample",
        "run_commands:data_preview",
        CONFIG,
        RUN_SETTINGS,
    ),
    "data stats": Command("count a store's documents, tokens and bytes", "run_commands:look_at_store", STORE, STORAGE),
    "data verify": Command("recompute the hashes of a token store", "run_commands:look_at_store", STORE, STORAGE),
    "data report": Command("show what was dropped and why, with samples", "run_commands:look_at_store", STORE, STORAGE),
    "dashboards push": Command("update Grafana to this version's dashboards", "dashboard_commands:push", PROMETHEUS),
    "dashboards diff": Command("list where Grafana's differ; exit code 1 if any do", "dashboard_commands:diff"),
    "dashboards export": Command(
        "write them, the alerts and the scrape settings as files for Grafana, Prometheus and kustomize",
        "dashboard_commands:export",
        argument("folder", help="such as k8s/monitoring"),
        PROMETHEUS,
    ),
    "plan": Command(
        "estimate what a run will take: operations, days, cost, memory, checkpoints, links",
        "plan_command:plan",
        CONFIG,
        flag("--demo", help="plan the run of `raymill demo`, with its faults"),
        flag("--calibrate", help="rehearse the run in small here, and predict its wall time from that"),
        flag("--simulate", help="at 8 to 4,096 GPUs instead: exchange, snapshots, checkpoints, data, limits"),
        flag("--recompute", help="assume that activations are computed again in backward"),
        settings("cluster.settings.plan:PlanConfig", leave_out=["recompute"]),
        RUN_SETTINGS,
    ),
    "inspect": Command(
        "show the shape and bytes of a batch at every stage of the model",
        "shapes_command:inspect",
        CONFIG,
        flag("--shapes", required=True, help="each stage's shape and bytes"),
        RUN_SETTINGS,
    ),
    "evaluate": Command(
        "measure loss, perplexity and bits per byte of a checkpoint",
        "run_commands:evaluate",
        CHECKPOINT,
        CONFIG_FLAG,
        settings("cluster.settings.run:EvaluateConfig"),
    ),
    "export": Command(
        "copy a checkpoint without its training state, ready for Hugging Face",
        "run_commands:export",
        CHECKPOINT,
        argument("destination", help="folder or s3:// URI to make"),
        STORAGE,
    ),
    "report": Command(
        "draw a run: loss, workers, throughput, a step's time, cost, plan and actual",
        "run_commands:report",
        runs(),
        argument("--price", type=float, help="dollars for an hour of a GPU, or of a CPU where there is none"),
        argument("--plan", type=Path, metavar="FILE", help="output of `raymill plan --json` to compare with"),
        STORAGE,
    ),
    "compare": Command("compare curves, settings and figures", "run_commands:compare", runs(nargs="+"), STORAGE),
    "why-slow": Command("say what bounds a run, and by which numbers", "run_commands:why_slow", runs(), STORAGE),
    "verify": Command("recompute the hashes of a run's checkpoints and data", "run_commands:verify", runs(), STORAGE),
    "replay": Command(
        "take steps of a run again and compare their bits",
        "run_commands:replay",
        runs(),
        argument("--steps", default="..", metavar="A..B", help="first and last step; all when unset"),
        argument("--workers", type=int, default=1, help="processes that train; 1 when unset"),
        STORAGE,
    ),
    "diff": Command("find the first step where two runs part", "run_commands:diff", runs(nargs=2), STORAGE),
    "probe": Command("measure each checkpoint's copying, induction, few-shot", "run_commands:probe", runs(), STORAGE),
    "track": Command(
        "send a run's curves to Weights & Biases or MLflow",
        "run_commands:track",
        runs(),
        one_of(
            argument("--wandb", metavar="PROJECT", help="a project of Weights & Biases"),
            argument("--mlflow", metavar="EXPERIMENT", help="an experiment of MLflow"),
            required=True,
        ),
        flag("--follow", help="continue until the run has ended"),
        STORAGE,
    ),
    "lend": Command(
        "have a running elastic run shrink for a while, and grow again",
        "run_commands:lend_workers",
        RUN_ID,
        one_of(
            argument("--workers", type=int, choices=range(1, 65), metavar="N", help="number of workers to give up"),
            flag("--return", dest="give_back", help="end the loan"),
            required=True,
        ),
        argument("--for", dest="for_s", type=float, default=300.0, metavar="SECONDS", help="300 when unset"),
        STORAGE,
    ),
    "publish": Command("make a checkpoint the latest one", "run_commands:publish_checkpoint", CHECKPOINT, STORAGE),
    "checkpoint show": Command(
        "verify a checkpoint and print its hashes", "run_commands:checkpoint_show", CHECKPOINT, STORAGE
    ),
    "checkpoint list": Command("list the published checkpoints", "run_commands:checkpoint_list", STORAGE),
    "serve": Command(
        "serve a checkpoint behind an OpenAI-compatible endpoint until SIGTERM or Ctrl-C",
        "run_commands:serve",
        CHECKPOINT,
        FOLLOW,
        CONFIG_FLAG,
        settings("cluster.settings.serve:ServeConfig"),
    ),
    "complete": Command(
        "complete a prompt at the endpoint that `raymill serve` started here",
        "run_commands:complete",
        argument("prompt"),
        URL,
        argument("--api-key-file", type=Path, help="file with the API key"),
        argument("--max-tokens", type=int, help="64 when unset, or as many as fit after the prompt"),
        argument("--temperature", type=float, default=0.8),
        argument("--seed", type=int),
        STORAGE,
    ),
    "promote": Command(
        "make the running endpoint serve another checkpoint",
        "delivery_commands:promote",
        argument("checkpoint", nargs="?", help="path or URI of a checkpoint's or run's folder, or `latest`"),
        argument("--canary", type=float, dest="canary_percent", metavar="PERCENT", help="of the requests, at first"),
        flag("--finish", help="give all requests to the current canary"),
        FOLLOW,
        argument("--watch-s", type=float, help="seconds in which it may be rolled back; the endpoint's when unset"),
        argument(
            "--gate-source",
            metavar="FILE",
            help="held-out text, or token rows as .json, on which its loss is compared with the live version's; the "
            "run's validation rows when unset, `none` for no comparison",
        ),
        argument("--max-loss-increase", type=float, help="allowed increase in nats per token; the endpoint's if unset"),
        URL,
        ADMIN_KEY,
        STORAGE,
    ),
    "rollback": Command("serve the previous version again", "delivery_commands:rollback", URL, ADMIN_KEY, STORAGE),
    "cluster render": Command("print the objects of an overlay as YAML", "kube_commands:render", *OVERLAY),
    "cluster apply": Command(
        "apply the objects of an overlay (server-side)",
        "kube_commands:apply",
        *OVERLAY,
        flag("--dry-run", help="let Kubernetes check it, and change nothing"),
    ),
    "cluster scale": Command(
        "change how many pods a group may have, or suspend and resume one group or all",
        "kube_commands:scale",
        NAMESPACE,
        KUBE_OBJECT,
        argument("--group", help="worker group; the only one when unset"),
        argument("--min", type=int, dest="lowest", help="pods that are always there"),
        argument("--max", type=int, dest="most", help="pods under load"),
        one_of(
            flag("--suspend", help="remove the pods of the group, or all without --group"),
            flag("--resume", help="restore what was suspended"),
        ),
    ),
    "cluster status": Command(
        "say in a sentence what each cluster, job and service does", "kube_commands:status", NAMESPACE, KUBE_OBJECTS
    ),
    "cluster why-pending": Command("say why pods do not run yet", "kube_commands:pending", NAMESPACE, KUBE_OBJECTS),
    "cluster why-not-idle": Command(
        "say why pods of a Ray cluster do not go away",
        "kube_commands:not_idle",
        NAMESPACE,
        KUBE_OBJECT,
        argument(
            "--url",
            default="http://127.0.0.1:8265",
            help="the Ray dashboard, for example after `kubectl port-forward svc/NAME-head-svc 8265`; the "
            "token comes from RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN",
        ),
    ),
    "demo": Command(
        "train and serve a small model on a 3-node local cluster, with a node killed on purpose",
        "run_commands:demo",
        flag("--keep", help="keep the endpoint up until Ctrl-C"),
        STORAGE,
    ),
}
