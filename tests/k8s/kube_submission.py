"""A run that `raymill submit --kuberay` submits, and the command's result."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.cli import main
from cluster.settings.flags import validate_config
from cluster.settings.run import RunConfig
from cluster.storage.uris import open_storage


def run_config(**branches: Any) -> RunConfig:
    """Returns run Demo_1 of up to three workers, with these settings over its own."""
    values: dict[str, Any] = {
        "run_id": "Demo_1",
        "data": {"source": "s3://raymill/corpus"},
        "model": {"preset": "tiny"},
        "scaling": {"min_workers": 1, "max_workers": 3},
        "storage": {"uri": "s3://raymill"},
    }
    return validate_config(values | branches, RunConfig)


def submission(bucket: str, folder: Path) -> list[str]:
    """Makes a corpus and the run's file. Returns the command's words, which are accepted."""
    uri = f"s3://{bucket}/store"
    open_storage(f"s3://{bucket}").write_bytes("corpus/a.txt", b"words")
    values = run_config(data={"source": f"s3://{bucket}/corpus"}, storage={"uri": uri}).model_dump(
        mode="json"
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return ["submit", "pretrain", str(folder / "run.yaml"), "--kuberay", "dev"]


def asked(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> dict[str, Any]:
    """Runs the command in this process, and returns its result."""
    assert main([*argv, "--json"]) == code
    return json.loads(capsys.readouterr().out.splitlines()[-1])
