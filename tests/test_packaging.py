"""Every import is of a declared package, and a wheel is built without a warning and lacks
nothing."""

import ast
import os
import pty
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from cluster.settings.code_folders import CODE_FOLDERS
from tests.repository import PYPROJECT, REPOSITORY
from tests.wheel import OF_AN_EXTRA, build_wheel, copied

PROJECT = PYPROJECT["project"]


def names(requirements: list[str]) -> set[str]:
    return {normal(re.split(r"[\[<>=!; ]", requirement)[0]) for requirement in requirements}


CLIENTS = {"agents": "openai-agents", "haystack": "haystack-ai"}
"""Distributions that have their packages' names in other words, and are not installed here."""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imports(folder: str) -> Iterator[tuple[str, str, bool]]:
    """Yields (file, module, whether it is imported with the file) of everything that the folder's
    files import."""
    for path in sorted((REPOSITORY / folder).rglob("*.py")):
        file, tree = (
            path.relative_to(REPOSITORY).as_posix(),
            ast.parse(path.read_text(encoding="utf-8")),
        )
        later = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = (
                    [node.module or ""]
                    if isinstance(node, ast.ImportFrom)
                    else [a.name for a in node.names]
                )
                yield from ((file, module, id(node) not in later) for module in modules)


def undeclared(folder: str, declared: set[str]) -> set[tuple[str, str]]:
    distributions = packages_distributions()
    found = set()
    for file, module, with_file in imports(folder):
        package = module.partition(".")[0]
        if package in sys.stdlib_module_names or package in (*CODE_FOLDERS, "tests"):
            continue
        parts = module.split(".")
        # What is not installed here is owned by its name; LlamaIndex's parts are named in full
        if (REPOSITORY / file).with_name(f"{package}.py").is_file():
            continue
        named = [
            CLIENTS.get(package, ""),
            *(".".join(parts[: end + 1]) for end in range(len(parts))),
        ]
        owners = {normal(owner) for owner in distributions.get(package, named)}
        if package not in OF_AN_EXTRA.get(file, ()) and not (owners & declared) and with_file:
            found.add((file, module))
    return found


@pytest.mark.more
@pytest.mark.parametrize("folder", CODE_FOLDERS)
def test_what_a_module_imports_is_a_core_dependency(folder: str) -> None:
    assert undeclared(folder, names(PROJECT["dependencies"])) == set()
    assert (
        any(with_file for _, module, with_file in imports(folder) if module.startswith("torch"))
        or folder == "cluster"
    )


@pytest.mark.more
@pytest.mark.parametrize("folder", ["tests", ".ci"])
def test_what_a_test_imports_is_declared(folder: str) -> None:
    declared = names(PROJECT["dependencies"])
    for needed in (
        *PROJECT["optional-dependencies"].values(),
        *PYPROJECT["dependency-groups"].values(),
    ):
        declared |= names(needed)
    assert undeclared(folder, declared) == set()


@pytest.mark.more
def test_modules_of_an_extra_are_imported_only_when_they_are_needed() -> None:
    extras = {file.removesuffix(".py").replace("/", ".") for file in OF_AN_EXTRA}
    found = [
        (file, module)
        for folder in CODE_FOLDERS
        for file, module, at_once in imports(folder)
        if at_once
    ]
    assert [
        (file, module) for file, module in found if module in extras and file not in OF_AN_EXTRA
    ] == []


def test_torch_is_bound_to_one_release() -> None:
    """`make` and the image use the same one. It is a range, as PyTorch's own index adds a wheel's
    device to its version."""
    constraints = (REPOSITORY / ".ci/constraints.txt").read_text(encoding="utf-8")
    (low, high) = re.findall(r"^torch>=2\.(\d+),<2\.(\d+)$", constraints, re.MULTILINE)[0]
    assert int(high) == int(low) + 1
    assert "--constraint .ci/constraints.txt" in (REPOSITORY / "Makefile").read_text(
        encoding="utf-8"
    )
    for build in ("cpu", "gpu"):
        packages = (REPOSITORY / f".ci/image-{build}.txt").read_text(encoding="utf-8")
        assert re.search(rf"^torch==2\.{low}\.", packages, re.MULTILINE)


def test_an_editable_installation_prints_no_warning(tmp_path: Path) -> None:
    """`make` does this first."""
    copy = copied(tmp_path)
    build = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=copy, capture_output=True, text=True, check=True
    )
    assert "warn" not in done.stderr.lower()


def test_a_wheel_is_built_without_a_warning_and_lacks_nothing(tmp_path: Path) -> None:
    wheel, said = build_wheel(tmp_path)
    assert not re.search("warn", said, re.IGNORECASE), said
    held = set(zipfile.ZipFile(wheel).namelist())
    code = {
        p
        for folder in CODE_FOLDERS
        for p in (REPOSITORY / folder).rglob("*")
        if p.suffix not in (".pyc", ".md")
    }
    expected = {
        path.relative_to(REPOSITORY).as_posix()
        for path in code
        if path.suffix not in (".png", ".svg") and path.is_file()
    }
    assert expected - held == set()
    manifests = {
        path.relative_to(REPOSITORY)
        for path in (REPOSITORY / "k8s").glob("*/**/*")
        if path.is_file()
    }
    assert {f"cluster/{path.as_posix()}" for path in manifests} - held == set()
    assert not [name for name in held if name.endswith((".md", ".png", ".svg", "Dockerfile"))]


@pytest.mark.parametrize("at_terminal", [True, False])
def test_the_installation_says_what_it_does(at_terminal: bool) -> None:
    """And pip says what it fetches, to a person who watches."""
    reader, writer = pty.openpty() if at_terminal else os.pipe()
    command = ["make", "--dry-run", "--always-make", "--no-print-directory", ".venv/.installed"]
    done = subprocess.run(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=writer, text=True, check=True
    )
    for descriptor in (reader, writer):
        os.close(descriptor)
    _, begins, *_, installs, _, ends = done.stdout.splitlines()
    assert "Installing raymill and what it needs into .venv" in begins
    assert ("--quiet" in installs) != at_terminal and "--editable" in installs
    assert ". .venv/bin/activate" in ends
