"""The commands of `raymill` from a checkpoint to answers. Each imports what it alone needs."""

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.commands.arguments import (
    ADAPTER,
    ADMIN_KEY,
    API_KEY,
    CANARY_PERCENT,
    CERTIFICATES,
    CHECKPOINT,
    CONFIG_FLAG,
    FINISH,
    FOLLOWED,
    GATE_SOURCE,
    MAX_LOSS_INCREASE,
    MAX_TOKENS,
    NAMED,
    PROMOTED,
    PROMPT,
    SEED,
    SIGN,
    STORAGE,
    TEMPERATURE,
    TIMESTAMP,
    URL,
    WATCH_S,
    named_once,
    signing_key,
)
from cluster.commands.command import (
    Argument,
    Arguments,
    Command,
    CommandSection,
    OneOf,
    Result,
    SettingsOf,
    Switch,
)
from cluster.commands.train_commands import as_typed, named_by
from cluster.output.progress import say
from cluster.output.result_text import put
from cluster.storage.uris import absolute_uri, open_storage
from raymill.errors import UserError

if TYPE_CHECKING:
    from cluster.settings.serve import ServeConfig

_NEW_PLACE = Argument[str]("destination", "folder or s3:// URI to make; with gguf a file")
_GGUF = "gguf"
_FORMAT = Argument[str](
    "--format",
    "folder, which transformers, vLLM and raymill read, or gguf, one file of llama.cpp's",
    choices=("folder", _GGUF),
    default="folder",
)
_BOM = Switch("--bom", "add a bill of materials of model and data (CycloneDX)")
_REQUEST_FILE = Argument[Path]("request", "file with the request's body", parse=Path)
_ANSWER_FILE = Argument[Path]("answer", "file with the answer, which has a receipt", parse=Path)
_RECEIPT_KEY = Argument[Path](
    "--signed-by",
    "public key of the endpoint's receipts, a PEM file",
    parse=Path,
    required=True,
    metavar="FILE",
)
_MERGE = Switch("--merge", "add an adapter to the weights that it stands on: a whole model")
_REPOSITORY = Argument[str](
    "repository", "model's repository on the Hub, hf://OWNER/NAME", metavar="hf://OWNER/NAME"
)
_LICENSE = Argument[str](
    "--license",
    "the Hub's word for the license, such as apache-2.0; unknown when unset",
    default="unknown",
    metavar="ID",
)
_CREATES = Switch("--create", "make the repository, a private one, where it is missing")
_ONLY_CARD = Switch("--card", "print the model card, upload nothing")


