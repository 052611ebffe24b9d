"""The `raymill` command: one subcommand per task, `--help` as the manual, one clear line and an
exit code on errors.

Exit codes: 0 done, 1 failed, 2 misused. With --json the last line of standard output is one JSON
object; progress and errors go to standard error.
"""

import argparse
import io
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

from cluster.commands import completion
from cluster.commands.cluster_commands import CLUSTER
from cluster.commands.command import Arguments, Command, CommandSection
from cluster.commands.data_commands import DATA
from cluster.commands.look_commands import LOOK
from cluster.commands.serve_commands import SERVE
from cluster.commands.train_commands import BEGIN, TRAIN
from cluster.output.result_text import printable, put
from cluster.settings.code_folders import code_version, version
from cluster.settings.parser import ConfigError, FirstManual, Parser
from cluster.stages.stage_module import OverBudgetError, exit_on_signal
from cluster.wings import added
from raymill.errors import UserError

_OF_WINGS = added(lambda wing: wing.commands)
SECTIONS = tuple(
    section.with_wings(_OF_WINGS) for section in (BEGIN, DATA, TRAIN, LOOK, SERVE, CLUSTER)
)
COMMANDS = tuple(chain.from_iterable(section.commands for section in SECTIONS))

Places: TypeAlias = "argparse._SubParsersAction[Parser]"

FIRST_COMMANDS = (
    "demo",
    "init",
    "plan",
    "pretrain",
    "evaluate",
    "serve",
    "complete",
    "promote",
    "status",
    "report",
)
"""The commands of the whole way, in its order, which the first help has alone."""

_COMMAND = "command record"  # among argparse's values, where no argument has a blank in its name


def main(argv: Sequence[str] | None = None) -> int:
    if completion.is_asked():
        completion.answer(command_parser(completion.typed_words()))
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` sets it
            signal.signal(number, exit_on_signal)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as in `raymill list >&-`
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 (until the process ends)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As standard error: a name may need more than ASCII
        sys.stdout.reconfigure(errors="backslashreplace")
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        return _run(words)
    except UserError as error:
        sys.stderr.write(f"error: {printable(str(error))}\n")
        if isinstance(error, OverBudgetError):
            return error.exit_code
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130


def _run(words: list[str]) -> int:
    if not words:
        put(command_parser([]).format_help())
        return 0
    try:
        values = vars(command_parser(words).parse_args(words))
    except SystemExit:  # of --help and --version, whose text is not written yet
        put("")
        raise
    command: Command = values.pop(_COMMAND)
    arguments = Arguments(tuple(words), is_json=values.pop("json"), values=MappingProxyType(values))
    result = command.run(arguments)
    if not result.is_shown:
        arguments.show(result)
    if result.next:
        sys.stderr.write(f"next: {printable(result.next)}\n")
    return int(result.is_bad)


def command_parser(words: Sequence[str] | None = None) -> Parser:
    """Returns the parser for a command line of these words; without words, the parser of all
    commands.

    Only the named command gets its arguments, as a configuration tree takes long to import, and for
    `--help` fewer than for `--help all`.
    """
    usage = "raymill [-h] [--version] COMMAND ..."
    about = f"{__doc__}\n{_overview(is_short=words == [] or _asks_for_short_help(words or []))}"
    parser = Parser(prog="raymill", usage=usage, description=about, formatter_class=FirstManual)
    # Reads all code
    shown = f"raymill {version()}, code {code_version()}" if words and "--version" in words else ""
    parser.add_argument(
        "--version", action="version", version=shown, help="print the version and the code's hash"
    )
    named = (
        None if words is None else next((word for word in words if not word.startswith("-")), "")
    )
    place = parser.add_subparsers(
        prog="raymill", metavar="COMMAND", required=True, help=argparse.SUPPRESS
    )
    for section in SECTIONS:
        _add_section(place, section, named, is_short=_asks_for_short_help(words or []))
    return parser


def _asks_for_short_help(words: Sequence[str]) -> bool:
    """Reports whether `--help` is asked for, and not `--help all`."""
    return not {"-h", "--help"}.isdisjoint(words) and words[-1] != "all"


def _add_section(
    place: "Places", section: CommandSection, named: str | None, *, is_short: bool
) -> None:
    places: dict[str, Places] = {}
    for first, about in section.groups.items():
        group = place.add_parser(first, help=about, description=about)
        places[first] = group.add_subparsers(metavar="COMMAND", required=True)
    for command in section.commands:
        first, _, second = command.name.partition(" ")
        parser = places.get(first, place).add_parser(
            second or first, help=command.help, description=command.help, is_short=is_short
        )
        if named in (None, first):
            parser.set_defaults(**{_COMMAND: command})
            parser.add_argument(
                "--json",
                action="store_true",
                help="print one JSON object as the last line of output",
            )
            for argument in command.arguments:
                argument.add_to(parser)


def _overview(*, is_short: bool) -> str:
    """Returns a line or two for each command and each group of commands, by section; or of the
    first ones alone."""
    if is_short:
        abouts = {command.name: command.help for command in COMMANDS}
        first = {name: abouts[name] for name in FIRST_COMMANDS if name in abouts}
        num_others = len({name.split()[0] for name in abouts}) - len(first)
        shown = _lines("the whole way", first)
        return f"{shown}\nand {num_others} others: `raymill --help all` lists them"
    return "\n".join(_lines(section.title, _listed(section)) for section in SECTIONS).rstrip()


def _lines(title: str, abouts: Mapping[str, str]) -> str:
    width = min(shutil.get_terminal_size().columns, 120)
    lines = [f"{title}:"]
    for name, about in abouts.items():
        start = f"  {name:15}"
        lines.append(
            textwrap.fill(about, width, initial_indent=start, subsequent_indent=" " * len(start))
        )
    return "\n".join(lines) + "\n"


def _listed(section: CommandSection) -> dict[str, str]:
    """Returns the help of each first word: a command's, or its group's with the words that may
    follow."""
    abouts: dict[str, str] = {}
    for command in section.commands:
        first, _, second = command.name.partition(" ")
        if not second:
            abouts[first] = command.help
        elif first in abouts:
            abouts[first] += f", {second}"
        else:
            abouts[first] = f"{section.groups[first]}: {second}"
    return abouts


if __name__ == "__main__":
    sys.exit(main())
