"""Settings as command-line flags, laid over a YAML file, with errors for people."""

import argparse
import dataclasses
import secrets
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from cluster.settings.parser import ConfigError, newcomers_word, suggestion
from cluster.settings.run import (
    TOKENS,
    DataConfig,
    EvaluateConfig,
    RunConfig,
    Settings,
    StorageConfig,
    TextConfig,
)
from cluster.settings.serve import HttpConfig, ServeConfig
from cluster.settings.wrong_values import expectation
from cluster.storage.references import checkpoint_uri
from cluster.storage.uris import absolute_uri
from model.config import PRESETS, GPTConfig
from model.tables import read_table

Config = TypeVar("Config", bound=Settings)


def add_config_arguments(parser: argparse.ArgumentParser, root: type[BaseModel], *, positional: str = "") -> None:
    """Adds one flag for each setting of `root`; the caller adds `config`, the YAML file that the flags override, and
    the setting that may also stand by itself (`positional`), whose flag the help leaves out."""
    for leaf in _leaves(root):
        flag = f"--{leaf.path}"
        names = [flag.replace("_", "-")] + ([flag] if "_" in flag else [])
        count = "+" if leaf.is_list else None
        shown = argparse.SUPPRESS if leaf.path == positional else leaf.help.replace("%", "%%")
        parser.add_argument(*names, dest=leaf.path, nargs=count, metavar="VALUE", help=shown)


def config_from_arguments(arguments: argparse.Namespace, root: type[Config], *, needs_source: bool = True) -> Config:
    """Returns the validated tree of file and flags. Raises `ConfigError` that names every wrong setting."""
    values = _read_yaml(arguments.config) if arguments.config else {}
    is_run = needs_source and root is RunConfig
    if arguments.config is None and is_run and arguments.__dict__.get("data.source") is None:
        raise ConfigError("no configuration: name a YAML file, or at least --data.source")
    _check_preset(arguments, values)
    return settled(validate_config(settings_from_flags(arguments, root, over=values), root))


def _check_preset(arguments: argparse.Namespace, values: dict[str, Any]) -> None:
    """Compares a preset that a flag gives with the file's own numbers of the shape, which win over it. Refuses one over
    a file that gives a shape and no preset; of one over another preset, `arguments.note` says which numbers win."""
    preset, model = arguments.__dict__.get("model.preset"), values.get("model")
    if preset not in PRESETS or not isinstance(model, dict):
        return
    wanted, given = PRESETS[preset], arguments.__dict__
    kept = {name: value for name, value in model.items() if given.get(f"model.{name}") is None}
    others = [f"model.{name}: {value}" for name, value in kept.items() if wanted.get(name, value) != value]
    if not others:
        return
    if "preset" not in model:
        raise ConfigError(
            f"--model.preset {preset} has other values than {arguments.config}, where {', '.join(others)}, and those "
            "would win; take them out of the file, or leave the preset out and give each as a flag"
        )
    arguments.note = f"{', '.join(others)} of {arguments.config} stays, with the rest of --model.preset {preset}"


