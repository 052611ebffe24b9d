"""The report tells a run from its ledger alone: figures, one page without outside requests, and
what was lost."""

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from cluster.settings.run import RunConfig
from cluster.storage.uris import Storage, open_storage
from jobs.report.figures import pictures, smoothed
from jobs.report.make_report import make_report
from jobs.report.why_slow import why_slow
from jobs.run.find_run import find_run
from jobs.run.history import (
    duration,
    lost_ranges,
    seconds_by_phase,
    statistics,
)
from jobs.run.ledger import Ledger
from raymill.errors import UserError
from tests.jobs.report.eventful_run import TOKENS_PER_STEP, Page, eventful_lines, write_run
from tests.jobs.runs import trained_run
from tests.repository import REPOSITORY
from tests.time_limits import limit_s

FIGURES = {"loss", "learning_rate", "throughput", "step_time", "waterfall"}


@pytest.fixture
def eventful(tmp_path: Path) -> Storage:
    run = open_storage(str(tmp_path)).child("runs/eventful")
    write_run(run, eventful_lines())
    return run


def test_history_of_a_kill_and_a_resize(eventful: Storage) -> None:
    ledger = Ledger.read(eventful)
    assert [(stop.step, stop.label, stop.lost_steps) for stop in ledger.interruptions()] == [
        (120, "resize 2 → 1", 3),
        (200, "resize 1 → 2", 0),
        (260, "restart", 5),
    ]
    assert all(5 < (stop.seconds or 0) < 8 for stop in ledger.interruptions())
    assert lost_ranges(ledger) == [(121, 123), (261, 265)]
    phases = seconds_by_phase(ledger)
    assert list(phases) == ["load", "forward", "backward", "sync", "update", "checkpoint", "stall"]
    assert all(len(seconds) == 300 for seconds in phases.values())
    assert sum(phases["checkpoint"]) == pytest.approx(7 * 0.2)


def test_statistics_are_those_of_the_ledger(eventful: Storage) -> None:
    ledger = Ledger.read(eventful)
    config = RunConfig.model_validate(
        {
            "train": {"max_tokens": 300 * TOKENS_PER_STEP, "global_batch_size": 8},
            "model": {"preset": "tiny"},
            "scaling": {"max_workers": 1, "threads_per_worker": 3},
        }
    )
    values = dict(statistics(ledger, config))
    steps = [line for line in ledger.lines if "event" not in line]
    assert len(steps) == 308
    held_s = 0.0  # from the start of each attempt to the last line of its workers
    for start in ledger.events("start"):
        own = [line["time"] for line in steps if line["attempt"] == start["attempt"]]
        measured = [line["time"] for line in ledger.events("validation")]
        last = max(at for at in [*own, *measured] if at <= own[-1] + 0.2)
        held_s += start["world_size"] * (last - start["time"])
    cpu_hours = held_s * 3 / 3600
    assert float(values["CPU-hours"]) == pytest.approx(cpu_hours, rel=1e-3)
    assert values["Steps"] == "300 of 300"
    assert values["Tokens trained on"] == "153,600"
    assert values["Workers, by attempt"] == "2, 1, 2, 2"
    assert values["Restarts"] == "3, 2 of them with another number of workers"
    assert values["Steps lost and taken again"] == "8 (121–123, 261–265)"
    assert values["Parameter hash"] == f"{280:064x}"
    wall_s = ledger.lines[-1]["time"] - ledger.lines[0]["time"]
    assert values["Wall time"] == duration(wall_s)
    useful_s = sum(line["wall_s"] for line in ledger.steps)
    assert values["Goodput"].startswith(f"{useful_s / wall_s:.1%} ")
    idle_s = sum(stop.seconds or 0 for stop in ledger.interruptions())
    again_s = sum(line["wall_s"] for line in steps if line not in ledger.steps)
    assert (
        values["Time lost"]
        == f"{idle_s + again_s:.1f} s, {again_s:.1f} s of it in steps taken again"
    )


