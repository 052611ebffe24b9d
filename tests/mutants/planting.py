"""Plants a mutant: from now on a module of this name is imported from another file.

It knows the standard library alone, as every Python that a test starts imports it first.
"""

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

_VARIABLE = "RAYMILL_MUTANT"
_AT_START = """import sys
sys.path.append({repository!r})
from tests.mutants.planting import plant_from_environment
plant_from_environment()
sys.path.remove({repository!r})
"""


class _Planted(MetaPathFinder):
    def __init__(self, module: str, file: Path) -> None:
        self._module, self._file = module, file

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if fullname != self._module:
            return None
        return importlib.util.spec_from_file_location(fullname, self._file)


def plant(module: str, source: str, folder: Path) -> None:
    """Plants the source as that module, in this process and in each Python that it starts.
    `folder` is empty, and the mutant's own. The module must not be imported yet."""
    assert module not in sys.modules, f"{module} is imported"
    file = folder / "mutant.py"
    file.write_text(source, encoding="utf-8")
    repository = str(Path(__file__).parents[2])
    at_start = _AT_START.format(repository=repository)
    (folder / "sitecustomize.py").write_text(at_start, encoding="utf-8")
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join([path for path in paths if path])
    os.environ[_VARIABLE] = f"{module}={file}"
    plant_from_environment()


def plant_from_environment() -> None:
    module, _, file = os.environ[_VARIABLE].partition("=")
    sys.meta_path.insert(0, _Planted(module, Path(file)))
