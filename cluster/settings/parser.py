"""The argparse of `raymill` and its modules, whose errors are one line with a suggestion. It imports nothing heavy."""

import argparse
import difflib
from typing import Any, Never

from model.errors import UserError


class ConfigError(UserError):
    """The command line or the configuration file is wrong: exit code 2."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `ConfigError` and never accepts abbreviated flags."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses unknown arguments here, as only a subcommand's own parser can suggest its flags."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            self.error(f"unknown argument {flag}{suggestion(flag, list(self._option_string_actions))}")
        return namespace, unknown

    def error(self, message: str) -> Never:
        raise ConfigError(f"{message} (see `{self.prog} --help`)")


def suggestion(word: str, known: list[str]) -> str:
    """Returns the end of an error that suggests the known word nearest to this one, or an empty text."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
