"""`raymill plan --trace` says what a run takes and costs on such a day."""

import json
from pathlib import Path

import pytest

from cluster.cli import main

RUN = [
    *("--model.preset", "tiny", "--train.global-batch-size", "8", "--train.micro-batch-size", "1"),
    *("--train.seq-len", "32", "--train.max-tokens", str(100 * 8 * 32)),
    *("--scaling.max-workers", "3", "--scaling.min-workers", "2", "--step-seconds", "3"),
    *("--scaling.price-per-device-hour", "72", "--scaling.spot-price-per-device-hour", "36"),
    *("--see-s", "0", "--detect-s", "0", "--meet-s", "5", "--load-s", "5"),
]
DAY = "seconds,nodes\n0,4\n130,2\n250,1\n350,4\n1000,0\n"


def test_figures_are_those_of_a_sum_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three workers have 3 lanes at most, two have 4: a step takes 3 and 4 s."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "day.csv").write_text(DAY)
    assert main(["plan", "--json", *RUN, "--trace", "day.csv"]) == 0
    plan = json.loads(capsys.readouterr().out)
    # 40 steps until 130, 27 of 4 s from 140 until 250 with 2 s of another; one node is too few until
    # 350; from 360 on 33 steps of 3 s
    assert (plan["is_done"], plan["steps"], plan["wall_s"]) == (True, 100, 360 + 99)
    assert (plan["recovery_s"], plan["lost_s"], plan["waiting_s"]) == (30, 2, 100)
    assert (plan["num_resizes"], plan["num_returns"]) == (1, 1)
    # 3 workers, 2, 1 that waits, 3, for a cent a second each
    held_s = 130 * 3 + 120 * 2 + 100 * 1 + 109 * 3
    assert plan["cost"] == pytest.approx(0.01 * held_s)
    assert plan["goodput"] == pytest.approx((40 * 9 + 27 * 8 + 33 * 9) / held_s)
    assert (plan["undisturbed_s"], plan["undisturbed_cost"]) == (300, pytest.approx(9.0))

    assert main(["plan", *RUN, "--trace", "day.csv"]) == 0
    text = capsys.readouterr().out
    assert "done after 7 min 39 s" in text and f"${0.01 * held_s:.2f}" in text
    [drawn] = [line for line in text.splitlines() if line.startswith("  workers  ")]
    assert drawn.split()[1].startswith("█") and "▅" in drawn and drawn.endswith("█")


def test_a_day_that_is_too_short__and_a_step_that_nobody_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "day.csv").write_text("seconds,nodes\n0,4\n100,0\n")
    assert main(["plan", *RUN, "--trace", "day.csv"]) == 0
    assert "NOT DONE when the trace ends, after 3 min 20 s" in capsys.readouterr().out
    index = RUN.index("--step-seconds")
    rest = [*RUN[:index], *RUN[index + 2 :]]
    assert main(["plan", *rest, "--no-measure", "--trace", "day.csv"]) == 1
    assert "a step's time is not known" in capsys.readouterr().err


def test_on_gpus__the_planner_tells_a_steps_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "day.csv").write_text("seconds,nodes\n0,8\n43200,4\n86400,8\n")
    run = ["--model.preset", "gpt2-124m", "--train.max-tokens", "20B", "--scaling.max-workers", "8"]
    run += ["--train.global-batch-size", "512", "--train.micro-batch-size", "8"]
    gpus = ["--gpu", "h100", "--price", "2", "--gpus-per-node", "1", "--trace", "day.csv"]
    assert main(["plan", "--json", *run, *gpus]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["timed"] == "planned for h100" and plan["is_done"]
    assert plan["cost"] == pytest.approx(2 * plan["worker_hours"])