def serve(arguments: Arguments) -> Result:
    """Serves until a signal, and then until all answers are whole. On a cluster at an address it
    deploys and returns."""
    from cluster.commands.local_endpoint import keep_up
    from cluster.endpoint.endpoint import deploy, require_key, require_ray_proxies, url_of
    from cluster.local.local_cluster import require_free_port
    from cluster.settings.serve import ServeConfig
    from cluster.submission.first_checks import check_gpu

    require_ray_proxies()
    config = arguments.config(
        ServeConfig, checkpoint=named_once(arguments, NAMED, flag="checkpoint")
    )
    require_key(config)
    if config.engine.device == "cuda":
        check_gpu(
            "engine.device=cuda",
            config.cluster.address,
            num_gpus=config.engine.tensor_parallel_size,
        )
    checkpoint = named_by(config)
    if config.cluster.address is None:
        require_free_port(config.host, config.port)
    say(f"serve: {checkpoint} at {url_of(config.host, config.port)}")

    from cluster.stages.stage import connected  # imports Ray, which takes a second

    replicas_per_node = -(-config.replicas.max_replicas // max(1, config.cluster.num_nodes - 1))
    cpus = replicas_per_node * config.replicas.threads_per_replica
    gpus = config.engine.tensor_parallel_size
    with connected(config.cluster, cpus_per_node=cpus, gpus_together=gpus) as connection:
        endpoint = deploy(connection, config)
        result = Result({"url": endpoint.url, "model": endpoint.model})
        arguments.show(result)
        if connection.local is None:
            say(f"{endpoint.url} stays up; end it with Ray Serve's own tools")
            return replace(result, is_shown=True)
        say(f"serving {endpoint.model} at {endpoint.url}; Ctrl-C ends it")
        completing = as_typed(config.storage.uri, 'raymill complete "Once upon a time"')
        say(f"next: {completing}")
        is_whole = keep_up(connection.local, host=config.host, port=config.port)
    return replace(result, is_shown=True, is_bad=not is_whole)


def complete(arguments: Arguments) -> Result:
    """Streams the text to standard output as it comes, or returns all of it with --json."""
    from cluster.endpoint.endpoint import Endpoint, stream_completion

    endpoint = Endpoint.load(
        arguments[STORAGE], url=arguments[URL], api_key_file=arguments[API_KEY]
    )
    request = {
        "prompt": arguments[PROMPT],
        "max_tokens": arguments[MAX_TOKENS],
        "temperature": arguments[TEMPERATURE],
        "seed": arguments[SEED],
    }
    if arguments.is_json:
        return Result(stream_completion(endpoint, request, on_text=lambda text: None))
    completed = stream_completion(endpoint, request, on_text=put)
    return Result(completed, text="" if completed["text"].endswith("\n") else "\n")


def verify_answer(arguments: Arguments) -> Result:
    from cluster.endpoint.receipt import verified

    endpoint = None
    if arguments[URL]:
        from cluster.endpoint.endpoint import Endpoint

        endpoint = Endpoint.load(
            arguments[STORAGE], url=arguments[URL], api_key_file=arguments[API_KEY]
        )
    verdict = verified(
        arguments[_REQUEST_FILE], arguments[_ANSWER_FILE], arguments[_RECEIPT_KEY], endpoint
    )
    return Result(verdict, is_bad=not verdict["valid"])


def promote(arguments: Arguments) -> Result:
    from cluster.commands import delivery_commands

    return delivery_commands.promote(arguments)


def rollback(arguments: Arguments) -> Result:
    from cluster.commands import delivery_commands

    return delivery_commands.rollback(arguments)


def publish(arguments: Arguments) -> Result:
    from cluster.storage import registry
    from cluster.storage.references import checkpoint_uri

    storage = open_storage(arguments[STORAGE])
    published = vars(
        registry.publish(storage, checkpoint_uri(arguments[CHECKPOINT], arguments[STORAGE]))
    )
    say(registry.what_latest_became(storage))
    return Result(
        {name: published[name] for name in ("checkpoint", "run_id", "step", "parameter_hash")}
    )


def export(arguments: Arguments) -> Result:
    from cluster.storage.references import checkpoint_uri
    from cluster.storage.registry import named_checkpoint

    destination = absolute_uri(arguments[_NEW_PLACE])
    storage_uri = arguments[STORAGE]
    checkpoint = checkpoint_uri(arguments[CHECKPOINT], storage_uri)
    say(f"export: {named_checkpoint(checkpoint, storage_uri)} to {destination}")

    # imports PyTorch, which takes two seconds
    from jobs.export import export as export_checkpoint
    from jobs.export import export_gguf

    key = signing_key(arguments)
    if (key or arguments[_BOM]) and arguments[_FORMAT] == _GGUF:
        raise UserError("--sign and --bom are for folders: a GGUF file has no place for them")
    if arguments[_FORMAT] == _GGUF:
        return Result(export_gguf(checkpoint, destination, storage_uri=storage_uri))
    exported = export_checkpoint(
        checkpoint,
        destination,
        storage_uri=storage_uri,
        merge=arguments[_MERGE],
        key=key,
        has_bom=arguments[_BOM],
    )
    return Result(exported, next=_to_load(destination, exported))


def push(arguments: Arguments) -> Result:
    from cluster.storage.references import checkpoint_uri
    from cluster.storage.registry import named_checkpoint

    repository, storage_uri = arguments[_REPOSITORY], arguments[STORAGE]
    checkpoint = checkpoint_uri(arguments[CHECKPOINT], storage_uri)
    say(f"push: {named_checkpoint(checkpoint, storage_uri)} to {repository}")

    from jobs.push import Pushed  # imports PyTorch, which takes two seconds

    pushed = Pushed.of(
        checkpoint, repository, storage_uri=storage_uri, license_id=arguments[_LICENSE]
    )
    if arguments[_ONLY_CARD]:
        return Result({"card": pushed.card}, text=pushed.card.rstrip("\n"))
    uploaded = pushed.upload(creates=arguments[_CREATES])
    return Result(uploaded, next=_to_load(pushed.name, uploaded))


def _to_load(place: str, made: Mapping[str, Any]) -> str:
    """Returns what loads a model of a folder or of the Hub, as it is typed; empty for an adapter
    whose base PEFT does not find."""
    if "base" in made:
        if made["base"] is None or place.startswith("s3://") or made["base"].startswith("s3://"):
            return ""
        line = f"import peft; peft.AutoPeftModelForCausalLM.from_pretrained({place!r})"
    elif place.startswith("s3://"):
        return f"`raymill serve {shlex.quote(place)}`"
    else:
        line = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({place!r})"
    return f"in Python, {line}"


def _serve_config() -> "type[ServeConfig]":
    from cluster.settings.serve import ServeConfig

    return ServeConfig


SERVE = CommandSection(
    "serve: from a checkpoint to answers",
    (
        Command(
            "serve",
            "serve a checkpoint behind an OpenAI-compatible endpoint until SIGTERM or Ctrl-C",
            serve,
            [NAMED, CONFIG_FLAG, SettingsOf(_serve_config, positional="checkpoint")],
        ),
        Command(
            "complete",
            "complete a prompt at the endpoint that `raymill serve` started here",
            complete,
            [PROMPT, URL, API_KEY, MAX_TOKENS, TEMPERATURE, SEED, STORAGE],
        ),
        Command(
            "verify-answer",
            "check an answer's receipt, and with --url that the same weights answer the same there",
            verify_answer,
            [_REQUEST_FILE, _ANSWER_FILE, _RECEIPT_KEY, URL, API_KEY, STORAGE],
        ),
        Command(
            "promote",
            "make the running endpoint serve another checkpoint",
            promote,
            [
                OneOf((PROMOTED, FINISH, FOLLOWED), required=True),
                ADAPTER,
                CANARY_PERCENT,
                WATCH_S,
                GATE_SOURCE,
                MAX_LOSS_INCREASE,
                URL,
                ADMIN_KEY,
                STORAGE,
            ],
        ),
        Command(
            "rollback",
            "serve the previous version again",
            rollback,
            [ADAPTER, URL, ADMIN_KEY, STORAGE],
        ),
        Command("publish", "make a checkpoint the latest one", publish, [CHECKPOINT, STORAGE]),
        Command(
            "export",
            "copy a checkpoint without its training state, ready for Hugging Face",
            export,
            [
                CHECKPOINT,
                _NEW_PLACE,
                _FORMAT,
                _MERGE,
                SIGN,
                CERTIFICATES,
                TIMESTAMP,
                _BOM,
                STORAGE,
            ],
        ),
        Command(
            "push",
            "upload a checkpoint to the Hugging Face Hub, with a model card of its lineage",
            push,
            [CHECKPOINT, _REPOSITORY, _LICENSE, _CREATES, _ONLY_CARD, STORAGE],
        ),
    ),
)
