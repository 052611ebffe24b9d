"""The subcommands of `raymill` that start stages, look at runs and checkpoints, and serve.

Each function imports only what it needs, so that no command waits for PyTorch or Ray in vain.
"""

import argparse
import math
import shlex
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from cluster.commands.table import table
from cluster.output.progress import reports_shown, say
from cluster.output.result_text import put
from cluster.settings.parser import ConfigError
from cluster.stages.stage_module import STAGES
from cluster.storage.uris import absolute_uri, open_storage
from model.errors import UserError

if TYPE_CHECKING:
    from cluster.settings.run import EvaluateConfig
    from cluster.settings.serve import ServeConfig


def stage(arguments: argparse.Namespace) -> dict[str, Any]:
    """Submits the stage that the command is named after as a job, and follows it."""
    from cluster.commands.chaos import chaos, parse_faults
    from cluster.local.local_cluster import cpus_per_node
    from cluster.settings.flags import resolve_config
    from cluster.settings.run import RunConfig, max_steps, run_storage
    from cluster.submission.first_checks import check_room, check_stage
    from cluster.submission.preflight import check_sources, folders_at
    from jobs.plan.memory import worker_needs
    from jobs.run.history import why_not_resumed

    resolved = resolve_config(vars(arguments), RunConfig, file=arguments.config)
    if resolved.note:
        say(resolved.note)
    config = resolved.config
    faults = parse_faults(getattr(arguments, "chaos", []))
    if faults and config.cluster.address is not None:
        raise ConfigError("--chaos kills nodes of the local cluster; leave out --cluster.address")
    check_sources(config.data, folders_at(config.cluster.address))
    if arguments.command != "tokenize" and (reason := why_not_resumed(run_storage(config), config)):
        raise ConfigError(reason)
    check_stage(config, arguments.command)
    check_room(config, arguments.command, {} if arguments.command == "tokenize" else worker_needs(config))
    steps = "" if arguments.command == "tokenize" else f", {max_steps(config):,} steps"
    sources = config.data.source
    more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
    say(f"{arguments.command}: run {config.run_id}{steps}, on {sources[0]}{more}")

    from cluster.stages.stage import connected, run_stage  # imports Ray, which takes a second

    try:
        with (
            connected(config.cluster, cpus_per_node=cpus_per_node(config)) as connection,
            chaos(faults, cluster=connection.local, config=config),
        ):
            result = run_stage(connection, STAGES[arguments.command], config)
    except (KeyboardInterrupt, SystemExit):
        if arguments.command != "tokenize":
            known = [] if "--run-id" in arguments.words else ["--run-id", str(config.run_id)]
            say(f"continue with: raymill {shlex.join([*arguments.words, *known])}")
        raise
    if arguments.command == "tokenize":
        words = ["pretrain" if word == "tokenize" else word for word in arguments.words]
        arguments.next = f"`raymill {shlex.join(words)}`"
    else:
        served = "latest" if config.checkpoint.publish else config.run_id
        arguments.next = _commands(config.storage.uri, f"raymill report {config.run_id}", f"raymill serve {served}")
    return result


def _commands(storage: str, *commands: str) -> str:
    """Returns the commands as they are typed, with the storage if it is not the default."""
    where = "" if absolute_uri(storage) == absolute_uri(".raymill") else f" --storage.uri {storage}"
    return ", or ".join(f"`{command}{where}`" for command in commands)


def storage_check(arguments: argparse.Namespace) -> dict[str, Any]:
    from cluster.submission.storage_check import check_storage

    uri = absolute_uri(arguments.uri)
    passed, problem = check_storage(uri)
    arguments.is_bad = bool(problem)
    return {"storage": uri, "usable": not problem, "passed": passed, "problem": problem}


def data_preview(arguments: argparse.Namespace) -> dict[str, Any]:
    from cluster.settings.flags import resolve_config
    from cluster.settings.run import RunConfig

    config = resolve_config(vars(arguments), RunConfig, file=arguments.config).config
    say("data preview: reading a sample of the corpus")

    from jobs.tokens.preview_data import preview  # takes a second

    with reports_shown():
        return preview(config)


