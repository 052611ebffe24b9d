"""Checks that find cheap mistakes, by names alone, before a cluster is started. Each raises a `UserError`."""

from cluster.local.local_cluster import require_free_port
from cluster.settings.parser import ConfigError
from cluster.settings.run import RunConfig, TextConfig
from cluster.settings.serve import ServeConfig
from cluster.storage.registry import LATEST, named_checkpoint
from cluster.storage.uris import open_storage
from cluster.submission.preflight import Folders, check_sources


def check_stage(config: RunConfig, stage: str) -> None:
    """Refuses missing sources, and a run that was started with other settings."""
    check_data(config.data, address=config.cluster.address)
    if stage == "tokenize":
        return
    from jobs.run.history import why_not_resumed

    run = open_storage(config.storage.uri).child(f"runs/{config.run_id}")
    if reason := why_not_resumed(run, config):
        raise ConfigError(reason)


def check_data(data: TextConfig, *, address: str | None) -> None:
    """Refuses missing sources. A cluster at an address may see other folders than this machine."""
    check_sources(data, Folders.SAME if address is None else Folders.UNKNOWN)


def check_checkpoint(reference: str, storage_uri: str, *, address: str | None) -> str:
    """Returns the URI of the checkpoint that the reference names."""
    place = storage_uri if reference == LATEST else reference
    if address is not None and open_storage(place).local_path("") is not None:
        return reference  # that cluster may see other folders
    return named_checkpoint(reference, storage_uri)


def check_endpoint(config: ServeConfig) -> str:
    """Returns the checkpoint's URI; refuses a missing checkpoint and a port that is in use."""
    checkpoint = check_checkpoint(config.checkpoint, config.storage.uri, address=config.cluster.address)
    if config.cluster.address is None:
        require_free_port(config.host, config.port)
    return checkpoint
