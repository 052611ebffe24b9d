"""Tab completion: what a shell may put next on a command line that is being typed, by argcomplete's
protocol.

It asks the files of this machine alone: a shell waits for the answer, and imports neither PyTorch
nor Ray.
"""

import argparse
import os
from pathlib import Path
from typing import Any, NoReturn

from cluster.settings.code_folders import overlay_names
from cluster.storage.uris import open_storage


def is_asked() -> bool:
    """Says whether a shell runs this process to complete a line."""
    return "_ARGCOMPLETE" in os.environ


def typed_words() -> list[str]:
    """Returns the words before the cursor, without the command's own name."""
    before_cursor = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
    return before_cursor.split()[1:]


def answer(parser: argparse.ArgumentParser) -> NoReturn:
    """Writes the completions to the shell's pipe, and ends the process."""
    import argcomplete

    argcomplete.autocomplete(parser, always_complete_options=False)
    raise AssertionError("argcomplete ends the process")


def run_ids(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Returns the ids of the storage's runs."""
    runs = _runs(parsed_args)
    if runs is None or not runs.is_dir():
        return []
    return sorted(folder.name for folder in runs.iterdir() if folder.is_dir())


def checkpoints(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Returns `latest` and the ids of the storage's runs; the run's steps once its id and `@` are
    typed."""
    from cluster.storage.references import checkpoint_steps

    run_id, at, _step = prefix.partition("@")
    runs = _runs(parsed_args)
    if not at or runs is None:
        return ["latest", *run_ids(parsed_args)]
    steps = checkpoint_steps(open_storage(str(runs / run_id)))
    return [f"{run_id}@{step}" for step in sorted(set(steps.values()))]


def _runs(parsed_args: argparse.Namespace) -> Path | None:
    """Returns the folder of the storage's runs, or None where it is not on this machine."""
    uri = vars(parsed_args).get("storage.uri") or ".raymill"
    return open_storage(uri).local_path("runs")


def overlays(**_: Any) -> list[str]:
    """Returns the names of raymill's overlays."""
    return overlay_names()
