"""What strangers and trainers change of a signed run, for `forgeries`."""

import base64
import json
import shutil
from collections.abc import Callable
from typing import Any

import torch
import yaml

from jobs.export import export
from jobs.proof.audits.kept_record import RECORD
from jobs.proof.sign_checkpoint import sign_checkpoint
from jobs.run.ledger import LEDGER, Line
from jobs.run.ledger_chain import hash_of
from jobs.tokens.document_map import DOCUMENTS
from jobs.tokens.token_store import canonical_json
from model.files.checkpoint_folder import ADAPTER_WEIGHTS, MANIFEST, WEIGHTS, fingerprint
from model.files.state_hash import COUNT
from model.signing.signature import MODEL, TRAINING, SigningKey
from tests.jobs.proof.signed_worlds import Tensors, World
from tests.jobs.tampering import flip_byte
from tests.signing_keys import made_keys

MANY = 1.01  # times a value: a change that no figure shows


EIGHTH = ("validation", 8)

# Edits of tensors


def grown(prefix: str) -> Callable[[Tensors], object]:
    """Changes the tensors whose names begin so."""

    def edit(tensors: Tensors) -> None:
        for name in tensors:
            if name.startswith(prefix) and tensors[name].is_floating_point():
                tensors[name] = tensors[name] * MANY + 1e-3

    return edit


def one_value(prefix: str) -> Callable[[Tensors], object]:
    def edit(tensors: Tensors) -> None:
        name = min(name for name in tensors if name.startswith(prefix))
        tensors[name].view(-1)[0] += 1e-3

    return edit


def counted_on(tensors: Tensors) -> None:
    tensors[COUNT] = tensors[COUNT] + 1


STATE = "train_state*.safetensors"
STATES: list[tuple[str, str, int, Callable[[World, int], object]]] = [
    ("moments", "mapped", 6, lambda w, s: w.edit_tensors(s, STATE, grown("exp_avg."))),
    ("second moments", "mapped", 6, lambda w, s: w.edit_tensors(s, STATE, grown("exp_avg_sq."))),
    ("one value", "mapped", 9, lambda w, s: w.edit_tensors(s, STATE, one_value("exp_avg"))),
    ("count of updates", "mapped", 6, lambda w, s: w.edit_tensors(s, STATE, counted_on)),
    ("guard's losses", "mapped", 6, lambda w, s: edit_guard(w, s, losses=[1.0, 2.0])),
    ("guard's count", "mapped", 6, lambda w, s: edit_guard(w, s, skipped_in_a_row=2)),
    ("first checkpoint", "mapped", 3, lambda w, s: w.edit_tensors(s, STATE, grown("exp_avg"))),
    ("weights", "mapped", 6, lambda w, s: w.edit_tensors(s, WEIGHTS, grown("transformer"))),
    ("Muon's momentum", "muon", 6, lambda w, s: w.edit_tensors(s, STATE, grown("momentum"))),
    ("a shard", "sharded", 6, lambda w, s: w.edit_tensors(s, "train*-00002-*", one_value("exp"))),
    ("an adapter's state", "adapter", 6, lambda w, s: w.edit_tensors(s, STATE, grown("exp_avg"))),
    ("an adapter", "adapter", 6, lambda w, s: w.edit_tensors(s, ADAPTER_WEIGHTS, one_value(""))),
]


def edit_guard(world: World, step: int, **fields: Any) -> None:
    def edit(metadata: Line) -> None:
        metadata["guard"] |= fields

    edit_metadata(world, step, edit)


def edit_metadata(world: World, step: int, edit: Callable[[Line], object]) -> None:
    world.edit_json(world.checkpoint(step) / "raymill.json", edit)
    world.remanifest(step)


# Lines of the ledger


def with_step(step: int, **fields: Any) -> Callable[[Line], object]:
    def edit(line: Line) -> None:
        if line.get("step") == step and "event" not in line:
            line |= fields

    return edit


def with_events(event: str, **fields: Any) -> Callable[[Line], object]:
    def edit(line: Line) -> None:
        if line.get("event") == event:
            line |= {name: value for name, value in fields.items() if line.get(name) is not None}

    return edit


def steps_of(world: World) -> list[Line]:
    return [line for line in world.lines() if "event" not in line]


def line_of(world: World, event: str, step: int) -> Line:
    return next(
        line for line in world.lines() if (line.get("event"), line.get("step")) == (event, step)
    )


def rewritten(edit: Callable[[Line], object]) -> Callable[[World], object]:
    """Makes an edit, and a chain that fits."""
    return lambda world: world.change(edit)


def claimed(edit: Callable[[Line], object]) -> Callable[[World], object]:
    """The same by the trainer, who signs it."""

    def forge(world: World) -> None:
        world.change(edit)
        world.sign()

    return forge


