"""The page of all settings: type, unit, default, bounds, meaning, and what each shapes."""

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.settings.leaves import SettingLeaf, branches, leaves
from cluster.settings.plan import PlanConfig, TraceConfig
from cluster.settings.run import RunConfig
from cluster.settings.serve import ServeConfig
from cluster.settings.setting import Settings, Shapes
from cluster.settings.stages import EvaluateConfig, IndexConfig
from model.architecture import ARCHITECTURES
from model.config import PRESETS, GPTConfig, Shape, preset_fields
from model.hardware.gpus import GPUS
from tests.reference.markdown import MADE, cell, code, listed, sentence, table, template
from tests.repository import REPOSITORY

TREES: dict[str, tuple[type[Settings], str]] = {
    "A run": (
        RunConfig,
        "Used by `raymill tokenize`, `pretrain`, `pipeline`, `submit`, `plan`, `inspect` and `data preview`.",
    ),
    "An evaluation": (EvaluateConfig, "Used by `raymill evaluate`."),
    "A trace index": (IndexConfig, "Used by `raymill trace index`."),
    "The endpoint": (
        ServeConfig,
        "Used by `raymill serve`, and by `args` in a Ray Serve config file.",
    ),
    "A plan": (PlanConfig, "Used by `raymill plan`, beside the settings of a run."),
    "A plan on a trace of spot nodes": (TraceConfig, "Used by `raymill plan --trace FILE`."),
}
_INTRODUCTION = """\
# Settings

A setting is a key of the YAML file and a flag: `train.learning_rate` is `--train.learning-rate`. A flag overrides the
file. Unknown keys are refused, with a suggestion. A count may be written as `20M` or `1e6`, and bytes as `64MiB`.
`raymill init` writes a file with the settings that are changed first.

**Shapes** says what a setting is part of. Another value of one that shapes the *token store* or the *tokenizer* makes
another store or tokenizer. A run cannot be resumed with another value of one that shapes the *run*. All other settings may
change at every start.

"""
_UNIT_BY_END = {
    "s": "seconds",
    "bytes": "bytes",
    "tokens": "tokens",
    "steps": "steps",
    "rows": "rows",
    "documents": "documents",
    "workers": "workers",
    "replicas": "replicas",
    "requests": "requests",
    "seqs": "sequences",
    "waiting": "sequences",
    "connections": "connections",
    "nodes": "nodes",
    "attempts": "attempts",
    "rollbacks": "rollbacks",
    "fraction": "share",
    "ratio": "ratio",
    "rate": "share",
    "hours": "hours",
    "context": "tokens",
    "positions": "tokens",
    "tflops": "TFLOP/s",
    "increase": "nats per token",
    "ngram": "words",
    "len": "tokens",
}
_UNIT_BY_NAME = {
    "learning_rate": "",
    "global_batch_size": "sequences",
    "micro_batch_size": "sequences",
    "batch_size": "sequences",
    "batch_ramp_start": "sequences",
    "micro_batches_per_lane": "micro-batches",
    "vocab_size": "token ids",
    "threads_per_worker": "threads",
    "threads_per_replica": "threads",
    "cpus_per_node": "CPUs",
    "gpus_per_node": "GPUs",
    "tensor_parallel_size": "GPUs",
    "count": "GPUs",
    "shard_group": "workers",
    "max_requests_per_key": "requests",
    "prefill_tokens_per_step": "tokens",
    "price_per_device_hour": "money an hour",
    "price": "dollars an hour",
    "network_gbit_per_s": "Gbit/s",
    "storage_bytes_per_s": "bytes/s",
    "mtbf_gpu_hours": "GPU-hours",
    "num_to_keep": "checkpoints",
    "keep_best": "checkpoints",
}
_WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text"}
_BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def unit_of(path: str, kind: Any) -> str:
    """Returns the unit of a number, by the last word of its name."""
    name = path.rpartition(".")[2]
    parts = {kind, *get_args(kind)}
    if not parts & {int, float} and not any(_is_number(part) for part in parts):
        return ""
    return _UNIT_BY_NAME.get(name, _UNIT_BY_END.get(name.rpartition("_")[2], ""))


def _is_number(kind: Any) -> bool:
    return getattr(kind, "__metadata__", None) is not None and get_args(kind)[0] in (int, float)


def type_of(leaf: SettingLeaf) -> str:
    if leaf.choices:
        words = ", ".join(map(code, leaf.choices))
        return f"list of: {words}" if leaf.is_list else words
    if leaf.is_list:
        return "names with values" if "dict" in str(leaf.kind) else "list"
    kinds = [leaf.kind, *get_args(leaf.kind)]
    kinds += [get_args(kind)[0] for kind in kinds if getattr(kind, "__metadata__", None)]
    return next((_WORDS[kind] for kind in kinds if kind in _WORDS), "text")


def bounds_of(info: FieldInfo) -> str:
    """Returns the bounds of the setting's value, also where it may be unset or stands in a list."""
    return ", ".join(_bounds(info.annotation, list(info.metadata)))


def _bounds(kind: Any, metadata: list[Any]) -> list[str]:
    words = []
    for bound in metadata:
        if isinstance(bound, FieldInfo):
            words += _bounds(None, list(bound.metadata))
        for name, sign in _BOUNDS.items():
            if (value := getattr(bound, name, None)) is not None:
                words.append(f"{sign} {_bound(value)}")
        for name, sign in (("min_length", "at least"), ("max_length", "at most")):
            if (value := getattr(bound, name, None)) is not None:
                words.append(f"{sign} {value} long")
        if pattern := getattr(bound, "pattern", None):
            words.append(f"matches {code(str(pattern))}")
    inner = list(getattr(kind, "__metadata__", ()))
    if inner:
        words += _bounds(None, inner)
    for part in get_args(kind) if not inner else get_args(kind)[:1]:
        words += _bounds(part, [])
    return words


