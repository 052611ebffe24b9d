"""A tiny model with lively logits, its checkpoint folder, and prompts of different lengths."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from model.config import GPTConfig
from model.files.checkpoint_folder import Metadata
from model.gpt import GPT
from model.text.tokenizer import Tokenizer, train_bpe
from raymill.files.safetensors_file import parameter_hash
from tests.checkpoints import save_model
from tests.serving.tiny_models import (
    FRAGILE_POSITION,
    LONG_CONTEXT_TOKENS,
    RUN_ID,
    lively_model,
    write_model,
)


@pytest.fixture(scope="module", autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """In an empty folder: endpoints without a storage of their own keep their state in `.raymill`
    there."""
    with contextlib.chdir(tmp_path_factory.mktemp("cwd")):
        yield


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_bpe(
        ["the quick brown fox jumps over the lazy dog, and naïve cafés sell €5 tea\n" * 9],
        vocab_size=300,
        normalize=[],
    )


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> GPT:
    return lively_model(tokenizer)


@pytest.fixture(scope="session")
def checkpoint(model: GPT, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "step-7"
    metadata = Metadata(
        run_id=RUN_ID,
        step=7,
        tokens_seen=7000,
        data_manifest_hash="d" * 64,
        code_version="test",
        parameter_hash=parameter_hash(model.state_dict()),
        val_loss=None,
        val_bits_per_byte=None,
    )
    save_model(folder, model=model, tokenizer=tokenizer, metadata=metadata)
    return folder


@pytest.fixture(scope="session")
def prompts(model: GPT) -> list[list[int]]:
    """Eight, of 1 to 57 tokens."""
    return [
        [(7 * i + 11 * k) % model.config.vocab_size for k in range(1 + 8 * i)] for i in range(8)
    ]


@pytest.fixture(scope="session")
def long_model(tokenizer: Tokenizer) -> GPT:
    """Large enough that HTTP, on the same two processors, costs little beside its answers."""
    shape = {"n_positions": LONG_CONTEXT_TOKENS, "n_layer": 8, "n_head": 8, "n_embd": 512}
    gpt = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, initializer_range=0.3, **shape))
    gpt.init_weights(1)
    return gpt.eval()


@pytest.fixture(scope="session")
def long_checkpoint(
    long_model: GPT, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return write_model(tmp_path_factory.mktemp("checkpoints") / "long-1", long_model, tokenizer)


@pytest.fixture(scope="session")
def fragile_checkpoint(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, whose logits are no numbers from position `FRAGILE_POSITION` on; as a folder
    of transformers, since raymill writes no such weights."""
    folder = tmp_path_factory.mktemp("checkpoints") / "fragile"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(checkpoint / name, folder)
    tensors = load_file(checkpoint / "model.safetensors")
    [name] = [name for name in tensors if "wpe" in name]
    tensors[name][FRAGILE_POSITION:] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def closing(tokenizer: Tokenizer) -> dict[str, float]:
    """Biases by which a random model comes to an end."""
    ids = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) in b'"}]']
    return {str(token_id): 8.0 for token_id in (*ids, tokenizer.eot_id)}


@pytest.fixture(scope="session")
def wide_checkpoint(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of one layer, with room for long answers."""
    shape = {"n_positions": 512, "n_layer": 1, "n_head": 2, "n_embd": 32}
    gpt = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, initializer_range=0.3, **shape))
    gpt.init_weights(3)
    return write_model(tmp_path_factory.mktemp("checkpoints") / "wide", gpt.eval(), tokenizer)
