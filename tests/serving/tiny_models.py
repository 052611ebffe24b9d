"""Small models for the endpoint's tests, and their checkpoint folders."""

import shutil
from pathlib import Path
from typing import Any

from model.architecture import ArchitectureName
from model.config import GPTConfig
from model.files.checkpoint_folder import Metadata
from model.gpt import GPT
from model.text.tokenizer import Tokenizer
from tests.checkpoints import save_model

RUN_ID = "tiny-run"
FRAGILE_POSITION = 120  # from which on the logits of the fragile checkpoint are not finite
LONG_CONTEXT_TOKENS = 256


def lively_model(
    tokenizer: Tokenizer,
    *,
    n_embd: int = 32,
    n_positions: int = 128,
    spread: float = 0.3,
    seed: int = 1,
    architecture: ArchitectureName = "gpt2",
) -> GPT:
    """Returns a model with widely spread weights (0.3 instead of 0.02), whose greedy output does
    not repeat one token. Llama's has one head of keys and values for two of queries."""
    shape: dict[str, Any] = (
        {"n_kv_head": 1, "activation_function": "swiglu"} if architecture == "llama" else {}
    )
    config = GPTConfig(
        vocab_size=tokenizer.vocab_size,
        n_positions=n_positions,
        n_layer=2,
        n_head=2,
        n_embd=n_embd,
        initializer_range=spread,
        architecture=architecture,
        **shape,
    )
    gpt = GPT(config)
    gpt.init_weights(seed)
    return gpt.eval()


def write_model(
    folder: Path, model: GPT, tokenizer: Tokenizer, *, step: int = 1, to_train: bool = False
) -> Path:
    metadata = Metadata(
        run_id=RUN_ID, step=step, tokens_seen=step, data_manifest_hash=None, code_version="test"
    )
    train_state = (
        {f"exp_avg.{name}": tensor for name, tensor in model.state_dict().items()}
        if to_train
        else None
    )
    save_model(folder, model=model, tokenizer=tokenizer, metadata=metadata, train_state=train_state)
    return folder


def as_transformers_folder(checkpoint: Path, folder: Path) -> Path:
    """Copies a checkpoint without raymill's manifest, whose hashes would reveal later changes."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        shutil.copy(checkpoint / name, folder)
    return folder
