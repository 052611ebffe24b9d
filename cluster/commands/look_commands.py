"""The commands of `raymill` that look at runs and checkpoints. Each imports what it alone needs."""

import sys
from typing import TYPE_CHECKING

from cluster.commands.arguments import (
    AUDITS_FOLDER,
    CERTIFICATES,
    CHECKPOINT,
    CONFIG_FLAG,
    DOCUMENT,
    EXPERIMENT,
    EXPLAINED_STEP,
    FOLLOW_RUN,
    IDENTITY,
    IDENTITY_PROVIDER,
    IDENTITY_TOKEN,
    INDEXED_STORE,
    KEY,
    KEYLESS,
    LAST_STEP,
    MIN_TOKENS,
    NONCE,
    NUM_PROCESSES,
    NUM_SAMPLES,
    NUM_SHARDS,
    PRICE,
    RUN,
    RUNS,
    SIGN,
    SIGNED_BY,
    STEP,
    STEPS,
    STORAGE,
    TEXT,
    TIMESTAMP,
    TIMESTAMPED_BY,
    TRACED_FILE,
    TRACED_TEXT,
    TRUST_CONFIG,
    TWO_RUNS,
    signer_of,
    signing_key,
    trusted_signer,
)
from cluster.commands.command import Arguments, Command, OneOf, Result, Section, SettingsOf
from cluster.output.progress import reports_shown, say
from cluster.output.result_text import lines
from cluster.settings.parser import ConfigError
from cluster.storage.uris import Storage, open_storage
from raymill.errors import UserError

if TYPE_CHECKING:
    from cluster.settings.stages import IndexConfig

_NEXT_TRACE = "`raymill trace find RUN TEXT`"


def report(arguments: Arguments) -> Result:
    run = _run(arguments, "report")

    from jobs.report.make_report import make_report

    with reports_shown():
        return Result(make_report(run, price=arguments[PRICE]))


def compare(arguments: Arguments) -> Result:
    runs = _runs("compare", arguments[RUNS], arguments[STORAGE])

    from jobs.report.compare_runs import as_table
    from jobs.report.compare_runs import compare as compare_runs

    with reports_shown():
        comparison = compare_runs(*runs, storage_uri=arguments[STORAGE])
    return Result(comparison, text=as_table(comparison))


def why_slow(arguments: Arguments) -> Result:
    run = _run(arguments, "why-slow")

    from jobs.report.why_slow import why_run_is_slow

    with reports_shown():
        return Result(why_run_is_slow(run))


def verify(arguments: Arguments) -> Result:
    run = _run(arguments, "verify")

    from jobs.proof.verify_run import verify as verify_run

    with reports_shown():
        verdict = verify_run(run, signed_by=trusted_signer(arguments))
    return Result(verdict, is_bad=not verdict["valid"])


def sign(arguments: Arguments) -> Result:
    checkpoint, storage_uri = arguments[CHECKPOINT], arguments[STORAGE]
    say(f"sign: {checkpoint}")

    from cluster.storage.references import checkpoint_uri
    from jobs.proof.sign_checkpoint import sign_checkpoint

    uri = checkpoint_uri(checkpoint, storage_uri)
    signed = sign_checkpoint(uri, signer_of(arguments), storage_uri=storage_uri)
    # People know the run's settings; the signed statement, and --json, have them all
    shown = signed | {"training": signed["training"]["runDetails"]["metadata"]}
    return Result(signed, text="".join(f"{line}\n" for line in lines(shown)))


def audit(arguments: Arguments) -> Result:
    run = _run(arguments, "audit")

    from jobs.proof.audit_run import Audit
    from jobs.proof.audit_run import audit as audit_run

    asked = Audit(
        num_samples=arguments[NUM_SAMPLES],
        nonce=arguments[NONCE],
        num_workers=arguments[NUM_PROCESSES],
        signed_by=trusted_signer(arguments),
        key=signing_key(arguments),
        num_shards=arguments[NUM_SHARDS],
    )
    with reports_shown():
        verdict = audit_run(run, asked, arguments[AUDITS_FOLDER])
    return Result(verdict, is_bad=not verdict["valid"])


def replay(arguments: Arguments) -> Result:
    run = _run(arguments, "replay")

    from jobs.proof.replay_run import replay_steps

    with reports_shown():
        verdict = replay_steps(run, steps=arguments[STEPS], workers=arguments[NUM_PROCESSES])
    return Result(verdict, is_bad=not verdict["equal"])


def diff(arguments: Arguments) -> Result:
    first, second = _runs("diff", arguments[TWO_RUNS], arguments[STORAGE])

    from jobs.proof.diff_runs import as_text
    from jobs.proof.diff_runs import diff as diff_runs

    with reports_shown():
        verdict = diff_runs(first, second)
    return Result(verdict, text=as_text(verdict), is_bad=not verdict["equal"])


