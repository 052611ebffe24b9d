"""Tables that stand as TOML files beside the modules which use them."""

import shlex
import tomllib
from functools import cache
from pathlib import Path
from typing import Any


@cache
def read_table(module: str, name: str) -> dict[str, Any]:
    """Returns the table of that name beside the module whose `__file__` is given. All callers share
    it."""
    return tomllib.loads(Path(module).with_name(f"{name}.toml").read_text(encoding="utf-8"))


def pip_line(extra: str) -> str:
    """Returns the line that installs what an extra of `pyproject.toml` adds, for any environment: a
    package index has no raymill."""
    packages: list[str] = read_table(__file__, "extras")[extra]
    return f"pip install {' '.join(map(shlex.quote, packages))}"
