"""Reads `commands.toml`, which declares every command, and adds arguments to the parser of the one that was asked for.

Functions and settings are named there, not imported: a command line imports only what its own command needs.
"""

import argparse
import math
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from cluster.commands.completion import COMPLETERS
from cluster.storage.uris import absolute_uri
from model.tables import read_table


def amount(text: str) -> float:
    if not 0 <= (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, not {text!r}")
    return value


_TYPES = {"int": int, "float": float, "amount": amount, "path": Path, "uri": absolute_uri}


def table() -> dict[str, Any]:
    """Returns `groups`, `shared` arguments and `commands`, each by name."""
    return read_table(__file__, "commands")


def add_argument(place: argparse._ActionsContainer, declared: str | dict[str, Any]) -> None:
    """Adds what `commands.toml` declares to a parser or group."""
    options = dict(table()["shared"][declared] if isinstance(declared, str) else declared)
    if "one_of" in options:
        arguments = options.pop("one_of")
        group = place.add_mutually_exclusive_group(**options)
        for argument in arguments:
            add_argument(group, argument)
    elif "settings" in options:
        tree = resolve_name(options.pop("settings"))
        resolve_name("cluster.settings.flags:add_config_arguments")(place, tree, **options)
    else:
        if "type" in options:
            options["type"] = _TYPES[options["type"]]
        completes = options.pop("completes", None)
        action = place.add_argument(*options.pop("name").split(), **options)
        if completes is not None:
            action.completer = COMPLETERS[completes]  # type: ignore[attr-defined]  # which argcomplete looks for
