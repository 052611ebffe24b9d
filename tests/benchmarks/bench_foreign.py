"""A model of transformers in raymill's exact step, beside transformers' own Trainer and a plain loop.

    python -m tests.benchmarks.bench_foreign [--rounds 5] [--steps 20] [--compiled] [--tiny]

One process, one thread, the same small Qwen3 with the same weights on the same batches in fp32. The
contenders take turns round by round; a round is a number of steps after two that are not timed. Of
a thread that waits for nothing, processor time is what a step takes on a quiet machine.
raymill computes as `train.compute` plain, which is the default of these models, with the loss by
chunks and the lane's gradient summed exactly. Trainer has its defaults (accelerate, fused AdamW),
and neither logs nor saves. With --compiled, raymill computes as `train.compute` compiled, and the
peers' forward and backward passes are under torch.compile. A ratio is the median of its rounds'
ratios; above 1, raymill is faster.
Prints a table and, last, one JSON object.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from cluster.settings.run import RunConfig
from jobs.exact.run_state import run_state
from jobs.exact.step_gradient import step_gradient
from model.decoders.make import new_decoder
from model.foreign_config import ForeignConfig
from model.hardware.memory import keep_freed_memory
from raymill.step_timer import StepTimer
from raymill.workers.worker_group import WorkerGroup
from tests.benchmarks.plain_gpt2 import training_step
from tests.benchmarks.train_steps import RowsInMemory, exactly
from tests.foreign_models import small

NUM_WARM_UPS = 2
SMALL = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 768,
    "vocab_size": 8192,
    "max_position_embeddings": 256,
}


class Seconds(NamedTuple):
    """Of a step."""

    wall: float
    cpu: float  # processor time, which other programs hardly change

    @classmethod
    def now(cls) -> "Seconds":
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: "Seconds", *, num_steps: int) -> "Seconds":
        return Seconds((self.wall - start.wall) / num_steps, (self.cpu - start.cpu) / num_steps)


Round = Callable[[int], Seconds]
"""Trains so many steps and returns the time of one, without those that warm up."""


@dataclass(frozen=True)
class Work:
    """What every contender does."""

    shape: ForeignConfig
    batch_size: int
    seq_len: int
    is_compiled: bool = False

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len

    def rows(self, num_steps: int) -> Tensor:
        """Returns tokens (steps, B, T + 1)."""
        generator = torch.Generator().manual_seed(0)
        size = (num_steps, self.batch_size, self.seq_len + 1)
        return torch.randint(self.shape.vocab_size, size, generator=generator)

    def weights(self) -> dict[str, Tensor]:
        return dict(self.module().named_parameters())

    def module(self) -> Any:
        """Returns transformers' own module, as its users make it, with the same weights each
        time."""
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(self.shape.hf, dtype=torch.float32)


def raymill(work: Work) -> Round:
    train = {
        "compute": "compiled" if work.is_compiled else "plain",
        "global_batch_size": work.batch_size,
        "micro_batch_size": work.batch_size,
        "seq_len": work.seq_len,
        "max_tokens": 10_000 * work.tokens_per_step,
        "precision": "fp32",
    }
    config = RunConfig.model_validate(
        {"model": {"config": work.shape.values}, "train": train, "scaling": {"max_workers": 1}}
    )
    keep_freed_memory()  # for the whole process: its peers gain by it as well
    group = WorkerGroup(rank=0, world_size=1)
    model = new_decoder(work.shape)
    model.adopt({name: weight.detach() for name, weight in work.weights().items()})
    model.requires_grad_(True)
    state = run_state(model.train(), config.train, device=torch.device("cpu"), group=group)

    def steps(num_steps: int) -> Seconds:
        rows: Any = RowsInMemory(work.rows(num_steps + NUM_WARM_UPS))
        gradient, timer = step_gradient(config, state, rows, group, eot_id=None), StepTimer()
        start = Seconds.now()
        for number in range(num_steps + NUM_WARM_UPS):
            if number == NUM_WARM_UPS:
                start = Seconds.now()
            with exactly():
                measured = gradient.of_step(number + 1, timer)
                state.apply(norm=measured.norm, learning_rate=6e-4)
            timer.take()
        return Seconds.now().since(start, num_steps=num_steps)

    return steps


def plain_loop(work: Work) -> Round:
    model: nn.Module = work.module().train()

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        logits = model(input_ids=inputs).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    computed = torch.compile(loss_of, dynamic=False) if work.is_compiled else loss_of
    step = training_step(model, computed, is_bf16=False)

    def steps(num_steps: int) -> Seconds:
        start = Seconds.now()
        for number, batch in enumerate(work.rows(num_steps + NUM_WARM_UPS)):
            if number == NUM_WARM_UPS:
                start = Seconds.now()
            step([(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())])
        return Seconds.now().since(start, num_steps=num_steps)

    return steps


class _Clock(TrainerCallback):
    """Takes the time from the end of the steps that warm up."""

    def __init__(self) -> None:
        self.start = Seconds.now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == NUM_WARM_UPS:
            self.start = Seconds.now()


def trainer(work: Work) -> Round:
    model = work.module().train()

    def steps(num_steps: int) -> Seconds:
        rows = work.rows(num_steps + NUM_WARM_UPS).flatten(0, 1)
        dataset = [{"input_ids": row[:-1], "labels": row[:-1]} for row in rows]
        clock = _Clock()
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=work.batch_size,
                max_steps=num_steps + NUM_WARM_UPS,
                learning_rate=6e-4,
                weight_decay=0.1,
                lr_scheduler_type="constant",
                use_cpu=True,
                torch_compile=work.is_compiled,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            )
            made = Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=[clock])
            made.remove_callback(PrinterCallback)
            made.train()
        return Seconds.now().since(clock.start, num_steps=num_steps)

    return steps


PEERS: dict[str, Callable[[Work], Round]] = {"plain loop": plain_loop, "Trainer": trainer}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a round")
    parser.add_argument("--compiled", action="store_true", help="every contender compiled")
    parser.add_argument("--tiny", action="store_true", help="a shape that shows only that it runs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    work = Work(small("qwen3"), 2, 32) if given.tiny else Work(small("qwen3", **SMALL), 4, 256)
    work = replace(work, is_compiled=given.compiled)
    rounds = {"raymill": raymill(work)} | {name: make(work) for name, make in PEERS.items()}
    taken: dict[str, list[Seconds]] = {name: [] for name in rounds}
    for number in range(given.rounds):
        turns = list(rounds.items())
        for name, steps in turns if number % 2 else reversed(turns):
            taken[name].append(steps(given.steps))
    figures = figures_of(taken, work)
    print(json.dumps(figures))
    return 0


def figures_of(taken: dict[str, list[Seconds]], work: Work) -> dict[str, Any]:
    """Prints a line for each contender, and returns all figures."""
    figures: dict[str, Any] = {"parameters": work.shape.num_parameters}
    for name, seconds in taken.items():
        rate = work.tokens_per_step / statistics.median(one.wall for one in seconds)
        pairs = [*zip(seconds, taken["raymill"], strict=True)]
        wall = statistics.median(theirs.wall / ours.wall for theirs, ours in pairs)
        cpu = statistics.median(theirs.cpu / ours.cpu for theirs, ours in pairs)
        print(
            f"{name:12} {rate:8,.0f} tokens/s   raymill {wall:.2f} x, of processor time {cpu:.2f} x"
        )
        word = name.lower().replace(" ", "_")
        figures |= {f"{word}_tokens_per_s": round(rate, 1)}
        if name in PEERS:
            figures |= {f"over_{word}": round(wall, 3), f"cpu_over_{word}": round(cpu, 3)}
    best = min(figures[f"over_{word}"] for word in _WORDS)
    return figures | {
        "best_peer_ratio": best,
        "best_peer_cpu_ratio": min(figures[f"cpu_over_{word}"] for word in _WORDS),
    }


_WORDS = [name.lower().replace(" ", "_") for name in PEERS]


if __name__ == "__main__":
    sys.exit(main())
