"""A run followed by an endpoint that `raymill serve` started: its commands as processes,
checkpoints as they appear."""

import json
import shutil
import signal
import subprocess
from pathlib import Path

import httpx
import pytest

from cluster.local.local_cluster import free_port
from model.files.checkpoint_folder import read_metadata
from tests.checkpoints import damage, write_tiny
from tests.command_line import RAYMILL, environment, raymill_result
from tests.time_limits import limit_s
from tests.waiting import wait_until


@pytest.mark.slow
@pytest.mark.cluster
def test_an_endpoint_follows_a_run(tmp_path: Path) -> None:
    run = tmp_path / ".raymill/runs/r/checkpoints"

    def checkpoint(step: int) -> Path:
        folder = run / f"step-{step:09d}"
        write_tiny(folder.with_name(f".step-{step}"), step=step, run_id="r")
        if step == 3:
            damage(folder.with_name(f".step-{step}"), "model.safetensors", "flip")
        folder.with_name(f".step-{step}").rename(folder)  # appears whole, as a run's does
        return folder

    first = checkpoint(1)
    (tmp_path / "admin").write_text("sk-admin")
    command = [
        *RAYMILL,
        "serve",
        str(first),
        "--port",
        str(free_port()),
        "--admin-key-file",
        "admin",
    ]
    command += ["--delivery.watch-s", "1", "--replicas.max-replicas", "1", "--json"]
    log = tmp_path / "promote.log"
    server = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True
    )
    followers = []
    try:
        assert server.stdout is not None
        url = json.loads(server.stdout.readline())["url"]
        follow = [*RAYMILL, "promote", "--follow", "r", "--url", url, "--admin-key-file", "admin"]
        followers.append(
            subprocess.Popen(follow, cwd=tmp_path, env=environment(), stderr=log.open("w"))
        )

        def live_step() -> int:
            return int(
                httpx.get(f"{url}/v1/models", timeout=limit_s(30)).json()["data"][0]["lineage"][
                    "step"
                ]
            )

        assert live_step() == 1
        checkpoint(2)
        wait_until(lambda: live_step() == 2, timeout_s=90)
        checkpoint(3)
        wait_until(lambda: "not promoted" in log.read_text(), timeout_s=90)
        assert "model.safetensors is altered" in log.read_text()
        fourth = checkpoint(4)
        wait_until(lambda: live_step() == 4, timeout_s=90)
        assert (
            httpx.get(f"{url}/version", timeout=limit_s(30)).headers["x-model-version"]
            == str(read_metadata(fourth).parameter_hash)[:16]
        )
        result = raymill_result("rollback", folder=tmp_path)
        assert result["phase"] == "steady" and Path(result["checkpoint"]).name == "step-000000002"
    finally:
        for follower in followers:
            follower.terminate()
            follower.wait(limit_s(30))
        server.send_signal(signal.SIGTERM)
        assert server.wait(limit_s(60)) == 0
        shutil.rmtree(tmp_path / ".raymill/logs", ignore_errors=True)
