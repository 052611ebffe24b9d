"""An adapter's step and state beside those of training all weights.

    python -m tests.benchmarks.bench_adapters [--rank 16] [--steps 3] [--tiny]

Each way in a process of its own, one thread, the same Qwen3 on the same rows in bf16: after a step
that is not timed, the processor time of a step, the bytes of the training state, and the memory that
is the process's own (USS; the base's file is mapped, and with one process counts as its own).
Prints a table and, last, one JSON object.
"""

import argparse
import json
import multiprocessing
import sys
import time
from typing import Any

import psutil
import torch

from cluster.settings.run import RunConfig
from jobs.exact.frozen import freeze
from jobs.exact.run_state import run_state
from jobs.exact.step_gradient import step_gradient
from model.adapters.lora import Adapter
from model.decoders.adapted import AdaptedModel
from model.decoders.make import initial_weights, new_decoder
from model.foreign_config import ForeignConfig
from raymill.state.sharding import Sharding
from raymill.state.train_state import ALONE
from raymill.step_timer import StepTimer
from tests.benchmarks.train_steps import RowsInMemory
from tests.foreign_models import small
from tests.jobs.train_worlds import base_of

CPU = torch.device("cpu")
LARGE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 2304,
    "vocab_size": 8192,
    "max_position_embeddings": 256,
}


def measured(shape: ForeignConfig, num_steps: int) -> dict[str, float]:
    """Returns the figures of this process, which has trained nothing before."""
    torch.set_num_threads(1)
    config = RunConfig.model_validate(
        {
            "train": {
                "global_batch_size": 4,
                "micro_batch_size": 4,
                "compute": "plain",
                "precision": "bf16",
                "seq_len": 128,
            },
            "scaling": {"max_workers": 1},
        }
    ).model_copy(update={"model": shape})
    before = psutil.Process().memory_full_info().uss
    with torch.device("meta"):
        model = new_decoder(shape)
    if isinstance(model, AdaptedModel):
        with base_of(model) as folder:
            freeze(model, folder, device=CPU, sharding=Sharding(), group=ALONE)
    state = run_state(model, config.train, device=CPU)
    state.load_weights(initial_weights(shape, 0))
    drawn = torch.randint(shape.vocab_size, (num_steps + 1, 4, 129))
    rows: Any = RowsInMemory(drawn)
    gradient = step_gradient(config, state, rows, ALONE, eot_id=None)
    start_s = 0.0
    for step in range(1, num_steps + 2):
        if step == 2:
            start_s = time.process_time()
        norm = gradient.of_step(step, StepTimer()).norm
        state.apply(norm=norm, learning_rate=1e-3)
    return {
        "trained": shape.num_parameters,
        "state_bytes": sum(part.nbytes for part in (*state.parts.values(), state.gradient)),
        "uss_bytes": psutil.Process().memory_full_info().uss - before,
        "step_cpu_s": (time.process_time() - start_s) / num_steps,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a model of a test's size")
    options = parser.parse_args()
    whole = small("qwen3", **({} if options.tiny else LARGE))
    adapted = whole.with_adapter(Adapter(options.rank, 2 * options.rank, ()))
    results = {}
    for name, shape in (("all weights", whole), ("adapter", adapted)):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results[name] = pool.apply(measured, (shape, options.steps))
        figures = results[name]
        print(
            f"{name:12} {figures['trained']:>12,} trained  state {figures['state_bytes'] / 1e6:8,.0f} MB  "
            f"own memory {figures['uss_bytes'] / 1e6:8,.0f} MB  a step {figures['step_cpu_s']:.3f} s"
        )
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