def where(arguments: Arguments) -> Result:
    run = _run(arguments, "where")

    from jobs.proof.where_run import as_text
    from jobs.proof.where_run import where as where_in_run

    with reports_shown():
        answer = where_in_run(
            run, document=arguments[DOCUMENT], text=arguments[TEXT], step=arguments[STEP]
        )
    return Result(answer, text=as_text(answer))


def explain(arguments: Arguments) -> Result:
    run = _run(arguments, "explain")

    from jobs.proof.explain_step import as_text
    from jobs.proof.explain_step import explain as explain_step

    with reports_shown():
        explanation = explain_step(run, arguments[EXPLAINED_STEP])
    return Result(explanation, text=as_text(explanation))


def trace_index(arguments: Arguments) -> Result:
    """Indexes the store that the command line names, or else the only one, on a cluster."""
    from cluster.local.local_cluster import cpus_per_node
    from cluster.settings.stages import IndexConfig

    config = arguments.config(IndexConfig, store=_store_given(arguments))
    place = config.store or config.storage.uri
    say(f"trace index: {config.store or f'the token store in {config.storage.uri}'}")
    # A cluster at an address may see other folders
    if config.cluster.address is None or open_storage(place).local_path("") is None:
        from jobs.run.find_run import token_uses
        from jobs.tokens.inspect_store import find_store
        from jobs.trace.build_index import found_index

        store = find_store(config.store, config.storage.uri, uses_in=token_uses)
        with reports_shown():
            indexed = found_index(store)
        if indexed is not None:
            return Result(indexed, next=_NEXT_TRACE)
        config = config.model_copy(update={"store": store.uri})

    from cluster.stages.stage import connected, run_stage  # imports Ray, which takes a second

    with connected(config.cluster, cpus_per_node=cpus_per_node(config)) as connection:
        indexed = run_stage(connection, "jobs.index_store", config)
    return Result(indexed, next=_NEXT_TRACE)


def _store_given(arguments: Arguments) -> str | None:
    """Returns the store that stands by itself or that its flag gives. Raises `ConfigError` for
    two."""
    named, flag = arguments[INDEXED_STORE], arguments.values["store"]
    if named is not None and flag not in (None, named):
        raise ConfigError(f"two stores, {named} and --store {flag}; name one")
    return named or flag


def trace_find(arguments: Arguments) -> Result:
    text = _traced_text(arguments)
    run = _run(arguments, "trace find")

    from jobs.trace.trace_run import as_text, trace

    with reports_shown():
        answer = trace(run, text, min_tokens=arguments[MIN_TOKENS], step=arguments[LAST_STEP])
    return Result(answer, text=as_text(answer))


def _traced_text(arguments: Arguments) -> str:
    """Returns the text of the command line, of a file, or of standard input. Raises
    `UserError`."""
    file, text = arguments[TRACED_FILE], arguments[TRACED_TEXT]
    try:
        if file is not None:
            return file.read_bytes().decode()
        if text == "-":
            return sys.stdin.buffer.read().decode()
    except OSError as error:
        raise UserError(f"--file {file}: {error.strerror}; name a file that holds text") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file or 'standard input'} is no UTF-8 text, from byte {error.start}; convert it"
        ) from error
    assert text is not None, "one of the two is given"
    return text


def probe(arguments: Arguments) -> Result:
    run = _run(arguments, "probe")

    from jobs.report.probe_run import probe_run

    with reports_shown():
        return Result(probe_run(run))


def track(arguments: Arguments) -> Result:
    run = _run(arguments, "track")

    from jobs.watching.track_run import track as track_run

    with reports_shown():
        return Result(track_run(run, mlflow=arguments[EXPERIMENT], follow=arguments[FOLLOW_RUN]))


def _run(arguments: Arguments, what: str) -> Storage:
    (run,) = _runs(what, [arguments[RUN]], arguments[STORAGE])
    return run


def _runs(what: str, references: list[str], storage_uri: str) -> list[Storage]:
    """Finds the runs and says which they are. Raises `UserError` for what is no run."""
    from jobs.run.find_run import find_run

    runs = [find_run(reference, storage_uri) for reference in references]
    say(f"{what}: {' and '.join(run.uri for run in runs)}")
    return runs


def checkpoint_show(arguments: Arguments) -> Result:
    """Returns what a checkpoint holds; for a damaged one `valid` is false and `problems` says
    why."""
    from cluster.storage.references import checkpoint_uri
    from cluster.storage.registry import LATEST, named_checkpoint, resolve_checkpoint
    from model.files.checkpoint_folder import read_metadata, verify_checkpoint

    storage_uri = arguments[STORAGE]
    reference = checkpoint_uri(arguments[CHECKPOINT], storage_uri)
    folder = None if reference == LATEST else open_storage(reference).local_path("")
    is_here = folder is not None
    if folder is None:
        folder = resolve_checkpoint(reference, storage_uri)
    elif not folder.is_dir() or (folder / "checkpoints").is_dir():
        # None, or a run's: its newest checkpoint.
        folder = open_storage(named_checkpoint(reference, storage_uri)).local_path("")
        assert folder is not None, "it is below a folder that is here"
    # A copy of a remote one has no training state
    problems = verify_checkpoint(folder, to_train=is_here)
    metadata = {"parameter_hash": None} if problems else vars(read_metadata(folder))
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    checked = {
        "checkpoint": str(folder),
        "valid": not problems,
        "problems": problems,
        "files": files,
    }
    return Result(checked | metadata)


