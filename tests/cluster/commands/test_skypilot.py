"""The recipes for SkyPilot are YAML of its fields, and Ray and raymill take their commands."""

import re
import shlex
from typing import Any

import pytest
import yaml
from ray.scripts.scripts import start

from cluster.cli import command_parser
from tests.repository import REPOSITORY

PAGE = (REPOSITORY / "docs/how-to/skypilot.md").read_text(encoding="utf-8")
TASKS = [yaml.safe_load(text) for text in re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S)]
# As its documentation of YAML files lists them
FIELDS = {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "setup", "run"}
RESOURCES = {"infra", "accelerators", "cpus", "memory", "use_spot", "job_recovery"}


def commands(task: dict[str, Any], program: str) -> list[list[str]]:
    lines = task["run"].replace("\\\n", " ").splitlines()
    split = [shlex.split(line) for line in lines]
    return [words[1:] for words in split if words[:1] == [program]]


@pytest.mark.parametrize("task", TASKS, ids=[task["name"] for task in TASKS])
def test_a_task_has_fields_of_skypilot_and_commands_that_are_taken(task: dict[str, Any]) -> None:
    assert task.keys() <= FIELDS and task["resources"].keys() <= RESOURCES
    taken = {option for parameter in start.params for option in parameter.opts}
    for words in commands(task, "ray"):
        assert words[0] == "start"
        assert {word for word in words if word.startswith("--")} <= taken
    for words in commands(task, "raymill"):
        command_parser().parse_args(words)
    assert "pip install --constraint .ci/constraints.txt ." in task["setup"]
    assert (REPOSITORY / ".ci/constraints.txt").exists()


def test_the_page_has_a_head_workers_and_a_job_with_budgets() -> None:
    by_name = {task["name"]: task for task in TASKS}
    assert by_name.keys() == {"raymill-job", "raymill-head", "raymill-worker"}
    for name in ("raymill-job", "raymill-head"):
        [words] = commands(by_name[name], "raymill")
        assert "--scaling.max-cost" in words and "--run-id" in words
    for name in ("raymill-job", "raymill-worker"):
        assert by_name[name]["resources"]["use_spot"]
        assert "RAY_NODE_MARKET_TYPE=spot" in by_name[name]["run"]
    named = set(re.findall(r"^(?:sky|for) .*?([\w-]+)\.yaml", PAGE, re.M))
    assert named == by_name.keys()