def test_page_and_figures(eventful: Storage, tmp_path: Path) -> None:
    result = make_report(eventful)
    assert result["figures"].keys() == FIGURES
    page = Page(Path(result["html"]).read_text())
    assert Path(result["html"]) == tmp_path / "runs/eventful/report/index.html"
    assert len(page.images) == len(FIGURES)
    for image, path in zip(page.images, result["figures"].values(), strict=True):
        png = Path(path).read_bytes()
        assert png.startswith(b"\x89PNG")
        assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == png
        assert len(image["alt"]) > 60
    assert "from 5." in page.images[0]["alt"]
    assert "resize 2 → 1 after step 120" in page.images[0]["alt"]
    assert len(page.references) == len(FIGURES)
    assert all(reference.startswith("data:") for reference in page.references)
    assert "script" not in page.tags
    assert "prefers-color-scheme: dark" in Path(result["html"]).read_text()
    assert page.value_of("Steps lost and taken again") == "8 (121–123, 261–265)"
    verdict = why_slow(Ledger.read(eventful)).verdict
    assert verdict in page.cells
    assert verdict in page.images[4]["alt"], "the waterfall has it too"
    assert re.fullmatch(
        r"\$0\.00\d+ at \$0\.05 for a CPU-hour, an assumption \(--price\)", page.value_of("Cost")
    )
    assert page.value_of("train.global_batch_size") == "8"
    said = r"attempt 2: workers 1 on node-1; from checkpoint step-000000120; 3 steps lost, 6\.\d s between steps"
    assert re.fullmatch(said, page.value_of("resize 2 → 1"))
    assert page.value_of("<script>alert(1)</script>") == "& what step 50 says"


@pytest.mark.more
def test_layers_are_drawn_where_they_were_measured(eventful: Storage) -> None:
    def measured(step: int, size: float) -> dict[str, Any]:
        layers = {
            "layers": ["wpe", "h.0.attn"],
            "weight_norm": [1.0, 1.0],
            "update_ratio": [0.0, None],
        }
        return {
            "event": "layers",
            "time": 0.0,
            "step": step,
            "gradient_norm": [size, 2 * size],
            **layers,
        }

    lines = eventful_lines()
    write_run(eventful, [*lines, *(measured(step, 100 / step) for step in (50, 100, 100, 300))])
    result = make_report(eventful)
    assert result["figures"].keys() == FIGURES | {
        f"layer_{n}" for n in ("gradient_norm", "weight_norm", "update_ratio")
    }
    page = Page(Path(result["html"]).read_text())
    assert "Gradient norm of each layer over steps 1 to 300" in page.images[5]["alt"]
    assert "layers" not in page.cells, "hundreds of measurements are no events to read"


@pytest.mark.more
def test_a_real_run_is_drawn_even_when_unfinished(tmp_path: Path) -> None:
    plan = trained_run(str(tmp_path))
    page = Page(Path(make_report(plan.run)["html"]).read_text())
    ledger = Ledger.read(plan.run)
    assert page.value_of("Steps") == "8 of 8"
    assert page.value_of("Parameter hash") == ledger.events("checkpoint")[-1]["parameter_hash"]
    assert (
        page.value_of("Validation loss")
        == f"{ledger.events('validation')[-1]['val_loss']:.4f} nats/token"
    )
    assert page.value_of("Restarts").startswith("0")
    assert page.cells[page.cells.index("kept") :][1:3] == ["2", "100.00%"]

    write_run(plan.run, eventful_lines()[:2])  # one step and no validation, checkpoint or finish
    result = make_report(plan.run)
    assert result["figures"].keys() == FIGURES
    assert Page(Path(result["html"]).read_text()).value_of("Steps") == "1 of 300, unfinished"


def test_a_price_makes_the_cost(eventful: Storage) -> None:
    page = Page(Path(make_report(eventful, price=1.5)["html"]).read_text())
    assert page.value_of("Cost").endswith("at $1.5 for a CPU-hour")


@pytest.mark.more
def test_an_mfu_is_drawn_where_it_is_known(eventful: Storage) -> None:
    write_run(
        eventful,
        [line | {"mfu": 0.41} if "event" not in line else line for line in eventful_lines()],
    )
    result = make_report(eventful)
    assert result["figures"].keys() == FIGURES | {"mfu"}
    page = Page(Path(result["html"]).read_text())
    assert "the median is 41.0% of the GPUs' bf16 peak" in page.images[5]["alt"]


