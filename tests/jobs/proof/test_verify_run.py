"""A run is as it was recorded, or what is not is named."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cluster.cli import main
from cluster.storage.uris import Storage, open_storage
from jobs.proof.verify_run import verify
from jobs.run.ledger import LEDGER
from model.files.checkpoint_folder import MANIFEST, fingerprint
from tests.jobs.tampering import checkpoint_folder, flip_byte


def test_an_unaltered_run_is_valid(run: Storage) -> None:
    result = verify(run)
    assert (result["valid"], result["problems"]) == (True, [])
    assert (result["checkpoints"], result["shards"]) == (3, 2)


def test_the_commands_show_their_progress_to_a_person(
    run: Storage, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", run.uri]) == 0
    (store,) = {entry.key.split("/")[0] for entry in open_storage(f"{run.uri}/../../tokens").list()}
    assert main(["data", "verify", store, "--storage.uri", f"{run.uri}/../.."]) == 0
    said = capfd.readouterr().err
    assert said.count("verifying: ") == 2
    assert "raymill-progress" not in said


def test_a_line_of_the_ledger_that_was_edited_or_dropped_is_found(run: Storage) -> None:
    lines = run.read_bytes(LEDGER).splitlines(keepends=True)
    at = next(place for place, line in enumerate(lines) if b'"loss"' in line)
    assert verify(run)["ledger_lines"] == len(lines)
    edited = lines[at].replace(b'"loss": ', b'"loss": 1')
    for instead, place in ((b"", at + 1), (edited, at + 2)):
        run.write_bytes(LEDGER, b"".join([*lines[:at], instead, *lines[at + 1 :]]))
        problems = verify(run)["problems"]
        assert problems[0].startswith(f"ledger.jsonl, line {place} was written behind another")


@pytest.mark.parametrize("name", ["model.safetensors", "train_state.safetensors", "tokenizer.json"])
def test_a_flipped_byte_of_a_checkpoint_is_found(run: Storage, name: str) -> None:
    flip_byte(checkpoint_folder(run, 6) / name)
    (problem,) = verify(run)["problems"]
    assert problem.startswith("step-000000006")
    assert f"{name} is altered" in problem


def test_weights_that_were_replaced_with_their_manifest_are_found(run: Storage) -> None:
    """Every file agrees with the manifest, but the parameters are not those that were saved."""
    folder = checkpoint_folder(run, 3)
    weights = load_file(folder / "model.safetensors")
    weights["transformer.ln_f.bias"][0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["files"]["model.safetensors"] = fingerprint(folder / "model.safetensors")
    (folder / MANIFEST).write_text(json.dumps(manifest))
    problems = verify(run)["problems"]
    assert all(problem.startswith("step-000000003") for problem in problems)
    assert [problem.partition(": ")[2].partition(" is ")[0] for problem in problems] == [
        "its parameters' hash",
        "its parameters' hash",
        "its training state's hash",
        "its manifest.json's hash",
    ]
    assert "raymill.json says" in problems[0]
    assert all("the ledger says" in problem for problem in problems[1:])


def test_a_checkpoint_that_is_gone_is_found(run: Storage) -> None:
    shutil.rmtree(checkpoint_folder(run, 8))
    (problem,) = verify(run)["problems"]
    assert problem.startswith("step-000000008")
    assert "missing" in problem


def test_a_flipped_byte_of_the_data_is_found(run: Storage, tmp_path: Path) -> None:
    flip_byte(tmp_path / "copy/tokens/made/train.bin")
    (problem,) = verify(run)["problems"]
    assert "train.bin has SHA-256" in problem


def test_other_data_is_found(run: Storage, tmp_path: Path) -> None:
    """A store of the same size, tokenized from another text."""
    place = tmp_path / "copy/tokens/made" / "manifest.json"
    place.write_text(place.read_text().replace('"source_hash": "s"', '"source_hash": "another"'))
    (problem,) = verify(run)["problems"]
    assert "none of the 1 token stores" in problem


def test_a_hash_that_the_ledger_does_not_have_is_found(run: Storage) -> None:
    lines = [json.loads(line) for line in run.read_bytes(LEDGER).splitlines()]
    for line in lines:
        if line.get("event") == "checkpoint" and line["step"] == 6:
            line["parameter_hash"] = "0" * 64
    run.write_bytes(LEDGER, "".join(json.dumps(line) + "\n" for line in lines).encode())
    chain, problem = verify(run)["problems"]
    assert problem.startswith("step-000000006")
    assert "the ledger says 000000000000…" in problem
    assert chain.startswith("ledger.jsonl, line ")
