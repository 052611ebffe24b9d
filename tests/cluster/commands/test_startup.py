"""The cost of a command line before it does anything: processor time and imported modules, of real
processes.

Processor time of the child alone counts, so that a busy machine changes little; the least of three.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.cli import COMMANDS, SECTIONS
from cluster.settings.code_folders import code_version, version
from tests.repository import REPOSITORY

pytestmark = pytest.mark.more

HEAVY = {
    "boto3", "botocore", "fastapi", "huggingface_hub", "kubernetes", "matplotlib", "openai", "pandas", "pyarrow", "ray",
    "requests", "safetensors", "starlette", "tiktoken", "tokenizers", "torch", "transformers", "uvicorn",
}  # fmt: skip


def measured(argv: list[str], folder: Path, **variables: str) -> tuple[float, set[str], str]:
    """Returns a command's CPU-seconds, the packages that it imported, and what it printed."""
    command = [sys.executable, "-X", "importtime", "-m", "cluster.cli", *argv]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | variables
    with (folder / "out").open("w+") as out, (folder / "imports").open("w+") as imports:
        process = subprocess.Popen(command, stdout=out, stderr=imports, env=environment, cwd=folder)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        imports.seek(0)
        lines = imports.read().splitlines()
        assert process.returncode == 0, lines[-1]
        packages = {
            line.rpartition("|")[2].strip().partition(".")[0]
            for line in lines
            if line.startswith("import")
        }
        return used.ru_utime + used.ru_stime, packages, out.read()


def check(
    argv: list[str], folder: Path, *, limit_s: float, banned: set[str], **variables: str
) -> str:
    """Returns what the command printed."""
    cpu_s, packages, shown = measured(argv, folder, **variables)
    assert not packages & banned
    assert "cluster" in packages, "the imports are seen at all"
    for _ in range(2):
        if cpu_s >= limit_s:
            cpu_s = min(cpu_s, measured(argv, folder, **variables)[0])
    assert cpu_s < limit_s
    return shown


def test_the_first_help_answers_at_once(tmp_path: Path) -> None:
    banned = HEAVY | {"httpx", "numpy", "pydantic", "rich", "yaml"}
    assert " pretrain " in check(["--help"], tmp_path, limit_s=0.6, banned=banned)
    shown = check(["--help", "all"], tmp_path, limit_s=0.6, banned=banned)
    abouts = {command.name: command.help for command in COMMANDS if " " not in command.name}
    for section in SECTIONS:
        abouts |= section.groups
    assert all(f" {name} " in shown and about.split()[0] in shown for name, about in abouts.items())


def test_the_version_names_the_code(tmp_path: Path) -> None:
    shown = check(
        ["--version"],
        tmp_path,
        limit_s=0.6,
        banned=HEAVY | {"httpx", "numpy", "pydantic", "rich", "yaml"},
    )
    assert shown == f"raymill {version()}, code {code_version()}\n"


@pytest.mark.parametrize("name", [command.name for command in COMMANDS])
def test_each_help_answers_at_once(name: str, tmp_path: Path) -> None:
    shown = check([*name.split(), "--help"], tmp_path, limit_s=0.9, banned=HEAVY)
    assert shown.startswith(f"usage: raymill {name} ")


def test_a_plan_that_measures_nothing_needs_neither_pytorch_nor_ray(tmp_path: Path) -> None:
    shown = check(
        ["plan", str(REPOSITORY / "jobs/configs/demo.yaml"), "--no-measure"],
        tmp_path,
        limit_s=2,
        banned=HEAVY,
    )
    assert shown.startswith("time ")


def test_a_list_needs_neither_pytorch_nor_ray(tmp_path: Path) -> None:
    assert check(["list"], tmp_path, limit_s=2, banned=HEAVY) == ""


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("raymill pre", "pretrain"),
        ("raymill pretrain --train.exact", "--train.exact"),
        ("raymill serve la", "latest"),
    ],
)
def test_a_shell_that_completes_a_line_waits_for_neither(
    line: str, word: str, tmp_path: Path
) -> None:
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    answer = tmp_path / "answer"
    check(
        [], tmp_path, limit_s=0.8, banned=HEAVY, **asked, _ARGCOMPLETE_STDOUT_FILENAME=str(answer)
    )
    assert answer.read_text().strip() == word