def checkpoint_list(arguments: Arguments) -> Result:
    """Lists what was published, oldest first, with its validation loss and whether `latest` means
    it."""
    from cluster.output.result_text import date_of, table
    from cluster.storage.registry import metadata_of, publications
    from model.files.checkpoint_folder import MANIFEST

    published = publications(open_storage(arguments[STORAGE]))
    usable = (
        entry for entry in reversed(published) if open_storage(entry.checkpoint).exists(MANIFEST)
    )
    latest = next(usable, None)
    rows, shown = [], []
    for publication in published:
        metadata = metadata_of(publication.checkpoint)
        is_latest, is_gone = publication is latest, metadata is None
        val_loss = metadata and metadata.val_loss
        row = vars(publication) | {"val_loss": val_loss, "is_latest": is_latest, "is_gone": is_gone}
        mark = "latest" if is_latest else "gone" if is_gone else ""
        rows.append(row)
        shown.append(row | {"published": date_of(publication.time), "latest": mark})
    if not rows:
        say(
            f"nothing is published in {arguments[STORAGE]}: a run that ends publishes its last checkpoint"
        )
    text = table(("published", "run_id", "step", "val_loss", "latest", "checkpoint"), shown)
    return Result({"published": rows}, text=text)


def _index_config() -> "type[IndexConfig]":
    from cluster.settings.stages import IndexConfig

    return IndexConfig


# Who must have signed
_SIGNED = (OneOf((SIGNED_BY, IDENTITY)), TIMESTAMPED_BY, IDENTITY_PROVIDER, TRUST_CONFIG)

LOOK = Section(
    "look at runs and checkpoints",
    (
        Command(
            "report",
            "draw a run: loss, workers, throughput, a step's time, cost",
            report,
            [RUN, PRICE, STORAGE],
        ),
        Command("compare", "compare curves, settings and figures", compare, [RUNS, STORAGE]),
        Command(
            "why-slow", "say what bounds a run, and by which numbers", why_slow, [RUN, STORAGE]
        ),
        Command(
            "verify",
            "recompute the hashes of a run's checkpoints, data and ledger",
            verify,
            [RUN, *_SIGNED, STORAGE],
        ),
        Command(
            "sign",
            "sign a checkpoint, and what it was trained from",
            sign,
            [
                CHECKPOINT,
                OneOf((KEY, KEYLESS), required=True),
                CERTIFICATES,
                TIMESTAMP,
                IDENTITY_TOKEN,
                TRUST_CONFIG,
                STORAGE,
            ],
        ),
        Command(
            "audit",
            "check a run as somebody who does not own its storage: signatures, hashes, and steps drawn by lot",
            audit,
            [
                RUN,
                NUM_SAMPLES,
                NUM_SHARDS,
                NONCE,
                NUM_PROCESSES,
                *_SIGNED,
                SIGN,
                CERTIFICATES,
                TIMESTAMP,
                AUDITS_FOLDER,
                STORAGE,
            ],
        ),
        Command("diff", "find the first step where two runs part", diff, [TWO_RUNS, STORAGE]),
        Command(
            "replay",
            "take steps of a run again and compare their bits",
            replay,
            [RUN, STEPS, NUM_PROCESSES, STORAGE],
        ),
        Command(
            "where",
            "find the steps that learned a document, or the documents of a step",
            where,
            [RUN, OneOf((DOCUMENT, TEXT, STEP), required=True), STORAGE],
        ),
        Command(
            "explain",
            "say which lane, row and document made a step's loss and gradient norm what they are",
            explain,
            [RUN, EXPLAINED_STEP, STORAGE],
        ),
        Command(
            "trace index",
            "index a token store, so that texts can be traced to it",
            trace_index,
            [INDEXED_STORE, CONFIG_FLAG, SettingsOf(_index_config, positional="store")],
        ),
        Command(
            "trace find",
            "find a text's word-for-word spans in what a run trains on, and the steps that learned them",
            trace_find,
            [RUN, OneOf((TRACED_TEXT, TRACED_FILE), required=True), MIN_TOKENS, LAST_STEP, STORAGE],
        ),
        Command(
            "probe", "measure each checkpoint's copying, induction, few-shot", probe, [RUN, STORAGE]
        ),
        Command(
            "track", "send a run's curves to MLflow", track, [RUN, EXPERIMENT, FOLLOW_RUN, STORAGE]
        ),
        Command(
            "checkpoint show",
            "verify a checkpoint and print its hashes",
            checkpoint_show,
            [CHECKPOINT, STORAGE],
        ),
        Command("checkpoint list", "list the published checkpoints", checkpoint_list, [STORAGE]),
    ),
    groups={
        "trace": "go from a text to the steps that learned it",
        "checkpoint": "look at checkpoints",
    },
)
