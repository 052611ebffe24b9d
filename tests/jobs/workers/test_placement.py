"""A run's precision: chosen where it trains, recorded, kept on any hardware, and reported where a
processor emulates it."""

import socket
from pathlib import Path

import pytest
import ray

from cluster.settings.parser import ConfigError
from cluster.settings.run import ScalingConfig
from jobs.pretrain import _enter
from jobs.run.history import CONFIG_FILE, recorded_config
from jobs.run.ledger import Ledger
from jobs.training.train_loop import train
from jobs.watching.run_watcher import message_of
from jobs.workers import placement as run_precision
from jobs.workers.placement import workers_precision
from model.hardware.processor import Device, fast_precision
from model.numerics import Precision
from model.text.tokenizer import Tokenizer
from tests.jobs.runs import tiny_plan


def worker_fast_precision(device: Device) -> Precision:
    assert ray.get_runtime_context().get_task_id() is not None, "it was not asked in a task"
    return fast_precision(device)


@pytest.mark.cluster
@pytest.mark.parametrize("host", [socket.gethostname(), "another"])
def test_it_is_what_the_workers_processor_computes_at_speed(
    host: str, ray_workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_precision.socket, "gethostname", lambda: host)
    if host == "another":  # whose own processor says nothing
        monkeypatch.setattr(run_precision, "fast_precision", worker_fast_precision)
    assert workers_precision(ScalingConfig()) == fast_precision("cpu")
    plan = tiny_plan(str(tmp_path), train={"precision": "auto"})
    plan.run.delete(CONFIG_FILE)
    settled = _enter(plan.run, plan.config, Tokenizer.from_json(plan.tokenizer_json))
    assert settled.train.precision == fast_precision("cpu")
    assert recorded_config(plan.run) == settled


@pytest.mark.parametrize("recorded", ["fp32", "bf16"])
def test_a_resume_keeps_it(recorded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker is asked."""
    monkeypatch.setattr(ray, "nodes", lambda: pytest.fail("the workers were looked for"))
    plan = tiny_plan(str(tmp_path), train={"precision": recorded})
    asked = plan.config.train.model_copy(update={"precision": "auto"})
    tokenizer = Tokenizer.from_json(plan.tokenizer_json)
    assert (
        _enter(plan.run, plan.config.model_copy(update={"train": asked}), tokenizer) == plan.config
    )
    assert _enter(plan.run, plan.config, tokenizer) == plan.config
    other = asked.model_copy(update={"precision": "bf16" if recorded == "fp32" else "fp32"})
    with pytest.raises(
        ConfigError, match=rf"train\.precision was {recorded}, now {other.precision}"
    ):
        _enter(plan.run, plan.config.model_copy(update={"train": other}), tokenizer)


def test_the_ledger_says_once_that_other_hardware_emulates_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tiny_plan(str(tmp_path), train={"precision": "bf16"}, checkpoint={"save_every_steps": 2})
    monkeypatch.setattr(run_precision, "fast_precision", lambda device: "bf16")
    train(plan, rank=0, world_size=1)
    assert not Ledger.read(plan.run).events("precision")
    assert [line["precision"] for line in Ledger.read(plan.run).events("start")] == ["bf16"]
    ledger = plan.run.read_bytes("ledger.jsonl")
    monkeypatch.setattr(run_precision, "fast_precision", lambda device: "fp32")
    for _ in range(2):
        train(plan, rank=0, world_size=1)
    assert plan.run.read_bytes("ledger.jsonl").startswith(ledger)
    (line,) = Ledger.read(plan.run).events("precision")
    assert (line["precision"], line["fast"], line["attempt"]) == ("bf16", "fp32", 2)
    assert (
        message_of(line) == "the run computes in bf16, as it began, which this processor emulates"
    )


def test_a_run_in_fp32_is_told_of_a_faster_precision() -> None:
    found = run_precision.at_odds("fp32", "cpu")
    assert (found is None) == (fast_precision("cpu") == "fp32")
    assert found is None or "computes bf16 at speed" in found["reason"]
