"""Training with several workers in numbers: raymill's ways to divide the state beside PyTorch's FSDP2.

    python -m tests.gpu.proof.speeds cuda|cpu WORKERS SECONDS

Each contender trains the same model in processes of its own, with one worker and with so many: bf16,
the same tokens, clipping, AdamW. None takes longer than half of the seconds.
FSDP2's blocks are compiled on a GPU, and it sends gradients once a step. Prints a table and, last,
one JSON object. The exit code is 1 if raymill fails.
"""

import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_CONTENDERS = ("raymill none", "raymill parameters", "FSDP2")
_NUM_FIRST_STEPS, _NUM_TIMED_STEPS = 3, 5
_LANES_PER_WORKER = 4
_TASKS: dict[str, dict[str, Any]] = {
    "cuda": {"preset": "gpt2-124m", "batch_size": 16, "seq_len": 1024, "vocab_size": 50304},
    "cpu": {"preset": "tiny", "batch_size": 2, "seq_len": 32, "vocab_size": 311},
}

Row = dict[str, Any]


def rows_of(kind: str, most_workers: int, *, within_s: float) -> list[Row]:
    rows: list[Row] = []
    for num_workers in sorted({1, most_workers}):
        for contender in _CONTENDERS:
            row = {"contender": contender, "workers": num_workers}
            row |= _measured(kind, contender, num_workers, within_s=within_s)
            print(_line_of(row), flush=True)
            rows.append(row)
    return rows


def _measured(kind: str, contender: str, num_workers: int, *, within_s: float) -> Row:
    """Returns the figures of the slowest and of the largest worker, or an `error`."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="raymill-speeds-") as folder:
        store = Path(folder) / "meeting"
        pipes = [context.Pipe(duplex=False) for _ in range(num_workers)]
        processes = [
            context.Process(
                target=_work, args=(theirs, kind, contender, rank, num_workers, store), daemon=True
            )
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(processes, pipes, strict=True):
            process.start()
            theirs.close()
        try:
            return _together([ours for ours, _ in pipes], within_s=within_s)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _together(answers: list[Connection], *, within_s: float) -> Row:
    deadline_s = time.monotonic() + within_s
    found: list[Row] = []
    for answer in answers:
        if not answer.poll(max(0.0, deadline_s - time.monotonic())):
            return {"error": f"no answer within {within_s:.0f} s"}
        try:
            found.append(answer.recv())
        except EOFError:
            return {"error": "a worker ended without a word"}
    errors = [row["error"] for row in found if "error" in row]
    if errors:
        return {"error": errors[0]}
    slowest = max(row["step_s"] for row in found)
    return {
        "step_s": slowest,
        "tokens_per_s": round(found[0]["num_tokens"] / slowest, 1),
        "peak_bytes": max(row["peak_bytes"] for row in found),
        "last_loss": found[0]["last_loss"],
    }


def _work(
    answers: Connection, kind: str, contender: str, rank: int, num_workers: int, store: Path
) -> None:
    from raymill.proof.place import meet

    try:
        device = meet(kind, rank=rank, num_workers=num_workers, store=store)
        answers.send(_figures(contender, device, rank, num_workers))
    except Exception as error:  # it is the row's
        [first, *_] = str(error).splitlines() or [""]
        answers.send({"error": f"{type(error).__name__}: {first}"[:300]})


def _figures(contender: str, device: Any, rank: int, num_workers: int) -> Row:
    import torch

    from tests.benchmarks.gpu_contenders import peak_bytes, wait

    torch.set_num_threads(1)
    task = _TASKS[device.type] | {"contender": contender, "device": device.type}
    task["num_lanes"] = _LANES_PER_WORKER * num_workers
    make = _fsdp2 if contender == "FSDP2" else _raymill
    step = make(task, device, rank, num_workers)
    losses = [step(number) for number in range(1, _NUM_FIRST_STEPS + 1)]
    taken: list[float] = []
    for number in range(len(losses) + 1, len(losses) + 1 + _NUM_TIMED_STEPS):
        wait(device)
        start_s = time.perf_counter()
        last_loss = step(number)
        wait(device)
        taken.append(time.perf_counter() - start_s)
    return {
        "step_s": statistics.median(taken),
        "num_tokens": task["num_lanes"] * task["batch_size"] * task["seq_len"],
        "peak_bytes": peak_bytes(device),
        "last_loss": last_loss,
    }


def _raymill(
    task: dict[str, Any], device: Any, rank: int, num_workers: int
) -> Callable[[int], float]:
    from raymill.workers.worker_group import WorkerGroup
    from tests.benchmarks.gpu_contenders import LEARNING_RATE, drawn_on_device, run_config
    from tests.gpu.made_runs import MadeRun

    config = run_config(task)
    shard = task["contender"].removeprefix("raymill ")
    scaling = config.scaling.model_copy(update={"shard": shard})
    config = config.model_copy(update={"scaling": scaling})
    draw = drawn_on_device if device.type == "cuda" else None
    run = MadeRun(config, device, WorkerGroup(rank, num_workers), draw=draw)
    return partial(run.step, learning_rate=LEARNING_RATE)


def _fsdp2(
    task: dict[str, Any], device: Any, rank: int, num_workers: int
) -> Callable[[int], float]:
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from tests.benchmarks.gpu_contenders import LEARNING_RATE, run_config, shape_of
    from tests.benchmarks.plain_gpt2 import PlainGPT2, Shape, training_step
    from tests.gpu.made_runs import MadeRows

    with device:
        model = PlainGPT2(Shape(**shape_of(task))).train()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        if device.type == "cuda":
            block.compile()
        fully_shard(block, mp_policy=policy)
    root: Any = fully_shard(model, mp_policy=policy)
    rows, size = MadeRows.of(run_config(task)), task["batch_size"]
    calls = 0

    def loss_of(inputs: Any, targets: Any) -> Any:
        nonlocal calls
        calls += 1
        root.set_requires_gradient_sync(calls % _LANES_PER_WORKER == 0)
        return root(inputs, targets)

    take = training_step(root, loss_of, is_bf16=True, learning_rate=LEARNING_RATE)

    def step(number: int) -> float:
        first = ((number - 1) * num_workers + rank) * _LANES_PER_WORKER * size
        starts = range(first, first + _LANES_PER_WORKER * size, size)
        lanes = (rows.samples(range(start, start + size)) for start in starts)
        return take([(inputs.to(device), targets.to(device)) for inputs, targets in lanes])

    return step


def _line_of(row: Row) -> str:
    name = f"{row['workers']:2} workers  {row['contender']:20}"
    if "error" in row:
        return f"{name} {row['error']}"
    return f"{name} {row['tokens_per_s']:>11,.0f} tokens/s  {row['peak_bytes'] / 1e9:.2f} GB"


if __name__ == "__main__":
    kind, most_workers, seconds = sys.argv[1:]
    found = rows_of(kind, int(most_workers), within_s=float(seconds) / 2)
    print(json.dumps({"rows": found}))
    ours = [row for row in found if row["contender"].startswith("raymill")]
    sys.exit(int(any("error" in row for row in ours)))