def data_pack(arguments: argparse.Namespace) -> dict[str, Any]:
    from cluster.settings.run import DataConfig
    from jobs.corpus.pack_texts import pack  # imports PyArrow

    say(f"data pack: {arguments.source} into {arguments.destination}")
    result = pack(arguments.source, arguments.destination, DataConfig())
    arguments.next = f"`raymill data preview --data.source {result['packed']}`"
    return result


def look_at_store(arguments: argparse.Namespace) -> dict[str, Any]:
    say(f"data {arguments.command}: {arguments.store or f'the token store in {arguments.storage_uri}'}")

    from jobs.tokens import inspect_store

    look = {"stats": inspect_store.stats, "report": inspect_store.report, "verify": inspect_store.verify}
    with reports_shown():
        return look[arguments.command](inspect_store.find_store(arguments.store, arguments.storage_uri))


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    from cluster.local.local_cluster import cpus_per_node
    from cluster.settings.flags import resolve_config
    from cluster.settings.run import EvaluateConfig
    from cluster.submission.preflight import check_sources, folders_at

    config = resolve_config(vars(_with_positional(arguments)), EvaluateConfig, file=arguments.config).config
    checkpoint = _named_by(config)
    check_sources(config.data, folders_at(config.cluster.address))
    say(f"evaluate: {checkpoint}")

    from cluster.stages.stage import connected, run_stage  # imports Ray, which takes a second

    with connected(config.cluster, cpus_per_node=cpus_per_node(config)) as connection:
        result = run_stage(connection, "jobs.evaluate", config)
    arguments.next = _commands(config.storage.uri, f"raymill serve {result['checkpoint']}")
    return result


def _with_positional(arguments: argparse.Namespace) -> argparse.Namespace:
    """Takes the checkpoint that stands by itself as the setting of that name."""
    if arguments.named is not None and arguments.checkpoint not in (None, arguments.named):
        raise ConfigError(f"two checkpoints, {arguments.named} and --checkpoint {arguments.checkpoint}; name one")
    arguments.checkpoint = arguments.named or arguments.checkpoint
    return arguments


def _named_by(config: "EvaluateConfig | ServeConfig") -> str:
    """Returns the URI of the settings' checkpoint, judged by file names alone, before a cluster is started."""
    from cluster.storage.registry import LATEST, named_checkpoint

    place = config.storage.uri if config.checkpoint == LATEST else config.checkpoint
    if config.cluster.address is not None and open_storage(place).local_path("") is not None:
        return config.checkpoint  # that cluster may see other folders
    return named_checkpoint(config.checkpoint, config.storage.uri)


def export(arguments: argparse.Namespace) -> dict[str, Any]:
    from cluster.storage.references import checkpoint_uri
    from cluster.storage.registry import named_checkpoint

    destination, storage_uri = absolute_uri(arguments.destination), arguments.storage_uri
    checkpoint = checkpoint_uri(arguments.checkpoint, storage_uri)
    say(f"export: {named_checkpoint(checkpoint, storage_uri)} to {destination}")

    from jobs.export import export as export_checkpoint  # imports PyTorch, which takes two seconds

    result = export_checkpoint(checkpoint, destination, storage_uri=storage_uri)
    arguments.next = f"transformers.AutoModelForCausalLM.from_pretrained({destination!r})"
    return result


def look(arguments: argparse.Namespace) -> dict[str, Any]:
    """Looks at the runs that the command names, as `commands.toml` says. Raises `UserError` for what is no run."""
    from jobs.run.find_run import find_run

    command = table()["commands"][arguments.command]
    runs = [find_run(reference, arguments.storage_uri) for reference in arguments.runs]
    say(f"{arguments.command}: {' and '.join(run.uri for run in runs)}")
    with reports_shown():
        passed = {name: getattr(arguments, name) for name in command.get("passes", [])}
        result: dict[str, Any] = resolve_name(command["looks_by"])(*runs, **passed)
    arguments.is_bad = "good_if" in command and not result[command["good_if"]]
    if "text_by" in command:
        arguments.text = resolve_name(command["text_by"])(result)
    return result


