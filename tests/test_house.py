"""The shape of the code: small folders with one job each, on floors that import-linter is shown to
hold."""

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import get_args

import pytest

from cluster.settings.code_folders import CODE_FOLDERS
from cluster.settings.train import Optimizer
from model.architecture import ARCHITECTURES
from model.numerics import NUMERICS
from tests.repository import BANNED_MODULES, PYPROJECT, REPOSITORY
from tests.time_limits import limit_s

MAX_MODULES = 15  # of a folder
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60

CONTRACTS = [contract["name"] for contract in PYPROJECT["tool"]["importlinter"]["contracts"]]

HEART = "the heart knows nothing of what joins it to a run"

# (contract, a file, what is written into it). A file that is not there is made.
VIOLATIONS = [
    ("the house", "cluster/storage/uris.py", "import jobs.run.ledger"),
    ("the house", "model/gpt.py", "import cluster.storage.uris"),
    (
        "every folder of cluster has its floor",
        "cluster/storage/uris.py",
        "import cluster.settings.run",
    ),
    ("every folder of cluster has its floor", "cluster/new_room/__init__.py", ""),
    ("jobs", "jobs/corpus/listing.py", "import jobs.tokens.token_store"),
    ("jobs", "jobs/new_stage.py", ""),
    ("the house", "raymill/state/sharding.py", "import model.numerics"),
    (HEART, "raymill/state/peers.py", "import raymill.sums.step_plan"),
    (HEART, "raymill/rules/muon.py", "import raymill.state.peers"),
    ("what joins the heart to a run", "jobs/exact/new_room/__init__.py", ""),
    ("serving", "serving/engine/engine.py", "import serving.protocol.errors"),
    ("serving", "serving/new_room/__init__.py", ""),
    ("model", "model/text/tokenizer.py", "import model.files.checkpoint"),
    ("model", "model/kv_cache.py", "import model.generation.generate"),
    ("model", "model/new_module.py", ""),
    ("the model knows no cluster", "model/gpt.py", "import ray"),
    ("the engine knows neither HTTP nor Ray", "serving/engine/engine.py", "import starlette.types"),
    (
        "the rest does without its wings",
        "jobs/training/guards.py",
        "import jobs.report.figures",
    ),
    (
        "training and snapshots alone know the sentinel",
        "jobs/saving/saver.py",
        "import jobs.sentinel.verdict",
    ),
    (
        "signatures are checked by the registry, not by those who train or compute",
        "serving/api/chat.py",
        "import model.signing.signature",
    ),
    (CONTRACTS[-2], "jobs/snapshots/slots.py", "import jobs.run.run_plan"),
    (CONTRACTS[-1], "serving/protocol/served_model.py", "import model.files.checkpoint"),
]

SHARED_NAMES = frozenset(
    [
        "Audit",
        "Block",
        "Chunk",
        "Decision",
        "Division",
        "Exchange",
        "Measured",
        "Outcome",
        "Part",
        "Piece",
        "Place",
        "Proof",
        "Result",
        "Row",
        "Shard",
        "Span",
        "Stretch",
        "Turn",
        "Verdict",
        "Window",
    ]
)
"""Class names with two homes."""

# Runs in a process of its own: one that has imported the repository's packages would find those,
# not the copy.
LINT = """
import json, sys
from pathlib import Path
from typing import get_args
from importlinter.api import use_cases
from importlinter.configuration import configure
from importlinter.contracts.forbidden import ForbiddenContract
from importlinter.contracts.layers import LayersContract
from importlinter.domain.contract import registry

configure()
registry.register(LayersContract, "layers")
registry.register(ForbiddenContract, "forbidden")

def broken_contracts():
    report = use_cases.create_report(use_cases.read_user_options("pyproject.toml"), cache_dir=None)
    return sorted(contract.name for contract, check in report.get_contracts_and_checks() if not check.kept)

found = [broken_contracts()]
for name, line in json.loads(sys.argv[1]):
    path = Path(name)
    before = path.read_text() if path.exists() else None
    path.parent.mkdir(exist_ok=True)
    path.write_text(line + "\\n" + (before or ""))
    found.append(broken_contracts())
    path.write_text(before) if before is not None else path.unlink()
    if not any(path.parent.iterdir()):
        path.parent.rmdir()
print(json.dumps(found))
"""


