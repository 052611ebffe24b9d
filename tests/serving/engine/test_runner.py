"""In which type a checkpoint is served: the fastest in which it stays what was trained."""

from pathlib import Path

import pytest

from cluster.settings.serve import EngineConfig
from model.hardware.processor import Precision
from serving.engine import runner
from serving.engine.runner import with_dtype
from tests.checkpoints import write_tiny


@pytest.mark.parametrize(
    ("trained", "fast", "dtype", "expected"),
    [
        ("bf16", "bf16", "auto", "bfloat16"),
        ("bf16", "fp32", "auto", "float32"),  # which emulates it
        ("fp32", "bf16", "auto", "float32"),  # nothing rounded its weights yet
        (None, "bf16", "auto", "float32"),  # an older checkpoint
        ("fp32", "fp32", "bfloat16", "bfloat16"),
        ("bf16", "bf16", "float32", "float32"),
        ("bf16", "bf16", "int8", "int8"),
    ],
)
def test_auto_keeps_to_the_checkpoint_and_to_the_processor(
    trained: str | None,
    fast: Precision,
    dtype: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_tiny(tmp_path / "checkpoint", precision=trained)
    monkeypatch.setattr(runner, "fast_precision", lambda device: fast)
    config = EngineConfig.model_validate({"dtype": dtype, "max_num_seqs": 3})
    settled = with_dtype(config, tmp_path / "checkpoint")
    assert settled == config.model_copy(update={"dtype": expected})


@pytest.mark.parametrize(("fast", "expected"), [("bf16", "bfloat16"), ("fp32", "float32")])
def test_on_a_gpu_auto_keeps_to_the_gpu_alone(
    fast: Precision, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny(tmp_path / "checkpoint", precision="fp32")
    asked = []
    monkeypatch.setattr(runner, "fast_precision", lambda device: asked.append(device) or fast)
    assert with_dtype(EngineConfig(device="cuda"), tmp_path / "checkpoint").dtype == expected
    assert asked == ["cuda"]


def test_what_transformers_saved_is_served_in_float32(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert with_dtype(EngineConfig(), tmp_path).dtype == "float32"
