"""What may be forged of a signed run, by whom, and what finds it.

Each forgery belongs to a row of the table in docs/explanation/threat-model.md, which it names.
"""

import base64
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import yaml

from cluster.storage.registry import find_checkpoint
from jobs.export import export
from jobs.proof.audits.record import RECORD
from jobs.proof.sign_checkpoint import sign_checkpoint
from jobs.run.ledger import LEDGER, Line
from jobs.run.ledger_chain import hash_of
from jobs.tokens.document_map import DOCUMENTS
from jobs.tokens.token_store import canonical_json
from model.errors import UserError
from model.files.checkpoint_folder import ADAPTER_WEIGHTS, MANIFEST, WEIGHTS, fingerprint
from model.files.state_hash import COUNT
from model.signing.floor import Floor
from model.signing.signature import MODEL, TRAINING, SigningKey, TrustedSigner
from tests.jobs.proof.signed_worlds import Tensors, World, train_storing
from tests.jobs.tampering import flip_byte
from tests.signing_keys import made_keys

MANY = 1.01  # times a value: a change that no figure shows


@dataclass(frozen=True)
class Forgery:
    """One thing that somebody does to a run, and the words by which it is found."""

    row: str
    name: str
    forge: Callable[[World], object]
    found: Callable[[World], str]  # returns the problems, "" where there are none
    says: str
    kind: str = "mapped"  # of the run


def signed(world: World) -> str:
    """Is `raymill verify --signed-by`."""
    return world.verified(world.signer)


def verified(world: World) -> str:
    """Is `raymill verify`."""
    return world.verified(None)


def audited(world: World) -> str:
    """Is `raymill audit --signed-by`, of all intervals."""
    return world.audited()


def tokenized(world: World) -> str:
    """Is `raymill audit --tokenize`, of all shards."""
    return world.audited(num_shards=100)


def door(world: World, *, floor: Floor | None = None, reference: str = "latest") -> str:
    """Is what an endpoint, an evaluation and a run ask with `storage.signed_by`."""
    signer = TrustedSigner(world.keys[1], floor=floor or Floor())
    target = str(world.run_folder) if reference == "run" else reference
    try:
        find_checkpoint(target, str(world.storage), signed_by=signer)
    except UserError as error:
        return str(error)
    return ""


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


def of_stranger(row: str) -> list[Forgery]:
    """Each part of a state, changed with its manifest by somebody who only writes to the bucket."""
    return [
        Forgery(
            row, f"stranger: {name}", lambda w, e=edit, s=step: e(w, s), signed, "hash is", kind
        )
        for name, kind, step, edit in STATES
    ]


def of_trainer(row: str) -> list[Forgery]:
    """The same by the trainer, who goes on from it with the honest program, and signs."""

    def forge(world: World, edit: Callable[[World, int], object], step: int) -> None:
        edit(world, step)
        world.go_on_from(step)

    return [
        Forgery(
            row,
            f"trainer: {name}",
            lambda w, e=edit, s=step: forge(w, e, s),
            audited,
            f"bits part at step {step}: ",
            kind,
        )
        for name, kind, step, edit in STATES
        if kind != "sharded" or "shard" in name
    ]


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


def signed_after_adding(world: World) -> str:
    """Is `raymill sign`, once more, of a run to which lines were added."""
    try:
        world.sign()
    except UserError as error:
        return str(error)
    return ""


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


def refused_audit(world: World) -> str:
    try:
        return audited(world)
    except UserError as error:
        return str(error)


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


def floored(world: World) -> str:
    return door(world, floor=Floor(step=12))


def door_of_run(world: World) -> str:
    return door(world, reference="run")


def trained_again(world: World) -> None:
    train_storing(world.plan)


EIGHTH = ("validation", 8)

CHANGED, ADDED, LINES = "checkpoint changed", "lines added", "ledger rewritten"
UNSIGNED, DATA, STATE_OF_TRAINER = "signature missing", "data changed", "state planted"
CLAIMS, STORE, HOST, STALE = "figures invented", "store invented", "audit planted", "older served"

