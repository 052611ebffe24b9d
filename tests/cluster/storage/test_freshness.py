"""What counts where checkpoints must be signed follows from names of files and from publications."""

import pytest

from cluster.storage.freshness import (
    Newest,
    Publication,
    checkpoint_folders,
    later_step,
    named_step,
    newest,
    recorded_names,
)

WHOLE = {"manifest.json", "raymill.json"}


def published(step: int, run_id: str = "r") -> Publication:
    return Publication(f"/{run_id}/{step}", "hash", run_id, step, time=0.0)


def never_asked(name: str) -> bool:
    raise AssertionError(name)


def test_the_last_name_counts_and_its_ledger_is_not_read() -> None:
    folders = {"step-1": WHOLE, "step-3": WHOLE | {"model.sig"}, "step-2": WHOLE}
    assert newest(folders, never_asked) == Newest("step-3", older="step-2")


@pytest.mark.parametrize(
    ("files", "is_recorded", "problem"),
    [
        ({"raymill.json"}, True, "it was complete once"),
        ({"model.sig"}, False, "it was complete once"),
        ({"training.sig"}, False, "it was complete once"),
        ({"QUARANTINED", "model.sig"}, False, "has the mark QUARANTINED"),
        (WHOLE | {"QUARANTINED", "training.sig"}, False, "has the mark QUARANTINED"),
    ],
)
def test_an_older_one_is_not_taken_for_one_that_was_complete(
    files: set[str], is_recorded: bool, problem: str
) -> None:
    choice = newest({"step-1": WHOLE, "step-2": files}, lambda name: is_recorded)
    assert (choice.name, choice.older, choice.skipped) == ("step-2", "step-1", {})
    assert problem in choice.problem


@pytest.mark.parametrize(
    ("files", "is_recorded", "reason"),
    [
        ({"raymill.json"}, False, "it is being uploaded"),
        ({"QUARANTINED"}, True, "set it aside"),
        (WHOLE | {"QUARANTINED"}, True, "set it aside"),
    ],
)
def test_what_was_never_complete_or_was_set_aside_is_passed_over(
    files: set[str], is_recorded: bool, reason: str
) -> None:
    folders = {"step-1": WHOLE, "step-2": files}
    choice = newest(folders, lambda name: is_recorded)
    assert (choice.name, choice.problem) == ("step-1", "")
    assert reason in choice.skipped["step-2"]
    del folders["step-1"]
    assert newest(folders, lambda name: is_recorded).name is None


def test_one_that_was_set_aside_is_not_recommended() -> None:
    folders = {"step-3": {"model.sig"}, "step-2": WHOLE | {"QUARANTINED"}, "step-1": WHOLE}
    assert newest(folders, never_asked).older == "step-1"


def test_folders_of_checkpoints_are_known_by_their_names_or_files() -> None:
    keys = [
        "ledger.jsonl",
        "checkpoints/step-000000030-0002/config.json",
        "checkpoints/.spool/step-000000031/manifest.json",
        "checkpoints/notes/manifest.json",
        "copies/release/raymill.json",
        "copies/signed/training.sig",
        "audit/model.sig",
    ]
    assert checkpoint_folders(keys) == {
        "checkpoints/step-000000030-0002": {"config.json"},
        "copies/release": {"raymill.json"},
        "copies/signed": {"training.sig"},
    }


@pytest.mark.parametrize(
    ("uri", "step"),
    [
        ("s3://b/runs/r/checkpoints/step-000000030-0002", 30),
        ("step-0", 0),
        ("/a/step-000000000", 0),
        ("/a/step-3/exported", None),
        ("/a/step-three", None),
    ],
)
def test_a_name_has_a_step(uri: str, step: int | None) -> None:
    assert named_step(uri) == step


def test_a_ledgers_checkpoints_are_known_by_their_folders_wherever_they_were() -> None:
    ledger = (
        b'{"event": "checkpoint", "checkpoint": "s3://elsewhere/runs/r/checkpoints/step-1"}\n'
        b'{"event": "checkpoint_damaged", "checkpoint": "/r/checkpoints/step-2"}\n'
        b'["checkpoint"]\n{"step": 3}\n{"event": "checkpoint", "checkpoint": "/r/checkpoints/st'
    )
    assert recorded_names(ledger) == {"step-1"}


def test_a_step_back_is_one_of_the_same_run() -> None:
    earlier = [published(25), published(40), published(90, "other")]
    assert later_step(published(30), earlier) == 40
    assert later_step(published(40), earlier) is None
    assert later_step(published(90, "a third"), earlier) is None