def append_other_figures(world: World) -> None:
    world.append(*[line | {"loss": 0.5, "grad_norm": 0.1} for line in steps_of(world)])


def append_better_validation(world: World) -> None:
    world.append(line_of(world, "validation", 12) | {"val_loss": 1.0, "val_bits_per_byte": 0.5})


def append_rollback(world: World) -> None:
    window = {"first": 1, "last": 12, "samples": [0, 72], "reason": "x"}
    world.append({"event": "rollback", "time": 1.0, "step": 12, **window})


def append_exchanged_checkpoint(world: World) -> None:
    world.edit_tensors(9, WEIGHTS, grown("transformer"))
    hashed = json.loads((world.checkpoint(9) / "raymill.json").read_bytes())["parameter_hash"]
    world.append(line_of(world, "checkpoint", 9) | {"parameter_hash": hashed})


def append_doubled_name(world: World) -> None:
    content = world.run.read_bytes(LEDGER)
    last = content.splitlines()[-1]
    line = json.dumps(steps_of(world)[-1]).encode()[:-1]
    added = line + b', "loss": 0.1, "prev": "' + hash_of(last).encode() + b'"}\n'
    world.run.write_bytes(LEDGER, content + added)


def append_unsigned_checkpoint(world: World) -> None:
    newer = world.checkpoint(12).with_name("step-000000013-0001")
    shutil.copytree(world.checkpoint(12), newer)
    for name in (MODEL, TRAINING):
        (newer / name).unlink()
    line = line_of(world, "checkpoint", 12)
    world.append(line | {"step": 13, "checkpoint": line["checkpoint"].replace("12-", "13-")})


def append_other_data(world: World) -> None:
    start = next(line for line in world.lines() if line.get("event") == "start")
    world.append(start | {"data_identity": "0" * 64, "attempt": 2, "step": 12})


def cut(world: World) -> None:
    lines = world.run.read_bytes(LEDGER).splitlines(keepends=True)
    world.run.write_bytes(LEDGER, b"".join(lines[:-1]))


def insert_first(world: World) -> None:
    content = world.run.read_bytes(LEDGER)
    world.run.write_bytes(LEDGER, b'{"event": "note", "time": 1, "prev": null}\n' + content)


def drop_a_line(world: World) -> None:
    lines = world.run.read_bytes(LEDGER).splitlines(keepends=True)
    world.run.write_bytes(LEDGER, b"".join(lines[:5] + lines[6:]))


def unchained(world: World) -> None:
    lines = world.lines()
    lines[5]["loss"] = 1.0
    world.write(lines, is_chained=False)


def front_unchained(world: World) -> None:
    """An old ledger that a newer version continued: who edits its front hides there."""
    lines = world.run.read_bytes(LEDGER).splitlines()
    fields = json.loads(lines[0])
    del fields["prev"]
    lines[0] = json.dumps(fields).encode()
    world.write(world.lines())
    content = world.run.read_bytes(LEDGER).splitlines()
    content[0] = lines[0]
    second = json.loads(content[1]) | {"prev": hash_of(lines[0])}
    world.run.write_bytes(
        LEDGER, b"\n".join([lines[0], json.dumps(second).encode(), *content[2:]]) + b"\n"
    )


def without_state_hashes(world: World) -> None:
    """As a version wrote it that did not bind the training state."""

    def edit(line: Line) -> None:
        line.pop("state_hash", None)
        line.pop("manifest_hash", None)

    world.change(edit)
    world.sign()


# Signatures and files


def without_checkpoints(world: World) -> None:
    shutil.rmtree(world.run_folder / "checkpoints")
    lines = [line for line in world.lines() if line.get("event") != "checkpoint"]
    world.write([line | ({"loss": 2.0} if "loss" in line else {}) for line in lines])


def signed_export(world: World, *, key: SigningKey | None = None) -> None:
    """Lays a signed copy of the checkpoint into a run with invented losses."""
    target = world.folder / "exported"
    newest = world.checkpoint(12)
    export(str(newest), str(target), storage_uri=str(world.storage), key=key)
    if key is None:
        sign_checkpoint(str(target), SigningKey.at(world.keys[0]), storage_uri=str(world.storage))
    shutil.rmtree(world.run_folder / "checkpoints")
    (world.run_folder / "checkpoints").mkdir()
    shutil.move(target, newest)
    lines = [line for line in world.lines() if line.get("event") != "checkpoint"]
    world.write([line | ({"loss": 2.0} if "loss" in line else {}) for line in lines])


def signed_with_export(world: World) -> None:
    signed_export(world, key=SigningKey.at(world.keys[0]))


def signed_by_another(world: World) -> None:
    world.sign(made_keys(world.folder, "evil")[0])


