"""The workers of `bench_sharded`: processes that train as one contender does, and answer what they
are asked."""

import hashlib
import multiprocessing
import os
import time
import traceback
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from model.hardware.memory import keep_freed_memory
from raymill.files.safetensors_file import parameter_hash
from raymill.workers.worker_group import WorkerGroup
from tests.benchmarks import worker_memory as memory
from tests.benchmarks.sharded_contenders import Trainer, config_of, trainer_of

ANSWER_S = 600
Settings = dict[str, str | int]
TINY_MODEL: Settings = {"preset": "tiny", "vocab_size": 101}
TINY_ROWS: Settings = {"seq_len": 64}


def forking_server() -> ForkServerContext:
    """Returns a context whose processes have imported PyTorch when they start, which takes one
    seconds."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


class Party:
    """The processes of one contender, in a context. Each does what `Worker` has a method for, all
    at the same time."""

    def __init__(
        self, contender: str, world_size: int, folder: Path, model: Settings, train: Settings
    ) -> None:
        self.contender, context = contender, forking_server()
        store = folder / hashlib.sha256(f"{contender} {world_size} {model}".encode()).hexdigest()
        pipes = [context.Pipe() for _ in range(world_size)]
        self._pipes = [ours for ours, _ in pipes]
        self._processes = [
            context.Process(
                target=_work,
                args=(theirs, contender, rank, world_size, str(store), model, train),
                daemon=True,
            )
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self._processes, pipes, strict=True):
            process.start()
            theirs.close()

    def ask(self, method: str, *args: Any) -> list[Any]:
        """Returns every rank's answer."""
        for pipe in self._pipes:
            pipe.send((method, args))
        return [self._answer(rank) for rank in range(len(self._pipes))]

    def _answer(self, rank: int) -> Any:
        pipe = self._pipes[rank]
        assert pipe.poll(ANSWER_S), (
            f"{self.contender}: rank {rank} did not answer within {ANSWER_S} s"
        )
        answer = pipe.recv()
        assert not isinstance(answer, Failure), (
            f"{self.contender}: rank {rank} failed\n{answer.text}"
        )
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if error is None:
                pipe.send(None)
            else:
                process.terminate()
        for process in self._processes:
            process.join(timeout=30)


class Failure:
    def __init__(self, text: str) -> None:
        self.text = text


def _work(
    pipe: Connection, contender: str, rank: int, world_size: int, store: str, *settings: Settings
) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    worker = None
    while (asked := pipe.recv()) is not None:
        try:
            worker = worker or Worker(contender, WorkerGroup(rank, world_size), *settings)
            pipe.send(getattr(worker, asked[0])(*asked[1]))
        except Exception:
            pipe.send(Failure(traceback.format_exc()))
            raise
    dist.destroy_process_group()


class Worker:
    """One rank. What a first step loads and opens is loaded before memory is counted, by a tiny
    model's steps."""

    def __init__(
        self, contender: str, group: WorkerGroup, model: Settings, train: Settings
    ) -> None:
        keep_freed_memory()
        tiny = trainer_of(contender, config_of(contender, TINY_MODEL, train | TINY_ROWS), group)
        for number in range(1, 3):
            tiny.step(number)
        tiny.close()
        del tiny
        memory.give_back()
        self._base, self._tensors = (
            memory.resident_bytes(),
            memory.num_bytes(memory.held_by_process()),
        )
        self._trainer: Trainer = trainer_of(contender, config_of(contender, model, train), group)
        memory.give_back()
        memory.reset_peak()

    def steps(self, first: int, count: int) -> dict[str, float]:
        """Takes steps, and returns what one took: seconds, seconds of this process's threads, and
        bytes sent."""
        dist.barrier()
        sent, start, start_cpu = memory.socket_bytes(), time.perf_counter(), time.process_time()
        for number in range(first, first + count):
            self._trainer.step(number)
        taken = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - start_cpu}
        dist.barrier()
        taken["bytes"] = memory.socket_bytes() - sent
        return {name: value / count for name, value in taken.items()}

    def hash(self, step: int) -> str:
        """Returns the hash of the weights after a step; rank 0's counts."""
        return parameter_hash(self._trainer.weights(step=step))

    def memory(self) -> dict[str, int]:
        """Returns bytes: the peak over what the process had without a model, and what is kept
        between steps."""
        peak = memory.peak_bytes() - self._base
        kept = {name: memory.storages(tensors) for name, tensors in self._trainer.kept().items()}
        state = {place: held for of in kept.values() for place, held in of.items()}
        other = memory.num_bytes(memory.held_by_process()) - memory.num_bytes(state) - self._tensors
        return {"peak": peak, "other": other} | {
            name: memory.num_bytes(of) for name, of in kept.items()
        }

    def transients(self, number: int) -> dict[str, list[str]]:
        """Takes a step; returns the largest of what is kept beside the state, and of what a step
        makes and releases."""
        names: dict[int, str] = {}
        for name, tensor in memory.named_tensors(trainer=self._trainer):
            names.setdefault(memory.key(tensor), name)
        state = {
            place for tensors in self._trainer.kept().values() for place in memory.storages(tensors)
        }
        before = memory.held_by_process()
        with memory.NewMemory(before, names) as new:
            self._trainer.step(number)
        beside = [
            (place, held) for place, held in before.items() if place in names and place not in state
        ]
        kept = {f"{held} {names[place]}": held.num_bytes for place, held in beside}
        return {"kept": _largest(kept), "made": _largest(new.seen)}


def _largest(num_bytes: dict[str, int]) -> list[str]:
    ordered = sorted(num_bytes, key=lambda text: -num_bytes[text])
    return [text for text in ordered[:6] if num_bytes[text] >= memory.MENTIONED_BYTES]
