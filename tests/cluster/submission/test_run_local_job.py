"""The process that owns a local cluster for one job, where that cluster cannot be used."""

import signal
import sys
from pathlib import Path

import pytest

from cluster.settings.run import ClusterConfig
from cluster.submission import run_local_job


def test_the_words_of_ray_are_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray's own errors repeat what they were sent; they went to the terminal as they came."""

    def connected(config: ClusterConfig, *, cpus_per_node: int) -> None:
        raise RuntimeError("Request failed: \x1b]0;owned\x07\nTraceback")

    (tmp_path / "run.yaml").write_text("run_id: a\ndata: {source: /tmp}\n")
    monkeypatch.setattr(run_local_job, "connected", connected)
    monkeypatch.setattr(
        sys, "argv", ["run_local_job", "jobs.pretrain", str(tmp_path / "run.yaml"), "a"]
    )
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert run_local_job.main() == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "error: Request failed: \\x1b]0;owned\\x07\nTraceback\n"
