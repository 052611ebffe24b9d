"""`engine.dtype: auto`: the fastest type in which a checkpoint stays what was trained."""

from pathlib import Path

from cluster.serve_config import EngineConfig
from model.checkpoint_folder import is_hf_folder, read_metadata
from model.processor import fast_precision


def with_dtype(config: EngineConfig, folder: Path) -> EngineConfig:
    """Returns the settings with the type in the place of `auto`; where another one is set, as they are.

    A run in bf16 rounded its matrices to bf16 in each step, so that they may be served so where the processor computes
    bf16 at speed. All others are served in float32, which rounds nothing.
    """
    if config.dtype != "auto":
        return config
    trained = None if is_hf_folder(folder) else read_metadata(folder).precision
    is_rounded = trained == "bf16" and fast_precision(config.device) == "bf16"
    return config.model_copy(update={"dtype": "bfloat16" if is_rounded else "float32"})
