"""All stages through the command line: text becomes a served model, with everything durable in
S3."""

import json
import signal
import subprocess
from pathlib import Path

import boto3
import httpx
import openai
import psutil
import pytest

from cluster.local.local_cluster import free_port
from tests.command_line import RAYMILL, environment, raymill_result
from tests.time_limits import limit_s
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster


def test_text_becomes_a_served_model_in_s3(tmp_path: Path, s3_bucket: str) -> None:
    for number in range(20):
        words = " ".join(f"w{(number * 31 + i * i) % 211}" for i in range(600))
        boto3.client("s3").put_object(
            Bucket=s3_bucket,
            Key=f"corpus/{number:02d}.txt",
            Body=f"Document {number}. {words}".encode(),
        )
    storage = ["--storage.uri", f"s3://{s3_bucket}/store"]
    settings = [
        "--model.preset",
        "tiny",
        "--data.vocab-size",
        "400",
        "--data.val-fraction",
        "0.2",
        "--train.max-tokens",
        "16384",
    ]
    settings += [
        "--train.global-batch-size",
        "8",
        "--train.micro-batch-size",
        "2",
        "--train.seq-len",
        "64",
    ]
    nodes = ["--cluster.num-nodes", "2"]
    settings += ["--checkpoint.save-every-steps", "10", "--train.eval-max-tokens", "4096"]

    run = raymill_result(
        "pretrain",
        "--data.source",
        f"s3://{s3_bucket}/corpus/*.txt",
        *settings,
        *nodes,
        *storage,
        folder=tmp_path,
    )
    assert run["step"] == 32
    assert run["val_loss"] < run["first_loss"]
    assert run["checkpoint"].startswith(f"s3://{s3_bucket}/store/runs/")

    shown = raymill_result("checkpoint", "show", run["checkpoint"], *storage, folder=tmp_path)
    assert shown["valid"] and shown["parameter_hash"] == run["parameter_hash"]
    report = raymill_result("report", run["run_id"], *storage, folder=tmp_path)
    assert report["html"].startswith(f"s3://{s3_bucket}/")

    port = free_port()
    command = [
        *RAYMILL,
        "serve",
        "latest",
        "--port",
        str(port),
        "--api-key-file",
        "key",
        *storage,
        "--json",
    ]
    server = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        endpoint = json.loads(server.stdout.readline())
        assert endpoint["url"] == f"http://127.0.0.1:{port}"
        key = (tmp_path / "key").read_text().strip()
        assert (tmp_path / "key").stat().st_mode & 0o077 == 0
        client = openai.OpenAI(base_url=f"{endpoint['url']}/v1", api_key=key)
        answer = client.completions.create(
            model=endpoint["model"], prompt="Document 3. w93", max_tokens=8, temperature=0
        )
        assert answer.usage is not None and answer.usage.completion_tokens == 8
        completed = raymill_result(
            "complete",
            "Document 3. w93",
            "--max-tokens",
            "8",
            "--temperature",
            "0",
            *storage,
            folder=tmp_path,
        )
        assert completed["text"] == answer.choices[0].text
        assert httpx.get(f"{endpoint['url']}/v1/models", timeout=limit_s(30)).status_code == 401

        second = subprocess.run(
            command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
        )
        assert second.returncode == 1
        assert f"port {port} on 127.0.0.1 is in use" in second.stderr
    finally:
        started = psutil.Process(server.pid).children(recursive=True)
        server.send_signal(signal.SIGTERM)
        assert server.wait(limit_s(60)) == 0, "all answers were whole"
    wait_until(lambda: not any(process.is_running() for process in started), timeout_s=20)
