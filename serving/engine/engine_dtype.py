"""The type in which an engine computes, chosen for a checkpoint. This module does not import PyTorch."""

from pathlib import Path

from cluster.settings.serve import EngineConfig
from model.checkpoint_folder import is_hf_folder, read_metadata
from model.processor import fast_precision


def with_dtype(config: EngineConfig, folder: Path) -> EngineConfig:
    """Returns the settings with a type instead of `auto`.

    A run in bf16 rounded its matrices to bf16 in each step, so bf16 serves it without loss where the processor computes
    bf16 at speed. All others are served in float32, which rounds nothing, except on a GPU: it has fast attention for
    bf16 alone.
    """
    if config.dtype != "auto":
        return config
    trained = None if is_hf_folder(folder) else read_metadata(folder).precision
    is_bf16 = (trained == "bf16" or config.device == "cuda") and fast_precision(config.device) == "bf16"
    return config.model_copy(update={"dtype": "bfloat16" if is_bf16 else "float32"})