def two_stated_lines(world: World) -> None:
    """Even with the key: a statement that names two lines leaves open which counts."""
    edit_payload(world, lambda predicate: predicate["runDetails"]["byproducts"].append({}))


def edit_payload(world: World, edit: Callable[[Any], object]) -> None:
    path = world.checkpoint(12) / TRAINING

    def edit_bundle(bundle: Any) -> None:
        envelope = bundle["dsseEnvelope"]
        statement = json.loads(base64.b64decode(envelope["payload"]))
        edit(statement["predicate"])
        envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()

    world.edit_json(path, edit_bundle)


def older_in_place_of_newest(world: World) -> None:
    for name in (MODEL, TRAINING):
        shutil.copy(world.checkpoint(12) / name, world.checkpoint(9) / name)
    shutil.rmtree(world.checkpoint(12))
    lines = world.lines()
    last = max(n for n, line in enumerate(lines, 1) if line.get("event") == "checkpoint")
    world.write(lines[: last - 1])


def unrecorded_checkpoint(world: World) -> None:
    """A checkpoint between two others, of which the ledger has no word."""
    folder = world.checkpoint(6).with_name("step-000000007-0001")
    shutil.copytree(world.checkpoint(6), folder)
    edit_metadata(world, 7, lambda metadata: metadata.update(step=7, tokens_seen=7 * 96))


def edit_settings(edit: Callable[[Any], object]) -> Callable[[World], object]:
    def forge(world: World) -> None:
        path = world.run_folder / "config.yaml"
        settings = yaml.safe_load(path.read_bytes())
        edit(settings)
        path.write_text(yaml.safe_dump(settings))

    return forge


def other_corpus(settings: Any) -> None:
    settings["data"]["source"] = ["/licensed/public-domain", "/licensed/novels"]


def learned_faster(settings: Any) -> None:
    settings["train"]["learning_rate"] = 1e-3


def renamed_document(world: World) -> None:
    path = world.tokens / DOCUMENTS
    content = path.read_text()
    assert "a.jsonl" in content
    path.write_text(content.replace("a.jsonl", "b.jsonl"))


def edited_table(world: World) -> None:
    path = world.tokens / DOCUMENTS
    listed = json.loads(path.read_bytes())
    table = world.tokens / (listed["tables"][0]["shard"].removesuffix(".bin") + ".docs")
    flip_byte(table, place=8)
    listed["tables"][0]["sha256"] = fingerprint(table)["sha256"]
    path.write_text(json.dumps(listed))


def edited_tokenizer(world: World) -> None:
    path = world.tokens / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b" ")


def flipped_shard(world: World) -> None:
    flip_byte(world.tokens / "shard-00000.bin", place=4)


def flipped_shard_with_manifest(world: World) -> None:
    flipped_shard(world)
    sha256 = fingerprint(world.tokens / "shard-00000.bin")["sha256"]

    def renew(manifest: Any) -> None:
        for shard in manifest["shards"]:
            if shard["file"] == "shard-00000.bin":
                shard["sha256"] = sha256

    manifest = world.tokens / "manifest.json"
    content = json.loads(manifest.read_bytes())
    renew(content)
    manifest.write_bytes(canonical_json(content))
    hashed = fingerprint(manifest)["sha256"]
    world.edit_json(world.tokens / DOCUMENTS, lambda listed: listed.update(manifest_hash=hashed))


