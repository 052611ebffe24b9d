"""Settings as command-line flags, laid over a YAML file, with errors for people."""

import argparse
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from cluster.settings.amounts import expectation
from cluster.settings.data import TOKENS, DataConfig, TextConfig
from cluster.settings.leaves import FIRST_TO_CHANGE, SettingLeaf, branches, leaves
from cluster.settings.parser import ConfigError, Parser, newcomers_word, suggestion
from cluster.settings.run import RunConfig, StorageConfig
from cluster.settings.serve import HttpConfig, ServeConfig
from cluster.settings.setting import Settings
from cluster.settings.stages import EvaluateConfig
from cluster.storage.references import checkpoint_uri
from cluster.storage.uris import absolute_uri
from model.config import PRESETS

Config = TypeVar("Config", bound=Settings)
_SHOWN_CHARS = 60
_PAIRS = {"data.validation": "NAME=SOURCE", "adapters": "NAME=CHECKPOINT"}
"""The settings that are texts by name, and how a flag gives one."""


def add_config_arguments(parser: Parser, root: type[BaseModel], *, positional: str = "") -> None:
    """Adds one flag for each setting of `root`, in groups: those that are changed first, then each
    branch, unless the parser is for a short help.

    The caller adds `config`, the YAML file that the flags override, and the setting that may also
    stand by itself (`positional`), whose flag the help leaves out.
    """
    groups: dict[str, argparse._ActionsContainer] = {"": parser}
    by_path = {leaf.path: leaf for leaf in leaves(root)}
    if root is RunConfig:
        first = parser.add_argument_group("settings that are changed first")
        for path in FIRST_TO_CHANGE:
            _add_flag(first, by_path.pop(path))
        if parser.is_short:
            about = f"{len(by_path)} more: `{parser.prog} --help all` lists them"
            parser.add_argument_group("other settings", about)
            return
    abouts = branches(root)
    for leaf in by_path.values():
        branch = leaf.path.partition(".")[0] if "." in leaf.path else ""
        if branch not in groups:
            groups[branch] = parser.add_argument_group(branch, abouts[branch])
        _add_flag(groups[branch], leaf, is_shown=leaf.path != positional)


def _add_flag(
    place: argparse._ActionsContainer, leaf: SettingLeaf, *, is_shown: bool = True
) -> None:
    """Adds the setting's flag; with underscores it is as good, and the help leaves that out."""
    flag = f"--{leaf.path}"
    options: dict[str, Any] = {
        "dest": leaf.path,
        "nargs": "+" if leaf.is_list else None,
        "metavar": "VALUE",
    }
    about = leaf.help.replace("%", "%%")
    action = place.add_argument(
        flag.replace("_", "-"), help=about if is_shown else argparse.SUPPRESS, **options
    )
    if leaf.words:
        action.completer = lambda **_: leaf.words  # type: ignore[attr-defined]  # which argcomplete looks for
    if "_" in flag:
        place.add_argument(flag, help=argparse.SUPPRESS, **options)


@dataclass(frozen=True)
class Resolved(Generic[Config]):
    """The settings that a file and flags give; `note` is for people, and empty where nothing is
    worth saying."""

    config: Config
    note: str


def resolve_config(
    flags: Mapping[str, Any],
    root: type[Config],
    *,
    file: Path | None = None,
    needs_source: bool = True,
) -> Resolved[Config]:
    """Returns the validated tree of the file and the flags, which are by dotted name and None where
    not given. Raises `ConfigError` that names every wrong setting."""
    values = _read_yaml(file) if file else {}
    is_run = needs_source and root is RunConfig
    if file is None and is_run and flags.get("data.source") is None:
        raise ConfigError("no configuration: name a YAML file, or at least --data.source")
    note = _check_preset(flags, values, file)
    config = validate_config(settings_from_flags(flags, root, over=values, file=file), root)
    if is_run and isinstance(config, RunConfig) and not config.data.source:
        raise ConfigError(
            f"data.source is empty: name the corpus by a path or URI, globs allowed, in {file} or by --data.source"
        )
    return Resolved(settled(config), note)


def _check_preset(flags: Mapping[str, Any], values: dict[str, Any], file: Path | None) -> str:
    """Compares a preset that a flag gives with the file's own numbers of the shape, which win over
    it. Refuses one over a file that gives a shape and no preset; of one over another preset,
    returns a sentence on which numbers win."""
    preset, model = flags.get("model.preset"), values.get("model")
    if preset not in PRESETS or not isinstance(model, dict):
        return ""
    wanted = PRESETS[preset]
    kept = {name: value for name, value in model.items() if flags.get(f"model.{name}") is None}
    others = [
        f"model.{name}: {value}" for name, value in kept.items() if wanted.get(name, value) != value
    ]
    if not others:
        return ""
    if "preset" not in model:
        raise ConfigError(
            f"--model.preset {preset} has other values than {file}, where {', '.join(others)}, and those would win; "
            "take them out of the file, or leave the preset out and give each as a flag"
        )
    return f"{', '.join(others)} of {file} stays, with the rest of --model.preset {preset}"


