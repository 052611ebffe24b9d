"""The settings of a tree as a list: the path, the type, the help, the choices and the default of
each; and a file of the settings that are changed first."""

import dataclasses
import json
import textwrap
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.settings.run import CONFIG, CONFIG_HELP, RunConfig
from model.config import PRESETS, GPTConfig, Shape

FIRST_TO_CHANGE = (
    "data.source",
    "model.preset",
    "train.max_tokens",
    "train.global_batch_size",
    "train.micro_batch_size",
    "train.learning_rate",
    "scaling.max_workers",
    "storage.uri",
)
"""The settings of a run that a newcomer changes first, which `raymill init` writes."""

_VALUES: dict[str, Any] = {"model.preset": "small-10m", "train.max_tokens": 20_000_000}
"""The values that are not the setting's default, as in the README's example: a model that needs no
GPU."""

_HEAD = """\
# The settings of a run that are changed first. `raymill pretrain --help all` lists all of them.
"""
_WIDTH = 100


class SettingLeaf(NamedTuple):
    """A setting that a file or a flag gives."""

    path: str  # dotted
    help: str  # with its choices and its default
    kind: Any  # its type
    choices: tuple[str, ...]  # of its values; none where they are not a few words
    default: Any

    @property
    def is_list(self) -> bool:
        kinds = [self.kind, *get_args(self.kind)]
        return get_origin(self.kind) is dict or any(get_origin(kind) is list for kind in kinds)

    @property
    def words(self) -> tuple[str, ...]:
        """Returns what its flag may be completed to."""
        return ("true", "false") if self.kind is bool else self.choices

    def is_unset_by(self, value: object) -> bool:
        """Reports whether a flag's value means None, which not every setting may be: `none` may be
        a value's name."""
        may_be_unset = type(None) in get_args(self.kind)
        return may_be_unset and value in ("null", "none") and value not in self.choices


def leaves(
    root: type[BaseModel], prefix: str = "", branch: BaseModel | None = None
) -> list[SettingLeaf]:
    """Returns each setting of the tree, in the order of its declaration. Of a `branch`, an instance,
    the defaults are its values."""
    result: list[SettingLeaf] = []
    for name, info in root.model_fields.items():
        kind = info.annotation
        default = getattr(branch, name) if branch else info.get_default(call_default_factory=True)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            result += leaves(kind, f"{prefix}{name}.", default)
        elif kind == Shape:
            result += _of_the_model(f"{prefix}{name}")
        else:
            result.append(_leaf(f"{prefix}{name}", info, default))
    return result


def branches(root: type[BaseModel]) -> dict[str, str]:
    """Returns what each branch of the tree is, in the first sentence of its class, by the branch's
    name."""
    result = {}
    for name, info in root.model_fields.items():
        kind = info.annotation
        if kind == Shape:
            kind = GPTConfig
        if isinstance(kind, type) and (issubclass(kind, BaseModel) or kind is GPTConfig):
            result[name] = str(kind.__doc__).partition(".")[0]
    return result


def first_settings() -> str:
    """Returns the settings as YAML, each below the line of its help."""
    by_path = {leaf.path: leaf for leaf in leaves(RunConfig)}
    text, section = _HEAD, ""
    for path in FIRST_TO_CHANGE:
        branch, name = path.split(".")
        if branch != section:
            text += f"\n{branch}:\n"
            section = branch
        text += _commented(name, by_path[path])
    return text


def _of_the_model(prefix: str) -> list[SettingLeaf]:
    names = tuple(PRESETS)
    about = f"shape by name, one of {', '.join(names)}; seed and seed-96 have one head, ReLU, and 12 or 96 layers"
    depth = "layers, with all that follows from them: width, heads, optimizer, learning rate, batch, tokens, warm-up"
    result = [
        SettingLeaf(f"{prefix}.preset", about, str | None, names, None),
        SettingLeaf(f"{prefix}.{CONFIG}", CONFIG_HELP, str | None, (), None),
        SettingLeaf(f"{prefix}.depth", depth, int | None, (), None),
    ]
    kinds = get_type_hints(GPTConfig)
    for field in dataclasses.fields(GPTConfig):
        kind, default = kinds[field.name], field.default
        help_text = f"{field.metadata['help']} ({default})"
        result.append(
            SettingLeaf(f"{prefix}.{field.name}", help_text, kind, _choices(kind), default)
        )
    return result


def _leaf(path: str, info: FieldInfo, default: Any) -> SettingLeaf:
    assert info.description is not None, f"{path} has no help"
    choices = _choices(info.annotation)
    notes = [f"one of {', '.join(choices)}"] if choices else []
    notes += [f"default {default}"] if default not in (None, [], {}) else []
    help_text = info.description + (f" ({'; '.join(notes)})" if notes else "")
    return SettingLeaf(path, help_text, info.annotation, choices, default)


def _choices(kind: Any) -> tuple[str, ...]:
    """Returns the names that a value, or each of several values, may be."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    names: tuple[str, ...] = ()
    for part in get_args(kind):
        names += _choices(part)
    return names


def _commented(name: str, leaf: SettingLeaf) -> str:
    lines = textwrap.wrap(leaf.help, _WIDTH, break_long_words=False, break_on_hyphens=False)
    comment = "\n".join(f"  # {line}" for line in lines)
    value = json.dumps(_VALUES.get(leaf.path, leaf.default))  # which YAML reads as well
    return f"{comment}\n  {name}: {value}\n"