def code_files() -> list[Path]:
    files = [path for folder in CODE_FOLDERS for path in (REPOSITORY / folder).rglob("*")]
    return [path for path in files if path.suffix in (".py", ".cpp", ".h")]


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def by_folder(paths: list[Path]) -> dict[str, list[Path]]:
    folders: dict[str, list[Path]] = {}
    for path in paths:
        folders.setdefault(path.parent.relative_to(REPOSITORY).as_posix(), []).append(path)
    return folders


def test_no_folder_has_more_modules_than_a_reader_takes_in() -> None:
    modules = by_folder([path for path in code_files() if path.name != "__init__.py"])
    assert {"model", "cluster/storage", "jobs/training", "model/kernels/native"} <= modules.keys()
    assert {
        folder: len(files) for folder, files in modules.items() if len(files) > MAX_MODULES
    } == {}


def test_no_file_is_too_long() -> None:
    files = {path.relative_to(REPOSITORY).as_posix(): num_lines(path) for path in code_files()}
    assert files and {file: size for file, size in files.items() if size > MAX_FILE_LINES} == {}


def long_functions(source: str) -> list[str]:
    """Returns the functions, methods and inner functions that are longer than a reader takes in,
    their decorators aside."""
    return [
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES
    ]


def test_long_functions_are_found() -> None:
    longest = "".join(f"    x = {n}\n" for n in range(MAX_FUNCTION_LINES - 1))
    too_long = longest + "    return x\n"
    assert long_functions(f"def f():\n{longest}") == []
    assert long_functions(f"def f():\n{too_long}") == ["f"]
    assert long_functions(f"async def g():\n{too_long}") == ["g"]
    inner = "".join(f"    {line}\n" for line in f"def f():\n{too_long}".splitlines())
    assert long_functions(f"class C:\n{inner}") == ["f"]


def test_no_function_is_too_long() -> None:
    found = {}
    for path in code_files():
        if path.suffix == ".py":
            name = path.relative_to(REPOSITORY).as_posix()
            found[name] = long_functions(path.read_text(encoding="utf-8"))
    assert len(found) > 300
    assert {name: functions for name, functions in found.items() if functions} == {}


def test_a_class_name_has_one_home() -> None:
    """A name says what it is wherever it is read; those that several classes still share are not
    taken again."""
    homes: dict[str, list[str]] = {}
    for path in code_files():
        if path.suffix == ".py":
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef):
                    homes.setdefault(node.name, []).append(path.relative_to(REPOSITORY).as_posix())
    assert len(homes) > 400
    shared = {name: files for name, files in homes.items() if len(files) > 1}
    assert {name: files for name, files in shared.items() if name not in SHARED_NAMES} == {}


def test_an_init_holds_a_docstring_and_nothing_else() -> None:
    inits = [path for path in code_files() if path.name == "__init__.py"]
    assert len(inits) > 20
    front_door = REPOSITORY / "raymill" / "__init__.py"  # names what users import
    for path in set(inits) - {front_door}:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree) and len(tree.body) == 1, path


def test_no_test_file_imports_another_one() -> None:
    files = list((REPOSITORY / "tests").rglob("*.py"))
    assert len(files) > 200
    found = [
        (path.name, line)
        for path in files
        for line in re.findall(r"^from tests\S*\.test_\w+ import", path.read_text(), re.M)
    ]
    assert found == []


def words_asked_for(source: str, words: Collection[str]) -> list[tuple[int, str]]:
    """Returns the lines that compare something with one of the words, match it, or look it up in a
    table of them."""
    operands: list[ast.expr] = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Compare():
                operands += [node.left, *node.comparators]
            case ast.MatchValue():
                operands.append(node.value)
            case ast.Dict():
                operands += [key for key in node.keys if key is not None]
    listed: list[ast.expr] = []
    for operand in operands:
        listed += operand.elts if isinstance(operand, ast.Tuple | ast.List | ast.Set) else [operand]
    return [
        (node.lineno, node.value)
        for node in listed
        if isinstance(node, ast.Constant) and node.value in words
    ]


