"""The file that `raymill init` writes: the settings that are changed first, each below its help."""

import json
import textwrap
from typing import Any

from cluster.settings.leaves import FIRST_TO_CHANGE, Leaf, leaves
from cluster.settings.run import RunConfig

_VALUES: dict[str, Any] = {"model.preset": "small-10m", "train.max_tokens": 20_000_000}
"""The values that are not the setting's default, as in the README's example: a model that needs no
GPU."""

_HEAD = """\
# The settings of a run that are changed first. `raymill pretrain --help` lists all of them.
"""
_WIDTH = 100


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
