"""What `bench_gpu` measures, each in a process of its own: raymill's step, a plain loop's, Hugging
Face's; the checks.

B sequences of a lane, T tokens of each. A step is several lanes, whose gradients are added, and one
update.
"""

import hashlib
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cluster.settings.run import RunConfig
from jobs.exact.self_test import self_test
from jobs.snapshots.slots import NUM_SLOTS, Header, Slots
from model.hardware.gpus import gpu_of
from raymill.state.state_shares import StateShares
from tests.benchmarks.plain_gpt2 import PlainGPT2, Shape, training_step
from tests.gpu.gradient_error import gradient_error
from tests.gpu.made_runs import MadeRows, MadeRun, as_in_training, made_config
from tests.gpu.worlds import CASES
from tests.repository import REPOSITORY

NUM_HASHED_STEPS = 3  # which also warm up
NUM_TIMED_STEPS = 8
LEARNING_RATE = 3e-4

Task = dict[str, Any]
Check = tuple[bool, str]
"""Whether it is as it should be, and what was found."""

Step = Callable[[int], float]
"""Trains on the batches of this step, from 1; returns the loss before it."""


def found(task: Task) -> dict[str, Any]:
    device = torch.device(task["device"])
    torch.set_num_threads(1)  # on a CPU only the benchmark itself is tried
    if task["contender"] in CHECKS:
        return {"machine": machine(device), "checks": CHECKS[task["contender"]](task, device)}
    start_s = time.perf_counter()
    make = {"plain": plain, "Hugging Face": hugging_face}.get(task["contender"], raymill)
    step, run = make(task, device)
    losses = [step(1)]
    figures: dict[str, Any] = {
        "machine": machine(device),
        "first_step_s": round(time.perf_counter() - start_s, 1),
    }
    losses += [step(number) for number in range(2, NUM_HASHED_STEPS + 1)]
    if run is not None:
        figures["hash"] = hashlib.sha256(run.state.values.cpu().numpy().data).hexdigest()
    num_timed = 2 if task["contender"] == "exact again" else NUM_TIMED_STEPS
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken = []
    for number in range(NUM_HASHED_STEPS + 1, NUM_HASHED_STEPS + num_timed + 1):
        wait(device)
        begun_s = time.perf_counter()
        losses.append(step(number))
        wait(device)
        taken.append(time.perf_counter() - begun_s)
    num_tokens, step_s = (
        task["num_lanes"] * task["batch_size"] * task["seq_len"],
        statistics.median(taken),
    )
    flops_per_s = num_tokens * run_config(task).model.flops_per_token(task["seq_len"]) / step_s
    gpu = gpu_of(torch.cuda.get_device_name()) if device.type == "cuda" else None
    figures |= {
        "step_s": step_s,
        "spread": round((max(taken) - min(taken)) / step_s, 3),
        "tokens_per_s": round(num_tokens / step_s, 1),
        "tflops": round(flops_per_s / 1e12, 3),
        "mfu": round(flops_per_s / gpu.peak_flops_per_s, 4) if gpu else None,
        "peak_bytes": peak_bytes(device),
        "losses": losses,
    }
    if task["contender"] == "exact":
        figures["snapshot_s"] = snapshot_s(run, step, first_step=len(losses) + 1)
    return figures


def snapshot_s(run: MadeRun, step: Step, *, first_step: int) -> float:
    """Returns the seconds for which training waits for a snapshot of the state into memory that
    other processes may map, as `jobs.snapshots.snapshots` takes it: by one rank, whose next step
    hides what it can."""
    tensors = StateShares(run.state).views(0, world_size=1)
    views = list(itertools.chain(*tensors.values()))
    descriptor = os.memfd_create("snapshots")
    os.ftruncate(descriptor, Slots.bytes_needed(sum(view.nbytes for view in views)))
    slots, exposed_s = Slots(descriptor), 0.0
    # The last one writes into memory that is there already.
    for number in range(first_step, first_step + NUM_SLOTS + 1):
        header = Header(1, number, 0, 1, run.state.num_updates, list(tensors), {})

        def take(pieces: Iterator[Tensor], header: Header = header) -> None:
            slots.write(header, (piece.numpy().view(np.uint8) for piece in pieces))

        copy = run.state.copies.start("snapshot", views, take)
        step(number)
        exposed_s = copy.exposed_s
    return round(exposed_s, 4)


def raymill(task: Task, device: torch.device) -> tuple[Step, MadeRun | None]:
    """Returns training's own step."""
    run = MadeRun(run_config(task), device, draw=drawn_on_device)
    return lambda number: run.step(number, learning_rate=LEARNING_RATE), run


def drawn_on_device(model: nn.Module) -> None:
    """Draws GPT-2's weights where they are: on the host a billion of them take ten seconds."""
    for name, value in model.named_parameters():
        with torch.no_grad():
            value.normal_(std=0.02) if value.dim() >= 2 else value.fill_(
                float(".ln_" in name and "weight" in name)
            )


