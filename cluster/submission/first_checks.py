"""Checks of a stage that are made before a local cluster is started, or a job on another one.

Without them each would be found minutes later, by another process, in words that do not name the
setting.
"""

import secrets
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import psutil

from cluster.local.jobs_api import JobsApi, ray_token
from cluster.output.result_text import counted
from cluster.settings.run import RunConfig, run_storage
from cluster.stages.run_mirrored import lease_key
from cluster.storage.interface import HF, StorageError
from cluster.storage.lease import Lease, living_holder
from cluster.storage.uris import open_storage, storage_flag
from cluster.submission.preflight import AdmissionError, check_cluster, check_gpus
from cluster.submission.storage_check import first_missing
from model.hardware.processor import num_gpus_here

_BEAT_S = 6.0
"""Time in which a lease's holder on another machine renews it; one on this machine is known at
once."""


def check_gpu(setting: str, address: str | None, *, num_gpus: int = 1) -> None:
    """Raises `AdmissionError` for a setting that asks for GPUs of a node, if there is none with
    them: a local cluster's nodes are lent this machine's GPUs."""
    if address is not None:
        check_gpus(cluster_at(address), setting, num_gpus=num_gpus)
        return
    if (found := num_gpus_here()) < num_gpus:
        raise AdmissionError(
            f"{setting} needs {counted(num_gpus, 'GPU')}, and PyTorch sees {found} on this machine: see "
            "`nvidia-smi`, and `python -c 'import torch; print(torch.version.cuda, torch.cuda.is_available())'`. "
            f"A Ray cluster with GPUs is named by --cluster.address http://HOST:8265; on CPUs, leave {setting} out"
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
        check_gpu("scaling.use_gpu", None, num_gpus=config.scaling.min_workers)
    check_writable(config)
    run = run_storage(config)
    holders = (
        living_holder(run, key, timeout_s=_BEAT_S) for key in (lease_key(stage), _start_key(stage))
    )
    for holder in filter(None, holders):
        where = storage_flag(config.storage.uri)
        raise AdmissionError(
            f"run {config.run_id} is running already: its {stage} is process {holder.pid} on {holder.host}, since "
            f"{holder.since}; `raymill status {config.run_id}{where}` shows it, `raymill stop {config.run_id}{where}` "
            "saves and ends it, and another --run-id begins another run"
        )


@contextmanager
def starting(config: RunConfig, stage: str) -> Iterator[ExitStack]:
    """Keeps others from starting the stage of the run until the stack is closed, by when the job has
    a lease of its own. A folder of another machine is left alone. Raises `LeaseHeldError` while
    another process does."""
    run = run_storage(config)
    is_elsewhere = config.cluster.address is not None and run.local_path("") is not None
    with ExitStack() as start:
        if not is_elsewhere:
            start.enter_context(Lease(run, _start_key(stage)))
        yield start


def _start_key(stage: str) -> str:
    return lease_key(stage).replace(".lease", ".start.lease")


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
            f"{words} (--storage.uri names another place; `raymill storage check {shlex.quote(uri)}`)"
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
            "smaller model, train.micro_batch_size or train.seq_len needs less (`raymill plan --all` has the parts)"
        )
