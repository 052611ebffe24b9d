"""Cheap mistakes, found before a cluster is started: what a stage or an endpoint would fail at first.

Whatever costs more than a look at names is left to the stage itself. Each function raises a `UserError`.
"""

from cluster.local.local_cluster import require_free_port
from cluster.settings.parser import ConfigError
from cluster.settings.run import RunConfig, TextConfig
from cluster.settings.serve import ServeConfig
from cluster.storage.registry import LATEST, named_checkpoint
from cluster.storage.uris import Storage, open_storage
from cluster.submission.preflight import Folders, check_sources


def check_stage(config: RunConfig, stage: str) -> None:
    """Sources that are not there; a run that was begun with other settings."""
    check_data(config.data, address=config.cluster.address)
    if stage == "tokenize":
        return
    from jobs.run.history import why_not_resumed

    run = open_storage(config.storage.uri).child(f"runs/{config.run_id}")
    if reason := why_not_resumed(run, config):
        raise ConfigError(reason)


def check_data(data: TextConfig, *, address: str | None) -> None:
    """Sources that are not there. A cluster at an address may see other folders than this machine."""
    check_sources(data, Folders.SAME if address is None else Folders.UNKNOWN)


def check_checkpoint(reference: str, storage_uri: str, *, address: str | None) -> str:
    """Returns the URI of the checkpoint that is meant."""
    place = storage_uri if reference == LATEST else reference
    if address is not None and open_storage(place).local_path("") is not None:
        return reference  # see above
    return named_checkpoint(reference, storage_uri)


def check_endpoint(config: ServeConfig) -> str:
    """A checkpoint that is not there, a port in use. Returns the checkpoint's URI."""
    checkpoint = check_checkpoint(config.checkpoint, config.storage.uri, address=config.cluster.address)
    if config.cluster.address is None:
        require_free_port(config.host, config.port)
    return checkpoint


def check_runs(references: list[str], storage_uri: str) -> list[Storage]:
    """Folders that are no runs. Returns the runs."""
    from jobs.run.find_run import find_run

    return [find_run(reference, storage_uri) for reference in references]