def test_a_report_in_s3(s3_bucket: str) -> None:
    storage = open_storage(f"s3://{s3_bucket}/mill")
    write_run(storage.child("runs/eventful"), eventful_lines()[:80])
    result = make_report(find_run("eventful", storage.uri))
    assert result["html"] == f"s3://{s3_bucket}/mill/runs/eventful/report/index.html"
    assert storage.read_bytes("runs/eventful/report/loss.png").startswith(b"\x89PNG")
    assert storage.exists("runs/eventful/report/index.html")


def test_runs_are_found_by_id_and_by_folder(eventful: Storage, tmp_path: Path) -> None:
    for reference in ("eventful", eventful.uri, f"file://{eventful.uri}"):
        assert find_run(reference, str(tmp_path)).uri == eventful.uri
    with pytest.raises(
        UserError, match=r"unknown run 'evenful': no ledger.jsonl in .*/runs/evenful.* has eventful"
    ):
        find_run("evenful", str(tmp_path))
    with pytest.raises(UserError, match=r"unknown run .*/none': .* has no runs"):
        find_run(str(tmp_path / "none"), str(tmp_path / "empty"))
    write_run(eventful, eventful_lines()[:1])
    with pytest.raises(UserError, match="no completed step yet"):
        make_report(eventful)


@pytest.mark.more
def test_the_command_prints_one_result(eventful: Storage, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "cluster.cli",
        "report",
        "eventful",
        "--storage.uri",
        str(tmp_path),
        "--json",
    ]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=limit_s(60), check=True
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["figures"].keys() == FIGURES


def test_smoothing_keeps_attempts_apart() -> None:
    steps = [line for line in eventful_lines() if "event" not in line]
    ledger = Ledger(steps)
    sizes = [float(line["world_size"]) for line in ledger.steps]
    assert smoothed(sizes, ledger).tolist() == pytest.approx(sizes)
    ramp = smoothed([float(line["step"]) for line in ledger.steps], ledger)
    assert ramp[50] == pytest.approx(51)
    # The mean of steps 1 to 4: nothing is made up before the first
    assert ramp[0] == pytest.approx(2.5)
    assert smoothed([3.0], Ledger(steps[:1])).tolist() == [3.0]


def test_a_short_run_is_smoothed_too() -> None:
    ledger = Ledger([line for line in eventful_lines() if "event" not in line][:60])
    losses = [line["loss"] for line in ledger.steps]
    assert (
        np.abs(np.diff(smoothed(losses, ledger), 2)).mean()
        < 0.5 * np.abs(np.diff(losses, 2)).mean()
    )


@pytest.mark.parametrize(
    ("measured", "width"), [([50], 1.0), ([40, 50], 1.0), (list(range(1, 61)), 1.0)]
)
def test_a_measurement_of_layers_is_drawn_where_it_was_made(
    measured: list[int], width: float
) -> None:
    """And not over all of the steps around it, which nobody measured."""
    fields = {"layers": ["wte", "ln_f"], "gradient_norm": [1.0, 2.0], "weight_norm": [3.0, 4.0]}
    events = [
        {"event": "layers", "time": 1.0, "step": step, **fields, "update_ratio": [1e-3, 2e-3]}
        for step in measured
    ]
    steps = [line for line in eventful_lines() if "event" not in line][:60]
    ledger = Ledger([*steps, *events])
    axes = Figure().subplots()
    pictures(ledger)["layer_weight_norm"].draw(axes, ledger)
    mesh = axes.collections[0]
    columns = mesh.get_array().reshape(2, -1)
    edges = mesh.get_coordinates()[0, :, 0]
    drawn = [
        (edges[n] + edges[n + 1]) / 2
        for n in range(columns.shape[1])
        if not np.ma.is_masked(columns[:, n])
    ]
    assert drawn == measured
    assert np.diff(edges)[::2].tolist() == pytest.approx([width] * len(measured))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1.24, "1.2 s"),
        (61, "1 min 01 s"),
        (3661.4, "1 h 01 min 01 s"),
        (360000, "100 h 00 min 00 s"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text
