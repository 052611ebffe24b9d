"""The demo: from a real corpus to a served model on a local cluster, with a worker lost on the way,
and the proof that its loss changed no weight."""

import shlex
import string
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.commands.chaos import Fault, chaos
from cluster.commands.demo_run import QUICK, WHOLE, demo_config, demo_faults, demo_serving
from cluster.endpoint.endpoint import Endpoint, deploy, stream_completion
from cluster.local.local_cluster import cpus_per_node, free_port
from cluster.output.progress import reports_shown, say
from cluster.output.result_text import counted
from cluster.settings.run import RunConfig
from cluster.settings.serve import ServeConfig
from cluster.settings.stages import EvaluateConfig
from cluster.stages.stage import connected, run_stage
from cluster.storage.uris import Storage
from jobs.report.make_report import make_report
from jobs.run.find_run import find_run
from raymill.errors import UserError

PROMPTS = ("ROMEO. But soft, what light", "To be, or not to be,")
_HASH_DIGITS = 16  # that are printed


@dataclass
class River:
    """The results of the stages that were run, and how long each took."""

    tokens: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(init=False)
    evaluation: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    endpoint: Endpoint = field(init=False)
    stage_s: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        say(f"\n== {title}")
        start = time.monotonic()
        yield
        self.stage_s[name] = round(time.monotonic() - start, 3)
        say(f"   {self.stage_s[name]:.1f} s")


@contextmanager
def river(
    config: RunConfig, *, faults: Sequence[Fault], serving: ServeConfig, is_short: bool = False
) -> Iterator[River]:
    """Runs all stages one after another on a local cluster, from the corpus to an endpoint, on a
    free port, that is up while the context lasts. A short one tokenizes in the job that trains, and
    neither evaluates nor reports."""
    flow = River()
    with ExitStack() as stack:
        with flow.stage("cluster", "a Ray cluster on this machine"):
            connection = stack.enter_context(
                connected(config.cluster, cpus_per_node=cpus_per_node(config))
            )
        if not is_short:
            with flow.stage("tokenize", "tokenizing"):
                flow.tokens = run_stage(connection, "jobs.tokenize_corpus", config)
        title = _title_of_training(faults, is_short=is_short)
        with flow.stage("train", title), chaos(faults, cluster=connection.local, config=config):
            flow.run = run_stage(connection, "jobs.pretrain", config)
        if not is_short:
            with flow.stage("evaluate", "evaluating"):
                evaluation = EvaluateConfig(
                    checkpoint=flow.run["checkpoint"], storage=config.storage
                )
                flow.evaluation = run_stage(connection, "jobs.evaluate", evaluation)
            with flow.stage("report", "drawing the report"):
                flow.report = make_report(find_run(flow.run["run_dir"], config.storage.uri))
        with flow.stage(
            "serve", f"serving with {counted(serving.replicas.max_replicas, 'replica')}"
        ):
            flow.endpoint = deploy(connection, serving.model_copy(update={"port": free_port()}))
        yield flow


def _title_of_training(faults: Sequence[Fault], *, is_short: bool) -> str:
    title = "tokenizing and training" if is_short else "training"
    if not faults:
        return title
    lost = "a node killed and one added" if len(faults) > 1 else "a worker killed"
    return f"{title}, with {lost} on purpose"


