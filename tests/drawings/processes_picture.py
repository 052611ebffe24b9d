"""The root README's picture of what runs where, as SVG: processes, ports and storage, from the
code's own names.

The modules, ports and keys in it are looked up where the code has them, so that one that moves or
goes is missed here.
"""

import html
from collections.abc import Mapping
from typing import NamedTuple

import yaml

from cluster.output.job_log import JOBS
from cluster.settings.serve import ServeConfig
from cluster.storage.registry import ENDPOINTS
from jobs.run.history import CONFIG_FILE
from jobs.run.ledger import LEDGER
from jobs.tokens.token_store import MANIFEST
from tests.repository import REPOSITORY

PICTURE = REPOSITORY / "docs" / "images" / "processes.svg"
WIDTH, HEIGHT = 1000, 680
STYLE = """
text { font-family: Helvetica, Arial, sans-serif; font-size: 13px; fill: #1f2933; }
.title { font-weight: bold; } .place { font-weight: bold; font-size: 14px; fill: #52606d; }
.module { font-family: Menlo, Consolas, monospace; font-size: 9.5px; fill: #2f6f9f; } .key { font-family: Menlo, Consolas, monospace; font-size: 12px; fill: #2f6f9f; }
.label { fill: #52606d; }
.machine { fill: #f5f7fa; stroke: #9aa5b1; } .process { fill: #ffffff; stroke: #3e4c59; }
.arrow { stroke: #52606d; stroke-width: 1.5; fill: none; marker-end: url(#head); }
.both { marker-start: url(#head); }
"""


class Process(NamedTuple):
    """A box: what the process is called, the module that it runs, and what it does."""

    title: str
    module: str | None
    lines: tuple[str, ...]


COMMAND = Process(
    "the raymill command",
    "cluster/cli.py",
    ("starts a local cluster, or", "submits to one that runs"),
)
CLIENTS = Process("clients", None, ("OpenAI's client, curl,", "a browser with the chat"))
WATCHERS = Process("Prometheus, Grafana", None, ("read each node's metrics port",))

HEAD = [
    Process("Ray's head", "cluster/local/start_node.py", ("knows nodes and actors,", "takes jobs")),
    Process(
        "a stage's job",
        "cluster/stages/run_mirrored.py",
        ("runs a stage, keeps its", "log, holds its lease"),
    ),
    Process(
        "Ray Train's controller",
        "jobs/ray_train/worker_backend.py",
        ("replaces lost workers,", "grows and shrinks"),
    ),
    Process(
        "proxy",
        "serving/proxy/front_door.py",
        ("bounds requests, retries", "those of a lost replica"),
    ),
    Process(
        "coordinator",
        "serving/delivery/coordinator.py",
        ("on any node: decides", "which version serves"),
    ),
]
NODE = [
    Process(
        "data task",
        "jobs/corpus/ray_data_tasks.py",
        ("reads, cleans, encodes", "a chunk of the corpus"),
    ),
    Process(
        "training worker",
        "jobs/training/train_worker.py",
        ("computes its lanes, sums", "exactly with the others"),
    ),
    Process("keeper", "jobs/snapshots/keepers.py", ("holds the last steps'", "state in memory")),
    Process("replica", "serving/replica.py", ("HTTP, keys, text and", "tokens, admission")),
    Process(
        "engine",
        "serving/engine_process/run_engine.py",
        ("continuous batching,", "KV cache, sampling"),
    ),
]


def ports() -> Mapping[str, int]:
    """Returns the first port of each of the cluster's network policies that names one."""
    text = (REPOSITORY / "k8s/base/network-policies.yaml").read_text(encoding="utf-8")
    rules = {
        policy["metadata"]["name"]: policy["spec"].get("ingress")
        or policy["spec"].get("egress")
        or []
        for policy in yaml.safe_load_all(text)
    }
    return {
        name: rule[0]["ports"][0]["port"]
        for name, rule in rules.items()
        if rule and "ports" in rule[0]
    }