FORGERIES: list[Forgery] = [
    *of_stranger(CHANGED),
    Forgery(
        CHANGED,
        "stranger: metadata's loss",
        lambda w: edit_metadata(w, 12, lambda m: m.update(val_loss=1.0)),
        signed,
        "is another than was signed",
    ),
    Forgery(
        CHANGED,
        "stranger: an older checkpoint's loss",
        lambda w: edit_metadata(w, 9, lambda m: m.update(val_loss=1.0)),
        signed,
        "manifest.json's hash is",
    ),
    Forgery(
        CHANGED,
        "stranger: the newest one's weights",
        lambda w: w.edit_tensors(12, WEIGHTS, grown("transformer")),
        signed,
        "is another than was signed",
    ),
    Forgery(
        CHANGED,
        "stranger: a file added",
        lambda w: (w.checkpoint(12) / "chat_template.jinja").write_text("{{ 1 }}"),
        signed,
        "was not there when model.sig was made",
    ),
    Forgery(
        CHANGED,
        "stranger: a link to a folder",
        lambda w: (w.checkpoint(12) / "code").symlink_to(w.folder),
        signed,
        "code in",
    ),
    Forgery(CHANGED, "stranger: a new checkpoint", unrecorded_checkpoint, signed, "no line of"),
    Forgery(CHANGED, "stranger: an adapter's base", exchanged_base, signed, "the base ", "adapter"),
    Forgery(ADDED, "figures", append_other_figures, signed, "added after the run had finished"),
    Forgery(ADDED, "validation", append_better_validation, signed, "has 1 line behind line"),
    Forgery(ADDED, "rollback", append_rollback, signed, "added after the run had finished"),
    Forgery(ADDED, "exchanged checkpoint", append_exchanged_checkpoint, signed, "hash is"),
    Forgery(ADDED, "a name twice", append_doubled_name, signed, "the key loss occurs twice"),
    Forgery(ADDED, "newer checkpoint", append_unsigned_checkpoint, signed, "is not signed"),
    Forgery(ADDED, "other data", append_other_data, signed, "added after the run had finished"),
    Forgery(ADDED, "signed again", append_other_figures, signed_after_adding, "has lines behind"),
    Forgery(LINES, "a loss", rewritten(with_step(5, loss=1.0)), signed, "had another last line"),
    Forgery(LINES, "end cut off", cut, signed, "had another last line"),
    Forgery(LINES, "first line inserted", insert_first, signed, "what stands before it"),
    Forgery(LINES, "a line dropped", drop_a_line, verified, "line 6 was written behind another"),
    Forgery(LINES, "chain taken off", unchained, verified, "it has no chain"),
    Forgery(LINES, "front without chain", front_unchained, verified, "lines 1 to 1 have no chain"),
    Forgery(UNSIGNED, "no checkpoint", without_checkpoints, signed, "nothing of this run was"),
    Forgery(UNSIGNED, "newest set aside", set_aside, signed, "has the mark QUARANTINED"),
    Forgery(
        UNSIGNED,
        "older one counts",
        set_aside_before_an_older_one,
        signed,
        "the ledger's newest checkpoint is missing",
    ),
    Forgery(UNSIGNED, "signed export", signed_export, signed, "states no line of a ledger"),
    Forgery(UNSIGNED, "export --sign", signed_with_export, signed, "had another last line"),
    Forgery(UNSIGNED, "another key", signed_by_another, signed, "another key than that of"),
    Forgery(UNSIGNED, "two stated lines", two_stated_lines, signed, "was altered"),
    Forgery(UNSIGNED, "older signature", older_in_place_of_newest, signed, "is another than was"),
    Forgery(
        UNSIGNED,
        "statement gone",
        lambda w: (w.checkpoint(12) / TRAINING).unlink(),
        signed,
        "is not signed",
    ),
    Forgery(
        UNSIGNED,
        "signature gone",
        lambda w: (w.checkpoint(12) / MODEL).unlink(),
        signed,
        "is not signed",
    ),
    Forgery(
        UNSIGNED,
        "statement edited",
        lambda w: edit_payload(w, lambda p: p["runDetails"].update(byproducts=[])),
        signed,
        "was altered",
    ),
    Forgery(
        DATA,
        "corpus in the settings",
        edit_settings(other_corpus),
        signed,
        "data.source is '/licensed/public-domain, ",
    ),
    Forgery(
        DATA,
        "learning rate in the settings",
        edit_settings(learned_faster),
        verified,
        "config.yaml is not the one that the run began with",
    ),
    Forgery(DATA, "a document's file", renamed_document, signed, "documents.json is"),
    Forgery(DATA, "a document's table", edited_table, verified, "documents.json is another one"),
    Forgery(
        DATA,
        "no document map",
        lambda w: (w.tokens / DOCUMENTS).unlink(),
        verified,
        "documents.json is gone",
    ),
    Forgery(DATA, "tokenizer", edited_tokenizer, verified, "is not its tokens' tokenizer"),
    Forgery(DATA, "a shard", flipped_shard, verified, "shard-00000.bin has SHA-256"),
    Forgery(
        DATA,
        "a shard and its hash",
        flipped_shard_with_manifest,
        verified,
        "its manifest's hash is",
    ),
    Forgery(
        DATA,
        "sources.json",
        lambda w: (w.tokens / "sources.json").write_text('{"sources": [], "files": []}'),
        verified,
        "sources.json is another one",
    ),
    *of_trainer(STATE_OF_TRAINER),
    Forgery(STATE_OF_TRAINER, "planted weights", planted_weights, audited, "bits part at step 3"),
    Forgery(
        STATE_OF_TRAINER,
        "vectors at a warm start",
        warm_vectors,
        signed,
        "the update rule's vectors are not zero",
        "warm",
    ),
    Forgery(
        STATE_OF_TRAINER, "no hash of the state", without_state_hashes, signed, "has no hash of its"
    ),
    Forgery(CLAIMS, "a loss", claimed(with_step(5, loss=1.0)), audited, "step 5: loss"),
    Forgery(CLAIMS, "a loss, by a bit", claimed(with_step(5, loss=5.7)), audited, "step 5: loss"),
    Forgery(CLAIMS, "a norm", claimed(with_step(8, grad_norm=0.5)), audited, "step 8: grad_norm"),
    Forgery(CLAIMS, "a hash", claimed_hash, audited, "step 5: parameter_hash"),
    Forgery(CLAIMS, "a checkpoint's loss", claimed_loss_of_checkpoint, signed, "says val_loss 1.0"),
    Forgery(CLAIMS, "two validations", claimed_twice, signed, "tells step 8 twice"),
    Forgery(CLAIMS, "a rate", claimed(with_step(8, lr=1e-5)), audited, "step 8: lr"),
    Forgery(CLAIMS, "samples", claimed(with_step(8, samples=[0, 6])), audited, "step 8: samples"),
    Forgery(CLAIMS, "a skipped step", claimed_skip, audited, "step 5: skipped"),
    Forgery(CLAIMS, "validation", claimed_validation, audited, "val_loss 1 against"),
    Forgery(CLAIMS, "a sample of the model", claimed_sample, audited, "sample of '10 a'"),
    Forgery(
        CLAIMS,
        "learning rate",
        claimed_settings(learned_faster),
        audited,
        "bits part at step 1: lr",
    ),
    Forgery(
        CLAIMS,
        "seed",
        claimed_settings(lambda settings: settings["train"].update(seed=7)),
        audited,
        "bits part at step 1: loss",
    ),
    Forgery(
        CLAIMS,
        "weight decay",
        claimed_settings(lambda settings: settings["train"].update(weight_decay=0.3)),
        audited,
        "bits part at step 2: loss",
    ),
    Forgery(
        STORE, "filters", claimed_settings(filters_that_never_ran), tokenized, "other settings"
    ),
    Forgery(STORE, "corpus", claimed_settings(other_corpus), tokenized, "cannot be read here"),
    Forgery(STORE, "a document's file", claimed_documents, tokenized, "b.jsonl"),
    Forgery(HOST, "audit.json", planted_audit, refused_audit, "that this user did not write"),
    Forgery(STALE, "published", published_older, floored, "is of step 9"),
    Forgery(STALE, "manifest deleted", without_manifest, door, "no older one takes its place"),
    Forgery(STALE, "run's newest torn", without_manifest, door_of_run, "no older one takes its"),
]

NOT_COVERED: list[Forgery] = [
    Forgery(
        "not covered",
        "times and speeds",
        claimed(lambda line: line.update(time=1.0, wall_s=0.1, tokens_per_s=1e9)),
        audited,
        "Times, speeds, prices",
    ),
    Forgery(
        "not covered",
        "hardware",
        claimed(with_events("start", hardware={"gpu": "one that nobody has"})),
        audited,
        "hardware and places of workers",
    ),
    Forgery("not covered", "older published", published_older, door, "is the newest one"),
]
"""What passes; an audit's page says so."""
