"""What trains and what proves it on a GPU needs PyTorch and a few small packages: no Ray, no
storage client."""

import os
import subprocess
import sys

from tests.repository import REPOSITORY

REFUSED = [
    "ray",
    "boto3",
    "botocore",
    "pyarrow",
    "tokenizers",
    "huggingface_hub",
    "orjson",
    "fastapi",
    "rich",
]

IMPORT = """
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[2].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Refuse())
for name in sys.argv[1].split(","):
    importlib.import_module(name)
"""


def test_it_is_imported_where_nothing_else_is_installed() -> None:
    modules = "tests.gpu.worlds,tests.benchmarks.gpu_contenders"
    command = [sys.executable, "-c", IMPORT, modules, ",".join(REFUSED)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def test_a_refused_module_fails() -> None:
    """Shows that the test above can fail."""
    command = [sys.executable, "-c", IMPORT, "rich.table", ",".join(REFUSED)]
    assert (
        "No module named 'rich'"
        in subprocess.run(command, capture_output=True, text=True, check=False).stderr
    )
