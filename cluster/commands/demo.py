"""The demo: from a real corpus to a served model on a 3-node local cluster, with a node killed and
another added."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.commands.chaos import Fault, chaos
from cluster.commands.demo_run import demo_config, demo_faults, demo_serving
from cluster.endpoint.endpoint import Endpoint, deploy, stream_completion
from cluster.local.local_cluster import cpus_per_node, free_port
from cluster.output.progress import say
from cluster.settings.run import EvaluateConfig, RunConfig
from cluster.settings.serve import ServeConfig
from cluster.stages.stage import connected, run_stage
from jobs.report.make_report import make_report
from jobs.run.find_run import find_run

PROMPTS = ("ROMEO. But soft, what light", "To be, or not to be,")


@dataclass
class River:
    """The results of the stages, and how long each took."""

    tokens: dict[str, Any] = field(init=False)
    run: dict[str, Any] = field(init=False)
    evaluation: dict[str, Any] = field(init=False)
    report: dict[str, Any] = field(init=False)
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
def river(config: RunConfig, *, faults: Sequence[Fault], serving: ServeConfig) -> Iterator[River]:
    """Runs all stages one after another on a local cluster, from the corpus to an endpoint, on a
    free port, that is up while the context lasts."""
    found = River()
    with ExitStack() as stack:
        with found.stage("cluster", "a Ray cluster on this machine"):
            connection = stack.enter_context(
                connected(config.cluster, cpus_per_node=cpus_per_node(config))
            )
        with found.stage("tokenize", "tokenizing"):
            found.tokens = run_stage(connection, "jobs.tokenize_corpus", config)
        title = "training, with a node killed and one added on purpose" if faults else "training"
        with found.stage("train", title), chaos(faults, cluster=connection.local, config=config):
            found.run = run_stage(connection, "jobs.pretrain", config)
        with found.stage("evaluate", "evaluating"):
            evaluation = EvaluateConfig(checkpoint=found.run["checkpoint"], storage=config.storage)
            found.evaluation = run_stage(connection, "jobs.evaluate", evaluation)
        with found.stage("report", "drawing the report"):
            found.report = make_report(find_run(found.run["run_dir"], config.storage.uri))
        with found.stage("serve", f"serving with {serving.replicas.max_replicas} replicas"):
            found.endpoint = deploy(connection, serving.model_copy(update={"port": free_port()}))
        yield found


def run_demo(storage_uri: str, *, preset: str, keep: bool) -> dict[str, Any]:
    """Runs every stage and returns their figures. With `keep` the endpoint stays up until a
    signal."""
    start = time.monotonic()
    config, source = demo_config(storage_uri, preset)
    say(f"corpus: {source}")
    with river(config, faults=demo_faults(config), serving=demo_serving(config)) as found:
        endpoint = found.endpoint
        completions = [ask(endpoint, prompt) for prompt in PROMPTS]
        result = (
            found.tokens | found.run | {"evaluation": found.evaluation, "completions": completions}
        )
        result |= {
            "corpus": source,
            "stage_s": found.stage_s,
            "url": endpoint.url,
            "model": endpoint.model,
        }
        result |= {"html": found.report["html"], "figures": found.report["figures"]}
        result["wall_s"] = round(time.monotonic() - start, 1)
        _print_figures(result)
        if keep:
            key = Path(str(endpoint.api_key_file)).read_text(encoding="utf-8").split()[0]
            say(
                f"\nThe endpoint stays up until Ctrl-C.  URL {endpoint.url}/v1  key {key}\n"
                f"curl {endpoint.url}/v1/completions -H 'Authorization: Bearer {key}'"
                " -H 'Content-Type: application/json'"
                f' -d \'{{"model": "{endpoint.model}", "prompt": "To be", "max_tokens": 40}}\''
            )
            threading.Event().wait()
    return result


def ask(endpoint: Endpoint, prompt: str) -> dict[str, Any]:
    """Returns one streamed completion, with its timing in seconds."""
    request = {"prompt": prompt, "max_tokens": 64, "temperature": 0.8, "seed": 7}
    return stream_completion(endpoint, request, on_text=lambda text: None)


def _print_figures(result: dict[str, Any]) -> None:
    """Prints what was done, in numbers."""
    facts = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").rstrip("\n")
    reasons = (
        ", ".join(f"{count} {reason}" for reason, count in result["dropped"].items() if count)
        or "none"
    )
    say(
        facts.format(
            **result, reasons=reasons, workers=" -> ".join(map(str, result["world_sizes"]))
        )
    )
    for completion in result["completions"]:
        say(f"\n{completion['prompt']}|{completion['text']}")
        say(
            f"   first token after {completion['ttft_s'] * 1e3:.0f} ms, all after {completion['total_s'] * 1e3:.0f} ms"
        )
