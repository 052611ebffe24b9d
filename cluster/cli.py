"""The `raymill` command: one subcommand per task, `--help` as the manual, one clear line and an exit code on errors.

Exit codes: 0 done, 1 failed, 2 misused. With --json the last line of standard output is one JSON object; progress and
errors go to standard error.
"""

import argparse
import io
import json
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from cluster.commands import completion
from cluster.commands.table import add_argument, table
from cluster.output.result_text import lines, printable, put
from cluster.settings.code_folders import code_version, version
from cluster.settings.parser import ConfigError, FirstManual, Parser
from cluster.stages.stage_module import exit_on_signal
from model.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    if completion.is_asked():
        completion.answer(command_parser(completion.typed_words()))
    signal.signal(signal.SIGTERM, exit_on_signal)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as in `raymill list >&-`
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 (until the process ends)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error: a name may need more than ASCII
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        return _run(words)
    except UserError as error:
        sys.stderr.write(f"error: {printable(str(error))}\n")
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130


def _run(words: list[str]) -> int:
    if not words:
        put(command_parser([]).format_help())
        return 0
    try:
        arguments = command_parser(words).parse_args(words)
    except SystemExit:  # of --help and --version, whose text is not written yet
        put("")
        raise
    # What a command may say besides its result: a text to print instead, that the result is bad, and what is next.
    arguments.words, arguments.text, arguments.is_bad, arguments.next = words, None, False, ""
    arguments.show = lambda result: _show(result, arguments)
    result = resolve_name(f"cluster.commands.{arguments.run}")(arguments)
    if result is not None:
        arguments.show(result)
    if arguments.next:
        sys.stderr.write(f"next: {printable(arguments.next)}\n")
    return int(arguments.is_bad)


def command_parser(words: Sequence[str] | None = None) -> Parser:
    """Returns the parser for a command line of these words; without words, that of all commands.

    Only the named command gets its arguments, as a configuration tree takes long to import.
    """
    usage = "raymill [-h] [--version] COMMAND ..."
    parser = Parser(prog="raymill", usage=usage, description=f"{__doc__}\n{_overview()}", formatter_class=FirstManual)
    shown = f"raymill {version()}, code {code_version()}" if words and "--version" in words else ""  # reads all code
    parser.add_argument("--version", action="version", version=shown, help="print the version and the code's hash")
    named = None if words is None else next((word for word in words if not word.startswith("-")), "")
    commands = parser.add_subparsers(prog="raymill", metavar="COMMAND", required=True, help=argparse.SUPPRESS)
    groups = {}
    for words_of_command, command in table()["commands"].items():
        first, _, second = words_of_command.partition(" ")
        if second and first not in groups:
            about = table()["groups"][first]
            group = commands.add_parser(first, help=about, description=about)
            groups[first] = group.add_subparsers(metavar="COMMAND", required=True)
        name, place = second or first, groups.get(first, commands)
        sub = place.add_parser(name, help=command["help"], description=command["help"])
        if named in (None, first):
            sub.add_argument("--json", action="store_true", help="print one JSON object as the last line of output")
            sub.set_defaults(run=command["run"], command=name)
            for argument in command.get("arguments", []):
                add_argument(sub, argument)
    return parser


def _overview() -> str:
    """Returns a line or two for each command, by section."""
    abouts = table()["groups"] | {name: command["help"] for name, command in table()["commands"].items()}
    column = " " * 14
    width = min(shutil.get_terminal_size().columns, 120)
    text = ""
    for title, names in table()["sections"].items():
        text += f"{title}:\n"
        for name in names:
            text += textwrap.fill(abouts[name], width, initial_indent=f"  {name:12}", subsequent_indent=column) + "\n"
        text += "\n"
    return text.rstrip()


def _show(result: dict[str, Any], arguments: argparse.Namespace) -> None:
    text = "\n".join(lines(result)) + "\n" if arguments.text is None else arguments.text
    put(json.dumps(result) + "\n" if arguments.json else text)


if __name__ == "__main__":
    sys.exit(main())