def plain(task: Task, device: torch.device) -> tuple[Step, MadeRun | None]:
    with device:
        model = PlainGPT2(Shape(**shape_of(task)))
    return _loop(task, device, model, model)


def hugging_face(task: Task, device: torch.device) -> tuple[Step, MadeRun | None]:
    from transformers import GPT2Config, GPT2LMHeadModel

    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    with device:
        model = GPT2LMHeadModel(
            GPT2Config(**shape_of(task), **dropout, use_cache=False, attn_implementation="sdpa")
        )

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        logits = model(inputs).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return _loop(task, device, model, loss_of)


def _loop(
    task: Task, device: torch.device, model: nn.Module, loss_of: Callable[..., Tensor]
) -> tuple[Step, MadeRun | None]:
    """Returns nanoGPT's loop, as fast as it is: TF32 where it computes in fp32; on a GPU its model
    is one compiled graph, and Hugging Face's comes as it is."""
    torch.backends.cuda.matmul.allow_tf32 = True
    if task["contender"] == "plain" and device.type == "cuda":
        loss_of = torch.compile(loss_of, dynamic=False)
    take = training_step(model.train(), loss_of, is_bf16=True, learning_rate=LEARNING_RATE)
    rows = MadeRows.of(run_config(task))

    def step(number: int) -> float:
        first = (number - 1) * task["num_lanes"]
        starts = [(first + lane) * task["batch_size"] for lane in range(task["num_lanes"])]
        lanes = (rows.samples(range(start, start + task["batch_size"])) for start in starts)
        return take([(inputs.to(device), targets.to(device)) for inputs, targets in lanes])

    return step, None


def run_config(task: Task) -> RunConfig:
    batch_size = task["num_lanes"] * task["batch_size"]
    train = {
        "global_batch_size": batch_size,
        "micro_batch_size": task["batch_size"],
        "seq_len": task["seq_len"],
        "max_tokens": 1000 * batch_size * task["seq_len"],
        "precision": "bf16",
        "exact": task["contender"] != "not exact",
    }
    return RunConfig.model_validate(
        {
            "model": {"preset": task["preset"], "vocab_size": task["vocab_size"]},
            "train": train,
            "scaling": {"max_workers": 1, "use_gpu": task["device"] == "cuda"},
        }
    )


def shape_of(task: Task) -> dict[str, int]:
    model = run_config(task).model
    return {
        name: getattr(model, name)
        for name in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
    }


def gradients(task: Task, device: torch.device) -> dict[str, Check]:
    """Returns how far the exact step's gradients are from those of float64, as training computes
    them, and not compiled in fp32; and what a worker finds by itself before it trains."""
    outcomes: dict[str, Check] = {}
    variants: dict[str, dict[str, Any]] = {
        "bf16": {"precision": "bf16"},
        "bf16, documents": {"precision": "bf16", "document_mask": True},
        "bf16, untied": {"precision": "bf16", "model": {"tie_word_embeddings": False}},
        "fp32, not compiled": {"compute": "plain"},
        "fp32, documents, not compiled": {"compute": "plain", "document_mask": True},
    }
    for name, changes in variants.items():
        try:
            error = gradient_error(made_config(device, num_lanes=3, **changes), device)
            outcomes[f"gradient in {name}"] = (error.is_rounding, f"off float64's by {error}")
        except Exception as error:
            outcomes[f"gradient in {name}"] = (False, f"{type(error).__name__}: {error}"[:200])
    try:
        with as_in_training(run_config(task)):
            self_test(run_config(task), device)
        outcomes["a worker's own test"] = (True, f"passed for {task['preset']}")
    except Exception as error:
        outcomes["a worker's own test"] = (False, str(error)[:300])
    return outcomes


def ranks(task: Task, device: torch.device) -> dict[str, Check]:
    """Returns whether one, two and four ranks on this device end with the same weights."""
    names = list(CASES[device.type])[:2]
    with tempfile.TemporaryDirectory(prefix="raymill-worlds-") as scratch:
        command = [sys.executable, "-m", "tests.gpu.worlds", device.type, scratch, *names]
        environment = os.environ | {
            "PYTHONPATH": str(REPOSITORY),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, env=environment, check=True
        )
    outcomes: dict[str, Check] = {}
    for case, worlds in json.loads(done.stdout.splitlines()[-1]).items():
        digests = sorted({digest[:16] for _, hashes, _ in worlds for digest in hashes})
        sizes = ", ".join(str(size) for size, _, _ in worlds)
        outcomes[f"weights of {sizes} ranks in {case}"] = (len(digests) == 1, " ".join(digests))
    return outcomes


CHECKS = {"gradients": gradients, "ranks": ranks}


def machine(device: torch.device) -> dict[str, Any]:
    card = torch.cuda.get_device_name() if device.type == "cuda" else None
    return {
        "card": card,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
    }


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
