"""Checks of a stage that are made before a local cluster is started, or a job on another one.

Without them each would be found minutes later, by another process, in words that do not name the
setting.
"""

import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import psutil

from cluster.local.jobs_api import JobsApi, ray_token
from cluster.settings.run import RunConfig, run_storage
from cluster.stages.run_mirrored import lease_key
from cluster.storage.interface import HF, StorageError
from cluster.storage.lease import living_holder
from cluster.storage.uris import open_storage
from cluster.submission.preflight import AdmissionError, check_cluster, check_gpus
from cluster.submission.storage_check import first_missing

_BEAT_S = 6.0
"""Time in which a lease's holder on another machine renews it; one on this machine is known at
once."""


def check_gpu(setting: str, address: str | None, *, num_gpus: int = 1) -> None:
    """Raises `AdmissionError` for a setting that asks for GPUs of a node: a local cluster's are
    given none."""
    if address is not None:
        check_gpus(cluster_at(address), setting, num_gpus=num_gpus)
        return
    raise AdmissionError(
        f"{setting} needs a Ray cluster with GPUs, and a local one has none: name one by --cluster.address, or leave "
        f"{setting} out"
    )


def cluster_at(address: str) -> JobsApi:
    """Returns the cluster at the address. Raises `ClusterError` if it does not answer or refuses
    us."""
    api = JobsApi(address, ray_token())
    api.probe()
    return api


def check_stage(config: RunConfig, stage: str) -> None:
    """Raises `AdmissionError` if the stage could not begin: no GPU, no storage, or a run that is
    running already."""
    if config.scaling.use_gpu and config.cluster.address is None and stage != "tokenize":
        check_gpu("scaling.use_gpu", None)
    check_writable(config)
    holder = living_holder(run_storage(config), lease_key(stage), timeout_s=_BEAT_S)
    if holder is not None:
        raise AdmissionError(
            f"run {config.run_id} is running already: its {stage} is process {holder.pid} on {holder.host}, since "
            f"{holder.since}; `raymill status {config.run_id}` shows it, and another --run-id begins another run"
        )


def check_writable(config: RunConfig) -> None:
    """Raises `AdmissionError` if nothing can be written to the storage. A folder of another machine
    is not tried."""
    uri, name = config.storage.uri, f"raymill-check-{secrets.token_hex(8)}"
    if uri.startswith(HF):
        raise AdmissionError(
            f"{uri}: the Hugging Face Hub can only be read; --storage.uri names a folder or s3://"
        )
    storage = open_storage(uri)
    folder = storage.local_path("")
    if folder is not None and config.cluster.address is not None:
        return
    made = first_missing(storage.local_path(name))
    try:
        storage.write_bytes(f"{name}/probe", b"")
    except StorageError as error:
        words = f"{uri} cannot be written: {error}"
        raise AdmissionError(
            f"{words} (--storage.uri names another place; `raymill storage check {uri}`)"
        ) from None
    finally:
        with suppress(StorageError):
            storage.delete(f"{name}/probe")
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def check_room(config: RunConfig, stage: str, needs: Mapping[str, Any]) -> None:
    """Raises `AdmissionError` if the fewest workers do not fit on the cluster of the settings."""
    if config.cluster.address is not None:
        check_cluster(cluster_at(config.cluster.address), config, stage, needs)
    elif stage != "tokenize":
        _check_memory_here(config, needs)


def _check_memory_here(config: RunConfig, needs: Mapping[str, Any]) -> None:
    """Compares what the fewest workers need with this machine's memory, which a local cluster's
    nodes share."""
    number, total, need = (
        config.scaling.min_workers,
        psutil.virtual_memory().total,
        needs["worker_bytes"],
    )
    if number * need > total:
        workers = (
            "a worker needs" if number == 1 else f"{number} workers (scaling.min_workers) need"
        )
        raise AdmissionError(
            f"{workers} about {number * need / 1e9:,.1f} GB of memory, and this machine has {total / 1e9:,.1f} GB; a "
            "smaller model, train.micro_batch_size or train.seq_len needs less (`raymill plan` has the parts)"
        )
