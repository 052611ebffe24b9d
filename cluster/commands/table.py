"""What `raymill` can be asked: each command with its line of help, its arguments, and the function that does it.

The functions are named, not imported: a command line imports only what its own command needs.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cluster.commands import arguments
from cluster.stages.stage_module import STAGES


@dataclass(frozen=True)
class Command:
    """A command with arguments, or one that has commands of its own."""

    about: str
    run: str = ""  # `module:function` of this folder, from the parsed arguments to the result that is printed
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    commands: Mapping[str, "Command"] = field(default_factory=dict)
    note: str = ""  # what its own manual says besides


_STORAGE = "whether a storage does all that runs ask of it, and in words what is wrong if not"

COMMANDS: dict[str, Command] = {
    "tokenize": Command(STAGES["tokenize"][1], "run_commands:stage", arguments.stage),
    "pretrain": Command(STAGES["pretrain"][1], "run_commands:stage", arguments.pretrain),
    "pipeline": Command(STAGES["pipeline"][1], "run_commands:stage", arguments.stage),
    "submit": Command(
        "start a stage as a job that goes on without this command; submitting the same run twice starts one job",
        "job_commands:submit",
        arguments.submit,
    ),
    "list": Command(
        "the jobs that were submitted for the runs of a storage, and what they are doing",
        "job_commands:list_jobs",
        arguments.list_jobs,
    ),
    "status": Command(
        "what a run's job is doing, or how it ended; exit code 1 if not well", "job_commands:status", arguments.job
    ),
    "logs": Command(
        "what a run's job and its workers printed, also when the cluster is gone", "job_commands:logs", arguments.logs
    ),
    "stop": Command(
        "have a run's job save and end; submitting the run again resumes it", "job_commands:stop", arguments.job
    ),
    "storage": Command(
        _STORAGE, commands={"check": Command(_STORAGE, "run_commands:storage_check", arguments.storage_check)}
    ),
    "data": Command(
        "look at a corpus before a job is spent, and at a token store afterwards",
        commands={
            "preview": Command(
                "documents, tokens and drop rates of a corpus, estimated from a sample",
                "run_commands:data_preview",
                arguments.stage,
            ),
            "stats": Command(
                "documents, tokens and bytes of a token store, by split and source",
                "run_commands:look_at_store",
                arguments.store,
            ),
            "verify": Command(
                "recompute the hash of every shard of a token store", "run_commands:look_at_store", arguments.store
            ),
            "report": Command("what was dropped and why, with samples", "run_commands:look_at_store", arguments.store),
        },
    ),
    "dashboards": Command(
        "the Grafana dashboards and the alerts, made from the metric table",
        commands={
            "push": Command(
                "bring Grafana's data source, folder and dashboards to what this version makes, as often as wanted",
                "dashboard_commands:push",
                arguments.dashboard_push,
            ),
            "diff": Command(
                "the places where Grafana's dashboards are not what this version makes; exit code 1 where there are "
                "any",
                "dashboard_commands:diff",
            ),
            "export": Command(
                "write them, the alerts and the scrape settings as files for Grafana, Prometheus and kustomize",
                "dashboard_commands:export",
                arguments.dashboard_export,
            ),
        },
        note=". Grafana is the one at GRAFANA_URL; its token is in GRAFANA_TOKEN, or in the file that "
        "GRAFANA_TOKEN_FILE names.",
    ),
    "plan": Command(
        "what a run will take: operations, days, cost, memory, checkpoints, links", "plan_command:plan", arguments.plan
    ),
    "inspect": Command(
        "the shape and bytes of a batch at every stage of the model", "shapes_command:inspect", arguments.inspect
    ),
    "evaluate": Command(
        "loss, perplexity and bits per byte of a checkpoint", "run_commands:evaluate", arguments.evaluate
    ),
    "export": Command(
        "copy a checkpoint without its training state, ready for Hugging Face", "run_commands:export", arguments.export
    ),
    "report": Command(
        "draw a run: loss, workers, throughput, a step's time, cost, plan and actual",
        "run_commands:report",
        arguments.report,
    ),
    "compare": Command(
        "put runs side by side: curves, settings that differ, final figures", "run_commands:compare", arguments.compare
    ),
    "why-slow": Command("say what bounds a run, and by which numbers", "run_commands:why_slow", arguments.one_run),
    "verify": Command(
        "recompute the hashes of a run's checkpoints and of its data", "run_commands:verify", arguments.one_run
    ),
    "replay": Command("take steps of a run again and compare their bits", "run_commands:replay", arguments.replay),
    "diff": Command("find the first step where two runs part", "run_commands:diff", arguments.diff),
    "probe": Command(
        "measure what each kept checkpoint does in context: copying, induction, few-shot",
        "run_commands:probe",
        arguments.one_run,
    ),
    "track": Command("bring a run's curves to Weights & Biases or MLflow", "run_commands:track", arguments.track),
    "lend": Command(
        "have a running elastic run shrink for a while, and grow again", "run_commands:lend_workers", arguments.lend
    ),
    "publish": Command("make a checkpoint the latest one", "run_commands:publish_checkpoint", arguments.one_checkpoint),
    "checkpoint": Command(
        "look at checkpoints",
        commands={
            "show": Command(
                "verify a checkpoint and print its hashes", "run_commands:checkpoint_show", arguments.one_checkpoint
            ),
            "list": Command("list the published checkpoints", "run_commands:checkpoint_list", arguments.storage),
        },
    ),
    "serve": Command(
        "serve a checkpoint behind an OpenAI-compatible endpoint until SIGTERM or Ctrl-C",
        "run_commands:serve",
        arguments.serve,
    ),
    "complete": Command(
        "complete a prompt at the endpoint that `raymill serve` started here",
        "run_commands:complete",
        arguments.complete,
    ),
    "promote": Command(
        "make the running endpoint serve another checkpoint", "delivery_commands:promote", arguments.promote
    ),
    "rollback": Command(
        "make the running endpoint serve the version before", "delivery_commands:rollback", arguments.operator
    ),
    "cluster": Command(
        "render and apply the manifests, scale their groups, and say why a pod is pending or stays",
        commands={
            "render": Command("print the objects of an overlay as YAML", "kube_commands:render", arguments.render),
            "apply": Command("apply the objects of an overlay (server-side)", "kube_commands:apply", arguments.apply),
            "scale": Command(
                "change how many pods a group may have, or suspend and resume it or all",
                "kube_commands:scale",
                arguments.scale,
            ),
            "status": Command(
                "say in a sentence what each cluster, job and service does",
                "kube_commands:status",
                arguments.kube_objects,
            ),
            "why-pending": Command("say why pods do not run yet", "kube_commands:pending", arguments.kube_objects),
            "why-not-idle": Command(
                "say why pods of a Ray cluster do not go away", "kube_commands:not_idle", arguments.why_not_idle
            ),
        },
    ),
    "demo": Command(
        "a corpus to a served model on a 3-node local cluster, with a node killed on purpose",
        "run_commands:demo",
        arguments.demo,
    ),
}
