"""A plan without GPUs speaks of this machine: three lines, a time that was measured or that a run
took, and no dollar."""

import json
from pathlib import Path
from typing import Any

import pytest
from pytest import CaptureFixture

from cluster.cli import main
from cluster.settings.run import RunConfig
from jobs.plan import cpu_plan
from jobs.plan.measured_steps import measured_pace
from jobs.plan.pace import NUM_STEPS
from jobs.run.ledger import Ledger
from jobs.training.train_loop import train
from tests.jobs.runs import tiny_plan

TINY = ["--model.preset", "tiny", "--train.max-tokens", "600k", "--train.precision", "fp32"]


def asked(capsys: CaptureFixture[str], *words: str) -> tuple[Any, str]:
    """Returns the figures, and what was said beside them."""
    assert main(["plan", *words, "--json"]) == 0
    said = capsys.readouterr()
    return json.loads(said.out.splitlines()[-1]), said.err


def test_what_matters_stands_in_three_lines_and_no_gpu_is_spoken_of(
    tmp_path: Path, capsys: CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *TINY]) == 0
    said = capsys.readouterr()
    lines = [line for line in said.out.splitlines() if not line.startswith((" ", "warning"))]
    assert [line.partition("  ")[0] for line in lines] == ["time", "memory", "disk"]
    assert " lanes here" in said.out
    first, second, *_ = said.err.splitlines()
    assert "counts with the 4,096 ids that its tokenizer will have (data.vocab_size)" in first
    assert second.startswith(f"plan: measuring up to {NUM_STEPS} lanes of a step here (--no-")
    assert main(["plan", *TINY, "--all", "--no-measure"]) == 0
    whole = capsys.readouterr().out
    assert whole.startswith("time    not known for 146 steps of 4,096 tokens: ")
    assert "no run like this one is in" in whole and "optimizer's moments" in whole
    for shown in (said.out, whole):
        assert not any(word in shown for word in ("$", "a100", "A100", "GPU-", "Exchange"))


def test_the_time_is_that_of_the_last_run_like_it(
    tmp_path: Path, capsys: CaptureFixture[str]
) -> None:
    """Of another batch, or with other workers, a run does not tell it."""
    settings: dict[str, Any] = {"eval_every_steps": 100, "sample_prompts": []}
    plan = tiny_plan(str(tmp_path), num_steps=12, train=settings)
    train(plan, rank=0, world_size=1)
    words = [str(tmp_path / "runs/tiny/config.yaml"), "--data.tokenizer", "given", "--no-measure"]
    found, said = asked(capsys, *words, "--train.max-tokens", "128000")
    assert "measuring" not in said
    assert found["timed"] == "the last 12 steps of run tiny"
    rates = sorted(line["tokens_per_s"] for line in Ledger.read(plan.run).steps)
    assert rates[0] <= found["tokens_per_s"] <= rates[-1]
    assert found["steps"] == 1000
    assert found["days"] * 86_400 == pytest.approx(128_000 / found["tokens_per_s"])
    assert 0 < found["processor"] <= 1
    for other in (["--train.global-batch-size", "8"], ["--scaling.max-workers", "2"]):
        found, _ = asked(capsys, *words, *other)
        assert found["days"] is None
        assert found["timed"].startswith("no run like this one is in")


def test_a_measured_pace_counts_the_lanes_of_a_worker() -> None:
    """By processor time, which other programs change little."""

    def alone_s(batch: int) -> float:
        train = {"global_batch_size": batch, "micro_batch_size": 4, "precision": "fp32"}
        values = {"model": {"preset": "tiny", "vocab_size": 512}, "train": train}
        values |= {"scaling": {"max_workers": 1}}
        pace = measured_pace(RunConfig.model_validate(values))
        return pace.step_s * pace.processor

    assert alone_s(512) > 4 * alone_s(32)


def test_what_does_not_fit_this_machine_is_said(
    tmp_path: Path, capsys: CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_plan, "num_processors", lambda: 2)
    where = ["--storage.uri", str(tmp_path)]
    found, said = asked(capsys, *where, "--model.preset", "gpt3-175b", "--scaling.max-workers", "3")
    assert "measuring" not in said, "it would not fit"
    assert found["timed"].startswith("nothing was measured, as that needs ")
    warnings = " ".join(found["warnings"])
    assert "does not fit this machine" in warnings
    assert "3 workers of 1 threads want 3 processors, and this machine has 2" in warnings
    assert "lanes do not divide among 3 workers" in warnings
    assert not {"cost", "gpu", "price_per_gpu_hour", "exchange"} & found.keys()
