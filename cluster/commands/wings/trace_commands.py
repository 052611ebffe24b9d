"""The commands that follow a text to the steps that learned it."""

import sys
from typing import TYPE_CHECKING

from cluster.commands.arguments import (
    CONFIG_FLAG,
    INDEXED_STORE,
    LAST_STEP,
    MIN_TOKENS,
    RUN,
    STORAGE,
    TRACED_FILE,
    TRACED_TEXT,
    named_once,
)
from cluster.commands.command import Arguments, Command, CommandSection, OneOf, Result, SettingsOf
from cluster.commands.named_runs import named_run
from cluster.output.progress import reports_shown, say
from cluster.storage.uris import open_storage
from raymill.errors import UserError

if TYPE_CHECKING:
    from cluster.settings.stages import IndexConfig

_NEXT_TRACE = "`raymill trace find RUN TEXT`"


def trace_index(arguments: Arguments) -> Result:
    """Indexes the store that the command line names, or else the only one, on a cluster."""
    from cluster.local.local_cluster import cpus_per_node
    from cluster.settings.stages import IndexConfig

    config = arguments.config(IndexConfig, store=named_once(arguments, INDEXED_STORE, flag="store"))
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


def trace_find(arguments: Arguments) -> Result:
    text = _traced_text(arguments)
    run = named_run(arguments, "trace find")

    from jobs.trace.trace_run import trace

    with reports_shown():
        answer = trace(run, text, min_tokens=arguments[MIN_TOKENS], step=arguments[LAST_STEP])
    return Result(answer.json(), text=answer.text())


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


def _index_config() -> "type[IndexConfig]":
    from cluster.settings.stages import IndexConfig

    return IndexConfig


TRACE = CommandSection(
    "look at runs and checkpoints",
    (
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
    ),
    groups={"trace": "go from a text to the steps that learned it"},
)
