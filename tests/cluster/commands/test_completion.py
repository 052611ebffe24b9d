"""A real bash completes a line: commands, flags, presets, and the runs and checkpoints of the
storage."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import write_tiny
from tests.command_line import RAYMILL, environment
from tests.time_limits import limit_s

REGISTER = Path(sys.executable).with_name("register-python-argcomplete")
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")

# Registers the command as the guide says, and calls what bash would call at a press of TAB.
PRESS_TAB = """
eval "$({register} raymill)"
complete -p raymill > /dev/null || exit 3
COMP_LINE={line}
COMP_POINT=${{#COMP_LINE}}
function=$(complete -p raymill | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
$function raymill
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with two runs, of which one has two checkpoints, and with the command in
    `bin`."""
    folder = tmp_path_factory.mktemp("typed")
    for step in (50, 100):
        write_tiny(folder / f".raymill/runs/first/checkpoints/step-{step:09}-0001", step=step)
    (folder / ".raymill/runs/second").mkdir()
    (folder / "elsewhere/runs/third").mkdir(parents=True)
    (folder / "bin").mkdir()
    command = folder / "bin/raymill"
    command.write_text(f'#!/bin/sh\nexec {shlex.join(RAYMILL)} "$@"\n')
    command.chmod(0o755)
    return folder


def completions(line: str, folder: Path) -> set[str]:
    """Returns what bash would put in place of the last word."""
    done = subprocess.run(
        ["bash", "--norc", "-c", PRESS_TAB.format(register=REGISTER, line=shlex.quote(line))],
        cwd=folder,
        env=environment() | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
        timeout=limit_s(60),
    )
    return {word.strip() for word in done.stdout.splitlines()} - {""}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("raymill pre", ["pretrain"]),
        ("raymill checkpoint ", ["show", "list"]),
        (
            "raymill pretrain --train.max",
            ["--train.max-tokens", "--train.max-skipped-steps", "--train.max-rollbacks"],
        ),
        ("raymill pretrain --model.preset small", ["small-10m"]),
        ("raymill pretrain --train.recompute ", ["true", "false"]),
        ("raymill evaluate --precision ", ["auto", "fp32", "bf16"]),
        ("raymill submit p", ["pretrain", "pipeline"]),
        ("raymill demo --preset demo-", ["demo-llama"]),
        ("raymill status ", ["first", "second"]),
        ("raymill logs --storage.uri elsewhere ", ["third"]),
        ("raymill status --storage.uri s3://bucket/x ", []),
        ("raymill compare first sec", ["second"]),
        ("raymill serve l", ["latest"]),
        ("raymill export s", ["second"]),
        ("raymill cluster render sp", ["spot"]),
    ],
    ids=str,
)
def test_a_line_is_completed(line: str, words: list[str], folder: Path) -> None:
    assert completions(line, folder) == set(words)


def test_a_checkpoint_is_completed_to_a_step_of_its_run(folder: Path) -> None:
    """As `@` divides words for bash, it takes the part after it alone."""
    assert completions("raymill evaluate first@", folder) == {"50", "100"}


def test_no_line_is_completed_to_what_the_help_leaves_out(folder: Path) -> None:
    flags = completions("raymill pretrain --data.", folder)
    assert "--data.vocab-size" in flags and not {flag for flag in flags if "_" in flag}
