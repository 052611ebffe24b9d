"""Training tokens/s of one process: raymill's step beside Hugging Face's GPT-2 of the same shape, in one run.

Both do the same work on the same thread: forward, loss, backward, clipping, AdamW. They take turns, so that a change
of the machine's speed meets both. Prints a table and, last, one JSON object.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from cluster.config import TrainConfig
from jobs.train_state import TrainState
from model.config import resolve_preset
from model.gpt import GPT

NUM_ROUNDS = 7
BATCH_SIZE = 4
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def raymill_step(inputs: torch.Tensor, targets: torch.Tensor, *, dtype: torch.dtype) -> Callable[[], None]:
    model = GPT(resolve_preset({"preset": "small-10m"}))
    model.init_weights(0)
    state = TrainState(model, TrainConfig(), device=torch.device("cpu"))

    def step() -> None:
        state.gradient.zero_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model.loss(inputs, targets) / targets.numel()
        loss.backward()
        state.apply(state.gradient, learning_rate=1e-4)

    return step


def hugging_face_step(inputs: torch.Tensor, targets: torch.Tensor, *, dtype: torch.dtype) -> Callable[[], None]:
    shape = resolve_preset({"preset": "small-10m"})
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape.vocab_size,
            n_positions=shape.n_positions,
            n_layer=shape.n_layer,
            n_head=shape.n_head,
            n_embd=shape.n_embd,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(inputs).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def main() -> int:
    torch.set_num_threads(1)
    shape = resolve_preset({"preset": "small-10m"})
    tokens = torch.randint(shape.vocab_size, (BATCH_SIZE, shape.n_positions + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    result = {}
    for name, dtype in PRECISIONS.items():
        steps = {
            "raymill": raymill_step(inputs, targets, dtype=dtype),
            "hugging_face": hugging_face_step(inputs, targets, dtype=dtype),
        }
        seconds: dict[str, list[float]] = {peer: [] for peer in steps}
        for round_number in range(NUM_ROUNDS + 1):
            for peer, step in steps.items():
                start = time.perf_counter()
                step()
                if round_number:  # the first round warms up
                    seconds[peer].append(time.perf_counter() - start)
        ratio = statistics.median(
            theirs / ours for ours, theirs in zip(seconds["raymill"], seconds["hugging_face"], strict=True)
        )
        for peer, values in seconds.items():
            rate = inputs.numel() / statistics.median(values)
            spread = (max(values) - min(values)) / statistics.median(values)
            print(f"{name}  {peer:12}  {rate:8.0f} tokens/s  spread {spread:.0%}")
            result[f"{name}_{peer}_tokens_per_s"] = round(rate, 1)
        print(f"{name}  ratio         {ratio:8.2f}")
        result[f"{name}_ratio"] = round(ratio, 3)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
