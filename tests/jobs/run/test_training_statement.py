"""What a checkpoint was trained from, by its run's ledger, where it lies in a run."""

from pathlib import Path
from typing import Any

from cluster.storage.uris import open_storage
from jobs.run.ledger import LEDGER
from jobs.run.ledger_chain import encoded, hash_of
from jobs.run.training_statement import training_of
from tests.checkpoints import write_tiny


def stated(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Returns the materials of a checkpoint by name, and the names of its by-products."""
    training = training_of(str(folder), folder)
    materials = {
        material["name"]: material["digest"]["sha256"]
        for material in training["buildDefinition"]["resolvedDependencies"]
    }
    return materials, [each["name"] for each in training["runDetails"]["byproducts"]]


def write_ledger(run: Path, lines: list[dict[str, Any]]) -> None:
    content: list[bytes] = []
    head: str | None = None
    for line in lines:
        content.append(encoded(line, head))
        head = hash_of(content[-1])
    open_storage(str(run)).write_bytes(LEDGER, b"".join(line + b"\n" for line in content))


def test_a_run_began_from_its_first_checkpoint_and_was_validated_as_its_last_start_says(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "checkpoints" / "step-000000002"
    write_tiny(folder, step=2)
    lines: list[dict[str, Any]] = [
        {"event": "checkpoint", "step": 0, "parameter_hash": "first"},
        {"event": "checkpoint", "step": 2, "parameter_hash": "second"},
    ]
    for attempt, name in enumerate(["a", "b", "c", "d"]):
        manifests = {name: f"manifest of {name}"}
        lines.append({"event": "start", "attempt": attempt, "validation_manifests": manifests})
    write_ledger(tmp_path, lines)
    materials, byproducts = stated(folder)
    assert materials["the parameters that it began from"] == "first"
    validated = {name: sha256 for name, sha256 in materials.items() if "validation" in name}
    assert validated == {"the manifest.json of validation set d": "manifest of d"}
    assert byproducts == [f"{LEDGER}, line 6"]


def test_a_checkpoint_outside_of_a_run_has_no_ledger(tmp_path: Path) -> None:
    """Neither that of the folder above, nor one that is not there."""
    copy = tmp_path / "run" / "copies" / "step-000000002"
    lost = tmp_path / "lost" / "checkpoints" / "step-000000002"
    for folder in (copy, lost):
        write_tiny(folder, step=2)
    write_ledger(tmp_path / "run", [{"event": "start", "attempt": 1}])
    for folder in (copy, lost):
        materials, byproducts = stated(folder)
        assert [*materials] == ["tokenizer.json", "the token store's manifest.json"]
        assert byproducts == []