def settings_from_flags(
    arguments: argparse.Namespace, root: type[BaseModel], *, over: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the settings that the flags give, laid over others."""
    values = over or {}
    for leaf in _leaves(root):
        path, value = leaf.path, getattr(arguments, leaf.path)
        if value is None:
            continue
        branch = values
        *parents, name = path.split(".")
        for parent in parents:
            branch = branch.setdefault(parent, {})
            if not isinstance(branch, dict):
                raise ConfigError(f"{parent} holds {branch!r} in {arguments.config}; expected `name: value` lines")
        branch[name] = None if leaf.is_unset_by(value) else value
        if path == "data.validation":
            if wrong := [item for item in value if "=" not in item]:
                raise ConfigError(f"--{path} {wrong[0]}: expected NAME=SOURCE")
            branch[name] = dict(item.split("=", 1) for item in value)
    return values


def validate_config(values: dict[str, Any], root: type[Config]) -> Config:
    try:
        return root.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_explained(problem, root) for problem in error.errors())) from None


def settled(config: Config) -> Config:
    """Makes paths absolute, since a job runs in another folder, and adds a run id if none was given."""
    update: dict[str, Any] = {}
    place = config.storage.uri if isinstance(config, (RunConfig, EvaluateConfig, ServeConfig)) else ""
    for name, value in config:
        match value:
            case StorageConfig():
                update[name] = value.model_copy(update={"uri": absolute_uri(value.uri)})
            case TextConfig():
                paths: dict[str, Any] = {"source": [_absolute_source(uri) for uri in value.source]}
                if isinstance(value, DataConfig):
                    paths["validation"] = {name: _absolute_source(uri) for name, uri in value.validation.items()}
                    paths["tokenizer"] = value.tokenizer and absolute_uri(value.tokenizer)
                update[name] = value.model_copy(update=paths)
            case Settings() if (source := getattr(value, "init_from", None)) is not None:
                update[name] = value.model_copy(update={"init_from": checkpoint_uri(source, place)})
            case HttpConfig(request_log=str(log)) if log != "-":
                update[name] = value.model_copy(update={"request_log": str(Path(log).absolute())})
            case str() if name == "checkpoint":
                update[name] = checkpoint_uri(value, place)
            case str() if name in ("api_key_file", "admin_key_file"):
                update[name] = absolute_uri(value)
            case None if name == "run_id":
                update[name] = new_run_id()
    return config.model_copy(update=update)


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
        raise ConfigError(f"{path} is not YAML: {_yaml_problem(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no settings; expected `section:` lines with `name: value` below them")
    return values


def _yaml_problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    problem = str(getattr(error, "problem", ""))
    words = "a tab; indent by spaces" if "'\\t'" in problem else f"check the indentation and the colons ({problem})"
    return f"line {mark.line + 1}, column {mark.column + 1}: {words}"


class _UniqueKeys(yaml.SafeLoader):
    """A loader that refuses a key set twice, of which YAML's own silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise ConfigError(f"{self.name}, line {line}: {name} is set already, on line {lines[name]}; keep one")
            lines[name] = line
        return super().construct_mapping(node, deep)


class _Leaf(NamedTuple):
    """A setting that a flag gives."""

    path: str  # dotted
    help: str
    kind: Any  # its type

    @property
    def is_list(self) -> bool:
        kinds = [self.kind, *get_args(self.kind)]
        return get_origin(self.kind) is dict or any(get_origin(kind) is list for kind in kinds)

    def is_unset_by(self, value: object) -> bool:
        """Reports whether a flag's value means None, which not every setting may be: `none` may be a value's name."""
        parts = get_args(self.kind)
        names = [name for part in parts if get_origin(part) is Literal for name in get_args(part)]
        return type(None) in parts and value in ("null", "none") and value not in names


def _leaves(root: type[BaseModel], prefix: str = "") -> list[_Leaf]:
    """Returns each setting."""
    leaves: list[_Leaf] = []
    for name, info in root.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            leaves += _leaves(kind, f"{prefix}{name}.")
        elif kind is GPTConfig:
            leaves.append(_Leaf(f"{prefix}{name}.preset", f"shape by name, one of {', '.join(PRESETS)}", str | None))
            kinds = get_type_hints(GPTConfig)
            for field in dataclasses.fields(GPTConfig):
                help_text = f"{field.metadata['help']} ({field.default})"
                leaves.append(_Leaf(f"{prefix}{name}.{field.name}", help_text, kinds[field.name]))
        else:
            leaves.append(_Leaf(f"{prefix}{name}", _help(root, name, info), kind))
    return leaves


def _help(branch: type[BaseModel], name: str, info: FieldInfo) -> str:
    help_table: dict[str, dict[str, str]] = read_table(__file__, "help")
    about = next(lines[name] for kind in branch.__mro__ if name in (lines := help_table.get(kind.__name__, {})))
    default = info.get_default(call_default_factory=True)
    choices = get_args(info.annotation) if all(isinstance(a, str) for a in get_args(info.annotation)) else ()
    notes = [f"one of {', '.join(choices)}"] if choices else []
    notes += [f"default {default}"] if default not in (None, [], {}) else []
    return about + (f" ({'; '.join(notes)})" if notes else "")


def _explained(problem: Any, root: type[BaseModel]) -> str:
    path = [str(part) for part in problem["loc"]]
    name = ".".join(path)
    if problem["type"] == "extra_forbidden" and (meant := newcomers_word(path[-1])):
        return f"unknown setting {name}{meant}"
    if problem["type"] == "extra_forbidden":
        siblings = [".".join(leaf.path.split(".")[: len(path)]) for leaf in _leaves(root)]
        return f"unknown setting {name}{suggestion(name, sorted(set(siblings)))}"
    below = [leaf.path.removeprefix(f"{name}.") for leaf in _leaves(root) if leaf.path.startswith(f"{name}.")]
    message = expectation(problem, siblings=below) or problem["msg"].removeprefix("Value error, ")
    shown = "" if problem["type"] == "value_error" else f", not {problem['input']!r}"
    return f"{name}: {message}{shown}" if name else message
