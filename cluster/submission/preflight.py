"""Checks before a job is spent: the storage, the sources, and whether the workers find room."""

import shlex
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

from cluster.local.jobs_api import JobsApi
from cluster.output.progress import say
from cluster.output.result_text import counted
from cluster.settings.data import TOKENS, DataConfig, TextConfig
from cluster.settings.parser import ConfigError
from cluster.settings.run import RunConfig
from cluster.storage.interface import HF
from cluster.storage.uris import NotFoundError, glob_uris, open_storage
from cluster.submission.storage_check import check_storage
from raymill.errors import UserError


class AdmissionError(UserError):
    """A job that could only fail or wait forever."""


class SourceError(AdmissionError, ConfigError):
    """Nothing is at a source: the command line or the configuration file names a wrong place."""


class Folders(StrEnum):
    """Says whether a job sees the folders of the machine that submits it."""

    SAME = "same"  # it runs on that machine
    UNKNOWN = "unknown"  # it does if they are on a shared file system
    NONE = "none"


def folders_at(address: str | None) -> Folders:
    """Returns what a stage on the Ray cluster at the address sees; None is a local one."""
    return Folders.SAME if address is None else Folders.UNKNOWN


def check_run(config: RunConfig, folders: Folders) -> None:
    """Checks the storage and the sources. Raises `AdmissionError`, or `StorageError` for a
    malformed location."""
    storage = config.storage.uri
    _, problem = check_storage(storage)
    if problem:
        raise AdmissionError(
            f"{problem} (`raymill storage check {shlex.quote(storage)}` says more)"
        )
    if _is_folder(storage) and folders is not Folders.SAME:
        if folders is Folders.NONE:
            raise AdmissionError(
                f"{storage} is a folder of this machine; the job needs --storage.uri s3://bucket"
            )
        say(f"{storage} is a folder: all nodes of the cluster must see the same files there")
    check_sources(config.data, folders)


def check_sources(data: TextConfig, folders: Folders) -> None:
    """Raises `SourceError` for a missing source, as far as this machine can tell, and
    `AdmissionError` for a folder of this machine that the job does not see."""
    validation = data.validation.values() if isinstance(data, DataConfig) else ()
    # A run that forgets reads the token store that is there
    forgets = isinstance(data, DataConfig) and data.forgotten is not None
    sources = [*([] if forgets else data.source), *validation]
    for uri in (source.removeprefix(TOKENS) for source in sources):
        if uri.startswith(HF) or (_is_folder(uri) and folders is Folders.UNKNOWN):
            continue  # the cluster may reach what this machine cannot
        if _is_folder(uri) and folders is Folders.NONE:
            raise AdmissionError(
                f"data.source: {uri} is on this machine, and the job is not; upload it to s3://"
            )
        try:
            glob_uris(uri)
        except NotFoundError as error:
            raise SourceError(f"data.source: {error}") from None


def _is_folder(uri: str) -> bool:
    return open_storage(uri).local_path("") is not None


def check_cluster(api: JobsApi, config: RunConfig, stage: str, needs: Mapping[str, Any]) -> None:
    """Raises `AdmissionError` if the stage finds no room on the cluster's nodes and no others can
    come, `ClusterError` if the cluster cannot be asked."""
    try:
        check_rooms(config, stage, needs, nodes=_resources(api), where=api.url)
    except AdmissionError as error:
        _may_wait(api, error)


def check_gpus(api: JobsApi, setting: str, *, num_gpus: int) -> None:
    """Raises `AdmissionError` if no node of the cluster has the GPUs that the setting takes, and no
    others can come."""
    most = max((node.get("GPU", 0.0) for node in _resources(api)), default=0.0)
    if most < num_gpus:
        wanted = counted(num_gpus, "GPU")
        _may_wait(
            api,
            AdmissionError(
                f"{setting} needs a node with {wanted}, and {api.url} has none with more than {most:g}"
            ),
        )


def _resources(api: JobsApi) -> list[dict[str, float]]:
    return [row["resources_total"] for row in api.alive_nodes()]


def _may_wait(api: JobsApi, problem: AdmissionError) -> None:
    """Raises the problem, unless the cluster adds nodes by itself: its autoscaler alone knows of
    which kinds."""
    if not api.has_autoscaler():
        raise problem
    say(f"{problem}; the cluster autoscales, so more nodes may come, and the job waits for them")


def check_rooms(
    config: RunConfig,
    stage: str,
    needs: Mapping[str, Any],
    *,
    nodes: Iterable[Mapping[str, float]],
    where: str,
) -> None:
    """Raises `AdmissionError` if `scaling.min_workers` do not fit on nodes of these resources (CPU,
    GPU, memory …)."""
    nodes, scaling = list(nodes), config.scaling
    if stage == "tokenize":
        if not any(node.get("CPU", 0) >= 1 for node in nodes):
            raise AdmissionError(f"tokenizing needs a CPU, and {where} has none for work now")
        return
    if scaling.use_gpu and not any(node.get("GPU", 0) >= 1 for node in nodes):
        raise AdmissionError(
            f"scaling.use_gpu needs GPUs, and {where} has none now; leave it out, or add nodes with GPUs"
        )
    worker = {"CPU": float(scaling.threads_per_worker)} | ({"GPU": 1.0} if scaling.use_gpu else {})
    rooms = sum(_rooms(node, worker) for node in nodes)
    each = counted(scaling.threads_per_worker, "CPU")
    each += " and a GPU" if scaling.use_gpu else ""
    if rooms < scaling.min_workers:
        raise AdmissionError(
            f"scaling.min_workers={scaling.min_workers} workers of {each} each do not fit: {where} has room for "
            f"{rooms} now; lower it, or add nodes"
        )
    worker |= {"memory": float(needs["worker_bytes"])}
    by_memory = sum(_rooms({**node, "memory": _memory(node)}, worker) for node in nodes)
    if by_memory < scaling.min_workers:
        raise AdmissionError(
            f"a worker needs about {needs['worker_bytes'] / 1e9:,.1f} GB of memory, and {where} has that for "
            f"{by_memory} of scaling.min_workers={scaling.min_workers} workers (the largest node has "
            f"{max(map(_memory, nodes), default=0) / 1e9:,.1f} GB); a smaller model, train.micro_batch_size or "
            "train.seq_len needs less"
        )


def _rooms(node: Mapping[str, float], worker: Mapping[str, float]) -> int:
    return int(min(node.get(name, 0.0) // amount for name, amount in worker.items()))


def _memory(node: Mapping[str, float]) -> float:
    """Returns a node's memory, which Ray divides between tasks and objects."""
    return node.get("memory", 0.0) + node.get("object_store_memory", 0.0)
