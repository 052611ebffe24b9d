"""The command that has a run forget documents."""

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.commands.arguments import (
    CERTIFICATES,
    PRICE,
    RUN,
    SIGN,
    STORAGE,
    TIMESTAMP,
    signing_key,
)
from cluster.commands.command import (
    Argument,
    Arguments,
    Command,
    CommandSection,
    Result,
    SettingsOf,
    Switch,
)
from cluster.commands.named_runs import named_run
from cluster.commands.train_commands import as_typed, run_to_end
from cluster.output.progress import reports_shown
from cluster.output.result_text import counted, lines, put, table
from cluster.settings.parser import ConfigError

if TYPE_CHECKING:
    from cluster.settings.run import RunConfig
    from cluster.settings.stages import WorkersConfig
    from jobs.forgetting.forget_plan import Forgetting
    from jobs.forgetting.former_run import Remnant
    from jobs.proof.recorded.certificate import Certificate

_DOCUMENTS = Argument[list[str] | None](
    "--document",
    "files of the corpus, or the ends of their paths; each with the first byte (of the uncompressed text) or the row "
    "of one of its documents",
    nargs="+",
    metavar="FILE[:PLACE]",
)
_LIST = Argument[Path | None](
    "--list", "a file that names one such document on each line", parse=Path, metavar="FILE"
)
_PATTERN = Argument[str | None](
    "--pattern",
    "each document in whose text this regular expression (Python's) is found",
    metavar="REGEX",
)
_ONLY_SAY = Switch("--dry-run", "say what it takes, and begin nothing")
_PURGE = Switch(
    "--purge", "then remove what holds the documents of the former run, where nothing needs it"
)


def forget(arguments: Arguments) -> Result:
    documents, listed, pattern = arguments[_DOCUMENTS], arguments[_LIST], arguments[_PATTERN]
    if not documents and listed is None and pattern is None:
        raise ConfigError("nothing to forget: name documents by --document, --list or --pattern")
    key = signing_key(arguments)
    run = named_run(arguments, "forget")

    from jobs.forgetting.certify import certify
    from jobs.forgetting.forget_plan import ForgetRequest, forgetting
    from jobs.forgetting.fork_run import fork
    from jobs.forgetting.former_run import purge, remnants

    request = ForgetRequest(documents or (), listed, pattern)
    with reports_shown():
        asked = forgetting(run, request, price=arguments[PRICE])
    if arguments[_ONLY_SAY]:
        words = [word for word in arguments.words if word != _ONLY_SAY.names]
        return Result(asked.plan.json(), asked.plan.text(), next=f"`raymill {shlex.join(words)}`")
    put(f"{asked.plan.text()}\n", sys.stderr)
    with reports_shown():
        fork(asked)
    _train(arguments, asked)
    with reports_shown():
        certificate = certify(asked.new, key)
        held = (purge if arguments[_PURGE] else remnants)(asked)
    return _result(arguments, asked, certificate, held)


def _train(arguments: Arguments, asked: "Forgetting") -> None:
    """Takes the steps again that are left to take."""
    from jobs.run.ledger import Ledger

    if not Ledger.read(asked.new).is_finished:
        command = f"raymill {shlex.join(arguments.words)}"
        run_to_end(_with_workers(arguments, asked.config), "pretrain", command=command)


def _with_workers(arguments: Arguments, config: "RunConfig") -> "RunConfig":
    """Returns the settings of a run with the workers and the cluster that the flags name."""
    from cluster.settings.flags import settings_from_flags, settled, validate_config
    from cluster.settings.run import RunConfig

    over: dict[str, Any] = config.model_dump(mode="json")
    named = settings_from_flags(arguments.values, _workers_config(), over=over)
    return settled(validate_config(named, RunConfig))


def _result(
    arguments: Arguments,
    asked: "Forgetting",
    certificate: "Certificate",
    held: "list[Remnant]",
) -> Result:
    values = {
        **asked.plan.json(),
        "run_dir": asked.new.uri,
        "parameter_hash": certificate.parameter_hash,
        "certificate": asdict(certificate),
        "holds": [remnant.json() for remnant in held],
    }
    shown = {
        "run": asked.plan.new_run,
        "without": counted(len(certificate.documents), "document"),
        "parameter hash": certificate.parameter_hash,
        "certificate": f"{asked.new.uri}/forgetting/certificate.json",
    }
    rows = [
        {
            "": "removed" if remnant.is_removed else "stays",
            "what": remnant.what,
            "needed by": "; ".join(remnant.needed_by),
            "uri": remnant.uri,
        }
        for remnant in held
    ]
    text = "".join(f"{line}\n" for line in lines(shown))
    text += f"\nwhat holds what was forgotten:\n{table(('', 'what', 'needed by', 'uri'), rows)}"
    typed = as_typed(
        asked.storage.uri,
        f"raymill verify {shlex.quote(asked.plan.new_run)}",
        f"raymill audit {shlex.quote(asked.plan.new_run)}",
    )
    return Result(values, text, next=f"{typed}, or `raymill promote` it")


def _workers_config() -> "type[WorkersConfig]":
    from cluster.settings.stages import WorkersConfig

    return WorkersConfig


FORGET = CommandSection(
    "train: from tokens to a checkpoint",
    (
        Command(
            "forget",
            "train a run again as if it had never read some documents, from before it did",
            forget,
            [
                RUN,
                _DOCUMENTS,
                _LIST,
                _PATTERN,
                _ONLY_SAY,
                _PURGE,
                PRICE,
                SIGN,
                CERTIFICATES,
                TIMESTAMP,
                SettingsOf(_workers_config),
                STORAGE,
            ],
        ),
    ),
)
