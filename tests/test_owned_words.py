"""Words of the settings and of checkpoints that one file understands: no other one compares
them."""

import ast
from collections.abc import Iterator
from typing import get_args

import pytest

from cluster.settings.code_folders import CODE_FOLDERS
from raymill.rules.adamw import AdamW
from raymill.rules.muon import Muon
from raymill.state.shard import Shard
from tests.repository import REPOSITORY

SHARD_OWNER = "raymill/state/shard.py"
RULE_OWNERS = dict.fromkeys(AdamW.vectors, "raymill/rules/adamw.py") | dict.fromkeys(
    Muon.matrix_vectors, "raymill/rules/muon.py"
)

WORDS = set(get_args(Shard)) - {"none"}
"""The choices of `scaling.shard` that are words of no other setting; "none" counts where it is
compared with a shard."""


def product_files() -> dict[str, str]:
    paths = [path for folder in CODE_FOLDERS for path in (REPOSITORY / folder).rglob("*.py")]
    assert len(paths) > 200
    return {
        path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8") for path in paths
    }


def strings_of(node: ast.AST) -> set[str]:
    constants = [each for each in ast.walk(node) if isinstance(each, ast.Constant)]
    return {constant.value for constant in constants if isinstance(constant.value, str)}


def decisions(source: str) -> Iterator[str]:
    """Yields what decides by a choice of `scaling.shard`: comparisons, cases, and dictionaries that
    it is looked up in."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Compare() | ast.MatchValue():
                words = strings_of(node)
            case ast.Subscript(value=ast.Dict(keys=keys)):
                words = {word for key in keys if key for word in strings_of(key)}
            case ast.Call(func=ast.Attribute(value=ast.Dict(keys=keys))):
                words = {word for key in keys if key for word in strings_of(key)}
            case _:
                continue
        text = ast.unparse(node)
        if words & WORDS or ("none" in words and "shard" in text):
            yield text


def test_one_file_decides_by_what_is_sharded() -> None:
    found = {file: [*decisions(source)] for file, source in product_files().items()}
    assert len(found.pop(SHARD_OWNER)) == len(WORDS), "a case for each choice"
    assert {file: texts for file, texts in found.items() if texts} == {}


@pytest.mark.parametrize(
    "line",
    [
        "x = scaling.shard != 'none'",
        "x = state.shard in ('gradients', 'parameters')",
        "x = {'none': 0, 'optimizer': 1}[shard]",
        "x = {'optimizer': 1}.get(shard, 0)",
        "match shard:\n    case 'parameters':\n        pass",
    ],
)
def test_each_way_to_decide_is_seen(line: str) -> None:
    assert len([*decisions(line)]) == 1


def test_the_one_decision_has_no_other_case() -> None:
    """A choice that is added to `Shard` alone is an error of the type checker."""
    matches = [
        node
        for node in ast.walk(ast.parse(product_files()[SHARD_OWNER]))
        if isinstance(node, ast.Match)
    ]
    assert len(matches) == 1
    *_, last = matches[0].cases
    assert ast.unparse(last) == "case _:\n    assert_never(shard)"


@pytest.mark.parametrize("vector", RULE_OWNERS)
def test_an_update_rule_alone_names_its_vectors(vector: str) -> None:
    named = [
        file for file, source in product_files().items() if vector in strings_of(ast.parse(source))
    ]
    assert named == [RULE_OWNERS[vector]]