def run_demo(
    storage_uri: str, *, preset: str, is_quick: bool, is_portable: bool, keep: bool
) -> dict[str, Any]:
    """Runs every stage and returns their figures. With `keep` the endpoint stays up until a
    signal.

    Raises `UserError` where the bits around the kill are others without it.
    """
    start = time.monotonic()
    variant = QUICK if is_quick else WHOLE
    config, source = demo_config(storage_uri, preset, variant, is_portable=is_portable)
    say(f"corpus: {source}")
    faults, serving = demo_faults(config, variant), demo_serving(config, variant)
    with river(config, faults=faults, serving=serving, is_short=variant.is_short) as flow:
        with flow.stage("proof", "the steps around the kill again, by one undisturbed worker"):
            proof = undisturbed(find_run(flow.run["run_dir"], storage_uri))
        endpoint = flow.endpoint
        result = flow.tokens | flow.run | {"corpus": source}
        if flow.evaluation:
            result["evaluation"] = flow.evaluation
        for name in flow.report.keys() & {"html", "figures"}:
            result[name] = flow.report[name]
        result |= {"proof": proof, "stage_s": flow.stage_s}
        result |= {"url": endpoint.url, "model": endpoint.model}
        result["completions"] = [ask(endpoint, prompt) for prompt in PROMPTS]
        result["wall_s"] = round(time.monotonic() - start, 1)
        _print_figures(result, incident=variant.incident)
        if is_portable:
            say(
                f"\nweights SHA-256 {result['parameter_hash'][:_HASH_DIGITS]}… after step {result['step']}, the last: "
                "the same on every kind of processor"
            )
        if keep:
            _stay_up(endpoint)
    return result


def undisturbed(run: Storage) -> dict[str, Any]:
    """Takes the steps around the run's lost worker again without the loss, and returns what came of
    them. Raises `UserError` where a bit differs."""
    from jobs.proof.replay_loss import replay_around_loss

    with reports_shown():
        steps, again = replay_around_loss(run)
    first, last = steps[0], steps[-1]
    if not again.equal:
        raise UserError(
            f"the kill changed the run: steps {first} to {last} taken again without it have other bits "
            f"({again.verdict}), and they should be the same; "
            f"`raymill verify {shlex.quote(run.uri)}` says whether its files are as they were written"
        )
    return again.json() | {"steps": [first, last]}


def ask(endpoint: Endpoint, prompt: str) -> dict[str, Any]:
    """Returns one streamed completion, with its timing in seconds."""
    request = {"prompt": prompt, "max_tokens": 64, "temperature": 0.8, "seed": 7}
    return stream_completion(endpoint, request, on_text=lambda text: None)


def _print_figures(result: dict[str, Any], *, incident: str) -> None:
    """Prints what was done, in numbers: the lines of the table whose figures there are."""
    counts = result.get("dropped", {})
    reasons = [f"{count} {reason}" for reason, count in counts.items() if count]
    values = result | {
        "reasons": ", ".join(reasons) or "none",
        "workers": " -> ".join(map(str, result["world_sizes"])),
        "incident": incident,
    }
    for line in Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines():
        names = {name for _, name, _, _ in string.Formatter().parse(line) if name}
        if names <= values.keys():
            say(line.format(**values))
    proof = result["proof"]
    first, last = proof["steps"]
    say(
        f"\nweights SHA-256 {proof['parameter_hash'][:_HASH_DIGITS]}… after step {last}: the same without the kill"
        f"\n   one undisturbed worker took steps {first} to {last} again, with the same losses and gradient norms"
    )
    for completion in result["completions"]:
        say(f"\n{completion['prompt']}|{completion['text']}")
        say(
            f"   first token after {completion['ttft_s'] * 1e3:.0f} ms, all after {completion['total_s'] * 1e3:.0f} ms"
        )


def _stay_up(endpoint: Endpoint) -> None:
    """Says how to ask the endpoint and how to talk to it, and waits for a signal."""
    key = Path(str(endpoint.api_key_file)).read_text(encoding="utf-8").split()[0]
    say(
        f"\nThe endpoint stays up until Ctrl-C.  URL {endpoint.url}/v1  key {key}\n"
        f"curl {endpoint.url}/v1/completions -H 'Authorization: Bearer {key}'"
        " -H 'Content-Type: application/json'"
        f' -d \'{{"model": "{endpoint.model}", "prompt": "To be", "max_tokens": 40}}\'\n'
        f"Open {endpoint.url} in a browser, and give it the key, to talk to it and look inside its answers."
    )
    threading.Event().wait()
