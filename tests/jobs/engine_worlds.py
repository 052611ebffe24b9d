"""Trains modules that raymill does not know by the exact engine, over real gloo processes, in
worlds of several sizes, and prints the results.

    python -m tests.jobs.engine_worlds MAX_WORLD_SIZE FOLDER [adapters]

The last word names other cases. Prints one JSON object: by case, the hash of the weights after training in each world, in one whose
size changes at each step, and by stock DistributedDataParallel.
"""

import json
import multiprocessing
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from raymill import AdamW, ExactEngine, Muon
from raymill.files.safetensors_file import parameter_hash
from raymill.rules.update_rule import UpdateRule
from raymill.state.shard import Shard

NUM_STEPS, NUM_LANES = 4, 6
STOCK_LANES = 12  # which DistributedDataParallel divides evenly in each world
RESIZES = (3, 1, 4, 2)  # the world's size at each step
ADAMW = AdamW(0.9, 0.95, 0.1)
_NUM_CLASSES = 5


@dataclass(frozen=True)
class Case:
    """A module, and a loss whose batch is a generator seeded by step and lane."""

    module: Callable[[], nn.Module]
    loss: Callable[[nn.Module, torch.Generator], Tensor]
    rule: UpdateRule = ADAMW
    shard: Shard = "none"


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2),
        nn.GroupNorm(2, 6),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(6 * 7 * 7, _NUM_CLASSES),
    )


def images_of(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    images = torch.rand(4, 1, 16, 16, generator=generator)
    return images, torch.randint(_NUM_CLASSES, (4,), generator=generator)


def loss_of_images(model: nn.Module, generator: torch.Generator) -> Tensor:
    images, labels = images_of(generator)
    return cross_entropy(model(images), labels)


def vision() -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=40,
            image_size=16,
            patch_size=8,
            num_channels=1,
            num_labels=_NUM_CLASSES,
        )
    )


def loss_of_vision(model: nn.Module, generator: torch.Generator) -> Tensor:
    images, labels = images_of(generator)
    return model(pixel_values=images, labels=labels).loss


def speech() -> nn.Module:
    """Without what is drawn by NumPy, which masks time steps."""
    model = Wav2Vec2Model(
        Wav2Vec2Config(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            conv_dim=(8, 8),
            conv_stride=(5, 4),
            conv_kernel=(10, 8),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            apply_spec_augment=False,
            layerdrop=0.0,
        )
    )
    model.masked_spec_embed.requires_grad_(False)
    return model


def loss_of_speech(model: nn.Module, generator: torch.Generator) -> Tensor:
    waves = torch.randn(2, 400, generator=generator)
    return model(waves).last_hidden_state.square().mean()


def adapter() -> nn.Module:
    """A frozen Qwen3 with low-rank adapters (arXiv 2106.09685), by PEFT."""
    from peft import LoraConfig, get_peft_model  # seconds that other cases do not need

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    return get_peft_model(base(), config)


def base() -> nn.Module:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=101,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            intermediate_size=48,
        )
    )


def loss_of_text(model: nn.Module, generator: torch.Generator) -> Tensor:
    ids = torch.randint(101, (2, 12), generator=generator)
    return model(input_ids=ids, labels=ids).loss


CASES = {
    "convolutions": Case(convolutions, loss_of_images),
    "convolutions, sharded": Case(convolutions, loss_of_images, shard="gradients"),
    "vision": Case(vision, loss_of_vision, shard="optimizer"),
    "vision, Muon": Case(vision, loss_of_vision, rule=Muon(0.95, 0.1, ADAMW), shard="gradients"),
    "speech": Case(speech, loss_of_speech),
}
ADAPTERS = {
    "adapter": Case(adapter, loss_of_text),
    "adapter, sharded": Case(adapter, loss_of_text, shard="gradients"),
}


def generator_of(step: int, lane: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * step + lane)


def new_engine(case: Case) -> ExactEngine[torch.Generator]:
    torch.manual_seed(0)
    return ExactEngine(
        case.module(),
        case.loss,
        num_lanes=NUM_LANES,
        rule=case.rule,
        shard=case.shard,
        grad_clip=0.5,
        seed=7,
    )


def take_step(engine: ExactEngine[torch.Generator]) -> float:
    step = engine.num_steps
    return engine.step(lambda lane: generator_of(step, lane), learning_rate=1e-2).loss


def hash_by_stock_ddp(case: Case, rank: int, world_size: int) -> str:
    """The hash after steps of `torch.optim.AdamW` on such lanes, all seeded, with the sums of
    DistributedDataParallel."""
    torch.manual_seed(0)
    module = case.module()
    model = DistributedDataParallel(module) if world_size > 1 else module
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        lanes = range(rank, STOCK_LANES, world_size)
        for lane in lanes:
            torch.manual_seed(lane)
            (case.loss(model, generator_of(step, lane)) / len(lanes)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
    return parameter_hash(dict(module.named_parameters()))


@contextmanager
def world(rank: int, world_size: int, folder: Path, name: str) -> Any:
    """Joins a world, and says whether this process is part of it."""
    if rank >= world_size:
        yield False
        return
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=world_size
    )
    try:
        yield True
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run_rank(
    rank: int, max_world_size: int, folder: Path, cases: dict[str, Case]
) -> dict[str, dict[str, Any]]:
    torch.set_num_threads(1)
    results: dict[str, dict[str, Any]] = {name: {"ddp": {}} for name in cases}
    for world_size in range(1, max_world_size + 1):
        with world(rank, world_size, folder, f"world-{world_size}") as is_member:
            if not is_member:
                continue
            for name, case in cases.items():
                engine = new_engine(case)
                losses = [take_step(engine) for _ in range(NUM_STEPS)]
                results[name][str(world_size)] = {"hash": engine.weights_hash(), "losses": losses}
                engine.close()
                if name == "convolutions":
                    stock = hash_by_stock_ddp(case, rank, world_size)
                    results[name]["ddp"][str(world_size)] = stock
    losses_of_case: dict[str, list[float]] = {name: [] for name in cases}
    for step, world_size in enumerate(RESIZES):
        with world(rank, world_size, folder, f"step-{step}") as is_member:
            if not is_member:
                continue
            for number, (name, case) in enumerate(cases.items()):
                engine = new_engine(case)
                if step:
                    engine.load(folder / f"state-{number}-{step}")
                losses_of_case[name].append(take_step(engine))
                saved = folder / f"state-{number}-{step + 1}"
                saved.mkdir(exist_ok=True)
                engine.save(saved)
                results[name]["resized"] = {
                    "hash": engine.weights_hash(),
                    "losses": losses_of_case[name],
                }
                engine.close()
    return results


if __name__ == "__main__":
    size, path = int(sys.argv[1]), Path(sys.argv[2])
    suite = ADAPTERS if sys.argv[3:] == ["adapters"] else CASES
    # Forked while this process has no other thread: torch is imported once for all ranks.
    with multiprocessing.get_context("fork").Pool(size) as pool:
        found = pool.starmap(
            run_rank, [(rank, size, path, suite) for rank in range(size)], chunksize=1
        )
    print(json.dumps(found[0]))
