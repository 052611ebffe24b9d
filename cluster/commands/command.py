"""A command of `raymill` as a record: its words, its help, its arguments, and the function that
returns its result.

The functions import what they need when they are called, so that a command line pays for its own
command alone.
"""

import argparse
import json
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from cluster.output.progress import say
from cluster.output.result_text import lines, put
from cluster.output.spoken_names import for_people
from cluster.settings.parser import Parser

if TYPE_CHECKING:
    from cluster.settings.setting import Settings

Value = TypeVar("Value")
Config = TypeVar("Config", bound="Settings")


@dataclass(frozen=True, eq=False)
class Argument(Generic[Value]):
    """An argument, by which `Arguments` gives its value. Its fields are argparse's, of
    `add_argument`."""

    names: str  # such as `run_id`, or `-f --follow`
    help: str | None = None
    parse: Callable[[str], Any] | None = None
    nargs: str | int | None = None
    default: Value | None = None
    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    required: bool = False
    completer: Callable[..., list[str]] | None = None  # of what a shell may put in its place

    @property
    def dest(self) -> str:
        longest = max(self.names.split(), key=len)
        return longest.lstrip("-").replace("-", "_")

    def add_to(self, place: argparse._ActionsContainer) -> None:
        options: dict[str, Any] = {
            "type": self.parse,
            "nargs": self.nargs,
            "default": self.default,
            "metavar": self.metavar,
            "choices": self.choices,
        }
        if self.names.startswith("-"):
            options |= {"dest": self.dest, "required": self.required}
        action = place.add_argument(*self.names.split(), help=self.help, **options)
        if self.completer is not None:
            action.completer = self.completer  # type: ignore[attr-defined]  # which argcomplete looks for


@dataclass(frozen=True, eq=False)
class Switch(Argument[bool]):
    """A flag without a value: True where it is given."""

    def add_to(self, place: argparse._ActionsContainer) -> None:
        names = self.names.split()
        place.add_argument(
            *names, action="store_true", dest=self.dest, required=self.required, help=self.help
        )


@dataclass(frozen=True)
class SettingAs:
    """A flag without a value that stands for a value of a setting."""

    name: str
    help: str
    setting: str
    value: str

    def add_to(self, place: argparse._ActionsContainer) -> None:
        place.add_argument(
            self.name, action="store_const", dest=self.setting, const=self.value, help=self.help
        )


@dataclass(frozen=True)
class OneOf:
    """Arguments of which at most one may be given, or exactly one."""

    arguments: tuple[Argument[Any], ...]
    required: bool = False

    def add_to(self, place: argparse._ActionsContainer) -> None:
        group = place.add_mutually_exclusive_group(required=self.required)
        for argument in self.arguments:
            argument.add_to(group)


@dataclass(frozen=True)
class SettingsOf:
    """A flag for each setting of a tree, of which one may also stand by itself (`positional`)."""

    tree: "Callable[[], type[Settings]]"
    positional: str = ""

    def add_to(self, place: argparse._ActionsContainer) -> None:
        from cluster.settings.flags import add_config_arguments

        assert isinstance(place, Parser), "settings are no choice among others"
        add_config_arguments(place, self.tree(), positional=self.positional)


@dataclass(frozen=True)
class Result:
    """A command's answer: `values` are its JSON, and lines for people unless there is a
    `text`."""

    values: Mapping[str, Any]
    text: str | None = None
    is_bad: bool = False  # exit code 1
    next: str = ""  # what a person may type now
    is_shown: bool = False  # already, by `Arguments.show`

    @classmethod
    def of_manifests(cls, manifests: Sequence[Mapping[str, Any]], **values: Any) -> "Result":
        """Returns Kubernetes' manifests with `values`, to be printed as the manifests' YAML."""
        import yaml

        text = yaml.safe_dump_all(manifests, sort_keys=False)
        return cls({**values, "objects": manifests}, text=text)


@dataclass(frozen=True)
class Arguments:
    """The values of a command line. A command reads them and writes none."""

    words: Sequence[str]  # as they were typed
    is_json: bool
    values: Mapping[str, Any]  # by `Argument.dest`, and those of settings by their dotted name

    def __getitem__(self, argument: Argument[Value]) -> Value:
        value: Value = self.values[argument.dest]
        return value

    def config(
        self, root: type[Config], *, needs_source: bool = True, **positional: str | None
    ) -> Config:
        """Returns the settings that the file and the flags give, and says what is worth saying of
        them. Raises `ConfigError`. A setting that stands by itself is given by its name."""
        from cluster.settings.flags import resolve_config

        given = {**self.values, **positional}
        file: Path | None = given["config"]
        resolved = resolve_config(given, root, file=file, needs_source=needs_source)
        if resolved.note:
            say(resolved.note)
        return resolved.config

    def show(self, result: Result) -> None:
        """Writes a result for people, or as JSON."""
        values = dict(result.values)
        if self.is_json:
            put(f"{json.dumps(values)}\n")
        elif result.text is None:
            put("".join(f"{line}\n" for line in lines(for_people(values))))
        else:
            put(result.text)


@dataclass(frozen=True)
class Command:
    """A command of one word or two."""

    name: str
    help: str
    run: Callable[[Arguments], Result]
    arguments: Sequence[Argument[Any] | SettingAs | OneOf | SettingsOf] = ()


@dataclass(frozen=True)
class CommandSection:
    """Commands that `raymill --help` lists together; `groups` has the help of each first word of
    two."""

    title: str
    commands: tuple[Command, ...]
    groups: Mapping[str, str] = field(default_factory=dict)
    wings_at: int = 0
    """Before which of the commands those of wings are listed."""

    def with_wings(self, sections: Sequence["CommandSection"]) -> "CommandSection":
        """Returns the section with the commands of wings that are to be listed in it."""
        joined = [section for section in sections if section.title == self.title]
        of_wings = chain.from_iterable(section.commands for section in joined)
        first, last = self.commands[: self.wings_at], self.commands[self.wings_at :]
        groups = ChainMap(dict(self.groups), *(dict(section.groups) for section in joined))
        return replace(self, commands=(*first, *of_wings, *last), groups=groups)
