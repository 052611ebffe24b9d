"""Follows README.md and pages of docs/: every block of commands is typed as it is, on a small corpus
and a small model.

Names that stand for the reader's own (a run's id, hosts, a bucket), ports and sizes are replaced.
`make demo` and `make test` are left out, and `raymill demo` and `init`; the commands of
docs/how-to/kubernetes.md are tested in ../k8s/test_cluster_command.py.
"""

import gzip
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.local.local_cluster import LocalCluster, free_port
from tests.cluster.grafana_stub import grafana_stub
from tests.readmes import Command, blocks_of_commands
from tests.repository import REPOSITORY
from tests.time_limits import limit_s

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.in_order]

SETTINGS: dict[str, Any] = {
    "model.preset": "tiny",
    "model.n_positions": 128,  # a context for what is asked below
    "data.vocab_size": 400,
    "data.val_fraction": 0.2,
    "train.max_tokens": 16384,
    "train.global_batch_size": 4,
    "train.micro_batch_size": 2,
    "train.seq_len": 128,
    "train.eval_max_tokens": 4096,
}
SMALLER = {"small-10m": "tiny", "demo-llama": "tiny", "20000000": "16384", "4000000": "16384"}
EXIT_CODES = {"diff": 1}  # the two runs differ
PAGES = (
    "README.md",
    "docs/tutorial/index.md",
    "docs/tutorial/assistant.md",
    "docs/how-to/data.md",
    "docs/how-to/plan.md",
    "docs/how-to/train.md",
    "docs/how-to/jobs.md",
    "docs/how-to/serve.md",
    "docs/how-to/promote.md",
    "docs/how-to/monitor.md",
    "k8s/scale.md",
)
LEFT_OUT = {"make", "kubectl", "raymill demo", "raymill init", "raymill lend"}


def is_followed(block: list[Command]) -> bool:
    firsts = {command.program for command in block}
    return not (firsts | {" ".join(command.words[:2]) for command in block}) & LEFT_OUT


BLOCKS = [
    block for name in PAGES for block in blocks_of_commands(REPOSITORY / name) if is_followed(block)
]


class Reader:
    """Types the commands, in a folder with a corpus, a configuration and key files."""

    def __init__(self, folder: Path, stands_for: dict[str, str]) -> None:
        self._folder, self._stands_for = folder, stands_for
        self._server: subprocess.Popen[str] | None = None
        self._exported: dict[str, str] = {}

    def follow(self, block: list[Command]) -> None:
        self._exported = {}
        try:
            for command in block:
                self._type(command)
        finally:
            self._end_server()

    def _type(self, command: Command) -> None:
        line = self._replaced(command.line)
        words = shlex.split(line, comments=True)
        if words[0] == "export":
            self._exported |= dict(word.split("=", 1) for word in words[1:])
        elif words[0] == "curl":
            self._curl(line)
        elif words[1] == "serve":
            self._serve(words[1:])
        else:
            self._raymill(words[1:])

    def _replaced(self, line: str) -> str:
        for name, value in self._stands_for.items():
            line = line.replace(name, value)
        return line

    @property
    def _environment(self) -> dict[str, str]:
        return os.environ | {"PYTHONPATH": str(REPOSITORY)} | self._exported

    def _raymill(self, arguments: list[str]) -> None:
        if arguments[0] == "pretrain" and "run.yaml" not in arguments:
            flags = {f"--{name.replace('_', '-')}": str(value) for name, value in SETTINGS.items()}
            arguments = arguments + [
                word for flag in flags.items() if flag[0] not in arguments for word in flag
            ]
        done = subprocess.run(
            [sys.executable, "-m", "cluster.cli", *arguments, "--json"],
            cwd=self._folder,
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=limit_s(600),
        )
        assert done.returncode == EXIT_CODES.get(arguments[0], 0), (
            f"{arguments}: {done.stdout}{done.stderr}"
        )
        result = json.loads(done.stdout.splitlines()[-1])
        if arguments[0] == "pretrain":
            self._stands_for.setdefault("RUN_ID", result["run_id"])
        elif arguments[0] == "tokenize":
            self._stands_for["MANIFEST"] = result["manifest"]

    def _serve(self, arguments: list[str]) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", *arguments, "--json"],
            cwd=self._folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._server.stdout is not None
        assert json.loads(self._server.stdout.readline())["model"]

    def _curl(self, line: str) -> None:
        done = subprocess.run(
            ["/bin/bash", "-c", f"{line} --fail --silent --show-error"],
            cwd=self._folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=limit_s(60),
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.rstrip().endswith("data: [DONE]"), done.stdout

    def _end_server(self) -> None:
        if self._server is not None:
            self._server.send_signal(signal.SIGTERM)
            assert self._server.wait(limit_s(60)) == 0, "every answer became whole"
            self._server = None


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, s3_server: str) -> Iterator[Reader]:
    import boto3

    folder = tmp_path_factory.mktemp("reader")
    (folder / "texts").mkdir()
    with gzip.open(folder / "texts" / "all.jsonl.gz", "wt", encoding="utf-8") as file:
        for number in range(30):
            words = " ".join(f"w{(number * 31 + i * i) % 211}" for i in range(600))
            file.write(json.dumps({"text": f"Document {number}. {words}"}) + "\n")
    with (folder / "says.jsonl").open("w", encoding="utf-8") as file:
        for number in range(200):
            turns = [
                {"role": "user", "content": f"Say {number}"},
                {"role": "assistant", "content": str(number)},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    settings: dict[str, Any] = {"data": {"source": str(folder / "texts" / "*.jsonl.gz")}}
    for name, value in SETTINGS.items():
        section, key = name.split(".")
        settings.setdefault(section, {})[key] = value
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    boto3.client("s3", endpoint_url=s3_server).create_bucket(Bucket="of-the-reader")
    with ExitStack() as stack:
        stub = stack.enter_context(grafana_stub())
        (folder / "token").write_text(stub.token)
        cluster = stack.enter_context(LocalCluster(num_nodes=1, cpus_per_node=3))
        stands_for = {
            "http://head:8265": cluster.jobs_url,
            "RAY_AUTH_TOKEN=…": f"RAY_AUTH_TOKEN={cluster.token}",
            "s3://bucket/prefix": "s3://of-the-reader/prefix",
            "https://grafana.example.org": stub.url,
            "8000": str(free_port()),
        }
        yield Reader(folder, stands_for | SMALLER)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block[0].place)
def test_a_block_of_commands_works_as_it_stands(block: list[Command], reader: Reader) -> None:
    reader.follow(block)
