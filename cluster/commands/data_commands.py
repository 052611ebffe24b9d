"""The commands of `raymill` from a corpus to tokens. Each imports what it alone needs."""

import shlex
from typing import Literal

from cluster.commands.arguments import (
    CONFIG,
    MAP_DOCUMENTS,
    NEW_FOLDER,
    RUN_SETTINGS,
    SOURCE,
    STORAGE,
    STORE,
)
from cluster.commands.command import Arguments, Command, CommandSection, Result
from cluster.commands.train_commands import tokenize
from cluster.output.progress import reports_shown, say


def preview(arguments: Arguments) -> Result:
    from cluster.settings.run import RunConfig
    from cluster.submission.preflight import check_sources, folders_at

    config = arguments.config(RunConfig)
    check_sources(config.data, folders_at(None))
    say("data preview: reading a sample of the corpus")

    from jobs.tokens.preview_data import preview as preview_data  # takes a second

    with reports_shown():
        return Result(preview_data(config))


def pack(arguments: Arguments) -> Result:
    from cluster.settings.data import DataConfig
    from jobs.corpus.pack_texts import pack as pack_texts  # imports PyArrow

    source, destination = arguments[SOURCE], arguments[NEW_FOLDER]
    say(f"data pack: {source} into {destination}")
    packed = pack_texts(source, destination, DataConfig())
    return Result(
        packed, next=f"`raymill data preview --data.source {shlex.quote(packed['packed'])}`"
    )


def stats(arguments: Arguments) -> Result:
    return _look(arguments, "stats")


def verify(arguments: Arguments) -> Result:
    return _look(arguments, "verify")


def report(arguments: Arguments) -> Result:
    return _look(arguments, "report")


def _look(arguments: Arguments, what: Literal["stats", "verify", "report"]) -> Result:
    """Looks at the store that the command line names, or else at the only one."""
    store, storage_uri = arguments[STORE], arguments[STORAGE]
    say(f"data {what}: {store or f'the token store in {storage_uri}'}")

    from jobs.run.find_run import token_uses
    from jobs.tokens import inspect_store

    looks = {
        "stats": inspect_store.stats,
        "verify": inspect_store.verify,
        "report": inspect_store.report,
    }
    with reports_shown():
        return Result(looks[what](inspect_store.find_store(store, storage_uri, uses_in=token_uses)))


DATA = CommandSection(
    "data: from a corpus to tokens",
    (
        Command(
            "data preview",
            "estimate documents, tokens and drop rates of a corpus from a sample",
            preview,
            [CONFIG, RUN_SETTINGS],
        ),
        Command(
            "data pack",
            "write many .txt files as a few Parquet files of the same documents: for a corpus of millions of files",
            pack,
            [SOURCE, NEW_FOLDER],
        ),
        Command(
            "data stats", "count a store's documents, tokens and bytes", stats, [STORE, STORAGE]
        ),
        Command("data verify", "recompute the hashes of a token store", verify, [STORE, STORAGE]),
        Command(
            "data report", "show what was dropped and why, with samples", report, [STORE, STORAGE]
        ),
        Command(
            "tokenize",
            "turn a corpus into token shards",
            tokenize,
            [CONFIG, RUN_SETTINGS, MAP_DOCUMENTS],
        ),
    ),
    groups={"data": "look at a corpus before a job is spent, and at a token store afterwards"},
)
