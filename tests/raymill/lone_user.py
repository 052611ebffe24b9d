"""A user's own project: what stands in its folder, and a loop of ten steps that is interrupted once.

The test writes this file beside a `model.py`, a `jobs.py` and the like. No other package than
raymill, torch, NumPy and what torch itself requires can be imported here.

    python train.py                      workers by plain multiprocessing: one, then two
    torchrun --nproc-per-node 2 train.py
"""

import importlib.abc
import importlib.metadata
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

OWN = ("cluster", "jobs", "model", "serving", "utils")
FOLDER = Path(__file__).parent


def required_by(package: str) -> set[str]:
    """Returns what a package requires without extras, and what that requires."""
    found: set[str] = set()
    for line in importlib.metadata.requires(package) or []:
        requirement, _, condition = line.partition(";")
        if "extra ==" not in condition:
            [name] = re.findall(r"^[\w-]+", requirement)
            try:
                found |= {name, *required_by(name)}
            except importlib.metadata.PackageNotFoundError:  # of another platform or Python
                continue
    return found


class OnlyThese(importlib.abc.MetaPathFinder):
    """Finds these packages alone, as if no other were installed."""

    def __init__(self, names: set[str]) -> None:
        self._names, self._finders = names, [*sys.meta_path]

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: Any = None
    ) -> ModuleSpec | None:
        is_of_python = name.startswith("_sysconfigdata")  # with the platform's name behind it
        if name.partition(".")[0] not in self._names and not is_of_python:
            return None
        specs = (finder.find_spec(name, path, target) for finder in self._finders)
        return next((spec for spec in specs if spec is not None), None)


# What NumPy and torch's requirements install has their names
allowed = {"torch", "torchgen", "functorch", "numpy", "raymill", "pkg_resources", "mpmath"}
allowed |= {name.replace("-", "_").lower() for name in required_by("torch")}
sys.meta_path[:] = [OnlyThese({*sys.stdlib_module_names, *allowed, *OWN})]

import torch  # noqa: E402

start_s = time.process_time()
import raymill  # noqa: E402

loads_torch_late = "raymill.engine" not in sys.modules
from raymill import AdamW, ExactEngine  # noqa: E402

import_s = time.process_time() - start_s


def batch_of(step: int, lane: int) -> torch.Tensor:
    return torch.rand(4, 6, generator=torch.Generator().manual_seed(100 * step + lane))


def loss(module: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (module(batch) - batch).square().mean()


def new_engine() -> "ExactEngine[torch.Tensor]":
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Linear(6, 600), torch.nn.Dropout(0.2), torch.nn.Linear(600, 6)
    )
    return ExactEngine(
        module, loss, num_lanes=5, rule=AdamW(0.9, 0.95, 0.1), shard="gradients", grad_clip=1.0
    )


def train(folder: str) -> str:
    for last in (5, 10):
        engine = new_engine()
        if last == 10:
            engine.load(folder)
        while (step := engine.num_steps) < last:
            engine.step(lambda lane, step=step: batch_of(step, lane), learning_rate=1e-2)
        engine.save(folder)
        engine.close()
    return engine.weights_hash()


def work(rank: int, world_size: int, folder: str, hashes: "multiprocessing.Queue[str]") -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    hashes.put(train(folder))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def by_multiprocessing(world_size: int) -> list[str]:
    """Forks, so that torch is imported once."""
    context = multiprocessing.get_context("fork")
    hashes: multiprocessing.Queue[str] = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(world_size):
            process = context.Process(
                target=work, args=(rank, world_size, folder, hashes), daemon=True
            )
            process.start()
            processes.append(process)
        for process in processes:
            process.join()
            assert process.exitcode == 0
        return [hashes.get() for _ in processes]


def by_torchrun() -> list[str]:
    torch.distributed.init_process_group("gloo")
    folder = sys.argv[1]
    Path(folder).mkdir(exist_ok=True)
    found = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, train(folder))
    torch.distributed.destroy_process_group()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    hashes = (
        by_torchrun() if "RANK" in os.environ else by_multiprocessing(1) + by_multiprocessing(2)
    )
    places = {name: __import__(name).__file__ for name in OWN}
    facts = {
        "hashes": hashes,
        "import_s": import_s,
        "loads_torch_late": loads_torch_late,
        "raymill": raymill.__file__,
        "own": [Path(str(place)).is_relative_to(FOLDER) for place in places.values()],
    }
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(facts), flush=True)
    # A thread of gloo that lets go of what it gathered while the interpreter ends aborts the process
    # (PyTorch 2.13, also with DistributedDataParallel)
    os._exit(0)