def lend_workers(arguments: argparse.Namespace) -> dict[str, Any]:
    from cluster.storage.lending import Loan, give_back, lend, read_loan

    run = open_storage(arguments.storage_uri).child(f"runs/{arguments.run_id}")
    if not any(run.list()):
        raise UserError(f"no run {arguments.run_id} in {arguments.storage_uri}: `raymill lend` takes a run id")
    if arguments.give_back:
        give_back(run)
    elif arguments.workers < 1:
        raise ConfigError(f"--workers {arguments.workers}: expected at least 1; --return ends a loan")
    elif not 0 < arguments.for_s < math.inf:
        raise ConfigError(f"--for {arguments.for_s:g}: expected seconds above 0; --return ends a loan")
    else:
        lend(run, Loan(arguments.workers, arguments.for_s))
    loan = read_loan(run)
    return {"run_id": arguments.run_id, "lent_workers": loan.num_workers if loan else 0, "for_s": loan and loan.for_s}


def delete(arguments: argparse.Namespace) -> dict[str, Any]:
    storage = open_storage(arguments.storage_uri)
    run = storage.child(f"runs/{arguments.run_id}")
    if "/" in arguments.run_id or not any(run.list()):
        raise UserError(f"no run {arguments.run_id} in {arguments.storage_uri}; `raymill list` shows which there are")

    from jobs.run.housekeeping import delete_run

    return _housekept(arguments, delete_run(run, storage, yes=arguments.yes))


def gc(arguments: argparse.Namespace) -> dict[str, Any]:
    say(f"gc: looking for what no run in {arguments.storage_uri} needs")

    from jobs.run.housekeeping import collect

    return _housekept(arguments, collect(open_storage(arguments.storage_uri), yes=arguments.yes))


def _housekept(arguments: argparse.Namespace, result: dict[str, Any]) -> dict[str, Any]:
    from cluster.output.result_text import counted
    from cluster.output.result_text import table as text_table

    rows = [{"files": row["num_files"], "MB": row["num_bytes"] / 1e6, **row} for row in result["leftovers"]]
    done = "deleted" if result["deleted"] else "would be deleted"
    total = f"{counted(len(rows), 'folder')} of {result['bytes'] / 1e6:,.1f} MB {done}\n"
    arguments.text = text_table(("files", "MB", "why", "uri"), rows) + (total if rows else "nothing to delete\n")
    if rows and not result["deleted"]:
        arguments.next = f"`raymill {shlex.join([*arguments.words, '--yes'])}`"
    return result


def publish_checkpoint(arguments: argparse.Namespace) -> dict[str, Any]:
    from cluster.storage.references import checkpoint_uri
    from cluster.storage.registry import publish, what_latest_became

    storage = open_storage(arguments.storage_uri)
    found = vars(publish(storage, checkpoint_uri(arguments.checkpoint, arguments.storage_uri)))
    say(what_latest_became(storage))
    return {name: found[name] for name in ("checkpoint", "run_id", "step", "parameter_hash")}