def settings_from_flags(
    flags: Mapping[str, Any],
    root: type[BaseModel],
    *,
    over: dict[str, Any] | None = None,
    file: Path | None = None,
) -> dict[str, Any]:
    """Returns the settings that the flags give, laid over a file's."""
    values = over or {}
    for leaf in leaves(root):
        path, value = leaf.path, flags[leaf.path]
        if value is None:
            continue
        branch = values
        *parents, name = path.split(".")
        for parent in parents:
            branch = branch.setdefault(parent, {})
            if not isinstance(branch, dict):
                raise ConfigError(
                    f"{parent} holds {branch!r} in {file}; expected `name: value` lines"
                )
        branch[name] = None if leaf.is_unset_by(value) else value
        if form := _PAIRS.get(path):
            if wrong := [item for item in value if "=" not in item]:
                raise ConfigError(f"--{path} {wrong[0]}: expected {form}")
            branch[name] = dict(item.split("=", 1) for item in value)
    return values


def validate_config(values: dict[str, Any], root: type[Config]) -> Config:
    try:
        return root.model_validate(values)
    except ValidationError as error:
        raise ConfigError(
            "; ".join(_explained(problem, root) for problem in error.errors())
        ) from None


def settled(config: Config) -> Config:
    """Makes paths absolute, since a job runs in another folder, and adds a run id if none was
    given."""
    update: dict[str, Any] = {}
    place = (
        config.storage.uri if isinstance(config, (RunConfig, EvaluateConfig, ServeConfig)) else ""
    )
    for name, value in config:
        match value:
            case StorageConfig():
                update[name] = with_absolute_paths(value)
            case TextConfig():
                paths: dict[str, Any] = {"source": [_absolute_source(uri) for uri in value.source]}
                if isinstance(value, DataConfig):
                    paths["validation"] = {
                        name: _absolute_source(uri) for name, uri in value.validation.items()
                    }
                    paths["tokenizer"] = value.tokenizer and absolute_uri(value.tokenizer)
                update[name] = value.model_copy(update=paths)
            case Settings() if (source := getattr(value, "init_from", None)) is not None:
                update[name] = value.model_copy(update={"init_from": checkpoint_uri(source, place)})
            case HttpConfig(request_log=str(log)) if log != "-":
                update[name] = value.model_copy(update={"request_log": str(Path(log).absolute())})
            case str() if name == "checkpoint":
                update[name] = checkpoint_uri(value, place)
            case dict() if name == "adapters":
                update[name] = {key: checkpoint_uri(uri, place) for key, uri in value.items()}
            case str() if name in ("api_key_file", "admin_key_file", "receipt_key_file", "trace"):
                update[name] = absolute_uri(value)
            case str() if name == "store" and "/" in value:  # else it may be a key
                update[name] = absolute_uri(value)
            case None if name == "run_id":
                update[name] = new_run_id()
    return config.model_copy(update=update)


def with_absolute_paths(storage: StorageConfig) -> StorageConfig:
    """Returns the same for a process in another folder."""
    files = {"signed_by": storage.signed_by, "timestamped_by": storage.timestamped_by}
    absolute = {name: file and str(Path(file).absolute()) for name, file in files.items()}
    return storage.model_copy(update={"uri": absolute_uri(storage.uri), **absolute})


def _absolute_source(uri: str) -> str:
    mark = TOKENS if uri.startswith(TOKENS) else ""
    return mark + absolute_uri(uri.removeprefix(mark))


def new_run_id() -> str:
    """Returns an id that sorts by time, with a random end for runs of the same second."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"


def read_config(path: Path, root: type[Config]) -> Config:
    """Returns the validated tree of a YAML file as it stands. Raises `ConfigError`."""
    return validate_config(_read_yaml(path), root)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            values = yaml.load(file, Loader=_UniqueKeys)  # noqa: S506 (a safe one, derived from SafeLoader)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is not YAML: {_yaml_problem(error, path)}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} holds no settings; expected `section:` lines with `name: value` below them"
        )
    return values


def _yaml_problem(error: Exception, path: Path) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    place = f"line {mark.line + 1}, column {mark.column + 1}"
    if "'\\t'" in str(getattr(error, "problem", "")):
        return f"{place}: a tab; indent by spaces"
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    shown = lines[mark.line].strip()[:_SHOWN_CHARS] if mark.line < len(lines) else ""
    return (
        f"{place}, {f'at {shown!r}' if shown else 'the end of the file'}: expected `name: value`, indented like the "
        "other lines of its section; a text with a colon stands in quotes, and a bracket is closed"
    )


class _UniqueKeys(yaml.SafeLoader):
    """A loader that refuses a key set twice, of which YAML's own silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise ConfigError(
                    f"{self.name}, line {line}: {name} is set already, on line {lines[name]}; keep one"
                )
            lines[name] = line
        return super().construct_mapping(node, deep)


def _explained(problem: Any, root: type[BaseModel]) -> str:
    path = [str(part) for part in problem["loc"]]
    name = ".".join(path)
    if problem["type"] == "extra_forbidden" and (meant := newcomers_word(path[-1])):
        return f"unknown setting {name}{meant}"
    if problem["type"] == "extra_forbidden":
        siblings = [".".join(leaf.path.split(".")[: len(path)]) for leaf in leaves(root)]
        return f"unknown setting {name}{suggestion(name, sorted(set(siblings)))}"
    below = [
        leaf.path.removeprefix(f"{name}.")
        for leaf in leaves(root)
        if leaf.path.startswith(f"{name}.")
    ]
    message = expectation(problem, siblings=below) or problem["msg"].removeprefix("Value error, ")
    shown = "" if problem["type"] == "value_error" else f", not {problem['input']!r}"
    return f"{name}: {message}{shown}" if name else message
