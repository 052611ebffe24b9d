"""The examples of raymill's README run as they stand there, and end with one hash."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.repository import REPOSITORY
from tests.time_limits import limit_s

README = REPOSITORY / "raymill" / "README.md"
MOMENTUM = """
engine = ExactEngine(torch.nn.Linear(32, 32), loss, num_lanes=2, rule=Momentum(0.9))
before = engine.model.weight.detach().clone()
first = engine.step(lambda lane: batch_of(0, lane), learning_rate=0.1)
second = engine.step(lambda lane: batch_of(0, lane), learning_rate=0.1)
assert second.loss < first.loss and not torch.equal(before, engine.model.weight)
"""


def examples() -> list[str]:
    """Returns the loop of one's own, the script for `torchrun`, and the rule."""
    found: list[str] = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.S)
    assert len(found) == 3
    return found


def run(folder: Path, *words: str) -> str:
    """Runs Python in a folder, and returns the last word that it prints."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=limit_s(90),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()[-1]


def test_the_loop_and_the_rule__run_as_they_stand(tmp_path: Path) -> None:
    loop, _, rule = examples()
    (tmp_path / "loop.py").write_text(loop + rule + MOMENTUM, encoding="utf-8")
    assert re.fullmatch(r"[0-9a-f]{64}", run(tmp_path, "loop.py"))


@pytest.mark.slow
def test_the_resized_run__ends_with_the_hash_of_the_loop(tmp_path: Path) -> None:
    loop, script, _ = examples()
    (tmp_path / "loop.py").write_text(loop, encoding="utf-8")
    (tmp_path / "train.py").write_text(script, encoding="utf-8")
    commands = re.findall(
        r"^torchrun --nproc-per-node (\d) train.py (\d+)", README.read_text(), re.M
    )
    assert len(commands) == 3
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
    hashes: list[str] = []
    for num_workers, num_steps in commands:
        hashes.append(run(tmp_path, *launcher, num_workers, "train.py", num_steps))
    assert hashes[-1] == run(tmp_path, "loop.py")
    assert len(set(hashes)) == 3
