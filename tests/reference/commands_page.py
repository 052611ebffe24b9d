"""The page of all commands, with their arguments."""

from typing import Any

from cluster.cli import SECTIONS
from cluster.commands.command import Argument, Command, OneOf, SettingAs, SettingsOf, Switch
from cluster.settings.setting import Settings
from tests.reference.markdown import MADE, cell, code, sentence, table
from tests.reference.settings_page import TREES

_INTRODUCTION = """\
# Commands

`raymill COMMAND --help` prints the same, with those of a run's settings that are changed first; `--help all` has all of
them. With `--json` the last line of standard output is one JSON object, and progress goes to standard error. A CHECKPOINT is `latest`, a run's id (its newest checkpoint), `RUN@STEP`, or the path or URI of a
folder; a folder here is meant before a run of the same name. A RUN is a run's id, or the path or URI of its folder.

| exit code | meaning |
| --- | --- |
| 0 | done; of `submit`: there is a job, new or not; of `stop`: it has ended; of `serve` after a signal: every answer became whole |
| 1 | failed; also where `verify`, `replay` or `diff` finds a difference, where `storage check` finds a storage unusable, and where `status` or `logs -f` sees a job that failed, was stopped or is lost |
| 2 | misused: a wrong flag, setting or configuration, or a source at which nothing is |
| 4 | the run has cost what `scaling.max_cost` allows: it is saved, and a higher one continues it |
| 128 + n | ended by signal n: 143 after SIGTERM, 130 after Ctrl-C |

"""

Row = tuple[str, str, str]


def _argument(argument: Argument[Any], note: str = "") -> Row:
    flags = argument.names.split()
    is_flag = flags[0].startswith("-")
    value = argument.metavar or (argument.dest.upper() if is_flag else "")
    shown = ", ".join(flags) if is_flag else (argument.metavar or argument.names).upper()
    if is_flag and not isinstance(argument, Switch) and argument.choices is None:
        shown += f" {value}"
    if argument.choices is not None:
        shown += f" {{{','.join(argument.choices)}}}"
    default = argument.default
    has_default = default not in (None, [], "", False) and not isinstance(argument, Switch)
    about = sentence(argument.help or "") + note
    if argument.required:
        about += " (required)"
    return code(shown), code(str(default)) if has_default else "", cell(about)


def _rows(command: Command) -> list[Row]:
    rows: list[Row] = []
    for part in command.arguments:
        match part:
            case SettingsOf():
                rows.append((code("--SETTING VALUE"), "", f"A flag for {_settings(part.tree())}"))
            case SettingAs():
                about = f"{sentence(part.help)}: {part.setting} = {part.value}"
                rows.append((code(part.name), "", cell(about)))
            case OneOf():
                rows += [_argument(argument, " (one of these)") for argument in part.arguments]
            case _:
                rows.append(_argument(part))
    return rows


def _settings(tree: type[Settings]) -> str:
    for title, (whole, _) in TREES.items():
        if whole is tree:
            anchor = title.lower().replace(" ", "-")
            return f"[each setting of {title.lower()}](settings.md#{anchor})"
    named = " and ".join(code(name) for name in tree.model_fields)
    return f"each setting of {named} in [a run](settings.md#a-run)"


def _command(command: Command) -> str:
    rows = _rows(command)
    text = f"### raymill {command.name}\n\n{cell(sentence(command.help))}.\n\n"
    return text + (table(("argument", "default", "meaning"), rows) if rows else "")


def page() -> str:
    text = MADE + _INTRODUCTION
    for section in SECTIONS:
        text += f"## {sentence(section.title)}\n\n"
        text += "".join(_command(command) for command in section.commands)
    return text