def checkpoint_show(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns what a checkpoint holds; for a damaged one `valid` is false and `problems` says why."""
    from cluster.storage.references import checkpoint_uri
    from cluster.storage.registry import LATEST, named_checkpoint, resolve_checkpoint
    from model.checkpoint_folder import read_metadata, verify_checkpoint

    reference = checkpoint_uri(arguments.checkpoint, arguments.storage_uri)
    folder = None if reference == LATEST else open_storage(reference).local_path("")
    is_here = folder is not None
    if folder is None:
        folder = resolve_checkpoint(reference, arguments.storage_uri)
    elif not folder.is_dir() or (folder / "checkpoints").is_dir():  # none, or a run's: its newest checkpoint
        folder = open_storage(named_checkpoint(reference, arguments.storage_uri)).local_path("")
        assert folder is not None, "it is below a folder that is here"
    problems = verify_checkpoint(folder, to_train=is_here)  # a copy of a remote one has no training state
    metadata = {"parameter_hash": None} if problems else vars(read_metadata(folder))
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    return {"checkpoint": str(folder), "valid": not problems, "problems": problems, "files": files, **metadata}


def checkpoint_list(arguments: argparse.Namespace) -> dict[str, Any]:
    """Lists what was published, oldest first, with its validation loss and whether `latest` means it."""
    from cluster.output import result_text
    from cluster.storage.registry import metadata_of, publications
    from model.checkpoint_folder import MANIFEST

    published = publications(open_storage(arguments.storage_uri))
    usable = (found for found in reversed(published) if open_storage(found.checkpoint).exists(MANIFEST))
    latest = next(usable, None)
    rows = []
    for publication in published:
        metadata = metadata_of(publication.checkpoint)
        val_loss = metadata and metadata.val_loss
        is_latest = {"is_latest": publication is latest, "is_gone": metadata is None}
        rows.append(vars(publication) | {"val_loss": val_loss} | is_latest)
    if not rows:
        say(f"nothing is published in {arguments.storage_uri}: a run that ends publishes its last checkpoint")
    shown = [row | {"published": result_text.date_of(row["time"]), "latest": _mark(row)} for row in rows]
    arguments.text = result_text.table(("published", "run_id", "step", "val_loss", "latest", "checkpoint"), shown)
    return {"published": rows}


def _mark(row: dict[str, Any]) -> str:
    return "latest" if row["is_latest"] else "gone" if row["is_gone"] else ""


def serve(arguments: argparse.Namespace) -> None:
    """Serves until a signal, and then until all answers are whole. On a cluster at an address it deploys and
    returns."""
    from cluster.commands.local_endpoint import keep_up
    from cluster.endpoint.endpoint import deploy, require_key, require_ray_proxies, url_of
    from cluster.local.local_cluster import require_free_port
    from cluster.settings.flags import resolve_config
    from cluster.settings.serve import ServeConfig
    from cluster.submission.first_checks import check_gpu

    require_ray_proxies()
    config = resolve_config(vars(_with_positional(arguments)), ServeConfig, file=arguments.config).config
    require_key(config)
    if config.engine.device == "cuda":
        check_gpu("engine.device=cuda", config.cluster.address, num_gpus=config.engine.tensor_parallel_size)
    checkpoint = _named_by(config)
    if config.cluster.address is None:
        require_free_port(config.host, config.port)
    say(f"serve: {checkpoint} at {url_of(config.host, config.port)}")

    from cluster.stages.stage import connected  # imports Ray, which takes a second

    replicas_per_node = -(-config.replicas.max_replicas // max(1, config.cluster.num_nodes - 1))
    cpus = replicas_per_node * config.replicas.threads_per_replica
    with connected(config.cluster, cpus_per_node=cpus) as connection:
        endpoint = deploy(connection, config)
        arguments.show({"url": endpoint.url, "model": endpoint.model})
        if connection.local is None:
            say(f"{endpoint.url} stays up; end it with Ray Serve's own tools")
            return
        say(f"serving {endpoint.model} at {endpoint.url}; Ctrl-C ends it")
        completing = _commands(config.storage.uri, 'raymill complete "Once upon a time"')
        say(f"next: {completing}")
        arguments.is_bad = not keep_up(connection.local, host=config.host, port=config.port)


def complete(arguments: argparse.Namespace) -> dict[str, Any]:
    """Streams the text to standard output as it comes, or returns all of it with --json."""
    from cluster.endpoint.endpoint import Endpoint, stream_completion

    endpoint = Endpoint.load(arguments.storage_uri, url=arguments.url, api_key_file=arguments.api_key_file)
    request = {name: getattr(arguments, name) for name in ("prompt", "max_tokens", "temperature", "seed")}
    show = (lambda text: None) if arguments.json else put
    arguments.text = ""
    return stream_completion(endpoint, request, on_text=show)


def demo(arguments: argparse.Namespace) -> dict[str, Any]:
    say("demo: a corpus, its tokens, training with a node killed on purpose, an evaluation, a report and an endpoint")

    from cluster.commands.demo import run_demo

    return run_demo(arguments.storage_uri, preset=arguments.preset, keep=arguments.keep)