def _bound(value: float) -> str:
    """Returns a number as people write it; large ones are powers of two."""
    power = int(abs(value)).bit_length() - 1
    is_power = abs(value) == 2**power and power > 20
    shown = f"{int(value):,}" if value == int(value) else f"{value:g}"
    return f"{'-' if value < 0 else ''}2^{power}" if is_power else shown


def _fields(root: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Returns the declaration of each setting but those of the model's shape."""
    fields: dict[str, FieldInfo] = {}
    for name, info in root.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            fields |= _fields(kind, f"{prefix}{name}.")
        elif kind != Shape:
            fields[f"{prefix}{name}"] = info
    return fields


def _default(path: str, value: Any) -> str:
    match value:
        case None | [] | {}:
            return "unset"
        case bool():
            return code(str(value).lower())
        case int() if path.endswith("_bytes") and value >= 1 << 20:
            is_large = value >= 1 << 30
            return code(f"{value >> 30} GiB" if is_large else f"{value >> 20} MiB")
        case int():
            return code(f"{value:,}")
        case float():
            return code(f"{value:,g}")
    return code(str(value))


def _shapes(info: FieldInfo | None) -> str:
    extra = info.json_schema_extra if info is not None else None
    if info is None:
        return "run"
    shapes = Shapes(extra["shapes"]) if isinstance(extra, dict) and "shapes" in extra else None
    names = {Shapes.STORE: "token store", Shapes.TOKENIZER: "tokenizer", Shapes.RUN: "run"}
    if shapes is None:
        return ""
    if Shapes.BY_ITSELF in shapes:
        return "token store, tokenizer"
    return ", ".join(word for shape, word in names.items() if shape in shapes)


def _row(leaf: SettingLeaf, info: FieldInfo | None) -> list[str]:
    meaning = leaf.help.rpartition(" (")[0] or leaf.help
    bounds = ""
    if info is not None:
        meaning, bounds = str(info.description), bounds_of(info)
    value = listed(type_of(leaf), unit_of(leaf.path, leaf.kind), bounds)
    default = _default(leaf.path, leaf.default)
    first = re.split(r"[:;, ]", meaning)[0]
    is_name = first in (*leaf.choices, *ARCHITECTURES)
    about = cell(meaning if is_name else sentence(meaning))
    return [code(leaf.path), about, value, default, _shapes(info)]


_HEAD = ("setting", "meaning", "type, unit, bounds", "default", "shapes")


def _tree(title: str, root: type[Settings], about: str) -> str:
    fields, abouts = _fields(root), branches(root)
    rows: dict[str, list[list[str]]] = {}
    for leaf in leaves(root):
        branch = leaf.path.partition(".")[0] if "." in leaf.path else ""
        rows.setdefault(branch, []).append(_row(leaf, fields.get(leaf.path)))
    text = f"## {title}\n\n{about}\n\n"
    for branch, lines in rows.items():
        if branch:
            text += f"### {title}: {branch}\n\n{abouts[branch]}.\n\n"
        has_shapes = any(line[-1] for line in lines)
        width = len(_HEAD) if has_shapes else len(_HEAD) - 1
        text += table(_HEAD[:width], [line[:width] for line in lines])
    return text


def _presets() -> str:
    rows = []
    for name in PRESETS:
        shape = GPTConfig(**preset_fields({"preset": name}))
        sizes = (shape.n_layer, shape.n_head, shape.n_embd, shape.n_positions)
        count = f"{shape.num_parameters:,}"
        rows.append([code(name), shape.architecture, *(f"{size:,}" for size in sizes), count])
    head = ("preset", "architecture", "layers", "heads", "width", "context", "parameters")
    about = "The values of `model.preset`. The count is with GPT-2's vocabulary of 50,257 ids.\n\n"
    return f"## Presets of the model\n\n{about}{table(head, rows)}"


def _gpus() -> str:
    names = [field.name for field in dataclasses.fields(next(iter(GPUS.values())))]
    rows = []
    for name, gpu in GPUS.items():
        rows.append([code(name), *(_figure(getattr(gpu, field)) for field in names)])
    about = "The values of `raymill plan --gpu`, with what the plan assumes of each.\n\n"
    return f"## GPUs of a plan\n\n{about}{table(['GPU', *map(_words, names)], rows)}"


def _words(name: str) -> str:
    return name.replace("_per_s", "/s").replace("_", " ")


def _figure(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else cell(str(value))


def _refused_together() -> str:
    """Returns what the trees refuse although each value alone is allowed."""
    messages = []
    for file in sorted((REPOSITORY / "cluster" / "settings").glob("*.py")):
        messages += _value_errors(file)
    lines = "".join(f"- {code(message)}\n" for message in sorted(set(messages)))
    return f"## Values that do not fit together\n\nThese are refused, in these words:\n\n{lines}"


def _value_errors(file: Path) -> list[str]:
    messages = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        match node:
            case ast.Raise(exc=ast.Call(func=ast.Name(id="ValueError"), args=[message])):
                messages.append(re.sub(r"…+", "…", template(message)))
    return messages


def page() -> str:
    trees = [_tree(title, root, about) for title, (root, about) in TREES.items()]
    rest = [_presets(), _gpus(), _refused_together()]
    return MADE + _INTRODUCTION + "".join([*trees, *rest])
