"""The tokenizer in a checkpoint's folder, or in one that transformers saved."""

from pathlib import Path

from model.files.checkpoint_folder import StoredModel
from model.text.tokenizer import Tokenizer, chat_format, from_gpt2_files
from raymill.errors import CheckpointError


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """Returns the checkpoint's tokenizer, or None where a folder that transformers saved holds
    none."""
    if (path := folder / "tokenizer.json").exists():
        chat = chat_format(
            lambda name: (folder / name).read_bytes() if (folder / name).exists() else None
        )
        return Tokenizer.from_json(path.read_bytes(), chat)
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return from_gpt2_files(folder / "vocab.json", folder / "merges.txt")
    if StoredModel(folder).is_of_transformers:
        return None
    raise CheckpointError(f"checkpoint {folder} is not valid: tokenizer.json is missing")
