"""`pip install raymill` gives a working program: a wheel and its core dependencies, in a new
environment, used elsewhere.

Not the checkout, nor any package of an extra, can be seen from there.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.cli import COMMANDS
from cluster.local.local_cluster import free_port
from cluster.settings.code_folders import CODE_FOLDERS
from model.tables import pip_line
from tests.repository import REPOSITORY
from tests.time_limits import limit_s
from tests.wheel import OF_AN_EXTRA, build_wheel

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


RUN = """
data: {source: [texts], vocab_size: 400, val_fraction: 0.2}
model: {preset: tiny, n_positions: 128}
train: {max_tokens: 16384, global_batch_size: 4, micro_batch_size: 2, eval_max_tokens: 4096}
scaling: {max_workers: 1}
cluster: {num_nodes: 1}
"""


@dataclass(frozen=True)
class Installation:
    """An environment, and the folder that its commands are typed in."""

    environment: Path
    folder: Path

    @property
    def variables(self) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in ("PYTHONPATH", "VIRTUAL_ENV")
        }
        return kept | {"PATH": f"{self.environment / 'bin'}:/usr/bin:/bin"}

    def command(self, *words: str) -> list[str]:
        return [str(self.environment / "bin" / "raymill"), *words]

    def raymill(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words),
            cwd=self.folder,
            env=self.variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=limit_s(300),
        )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    folder = tmp_path_factory.mktemp("core")
    wheel, _ = build_wheel(folder)
    environment, elsewhere = folder / "environment", folder / "elsewhere"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    command = [
        environment / "bin" / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ]
    subprocess.run(
        [*command, "--constraint", REPOSITORY / ".ci" / "constraints.txt", wheel], check=True
    )
    (elsewhere / "texts").mkdir(parents=True)
    for number in range(40):
        words = " ".join(f"w{number * k % 97}" for k in range(120))
        (elsewhere / "texts" / f"{number}.txt").write_text(f"Document {number}. {words}\n")
    (elsewhere / "run.yaml").write_text(RUN)
    return Installation(environment, elsewhere)


@pytest.fixture(scope="module")
def trained(installed: Installation) -> str:
    """The run's id."""
    done = installed.raymill("pretrain", "run.yaml", "--json")
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout.splitlines()[-1])["run_id"])


def test_nothing_of_an_extra_is_there(installed: Installation) -> None:
    probe = "import importlib.util as u; print([n for n in ('openai', 'kubernetes', 'mlflow', 'pytest') if u.find_spec(n)])"
    done = subprocess.run(
        [installed.environment / "bin" / "python", "-c", f"{probe}; import cluster; print(cluster.__file__)"],
        cwd=installed.folder, env=installed.variables, capture_output=True, text=True, check=True,
    )  # fmt: skip
    extras, place = done.stdout.splitlines()
    assert extras == "[]"
    assert Path(place).is_relative_to(installed.environment)


def test_only_modules_of_an_extra_cannot_be_imported(installed: Installation) -> None:
    (packages,) = installed.environment.glob("lib/python*/site-packages")
    files = [path for folder in CODE_FOLDERS for path in sorted((packages / folder).rglob("*.py"))]
    places = [
        path.relative_to(packages).with_suffix("") for path in files if path.stem != "__init__"
    ]
    modules = [".".join(place.parts) for place in places]
    assert len(modules) > 200
    probe = (
        "import importlib, sys\n"
        "from raymill.errors import UserError\n"
        "for module in sys.argv[1:]:\n"
        "    try: importlib.import_module(module)\n"
        "    except (ImportError, UserError): print(module)\n"
    )
    done = subprocess.run(
        [installed.environment / "bin" / "python", "-c", probe, *modules],
        cwd=installed.folder, env=installed.variables, capture_output=True, text=True, check=True,
    )  # fmt: skip
    missing = {f"{module.replace('.', '/')}.py" for module in done.stdout.split()}
    assert missing == set(OF_AN_EXTRA)


def test_each_command_has_its_manual(installed: Installation) -> None:
    """A forked process for each, so that none needs what another has imported."""
    probe = (
        "import os, sys\n"
        "from cluster.cli import main\n"
        "for name in sys.argv[1:]:\n"
        "    sys.argv[1:] = [*name.split(), '--help']\n"
        "    print(end='\\f', flush=True)\n"
        "    if os.fork() == 0: sys.exit(main())\n"
        "    assert os.wait()[1] == 0, name\n"
    )
    names = [command.name for command in COMMANDS]
    done = subprocess.run(
        [installed.environment / "bin" / "python", "-c", probe, *names],
        cwd=installed.folder, env=installed.variables, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    _, *manuals = done.stdout.split("\f")
    for name, manual in zip(names, manuals, strict=True):
        assert manual.startswith(f"usage: raymill {name} ")


def test_a_run_is_planned(installed: Installation) -> None:
    done = installed.raymill("plan", "run.yaml", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 32


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["cluster", "render", "dev"], "k8s"),
        (["cluster", "status"], "k8s"),
        (["submit", "pretrain", "run.yaml", "--kuberay", "dev"], "k8s"),
        (["track", "RUN", "--mlflow", "experiment"], "tracking"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_a_command_of_an_extra_names_it(
    words: list[str], extra: str, installed: Installation, trained: str
) -> None:
    done = installed.raymill(*(trained if word == "RUN" else word for word in words))
    assert done.returncode == 1
    *said, error = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert f"`{pip_line(extra)}`" in error
    assert len(said) == (words[0] == "track")  # which run it is


def test_the_manifests_are_there(installed: Installation) -> None:
    """The manifests are in the wheel; kubectl, which renders them, belongs to an extra."""
    (held,) = installed.environment.glob("lib/python*/site-packages/cluster/k8s")
    assert (held / "overlays" / "dev" / "kustomization.yaml").is_file()
    done = installed.raymill("cluster", "render", "production")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "one of dev, eks, gke, gpu, gpu-node, gpu-serving, kueue, spot" in done.stderr


def test_a_run_is_reported_and_exported(installed: Installation, trained: str) -> None:
    for words in (
        ["report", trained],
        ["verify", trained],
        ["export", "latest", "out"],
        ["evaluate", "latest"],
    ):
        done = installed.raymill(*words, "--json")
        assert done.returncode == 0, done.stderr


@pytest.fixture
def url(installed: Installation, trained: str) -> Iterator[str]:
    command = installed.command(
        "serve", "latest", "--port", str(free_port()), "--api-key-file", "key", "--json"
    )
    server = subprocess.Popen(
        command, cwd=installed.folder, env=installed.variables, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        yield json.loads(server.stdout.readline())["url"]
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(limit_s(60)) == 0


def test_the_endpoint_answers(url: str, installed: Installation) -> None:
    done = installed.raymill("complete", "Document 3.", "--max-tokens", "8", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["usage"]["completion_tokens"] == 8
    assert url.startswith("http://127.0.0.1:")
