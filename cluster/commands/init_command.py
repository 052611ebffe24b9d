"""`raymill init`: writes a commented file of the settings that a newcomer changes first."""

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

from cluster.settings.leaves import FIRST_TO_CHANGE, Leaf, leaves
from cluster.settings.run import RunConfig
from model.errors import UserError

_VALUES: dict[str, Any] = {"model.preset": "small-10m", "train.max_tokens": 20_000_000}
"""The values that are not the setting's default, as in the README's example: a model that needs no GPU."""

_HEAD = """\
# The settings of a run that are changed first. `raymill pretrain --help` lists all of them.
"""
_WIDTH = 100


def init(arguments: argparse.Namespace) -> dict[str, Any]:
    """Writes the file, and never over one that is there."""
    path: Path = arguments.file
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(first_settings())
    except FileExistsError:
        raise UserError(f"{path} is there already and stays as it is; name another file") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    arguments.next = f"set data.source in {path}, then `raymill plan {path}` and `raymill pretrain {path}`"
    return {"file": str(path)}


def first_settings() -> str:
    """Returns the settings as YAML, each below the line of its help."""
    by_path = {leaf.path: leaf for leaf in leaves(RunConfig)}
    text, section = _HEAD, ""
    for path in FIRST_TO_CHANGE:
        branch, name = path.split(".")
        if branch != section:
            text += f"\n{branch}:\n"
            section = branch
        text += _commented(name, by_path[path])
    return text


def _commented(name: str, leaf: Leaf) -> str:
    lines = textwrap.wrap(leaf.help, _WIDTH, break_long_words=False, break_on_hyphens=False)
    comment = "\n".join(f"  # {line}" for line in lines)
    value = json.dumps(_VALUES.get(leaf.path, leaf.default))  # which YAML reads as well
    return f"{comment}\n  {name}: {value}\n"
