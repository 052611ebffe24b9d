"""Runs that recorded settings which are constants now are still read, continued, replayed and compared."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.settings.flags import validate_config
from cluster.settings.parser import ConfigError
from cluster.settings.run import FORMER_SETTINGS, RunConfig
from cluster.storage.uris import Storage, open_storage
from jobs.proof.diff_runs import diff
from jobs.proof.replay_run import replay
from jobs.report.make_report import make_report
from jobs.run.history import CONFIG_FILE, changed_settings, recorded_config
from jobs.training.train_loop import train
from tests.jobs.runs import tiny_plan

UNUSUAL: dict[str, Any] = {
    "sample_tokens": 9,
    "timing": False,
    "while_tokenizing": True,
    "max_failures": 3,
    "start_timeout_s": 5,
    "spool_bytes": 1,
    "standby": 2,
}


def record(run: Storage, values: dict[str, Any]) -> None:
    """Records each former setting of these names, as the version that had it did; the others with their constants."""
    settings = yaml.safe_load(run.read_bytes(CONFIG_FILE))
    for path, constant in FORMER_SETTINGS.items():
        branch, name = path.split(".")
        settings[branch][name] = values.get(name, constant)
    run.write_bytes(CONFIG_FILE, yaml.safe_dump(settings).encode())


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    plan = tiny_plan(str(tmp_path_factory.mktemp("usual")), train={"sample_prompts": []})
    train(plan, rank=0, world_size=1)
    return plan.run


@pytest.fixture
def old(usual: Storage, tmp_path: Path) -> Storage:
    shutil.copytree(Path(usual.uri).parents[1], tmp_path / "old")
    return open_storage(str(tmp_path / "old")).child("runs/tiny")


def test_what_decides_no_bits_is_ignored(usual: Storage, old: Storage) -> None:
    record(old, UNUSUAL)
    config = recorded_config(old)
    assert config == recorded_config(usual)
    assert changed_settings(old, config) == []
    assert replay(old, steps=range(7, 9))["equal"]
    assert diff(usual, old)["settings"] == {}
    assert make_report(old)["html"]


@pytest.mark.parametrize(("name", "value"), [("epsilon", 1e-6), ("spike_window", 16)])
def test_other_bits_are_refused_with_the_version_that_made_them(
    usual: Storage, old: Storage, name: str, value: float
) -> None:
    record(old, UNUSUAL | {name: value})
    constant = FORMER_SETTINGS[f"train.{name}"]
    says = rf"was trained with train\.{name} {value}, which is fixed at {constant} now: .*\(code_version test\)"
    for use in (
        lambda: changed_settings(old, recorded_config(usual)),
        lambda: replay(old, steps=range(7, 9)),
        lambda: diff(usual, old),
        lambda: make_report(old),
    ):
        with pytest.raises(ConfigError, match=says):
            use()


@pytest.mark.parametrize("path", FORMER_SETTINGS)
def test_a_file_of_ones_own_is_asked_to_leave_them_out(path: str) -> None:
    branch, name = path.split(".")
    with pytest.raises(ConfigError, match=f"{path} is no setting any more, its value is a constant; leave it out"):
        validate_config({branch: {name: 1}}, RunConfig)
