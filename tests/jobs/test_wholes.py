"""The whole settings files of docs/wholes: each is taken as it stands, and plans as its head says."""

import json
import re
from pathlib import Path

import pytest
import yaml

from cluster.cli import main
from cluster.kube.kustomize import rendered_overlay
from cluster.kube.rayjob import rayjob
from cluster.settings.flags import read_config
from cluster.settings.run import RunConfig
from jobs.plan.memory import worker_needs
from tests.repository import REPOSITORY

FILES = sorted((REPOSITORY / "docs/wholes").glob("*.yaml"))
PLANNED = re.compile(r"^# `raymill (plan docs/wholes/[^`]*)`.*says:\n((?:#   .*\n)+)", re.MULTILINE)
QWEN3 = {  # Qwen3-0.6B's, as its page on the hub has it
    "model_type": "qwen3",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_taken_and_its_page_says_how(path: Path) -> None:
    config = read_config(path, RunConfig)
    assert config.run_id == path.stem and config.data.source
    page = (REPOSITORY / "docs/how-to/wholes.md").read_text(encoding="utf-8")
    [command] = re.findall(
        rf"^#   (raymill .* ?docs/wholes/{path.name}.*)$", path.read_text(), re.M
    )
    assert f"[{path.name}](../wholes/{path.name}) | `{command}` |" in page


@pytest.mark.parametrize(
    "path",
    # transformers knows the adapter's model, and takes seconds to import
    [
        pytest.param(path, marks=[pytest.mark.more] if path.stem == "adapter" else [])
        for path in FILES
    ],
    ids=lambda path: path.stem,
)
def test_what_a_files_head_says_of_a_gpu_is_what_the_planner_says(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    (tmp_path / "docs").symlink_to(REPOSITORY / "docs")
    monkeypatch.chdir(tmp_path)
    said = PLANNED.findall(path.read_text(encoding="utf-8"))
    assert len(said) == (path.stem not in {"laptop", "three-machines"})
    for command, lines in said:
        assert main(command.split()) == 0
        shown = capsys.readouterr()
        assert lines.replace("#   ", "") in shown.out + shown.err


def test_the_one_for_spot_nodes_is_a_job_of_that_overlay(tmp_path: Path) -> None:
    config = read_config(REPOSITORY / "docs/wholes/spot.yaml", RunConfig)
    here = config.storage.model_copy(update={"uri": str(tmp_path)})
    config = config.model_copy(update={"storage": here})
    overlay = rendered_overlay(REPOSITORY / "k8s/overlays/spot", None)
    job, settings = rayjob(overlay, config, "pretrain", name="run-1", needs=worker_needs(config))
    assert yaml.safe_load(settings["data"]["run.yaml"])["model"]["n_layer"] == 24
    spot, on_demand = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert spot["maxReplicas"] == on_demand["maxReplicas"] == config.scaling.max_workers
    assert spot["template"]["spec"]["nodeSelector"]["raymill/capacity"] == "spot"
