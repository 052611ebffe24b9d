"""The page of the exact engine is true: its example runs under stock Ray Train, and ends with one
hash on one worker, on two, and on up to four of which one is killed."""

import ast
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from tests.local_ray import local_ray
from tests.repository import REPOSITORY
from tests.time_limits import limit_s
from tests.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

PAGE = REPOSITORY / "docs" / "how-to" / "engine.md"
WORKERS = "num_workers=(1, 4)"


def example() -> str:
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert WORKERS in code
    return str(code)


def kill_a_worker(storage: Path, killed: threading.Event) -> None:
    """Kills one training process once the run has a checkpoint."""
    wait_until(lambda: any(storage.glob("exact/checkpoint_*/exact.json")), timeout_s=120)
    workers: list[psutil.Process] = []
    for process in psutil.Process().children(recursive=True):
        if any("RayTrainWorker" in word for word in process.cmdline()):
            workers.append(process)
    assert len(workers) == 4
    workers[-1].kill()
    killed.set()


def test_the_example_ends_with_one_hash(tmp_path: Path) -> None:
    hashes: dict[str, str] = {}
    # Ray, its workers and the example find this folder in place of the user's home
    environment = {"HOME": str(tmp_path)}
    with local_ray(num_cpus=4, environment=environment):
        import ray

        address = ray.get_runtime_context().gcs_address
        for number, workers in enumerate(("1", "2", "(1, 4)")):
            storage = tmp_path / str(number)
            code = example().replace(WORKERS, f"num_workers={workers}")
            code = code.replace(
                'RunConfig(name="exact"', f'RunConfig(name="exact", storage_path="{storage}"'
            )
            script = tmp_path / f"train_{number}.py"
            script.write_text(code, encoding="utf-8")
            killed = threading.Event()
            if workers == "(1, 4)":
                threading.Thread(target=kill_a_worker, args=(storage, killed), daemon=True).start()
            done = subprocess.run(
                [sys.executable, str(script)],
                env=os.environ
                | environment
                | {"RAY_ADDRESS": address, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=limit_s(300),
                check=False,
            )
            assert done.returncode == 0, done.stderr[-3000:]
            metrics = ast.literal_eval(done.stdout.splitlines()[-1])
            assert metrics["step"] == 400
            hashes[workers] = metrics["weights"]
            assert killed.is_set() == (workers == "(1, 4)")
    assert len(set(hashes.values())) == 1, hashes
