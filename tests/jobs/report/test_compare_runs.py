"""Runs side by side: what differs is named, what does not is not, and the page stands alone."""

from pathlib import Path

import pytest
import yaml

from cluster.settings.parser import ConfigError
from cluster.storage.uris import Storage, open_storage
from jobs.report.compare_runs import compare
from jobs.run.history import CONFIG_FILE
from tests.jobs.report.eventful_run import Page, eventful_lines, write_run


def made(storage: Storage, name: str, *, learning_rate: float, num_lines: int) -> Storage:
    run = storage.child(f"runs/{name}")
    write_run(run, eventful_lines()[:num_lines])
    settings = yaml.safe_load(run.read_bytes(CONFIG_FILE))
    settings["run_id"], settings["train"]["learning_rate"] = name, learning_rate
    run.write_bytes(CONFIG_FILE, yaml.safe_dump(settings).encode())
    return run


def test_two_runs(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    runs = [
        made(storage, "slow", learning_rate=1e-4, num_lines=130),
        made(storage, "fast", learning_rate=1e-3, num_lines=400),
    ]
    result = compare(*runs, storage_uri=storage.uri)
    assert result.runs == ["slow", "fast"]
    assert result.settings == {"train.learning_rate": ["0.0001", "0.001"]}
    assert result.figures["Steps"] == ["123 of 300, unfinished", "300 of 300"]
    assert Path(result.figure).read_bytes().startswith(b"\x89PNG")
    page = Page(Path(result.html).read_text())
    assert page.cells[page.cells.index("train.learning_rate") :][:3] == [
        "train.learning_rate",
        "0.0001",
        "0.001",
    ]
    assert "slow ends at" in page.images[0]["alt"]
    assert all(reference.startswith("data:") for reference in page.references)
    shown = result.text().splitlines()
    assert ["slow", "fast"] in [line.split() for line in shown]
    assert ["train.learning_rate", "0.0001", "0.001"] in [line.split() for line in shown]
    steps = [line.split("  ") for line in shown if "123 of 300, unfinished" in line]
    assert [line[-1].strip() for line in steps] == ["300 of 300"], "each run has its column"
    assert compare(*runs, storage_uri=storage.uri).html == result.html, (
        "the same runs have one page"
    )


def test_one_run_is_no_comparison(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    with pytest.raises(ConfigError, match="1 run cannot be compared; name 2 to 8"):
        compare(made(storage, "alone", learning_rate=1e-3, num_lines=50), storage_uri=storage.uri)