def exchanged_base(world: World) -> None:
    """The frozen weights of an adapter, with a manifest and metadata that say nothing of it."""
    [folder] = (path.parent for path in world.storage.glob(f"bases/*/{MANIFEST}"))
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    grown("")(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    def renew(manifest: Any) -> None:
        manifest["files"][WEIGHTS] = fingerprint(folder / WEIGHTS)

    world.edit_json(folder / MANIFEST, renew)


def warm_vectors(world: World) -> None:
    """The trainer begins from vectors that are not zero, and trains the whole run from them."""
    world.edit_tensors(0, STATE, grown("exp_avg"))
    world.go_on_from(0)


# What a trainer claims


def claimed_hash(world: World) -> None:
    """Of a step after which the settings ask for none."""
    world.change(with_step(5, parameter_hash="0" * 64))
    world.sign()


def claimed_loss_of_checkpoint(world: World) -> None:
    """Of a step that was not validated."""
    edit_metadata(world, 9, lambda m: m.update(val_loss=1.0, val_bits_per_byte=0.5))

    def edit(line: Line) -> None:
        if (line.get("event"), line["step"]) == ("checkpoint", 9):
            line["val_loss"] = 1.0

    world.change(lambda line: edit(line) if "step" in line else None)
    world.record()


def claimed_twice(world: World) -> None:
    """A validation before the honest one, which a reader may see first."""
    lines = world.lines()
    [at] = [n for n, line in enumerate(lines) if (line.get("event"), line.get("step")) == EIGHTH]
    world.write([*lines[:at], lines[at] | {"val_loss": 1.0}, *lines[at:]])
    world.sign()


def set_aside(world: World) -> None:
    (world.checkpoint(12) / "QUARANTINED").write_text("x")


def set_aside_before_an_older_one(world: World) -> None:
    uri = str(world.checkpoint(9))
    lines = world.run.read_bytes(LEDGER)
    end = max(n for n, line in enumerate(world.lines()) if line.get("step") == 9)
    world.write(world.lines()[: end + 1])
    sign_checkpoint(uri, SigningKey.at(world.keys[0]), storage_uri=str(world.storage))
    world.run.write_bytes(LEDGER, lines)
    set_aside(world)


def claimed_validation(world: World) -> None:
    world.change(with_events("validation", val_loss=1.0, val_bits_per_byte=0.5))
    world.change(with_events("checkpoint", val_loss=1.0))
    edit_metadata(world, 12, lambda m: m.update(val_loss=1.0, val_bits_per_byte=0.5))
    world.record()


def claimed_sample(world: World) -> None:
    def edit(line: Line) -> None:
        for sample in line.get("samples", []) if line.get("event") == "validation" else []:
            sample["text"] = " of all that is good."

    world.change(edit)
    world.sign()


def claimed_skip(world: World) -> None:
    """A step that counted is said to be skipped."""
    lines = world.lines()
    [at] = [n for n, line in enumerate(lines) if line.get("step") == 5 and "event" not in line]
    kept = {name: lines[at][name] for name in ("time", "step", "samples", "attempt")}
    lines[at] = {"event": "skip", **kept, "reason": "loss nan"}
    world.write(lines)
    world.sign()


def claimed_settings(edit: Callable[[Any], object]) -> Callable[[World], object]:
    """With a ledger that binds these settings, as if the run had begun with them."""

    def forge(world: World) -> None:
        edit_settings(edit)(world)
        sha256 = fingerprint(world.run_folder / "config.yaml")["sha256"]
        world.change(with_events("start", config_hash=sha256))
        world.sign()

    return forge


def filters_that_never_ran(settings: Any) -> None:
    settings["data"] |= {"decontaminate_ngram": 13}


def claimed_documents(world: World) -> None:
    """The map says that documents come from another file, and the ledger binds it."""
    path = world.tokens / DOCUMENTS
    path.write_text(path.read_text().replace("a.jsonl", "b.jsonl"))
    sha256 = fingerprint(path)["sha256"]
    world.change(with_events("start", documents_hash=sha256))
    world.sign()


def planted_weights(world: World) -> None:
    """Moments that lead from a kept checkpoint to any weights, as a review did it."""

    def plant(tensors: Tensors) -> None:
        for name in tensors:
            if name.startswith("exp_avg."):
                tensors[name] = torch.sign(tensors[name]) * 3.0
            elif name.startswith("exp_avg_sq."):
                tensors[name] = torch.full_like(tensors[name], 1e4)

    world.edit_tensors(3, STATE, plant)
    world.go_on_from(3)


# The auditor's host, and the door


def planted_audit(world: World) -> None:
    from jobs.proof.verify_run import proof_of

    proof = proof_of(world.run, signed_by=world.signer)
    assert proof.signed is not None
    intervals = [
        {"first": last - 2, "last": last, "equal": True, "verdict": "bits equal, believe me"}
        for last in (3, 6, 9, 12)
    ]
    record = {"run": world.run.uri, "head": proof.signed.sha256, "nonce": "a nonce"}
    (world.folder / "audit").mkdir()
    (world.folder / "audit" / RECORD).write_text(json.dumps(record | {"intervals": intervals}))


def published_older(world: World) -> None:
    """Whoever writes to the registry names an older checkpoint that is signed as well."""
    uri = str(world.checkpoint(9))
    sign_checkpoint(uri, SigningKey.at(world.keys[0]), storage_uri=str(world.storage))
    [path] = (world.storage / "registry").glob("*.json")
    content = json.loads(path.read_bytes())
    hashed = json.loads((world.checkpoint(9) / "raymill.json").read_bytes())["parameter_hash"]
    content |= {"checkpoint": uri, "step": 9, "parameter_hash": hashed}
    content["manifest_hash"] = fingerprint(world.checkpoint(9) / MANIFEST)["sha256"]
    path.with_name("000002.json").write_text(json.dumps(content))


def without_manifest(world: World) -> None:
    uri = str(world.checkpoint(9))
    sign_checkpoint(uri, SigningKey.at(world.keys[0]), storage_uri=str(world.storage))
    (world.checkpoint(12) / MANIFEST).unlink()
