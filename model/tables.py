"""Tables that stand as TOML files beside the modules which use them."""

import tomllib
from functools import cache
from pathlib import Path
from typing import Any


@cache
def read_table(module: str, name: str) -> dict[str, Any]:
    """Returns the table of that name beside the module whose `__file__` is given. All callers share
    it."""
    return tomllib.loads(Path(module).with_name(f"{name}.toml").read_text(encoding="utf-8"))
