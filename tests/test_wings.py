"""The wings of the house: each is named in one table, and the rest does without it."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path

import pytest

from cluster.settings.code_folders import CODE_FOLDERS
from cluster.wings import WINGS, Wing
from tests.repository import PYPROJECT, REPOSITORY
from tests.time_limits import limit_s

TABLE = "cluster/wings.py"
TAKEN_AWAY = ("jobs.trace", "jobs.watching", "serving.xray", "cluster.kube")
TESTS = (
    "tests/jobs/run/test_ledger.py",
    "tests/serving/engine/test_scheduler.py",
    "tests/cluster/submission/test_preflight.py",
)
"""Tests of three areas that are run without those wings."""

# In a process of its own, in a copy of the code: what starts each program of the product is
# imported, the commands and routes that there are without four wings are printed, and tests run.
STARTED = """
import sys
import pytest
import cluster.cli, jobs.pretrain, jobs.training.train_worker, serving.app, serving.replica
import serving.engine_process.run_engine
from cluster.settings.serve import ServeConfig
from tests.serving.endpoint_parts import all_routes_of
print(*(command.name.replace(" ", "-") for command in cluster.cli.COMMANDS))
print(*(route.path for route in all_routes_of(ServeConfig()).routes))
print(cluster.cli.__file__)
sys.exit(pytest.main(["-q", "-n0", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def names_of(wing: Wing) -> list[str]:
    kinds = [field.name for field in fields(wing) if field.name not in ("folder", "needs")]
    return [name for kind in kinds if (name := getattr(wing, kind)) is not None]


def test_each_name_in_the_table_is_there() -> None:
    names = [name for wing in WINGS for name in names_of(wing)]
    assert len(names) > 8
    for name in names:
        module, _, path = name.partition(":")
        source = (REPOSITORY / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        defined = {
            getattr(node, "name", None) or ast.unparse(getattr(node, "targets", [node])[0])
            for node in ast.parse(source).body
        }
        assert path.split(".")[0] in defined, name


def test_the_contract_is_about_the_wings_of_the_table() -> None:
    [contract] = [
        contract
        for contract in PYPROJECT["tool"]["importlinter"]["contracts"]
        if contract["name"] == "the rest does without its wings"
    ]
    assert set(contract["forbidden_modules"]) == {wing.folder for wing in WINGS}


def imported(folder: str) -> set[str]:
    """Returns the modules that those in a folder import, wherever they do."""
    found: set[str] = set()
    for file in (REPOSITORY / folder.replace(".", "/")).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                found.add(node.module or "")
    return found


@pytest.mark.parametrize("wing", WINGS, ids=[wing.folder for wing in WINGS])
def test_a_wing_stands_on_those_alone_that_it_names(wing: Wing) -> None:
    others = {other.folder for other in WINGS} - {wing.folder}
    used = {".".join(module.split(".")[:2]) for module in imported(wing.folder)}
    assert used & others == set(wing.needs)


def without(table: str, folders: Collection[str]) -> str:
    """Returns the table's source without the entries of these folders."""
    entries = [
        node
        for node in ast.walk(ast.parse(table))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "Wing"
        and isinstance(node.args[0], ast.Constant)
        and node.args[0].value in folders
    ]
    assert len(entries) == len(folders)
    gone = {line for entry in entries for line in range(entry.lineno, (entry.end_lineno or 0) + 1)}
    lines = table.splitlines(keepends=True)
    return "".join(line for number, line in enumerate(lines, start=1) if number not in gone)


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code and its tests without four wings."""
    copy = tmp_path_factory.mktemp("smaller")
    for folder in (*CODE_FOLDERS, "tests"):  # with what is compiled of them
        shutil.copytree(REPOSITORY / folder, copy / folder, ignore=shutil.ignore_patterns("k8s"))
    shutil.copy(REPOSITORY / "pyproject.toml", copy)
    for wing in TAKEN_AWAY:
        shutil.rmtree(copy / wing.replace(".", "/"))
    table = copy / TABLE
    table.write_text(without(table.read_text(encoding="utf-8"), TAKEN_AWAY), encoding="utf-8")
    return copy


@pytest.mark.slow
def test_without_four_wings_the_rest_starts_and_passes_its_tests(smaller: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARTED, *TESTS],
        cwd=smaller,
        capture_output=True,
        text=True,
        check=False,
        timeout=limit_s(120),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    commands, routes, place = done.stdout.splitlines()[:3]
    assert place == str(smaller / "cluster" / "cli.py")
    assert {"pretrain", "serve", "verify", "report"} <= set(commands.split())
    assert {"track", "trace-find", "trace-index", "cluster-apply", "cluster-render"}.isdisjoint(
        commands.split()
    )
    assert {"/v1/completions", "/tokenize", "/", "/page/api.js"} <= set(routes.split())
    assert {"/v1/xray", "/v1/trace", "/inside"}.isdisjoint(routes.split())
    assert " passed" in done.stdout
