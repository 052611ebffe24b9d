"""Random adapters of a small model, as runs leave them, and what each computes merged."""

from pathlib import Path
from typing import NamedTuple

import torch

from cluster.settings.run import RunConfig, adapted
from jobs.run.base import Base
from jobs.training.warm_start import store_base
from model.adapters.lora import Adapter
from model.decoders.make import initial_weights
from model.files.checkpoint import load_decoder, write_checkpoint
from model.files.checkpoint_folder import Metadata
from model.gpt import GPT
from model.text.tokenizer import Tokenizer

RANK = 4


class MadeAdapter(NamedTuple):
    folder: Path
    merged: GPT


def stored_base(storage: Path, model: GPT, tokenizer: Tokenizer) -> Base:
    config = RunConfig.model_validate({"run_id": "base", "storage": {"uri": str(storage)}})
    weights = {name: values.detach() for name, values in model.named_parameters()}
    return store_base(config, model.config, weights, tokenizer, source="hf://OWNER/NAME")


def made_adapter(
    storage: Path,
    name: str,
    base: Base,
    model: GPT,
    tokenizer: Tokenizer,
    *,
    seed: int,
    rank: int = RANK,
) -> MadeAdapter:
    """Writes the checkpoint of a run of that name."""
    settings = {"init_from": "there", "lora_rank": rank}
    train = RunConfig.model_validate({"train": settings}).train
    shape = adapted(model.config, train)
    assert isinstance(shape.adapter, Adapter)
    torch.manual_seed(seed)
    weights = {part: torch.randn(values.shape) / 8 for part, values in initial_weights(shape, 0)}
    metadata = Metadata(
        run_id=name,
        step=seed,
        tokens_seen=seed,
        data_manifest_hash=None,
        code_version="test",
        base=base.uri,
        base_hash=base.parameter_hash,
        base_source=base.source,
    )
    folder = storage / f"runs/{name}/checkpoints/step-{seed:09}"
    write_checkpoint(
        folder,
        config=shape,
        state=weights,
        tokenizer=tokenizer,
        metadata=metadata,
        train_state=None,
    )
    merged = load_decoder(folder, base=base.folder(str(storage)))
    assert isinstance(merged, GPT)
    return MadeAdapter(folder, merged)