def keys() -> list[tuple[str, str]]:
    """Returns what lies in the storage, and what it is."""
    return [
        (f"runs/RUN/{CONFIG_FILE}, {LEDGER}", "the settings, and a line for each step and event"),
        (
            f"runs/RUN/checkpoints/, {JOBS}/, report/",
            "hashed checkpoints, kept logs, figures and page",
        ),
        (f"tokens/KEY/, with {MANIFEST}", "token shards; the tokenizer is in tokenizers/KEY/"),
        (f"registry/, {ENDPOINTS}", "what was published, and what each endpoint serves"),
    ]


def draw() -> str:
    """Returns the picture."""
    at = ports()
    assert at["completions-endpoint"] == ServeConfig.model_fields["port"].default
    parts = [*_row(20, [COMMAND, CLIENTS, WATCHERS], left=40, width=240, gap=100)]
    parts += _machine(
        150,
        "head node (on Kubernetes every node has a proxy; a local cluster's Ray ports are free ones on loopback)",
        HEAD,
    )
    parts += _machine(335, "worker nodes", NODE)
    parts += _storage(520)
    parts += [
        _arrow(160, 103, 160, 150, f"Jobs API, {at['jobs-api']}"),
        _arrow(500, 103, 690, 178, f"HTTP, {at['completions-endpoint']}", dx=12),
        _arrow(840, 103, 840, 150, f"metrics, {at['metrics']}"),
        _arrow(310, 285, 310, 335, "schedules tasks and actors", both=True),
        _arrow(690, 261, 690, 363, "requests; tokens by a Unix socket", both=True),
        _arrow(
            310,
            470,
            310,
            520,
            f"file://, s3:// ({at['object-storage']}) or hf:// for reading",
            both=True,
        ),
    ]
    for process in (COMMAND, *HEAD, *NODE):
        assert process.module is None or (REPOSITORY / process.module).is_file(), process
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">\n'
        f"<style>{STYLE}</style>\n"
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto-start-reverse"><path d="M0 0 8 4 0 8z" fill="#52606d"/></marker></defs>\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>\n'
    )
    return head + "\n".join(parts) + "\n</svg>\n"


def _machine(top: int, title: str, processes: list[Process]) -> list[str]:
    frame = f'<rect class="machine" x="20" y="{top}" width="960" height="135" rx="8"/>'
    return [
        frame,
        _text(36, top + 20, title, "place"),
        *_row(top + 30, processes, left=36, width=176, gap=12),
    ]


def _storage(top: int) -> list[str]:
    frame = f'<rect class="machine" x="20" y="{top}" width="960" height="150" rx="8"/>'
    parts = [
        frame,
        _text(
            36, top + 22, "storage: a folder, .raymill by default, or s3://bucket/prefix", "place"
        ),
    ]
    for number, (key, meaning) in enumerate(keys()):
        y = top + 50 + 26 * number
        parts += [_text(36, y, key, "key"), _text(400, y, meaning, "label")]
    return parts


def _row(top: int, processes: list[Process], *, left: int, width: int, gap: int) -> list[str]:
    parts = []
    for number, process in enumerate(processes):
        x = left + number * (width + gap)
        parts.append(
            f'<rect class="process" x="{x}" y="{top}" width="{width}" height="83" rx="4"/>'
        )
        parts.append(_text(x + 8, top + 20, process.title, "title"))
        module = [("/".join(process.module.split("/")[-2:]), "module")] if process.module else []
        for row, (line, kind) in enumerate([*module, *((line, "") for line in process.lines)]):
            parts.append(_text(x + 8, top + 40 + 17 * row, line, kind))
    return parts


def _arrow(
    x1: int, y1: int, x2: int, y2: int, label: str, *, both: bool = False, dx: int = 8
) -> str:
    kind = "arrow both" if both else "arrow"
    return f'<path class="{kind}" d="M{x1} {y1} {x2} {y2}"/>\n' + _text(
        (x1 + x2) // 2 + dx, (y1 + y2) // 2 + 4, label, "label"
    )


def _text(x: int, y: int, text: str, kind: str) -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{html.escape(text)}</text>'
