"""The argparse of `raymill` and its modules, whose errors are one line with a suggestion. It
imports nothing heavy."""

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import Any, Never

from raymill.errors import UserError


class ConfigError(UserError):
    """The command line or the configuration file is wrong: exit code 2."""


class Manual(argparse.HelpFormatter):
    """Writes `--help`, with one word for all settings in the usage, which they would fill by the
    dozen."""

    def add_usage(
        self, usage: str | None, actions: Iterable[argparse.Action], groups: Any, prefix: Any = None
    ) -> None:
        actions = list(actions)
        named = [action for action in actions if not _is_setting(action)]
        if len(named) < len(actions):
            named.append(argparse.ArgumentParser().add_argument("--SETTING", metavar="VALUE ..."))
        super().add_usage(usage, named, groups, prefix)


class FirstManual(Manual, argparse.RawDescriptionHelpFormatter):
    """Writes `raymill --help`, whose description has its own lines."""


def _is_setting(action: argparse.Action) -> bool:
    flag = action.option_strings[0] if action.option_strings else ""
    return "." in flag and action.metavar == "VALUE"


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `ConfigError` and never accepts abbreviated flags. With
    `is_short` it is for a help that has of a run's many settings only the ones that are changed
    first."""

    def __init__(self, *, is_short: bool = False, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **{"formatter_class": Manual} | settings)
        self.is_short = is_short

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses unknown arguments here, as only a subcommand's own parser can suggest its
        flags."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            known = list(self._option_string_actions)
            meant = newcomers_word(flag.rpartition(".")[2]) if "--train.max-tokens" in known else ""
            self.error(f"unknown argument {flag}{meant or suggestion(flag, known)}")
        return namespace, unknown

    def error(self, message: str) -> Never:
        if wrong := _CHOICE.fullmatch(message):
            message = f"unknown command {wrong['word']}{suggestion(wrong['word'], _NAME.findall(wrong['known']))}"
        raise ConfigError(f"{message} (see `{self.prog} --help`)")


_CHOICE = re.compile(
    r"argument COMMAND: invalid choice: '(?P<word>[^']*)' \(choose from (?P<known>.*)\)"
)
"""Matches how argparse refuses a command, by a list of all of them."""
_NAME = re.compile(r"[\w-]+")

_NEWCOMERS = {
    "lr": "train.learning_rate",
    "steps": "train.max_tokens, a number of tokens (`raymill plan` says how many steps they are)",
    "max_steps": "train.max_tokens, a number of tokens (`raymill plan` says how many steps they are)",
    "epochs": "train.max_tokens, a number of tokens; the corpus is repeated as often as they take",
    "batch_size": "train.global_batch_size, of all workers together",
    "block_size": "train.seq_len",
    "context_length": "train.seq_len",
    "gpus": "scaling.max_workers, with scaling.use_gpu",
    "workers": "scaling.max_workers",
    "dataset": "data.source",
    "output_dir": "storage.uri",
}
"""Names that people from other projects type, and the setting that they mean."""


def newcomers_word(word: str) -> str:
    """Returns the end of an error that names the setting that people mean by a word, or an empty
    text."""
    meant = _NEWCOMERS.get(word.lstrip("-").replace("-", "_"))
    return f"; did you mean {meant}?" if meant else ""


def suggestion(word: str, known: list[str]) -> str:
    """Returns the end of an error that suggests the known word nearest to this one, or an empty
    text."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
