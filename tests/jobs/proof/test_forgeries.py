"""What is forged of a signed run is found by what the threat model names. The honest run passes."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from cluster.commands.job_commands import _progress, _recent_lines
from jobs.proof.audit_run import UNCOVERED
from jobs.proof.where_run import where
from jobs.run.ledger import Ledger
from tests.jobs.proof.forgeries import (
    FORGERIES,
    NOT_COVERED,
    Forgery,
    append_other_figures,
    append_rollback,
    audited,
    door,
    signed,
    tokenized,
    verified,
)
from tests.jobs.proof.signed_worlds import NUM_STEPS, World, copied, made
from tests.repository import REPOSITORY

TABLE = REPOSITORY / "docs/explanation/threat-model.md"

Honest = Callable[[str], World]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Honest:
    """Returns a run of a kind, which every check passes."""
    worlds: dict[str, World] = {}

    def of_kind(kind: str) -> World:
        if kind not in worlds:
            world = made(kind, tmp_path_factory.mktemp(kind))
            for check in (verified, signed, audited, door):
                assert check(world) == "", check.__name__
            worlds[kind] = world
        return worlds[kind]

    return of_kind


def with_marks(forgeries: Sequence[Forgery]) -> list[Any]:
    """Returns parameters: `make test` has the first forgery of each row of the threat model, and all
    that are found without training again and without another run."""
    params: list[Any] = []
    rows: set[str] = set()
    for forgery in forgeries:
        is_dear = forgery.found in (audited, tokenized) or forgery.kind != "mapped"
        marks = [pytest.mark.more] if is_dear and forgery.row in rows else []
        rows.add(forgery.row)
        params.append(pytest.param(forgery, marks=marks, id=f"{forgery.row}: {forgery.name}"))
    return params


@pytest.mark.parametrize("forgery", with_marks(FORGERIES))
def test_a_forgery_is_found(forgery: Forgery, honest: Honest, tmp_path: Path) -> None:
    world = copied(honest(forgery.kind), tmp_path)
    forgery.forge(world)
    assert forgery.says in forgery.found(world)


def test_there_are_many() -> None:
    assert len(FORGERIES) >= 50
    assert len({(forgery.row, forgery.name) for forgery in FORGERIES}) == len(FORGERIES)


def test_the_threat_model_has_a_row_for_each_kind_and_no_other() -> None:
    rows = [
        line.split("|")[1].strip() for line in TABLE.read_text().splitlines() if "test_f" in line
    ]
    kinds = [forgery.row for forgery in (*FORGERIES, *NOT_COVERED)]
    assert sorted(rows) == sorted({*kinds})


@pytest.mark.parametrize("forgery", with_marks(NOT_COVERED))
def test_what_no_audit_covers_is_said_by_each(
    forgery: Forgery, honest: Honest, tmp_path: Path
) -> None:
    world = copied(honest(forgery.kind), tmp_path)
    forgery.forge(world)
    assert forgery.found(world) == ""
    assert any(forgery.says in text for text in UNCOVERED)


@pytest.mark.more
@pytest.mark.parametrize("add", [append_other_figures, append_rollback])
def test_no_command_shows_lines_that_were_added_behind_the_signed_ones(
    add: Callable[[World], None],
    honest: Honest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    true = copied(honest("mapped"), tmp_path / "true")
    world = copied(honest("mapped"), tmp_path / "forged")
    add(world)

    def said(command: str, *words: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main([command, *words, "--json"]) == 0
        out, err = capsys.readouterr()
        assert "would replace what was signed" in err, command
        answer: dict[str, Any] = json.loads(out)
        return answer

    assert said("diff", true.run.uri, world.run.uri)["equal_steps"] == NUM_STEPS
    place = ("--storage.uri", str(tmp_path))
    compared = said("compare", true.run.uri, world.run.uri, *place)["figures"]
    for name in ("Training loss", "Steps", "Validation loss", "Bits per byte"):
        assert len({*compared[name]}) == 1, name
    said("report", world.run.uri)
    page = world.run.read_bytes("report/index.html").decode()
    assert compared["Training loss"][0] in page
    steps = [said("where", "--step", "8", world.run.uri), where(true.run, step=8).json()]
    assert steps[0]["rows"] == json.loads(json.dumps(steps[1]["rows"]))
    shown = _progress(_recent_lines(world.run))
    last = Ledger.read(true.run).steps[-1]
    assert (shown["step"], shown["loss"]) == (NUM_STEPS, last["loss"])
