"""`make gpu-proof`: a section that fails stops no other, the page shows what there is on any screen,
and the whole runs here on CPUs."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.chromium import Watched, needs_chromium, running_chromium
from tests.gpu.proof.__main__ import MACHINE, main, write
from tests.gpu.proof.page import ON_CPUS, page_of
from tests.gpu.proof.sections import SECTIONS, TOTAL_S, Outcome, Section, run_sections
from tests.time_limits import limit_s

CARD = "NVIDIA H100 80GB HBM3, 80 GiB, 9.0"
PHONE = 360  # pixels
CELLS = dict.fromkeys(("none", "optimizer", "gradients", "DDP", "FSDP2"), "9c7cc9dcd8")
SPEED = {"tokens_per_s": 412345.6, "mfu": 0.43, "peak_bytes": 31_000_000_000, "hash": "9c7c" * 16}
FIGURES: dict[str, dict[str, Any]] = {
    "hashes": {
        "rows": {"1 worker": CELLS, "4, one killed, 3": CELLS},
        "reasons": {"FSDP2": "RuntimeError: two workers share one card, " + "x" * 90},
        "verdict": "raymill's 6 trainings end with 1 hash.",
    },
    "speed": {
        "rows": [
            {"preset": "gpt2-124m", "contender": "exact"} | SPEED,
            {"preset": "gpt2-124m", "contender": "plain", "error": "exit code 1: " + "y" * 90},
            {"preset": "tiny", "contender": "gradients", "checks": {"bf16": [False, "off by 2"]}},
        ]
    },
    "workers": {
        "rows": [
            {"workers": 8, "contender": "raymill none"} | SPEED,
            {"workers": 8, "contender": "FSDP2"} | SPEED | {"tokens_per_s": 300_000.0},
        ]
    },
    "demo": {"use_gpu": True, "parameter_hash": "9c7c" * 16, "answer": "To be <b>or</b>"},
}


def outcomes() -> list[Outcome]:
    return [
        Outcome(
            name=section.name,
            title=section.title,
            says=section.says,
            state="failed" if section.name == "speed" else "passed",
            command="python -m somewhere",
            exit_code=int(section.name == "speed"),
            seconds=12.3,
            figures=FIGURES.get(section.name, {}),
            last_lines=["a line of <output> " + "z" * 300],
        )
        for section in SECTIONS
    ]


def of_code(name: str, code: str, *, within_s: float) -> Section:
    words: Sequence[str] = ["-c", code]
    return Section(name, "A title", "It says.", words, words, within_s)


def test_a_section_that_fails_stops_no_other(tmp_path: Path) -> None:
    enough_s = limit_s(20)
    sections = [
        of_code("breaks", "import sys; print('the reason'); sys.exit(3)", within_s=enough_s),
        of_code("hangs", "import time; time.sleep(1e6)", within_s=1.0),
        of_code(
            "works",
            "print('first'); import json; print(json.dumps(dict(rows=[])))",
            within_s=enough_s,
        ),
        of_code("comes last", "", within_s=0.1),
    ]
    told: list[str] = []
    found = run_sections(sections, num_gpus=0, folder=tmp_path / "work", tell=told.append)
    assert [outcome.state for outcome in found] == ["failed", "out of time", "passed", "left out"]
    assert [outcome.exit_code for outcome in found] == [3, None, 0, None]
    assert found[0].last_lines == ["the reason"]
    assert (found[2].figures, found[2].last_lines) == ({"rows": []}, ["first"])
    assert len(told) == 2 * len(sections)

    page, figures = write(tmp_path / "out", {"cards": [CARD]}, found, made="2026-01-02 03:04")
    shown = page.read_text(encoding="utf-8")
    assert "Not passed: breaks, hangs, comes last." in shown
    assert CARD in shown and ON_CPUS not in shown
    read = json.loads(figures.read_text(encoding="utf-8"))
    assert [section["exit_code"] for section in read["sections"]] == [3, None, 0, None]


def test_the_page_has_every_sections_figures_and_says_where_they_are_from() -> None:
    shown = page_of({"cards": [], "driver": None}, outcomes(), made="2026-01-02 03:04")
    assert ON_CPUS in shown
    for text in (
        "9c7cc9dcd8",
        "412,346",
        "43.0%",
        "31.00",
        "WRONG: off by 2",
        "Not passed: speed.",
    ):
        assert text in shown, text
    assert "To be &lt;b&gt;or&lt;/b&gt;" in shown and "driver" not in shown and "vllm" not in shown


@pytest.mark.more
@needs_chromium
def test_the_page_fits_a_phone_and_asks_nobody_for_anything(tmp_path: Path) -> None:
    machine = {"cards": [CARD] * 8, "packages": dict.fromkeys(("torch", "ray"), "2.13.0")}
    page, _ = write(tmp_path, machine, outcomes(), made="2026-01-02 03:04")
    with running_chromium() as browser:
        shown = browser.new_page(viewport={"width": PHONE, "height": 800})
        watched = Watched(shown, page.as_uri())
        shown.goto(page.as_uri())
        shown.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert shown.evaluate("document.documentElement.scrollWidth") <= PHONE
        assert watched.problems == []


@pytest.mark.more
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu__it_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--to", str(tmp_path / "out"), "--patience", str(limit_s(1))]) == 2
    assert "add --cpu for its short form" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.cluster
def test_its_short_form_passes_on_cpus(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert main(["--cpu", "--to", str(folder), "--patience", str(limit_s(1))]) == 0
    read = json.loads((folder / "gpu-proof.json").read_text(encoding="utf-8"))
    figures = {section["name"]: section["figures"] for section in read["sections"]}
    assert read["path"] == ON_CPUS and figures.keys() == {one.name for one in SECTIONS}
    cells = figures["hashes"]["rows"]
    ours = [of_row[way] for of_row in cells.values() for way in ("none", "optimizer", "gradients")]
    assert len(ours) == 6 and len({*ours}) == 1
    assert cells["1 worker"]["DDP"] != cells["4, one killed, 3"]["DDP"]
    assert {row["contender"] for row in figures["speed"]["rows"]} >= {"exact", "plain"}
    for name in ("speed", "workers"):
        assert all(row["tokens_per_s"] > 0 for row in figures[name]["rows"]), figures[name]
    assert figures["demo"]["restarts"] == 1 and figures["demo"]["steps_again"]
    assert read["machine"]["python"] == ".".join(map(str, sys.version_info[:3]))
    page = (folder / "gpu-proof.html").read_text(encoding="utf-8")
    assert ON_CPUS in page and "All sections passed." in page


def test_limits_are_within_a_quarter_of_an_hour() -> None:
    assert sum(section.limit_s for section in SECTIONS) <= TOTAL_S <= 15 * 60 - MACHINE.limit_s
