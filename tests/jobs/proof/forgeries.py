"""What may be forged of a signed run, by whom, and what finds it.

Each forgery belongs to a row of the table in docs/explanation/threat-model.md, which it names.
"""

from collections.abc import Callable
from dataclasses import dataclass

from cluster.storage.registry import find_checkpoint
from jobs.tokens.document_map import DOCUMENTS
from model.files.checkpoint_folder import WEIGHTS
from model.signing.floor import Floor
from model.signing.signature import MODEL, TRAINING, TrustedSigner
from raymill.errors import UserError
from tests.jobs.proof.forging import (
    STATES,
    append_better_validation,
    append_doubled_name,
    append_exchanged_checkpoint,
    append_other_data,
    append_other_figures,
    append_rollback,
    append_unsigned_checkpoint,
    claimed,
    claimed_documents,
    claimed_hash,
    claimed_loss_of_checkpoint,
    claimed_sample,
    claimed_settings,
    claimed_skip,
    claimed_twice,
    claimed_validation,
    cut,
    drop_a_line,
    edit_metadata,
    edit_payload,
    edit_settings,
    edited_table,
    edited_tokenizer,
    exchanged_base,
    filters_that_never_ran,
    flipped_shard,
    flipped_shard_with_manifest,
    front_unchained,
    grown,
    insert_first,
    learned_faster,
    older_in_place_of_newest,
    other_corpus,
    planted_audit,
    planted_weights,
    published_older,
    renamed_document,
    rewritten,
    set_aside,
    set_aside_before_an_older_one,
    signed_by_another,
    signed_export,
    signed_with_export,
    two_stated_lines,
    unchained,
    unrecorded_checkpoint,
    warm_vectors,
    with_events,
    with_step,
    without_checkpoints,
    without_manifest,
    without_state_hashes,
)
from tests.jobs.proof.signed_worlds import World


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


def signed_after_adding(world: World) -> str:
    """Is `raymill sign`, once more, of a run to which lines were added."""
    try:
        world.sign()
    except UserError as error:
        return str(error)
    return ""


def refused_audit(world: World) -> str:
    try:
        return audited(world)
    except UserError as error:
        return str(error)


def floored(world: World) -> str:
    return door(world, floor=Floor(step=12))


def door_of_run(world: World) -> str:
    return door(world, reference="run")


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