def test_the_syntax_tree_shows_where_a_word_is_asked_for() -> None:
    source = """
if way == "fp32": pass
if "bf16" != way: pass
if way in ("auto", "fp32"): pass
match way:
    case "fp32" | "bf16": pass
table = {"bf16": 2, "fp32": 4}
default = "fp32"
text = f"{way} and bf16"
"""
    lines = [line for line, _ in words_asked_for(source, NUMERICS)]
    assert sorted(lines) == [2, 3, 4, 6, 6, 7, 7]


@pytest.mark.more
@pytest.mark.parametrize(
    ("owner", "words"),
    [
        ("model/architecture.py", ARCHITECTURES),
        ("model/numerics.py", NUMERICS),
        ("jobs/exact/run_values.py", get_args(Optimizer)),
    ],
    ids=["architecture", "precision", "optimizer"],
)
def test_only_its_owner_asks_which_word_a_setting_has(owner: str, words: Collection[str]) -> None:
    """All others ask the record that the word names, so that another member of the set is another
    record."""
    found = {}
    for path in code_files():
        name = path.relative_to(REPOSITORY).as_posix()
        if path.suffix == ".py" and name != owner:
            found[name] = words_asked_for(path.read_text(encoding="utf-8"), words)
    assert len(found) > 300 and words
    assert {name: places for name, places in found.items() if places} == {}


def only_imports(source: str) -> str:
    """Returns a file's imports, which are all that import-linter looks at, without those that type
    checkers alone see."""
    tree = ast.parse(source)
    unseen: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            unseen |= {*ast.walk(node)}
    kept = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom) and node not in unseen
    ]
    return "\n".join([line for line in kept if line != "from __future__ import annotations"])


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Returns the contracts that a copy of the code breaks: unchanged, and after each of
    `VIOLATIONS`."""
    copy = tmp_path_factory.mktemp("house")
    for path in code_files():
        if path.suffix == ".py":
            target = copy / path.relative_to(REPOSITORY)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(only_imports(path.read_text(encoding="utf-8")), encoding="utf-8")
    shutil.copy(REPOSITORY / "pyproject.toml", copy)
    planted = json.dumps([(file, line) for _, file, line in VIOLATIONS])
    done = subprocess.run(
        [sys.executable, "-c", LINT, planted],
        cwd=copy,
        capture_output=True,
        text=True,
        check=False,
        timeout=limit_s(60),
    )
    assert done.returncode == 0, done.stderr
    found: list[list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_each_contract_has_a_violation_that_it_is_tried_on() -> None:
    assert {contract for contract, _, _ in VIOLATIONS} == set(CONTRACTS)


def test_the_code_keeps_every_contract(broken: list[list[str]]) -> None:
    assert broken[0] == []


@pytest.mark.parametrize(
    "number", range(len(VIOLATIONS)), ids=[f"{c}: {f} {line}" for c, f, line in VIOLATIONS]
)
def test_a_violation_breaks_its_contract(broken: list[list[str]], number: int) -> None:
    assert VIOLATIONS[number][0] in broken[1 + number]


def refused(file: str) -> set[str]:
    """Returns the private modules that ruff does not let a file of that name import."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "ruff",
            "check",
            "--no-cache",
            "--output-format=concise",
            "--stdin-filename",
            file,
            "-",
        ],
        cwd=REPOSITORY,
        input="".join(f"from {module}.somewhere import something\n" for module in BANNED_MODULES),
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        BANNED_MODULES[int(line) - 1] for line in re.findall(r":(\d+):\d+: TID251", done.stdout)
    }


@pytest.mark.parametrize("folder", [*CODE_FOLDERS, "tests"])
def test_private_names_are_refused_away_from_their_homes(folder: str) -> None:
    assert refused(f"{folder}/new_file.py") == set(BANNED_MODULES)


@pytest.mark.parametrize(
    "home",
    ["cluster/local/start_node.py", "jobs/ray_train/callbacks.py", "serving/proxy/http_bounds.py"],
)
def test_private_names_are_taken_in_their_homes(home: str) -> None:
    assert (REPOSITORY / home).is_file()
    assert refused(home) == set()
