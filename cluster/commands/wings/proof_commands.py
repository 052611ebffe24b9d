"""The commands that check a run, and follow its documents and steps."""

from cluster.commands.arguments import (
    AUDITS_FOLDER,
    CERTIFICATES,
    CHECKPOINT,
    DOCUMENT,
    EXPLAINED_STEP,
    IDENTITY,
    IDENTITY_PROVIDER,
    IDENTITY_TOKEN,
    KEY,
    KEYLESS,
    NONCE,
    NUM_PROCESSES,
    NUM_SAMPLES,
    NUM_SHARDS,
    RUN,
    SIGN,
    SIGNED_BY,
    STEP,
    STEPS,
    STORAGE,
    TEXT,
    TIMESTAMP,
    TIMESTAMPED_BY,
    TRUST_CONFIG,
    TWO_RUNS,
    signer_of,
    signing_key,
    trusted_signer,
)
from cluster.commands.command import Arguments, Command, CommandSection, OneOf, Result
from cluster.commands.named_runs import named_run, named_runs
from cluster.output.progress import reports_shown, say
from cluster.output.result_text import lines


def verify(arguments: Arguments) -> Result:
    run = named_run(arguments, "verify")

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
    run = named_run(arguments, "audit")

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
        report = audit_run(run, asked, arguments[AUDITS_FOLDER])
    return Result(report.json(), is_bad=not report.record.valid)


def replay(arguments: Arguments) -> Result:
    run = named_run(arguments, "replay")

    from jobs.proof.replay_run import replay_steps

    with reports_shown():
        again = replay_steps(run, steps=arguments[STEPS], workers=arguments[NUM_PROCESSES])
    return Result(again.json(), is_bad=not again.equal)


def diff(arguments: Arguments) -> Result:
    first, second = named_runs("diff", arguments[TWO_RUNS], arguments[STORAGE])

    from jobs.proof.diff_runs import diff as diff_runs

    with reports_shown():
        compared = diff_runs(first, second)
    return Result(compared.json(), text=compared.text(), is_bad=not compared.equal)


def where(arguments: Arguments) -> Result:
    run = named_run(arguments, "where")

    from jobs.proof.where_run import as_text
    from jobs.proof.where_run import where as where_in_run

    with reports_shown():
        answer = where_in_run(
            run, document=arguments[DOCUMENT], text=arguments[TEXT], step=arguments[STEP]
        )
    return Result(answer.json(), text=as_text(answer))


def explain(arguments: Arguments) -> Result:
    run = named_run(arguments, "explain")

    from jobs.proof.explain.explain_step import as_text
    from jobs.proof.explain.explain_step import explain as explain_step

    with reports_shown():
        explanation = explain_step(run, arguments[EXPLAINED_STEP])
    return Result(explanation.json(), text=as_text(explanation))


# Who must have signed
_SIGNED = (OneOf((SIGNED_BY, IDENTITY)), TIMESTAMPED_BY, IDENTITY_PROVIDER, TRUST_CONFIG)

PROOF = CommandSection(
    "look at runs and checkpoints",
    (
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
    ),
)
