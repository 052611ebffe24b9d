"""A person reads a line at once, and a cheap mistake is named before a cluster is started.

Measured on real processes by their own processor time, so that a busy machine changes little.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest

from cluster.cli import main
from cluster.settings.run import RunConfig, to_yaml
from cluster.stages.run_mirrored import lease_key
from cluster.storage.lease import Lease
from cluster.storage.registry import publish
from cluster.storage.uris import open_storage
from tests.checkpoints import write_tiny
from tests.command_line import RAYMILL, environment
from tests.time_limits import limit_s


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A corpus, a checkpoint, a run with settings, a run that is running, and a folder that is no
    run."""
    folder = tmp_path_factory.mktemp("person")
    (folder / "text.txt").write_text("to be or not to be\n" * 100)
    write_tiny(folder / "step-1")
    config = RunConfig.model_validate(
        {"run_id": "begun", "model": {"preset": "tiny"}, "train": {"seed": 1}}
    )
    run = folder / ".raymill/runs/begun"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(config))
    (run / "ledger.jsonl").write_text("")
    (folder / "notes").mkdir()
    (folder / "notes/a.txt").write_text("a")
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64}
    (folder / "run.yaml").write_text(json.dumps({"data": {"source": "text.txt"}, "model": shape}))
    with Lease(open_storage(str(folder / ".raymill/runs/busy")), lease_key("pretrain")):
        yield folder


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """One that somebody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


class JobsApiStandIn(BaseHTTPRequestHandler):
    """Answers as the dashboard of a Ray cluster of one node, which may autoscale."""

    node: ClassVar[dict[str, float]] = {"CPU": 4.0, "memory": 8e9, "object_store_memory": 2e9}
    has_autoscaler = False

    def do_GET(self) -> None:
        answers: dict[str, Any] = {
            "/api/version": {"ray_version": metadata.version("ray")},
            "/api/v0/nodes": {"data": {"result": {"result": [{"resources_total": self.node}]}}},
            "/api/cluster_status": {
                "data": {
                    "clusterStatus": {"autoscalingStatus": "up" if self.has_autoscaler else ""}
                }
            },
        }
        answer = answers.get(self.path.partition("?")[0])
        self.send_response(404 if answer is None else 200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *words: Any) -> None:
        """Says nothing."""


class AutoscalingStandIn(JobsApiStandIn):
    """Answers as that of a cluster that adds nodes by itself."""

    has_autoscaler = True


def address_of(stand_in: type[JobsApiStandIn]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), stand_in) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def small() -> Iterator[str]:
    """The address of a cluster without GPUs."""
    yield from address_of(JobsApiStandIn)


@pytest.fixture(scope="module")
def growing() -> Iterator[str]:
    """The address of a cluster without GPUs that autoscales."""
    yield from address_of(AutoscalingStandIn)


def started(argv: list[str], folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*RAYMILL, *argv],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=folder,
        start_new_session=True,
    )


TINY = ["--data.source", "text.txt", "--model.preset", "tiny", "--run-id", "begun"]
TEXT = ["pretrain", "--data.source", "text.txt"]
SHORT = ["--train.seq-len", "64", "--train.micro-batch-size", "1"]
AT_SMALL = ["--cluster.address", "SMALL"]
MISTAKES = {
    "no such command": (["pretrian"], "unknown command pretrian; did you mean pretrain?"),
    "nothing published": (["serve", "latest"], "nothing is published in"),
    "no such checkpoint": (["evaluate", "step-7"], "unknown checkpoint"),
    "nothing to evaluate": (["evaluate"], "nothing is published in"),
    "no such checkpoint by flag": (["evaluate", "--checkpoint", "step-7"], "unknown checkpoint"),
    "two checkpoints": (
        ["evaluate", "step-1", "--checkpoint", "step-7"],
        "two checkpoints, step-1 and",
    ),
    "no checkpoint there": (["serve", "notes"], "manifest.json is missing"),
    "nothing to export": (["export", "latest", "out"], "nothing is published in"),
    "port in use": (["serve", "step-1", "--port", "PORT"], "is in use by another process"),
    "no such source": (["pretrain", "--data.source", "nowhere.txt"], "nothing is at"),
    "no such source to preview": (
        ["data", "preview", "--data.source", "nowhere.txt"],
        "data.source: nothing is at",
    ),
    "empty pattern": (["tokenize", "--data.source", "*.jsonl"], "nothing is at"),
    "no such validation set": (
        ["pretrain", *TINY, "--data.validation", "news=none.txt"],
        "nothing is at",
    ),
    "no GPU": (
        [*TEXT, "--scaling.use-gpu", "true"],
        "scaling.use_gpu needs 1 GPU, and PyTorch sees 0 on this machine: see `nvidia-smi`",
    ),
    "no GPU to serve": (
        ["serve", "step-1", "--engine.device", "cuda"],
        "A Ray cluster with GPUs is named by --cluster.address http://HOST:8265",
    ),
    "no memory": ([*TEXT, "--model.preset", "gpt3-175b", *SHORT], "a worker needs about"),
    "no GPU there": (
        [*TEXT, *AT_SMALL, "--scaling.use-gpu", "true"],
        "scaling.use_gpu needs GPUs, and http://",
    ),
    "no GPU to serve there": (
        [
            "serve",
            "step-1",
            *AT_SMALL,
            "--engine.device",
            "cuda",
            "--engine.tensor-parallel-size",
            "2",
        ],
        "engine.device=cuda needs a node with 2 GPUs, and http://",
    ),
    "no memory there": (
        [*TEXT, *AT_SMALL, "--model.preset", "gpt2-1.5b", *SHORT],
        "(the largest node has 10.0 GB)",
    ),
    "no room there": (
        [*TEXT, *AT_SMALL, "--scaling.threads-per-worker", "5"],
        "has room for 0 now",
    ),
    "nobody there": (
        [*TEXT, "--cluster.address", "http://127.0.0.1:9"],
        "no Ray Jobs API answers at http://127.0.0.1:9",
    ),
    "no key": (["serve", "step-1", "--host", "0.0.0.0"], "host is 0.0.0.0, which others can reach"),
    "running already": ([*TEXT, "--run-id", "busy"], "`raymill status busy` shows it"),
    "no place": (
        ["tokenize", *TEXT[1:], "--storage.uri", "/proc/nope"],
        "/proc/nope cannot be written",
    ),
    "nor there": ([*TEXT, "--storage.uri", "/sys/nope"], "/sys/nope cannot be written"),
    "a preset over a shape": (
        ["pretrain", "run.yaml", "--model.preset", "gpt3-175b"],
        "model.n_layer: 2",
    ),
    "other settings": (["pretrain", *TINY, "--train.seed", "2"], "train.seed was 1, now 2"),
    "no run": (["report", "notes"], "unknown run 'notes'"),
    "nor to look at": (["verify", "./notes"], "unknown run './notes'"),
}


@pytest.mark.more
@pytest.mark.parametrize("name", MISTAKES)
def test_a_cheap_mistake_is_one_line_before_a_cluster_starts(
    name: str, folder: Path, port: int, small: str
) -> None:
    argv, words = MISTAKES[name]
    places = {"PORT": str(port), "SMALL": small}
    process = started([places.get(word, word) for word in argv], folder)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode in (1, 2)
    assert said.startswith("error: ") and said.count("\n") == 1, said
    assert words in said
    assert used.ru_utime + used.ru_stime < 2


@pytest.mark.more
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([*TEXT, "--scaling.use-gpu", "true"], "scaling.use_gpu needs GPUs"),
        ([*TEXT, "--model.preset", "gpt2-1.5b", *SHORT], "a worker needs about"),
        (
            ["serve", "step-1", "--engine.device", "cuda"],
            "engine.device=cuda needs a node with 1 GPU",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_cluster_that_autoscales_is_waited_for(
    argv: list[str], words: str, folder: Path, growing: str
) -> None:
    process = started([*argv, "--cluster.address", growing], folder)
    assert process.stderr is not None
    try:
        first, second = process.stderr.readline(), process.stderr.readline()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert first.startswith(words), first
    assert first.endswith(
        "; the cluster autoscales, so more nodes may come, and the job waits for them\n"
    )
    assert second.startswith(("pretrain: run ", "serve: ")), "the command goes on"


def test_without_words_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "train on token shards" in capsys.readouterr().out


WORDS = {
    "tokenize": (
        ["tokenize", "--data.source", "text.txt", "--run-id", "t"],
        "tokenize: run t, on ",
    ),
    "pretrain": (["pretrain", *TINY, "--train.seed", "1"], "pretrain: run begun, "),
    "pipeline": (["pipeline", *TINY, "--train.seed", "1"], "pipeline: run begun, "),
    "submit": (["submit", "pretrain", *TINY], "submit: pretrain of run begun; checking"),
    "evaluate": (["evaluate", "step-1"], "evaluate: /"),
    "serve": (["serve", "step-1"], "serve: /"),
    "export": (["export", "step-1", "exported"], "export: /"),
    "push": (["push", "step-1", "hf://owner/name", "--card"], "push: /"),
    "report": (["report", "begun"], "report: /"),
    "probe": (["probe", "begun"], "probe: /"),
    "data preview": (
        ["data", "preview", "--data.source", "text.txt"],
        "data preview: reading a sample",
    ),
    "plan": (["plan", "--model.preset", "demo"], "no corpus is named"),
    "data verify": (["data", "verify", "nowhere"], "data verify: nowhere"),
    "demo": (["demo"], "demo: "),
}


@pytest.mark.parametrize("name", WORDS)
def test_something_speaks_within_a_second(name: str, folder: Path) -> None:
    argv, words = WORDS[name]
    process = started(argv, folder)
    assert process.stderr is not None
    try:
        begun_s = time.monotonic()
        first = process.stderr.readline()
        times = psutil.Process(process.pid).cpu_times()
        assert time.monotonic() - begun_s < limit_s(20)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert first.startswith(words), first
    assert times.user < 1  # the system's share grows with what else runs


def test_a_list_of_runs_says_where_it_looked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list", "--storage.uri", str(tmp_path)]) == 0
    assert capsys.readouterr().err.startswith(f"no runs in {tmp_path}: `raymill pretrain`")
    jobs = tmp_path / "runs/second/jobs/20260101-000000-abcd"
    jobs.mkdir(parents=True)
    (jobs / "started.json").write_text(
        '{"job": "raymill-1", "stage": "pretrain", "host": "desk", "time": 1767225600.0}'
    )
    (jobs / "ended.json").write_text(
        '{"exit_code": 0, "stopped": false, "result": null, "time": 1767225700.0}'
    )
    (tmp_path / "runs/second/ledger.jsonl").write_text(
        '{"step": 60, "tokens_seen": 1, "loss": 2.0, "world_size": 2}\n{"event": "finish", "step": 60}\n'
    )
    assert main(["list", "--storage.uri", str(tmp_path)]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == [
        "run_id",
        "stage",
        "state",
        "step",
        "loss",
        "started",
        "kind",
        "of",
        "job",
        "place",
        "job",
    ]
    assert main(["status", "second", "--storage.uri", str(tmp_path)]) == 0
    shown = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert {"stage pretrain", "step 60", "loss 2", "kind of job by hand", "place desk"} <= shown
    assert not any(line.startswith(("number", "submissions")) for line in shown), (
        "it was submitted by nobody"
    )
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(1767225600)).split()
    known = [
        "second",
        "pretrain",
        "succeeded",
        "60",
        "2",
        *started,
        "by",
        "hand",
        "desk",
        "raymill-1",
    ]
    assert row.split() == known


RECORD = {
    "run_id": "bad",
    "stage": "pretrain",
    "backend": "local",
    "where": "desk",
    "job": "j",
    "number": 1,
}
UNREADABLE = {
    "a newer record": (
        "jobs/submitted.json",
        json.dumps(RECORD | {"submitted": 1.0, "later": 1}).encode(),
    ),
    "an unknown backend": (
        "jobs/submitted.json",
        json.dumps(RECORD | {"submitted": 1.0, "backend": "slurm"}).encode(),
    ),
    "no record": ("jobs/submitted.json", b"[]"),
    "an empty start": ("jobs/20260101-000000-abcd/started.json", b""),
    "an end that is not text": ("jobs/20260101-000000-abcd/ended.json", b"\xff"),
    "a damaged ledger": ("ledger.jsonl", b'{"step": 1, "loss": \xff}\n'),
}


@pytest.mark.parametrize("damage", UNREADABLE)
def test_a_run_that_cannot_be_read_is_named_and_the_others_are_listed(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run in ("bad", "good"):
        jobs = tmp_path / f"runs/{run}/jobs/20260101-000000-abcd"
        jobs.mkdir(parents=True)
        (jobs / "started.json").write_text(
            '{"job": "j", "stage": "pretrain", "host": "desk", "time": 1.0}'
        )
        (jobs / "ended.json").write_text(
            '{"exit_code": 0, "stopped": false, "result": null, "time": 2.0}'
        )
    name, content = UNREADABLE[damage]
    path = tmp_path / "runs/bad" / name
    path.write_bytes(content)
    assert main(["list", "--storage.uri", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert [line.split()[0] for line in said.out.splitlines()] == ["run_id", "good"]
    assert said.err.startswith(f"bad is left out: {path} ") and said.err.count("\n") == 1
    assert main(["status", "bad", "--storage.uri", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {path} ")


def record_log(storage: Path, log: str, *, exit_code: int, stopped: bool) -> list[str]:
    """Records the only launch of a run, which has ended, and returns the words that ask for its
    log."""
    folder = storage / "runs/second/jobs/20260101-000000-abcd"
    folder.mkdir(parents=True)
    (folder / "started.json").write_text(
        '{"job": "j", "stage": "pretrain", "host": "desk", "time": 1.0}'
    )
    ended = {"exit_code": exit_code, "stopped": stopped, "result": None, "time": 2.0}
    (folder / "ended.json").write_text(json.dumps(ended))
    (folder / "log-000000000000").write_text(log)
    return ["logs", "second", "--storage.uri", str(storage)]


def test_logs_leave_out_what_ray_says_to_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alarming = "[2026-01-01 00:00:00,123 E 12 34] core_worker.cc:2157: Actor with class name X cannot be created\n"
    log = f"attempt 1: 2 workers\n{alarming}(raylet) bash: warning\nsaved\n"
    words = record_log(tmp_path, log, exit_code=0, stopped=False)
    assert main(words) == 0
    assert capsys.readouterr().out == "attempt 1: 2 workers\nsaved\n"
    assert main([*words, "--follow"]) == 0
    assert capsys.readouterr().out.startswith("attempt 1: 2 workers\nsaved\n")
    assert main([*words, "--ray"]) == 0
    assert alarming in capsys.readouterr().out


def test_the_log_of_a_stopped_run_ends_with_a_plain_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stack = "*** SIGTERM received at time=1795955368 on cpu 0 ***\nPC: @     0x7fba53ca676e  (unknown)  (unknown)\n"
    log = f"WAITING for 2 workers\n{stack}    @     0x7fba53c4bd70  (unknown)\n"
    words = record_log(tmp_path, log, exit_code=143, stopped=True)
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines() == [
        "WAITING for 2 workers",
        "stopped, as requested; the same run id continues it",
    ]
    assert main([*words, "--ray"]) == 0
    assert "SIGTERM received" in capsys.readouterr().out


def test_a_log_moves_no_cursor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs/second/jobs/20260101-000000-abcd"
    folder.mkdir(parents=True)
    (folder / "started.json").write_text(
        '{"job": "j", "stage": "pretrain", "host": "desk", "time": 1.0}'
    )
    (folder / "ended.json").write_text(
        '{"exit_code": 0, "stopped": false, "result": null, "time": 2.0}'
    )
    (folder / "log-000000000000").write_text("\x1b]0;name\x07\x1b[2J.txt\n")
    words = ["logs", "second", "--storage.uri", str(tmp_path)]
    for at_terminal, shown in (
        (False, "\x1b]0;name\x07\x1b[2J.txt\n"),
        (True, "\\x1b]0;name\\x07\\x1b[2J.txt\n"),
    ):
        monkeypatch.setattr(sys.stdout, "isatty", lambda at_terminal=at_terminal: at_terminal)
        assert main(words) == 0
        assert capsys.readouterr().out == shown
        assert main([*words, "--follow"]) == 0
        assert capsys.readouterr().out.startswith(shown)


def test_the_published_ones_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = open_storage(str(tmp_path))
    for number, run_id in enumerate(("first", "second", "third"), start=1):
        write_tiny(tmp_path / run_id, step=number, run_id=run_id, val_loss=4 - number / 3)
        publish(storage, str(tmp_path / run_id))
    (tmp_path / "third/manifest.json").unlink()
    assert main(["checkpoint", "list", "--storage.uri", str(tmp_path)]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["published", "run_id", "step", "val_loss", "latest", "checkpoint"]
    assert [row.split()[2:] for row in rows] == [
        ["first", "1", "3.667", str(tmp_path / "first")],
        ["second", "2", "3.333", "latest", str(tmp_path / "second")],
        ["third", "3", "3", str(tmp_path / "third")],
    ]
    assert all(row.startswith(time.strftime("%Y-%m-%d ")) for row in rows)
    shutil.rmtree(tmp_path / "first")
    assert main(["checkpoint", "list", "--storage.uri", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[2:] == [
        "first",
        "1",
        "-",
        "gone",
        str(tmp_path / "first"),
    ]


def test_a_run_that_waits_has_no_report_yet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs/waiting/jobs/20260101-000000-abcd"
    folder.mkdir(parents=True)
    (folder / "started.json").write_text(
        '{"job": "j", "stage": "pretrain", "host": "desk", "time": 1.0}'
    )
    assert main(["report", "waiting", "--storage.uri", str(tmp_path)]) == 1
    assert "run 'waiting' has no step yet" in capsys.readouterr().err
