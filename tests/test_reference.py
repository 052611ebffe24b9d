"""The reference in docs/ is what the code declares, and has words for everything."""

import ast
from collections.abc import Iterator

import pytest

from cluster.cli import COMMANDS
from cluster.metrics.metric_table import metrics
from cluster.settings.leaves import leaves
from jobs.corpus.documents import Drop
from jobs.run.end import FORGOTTEN, End
from model.tables import read_table
from serving.protocol import errors
from tests.reference import read_first
from tests.reference.http_page import BODIES, meaning, words
from tests.reference.ledger_page import fields
from tests.reference.make_reference import FOLDER, PAGES, written
from tests.reference.settings_page import TREES
from tests.repository import REPOSITORY

TELLING = {"event", "note", "tell", "_tell", "_report"}
"""Functions by which code writes an event into the ledger, whose name is their first text."""


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_code_declares(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert text == PAGES[name]().rstrip() + "\n", "`make reference` writes it again"


@pytest.mark.parametrize("folder", read_first.folders())
def test_a_folders_readme_names_what_is_read_first_as_contributing_does(folder: str) -> None:
    text = read_first.readme(folder).read_text(encoding="utf-8")
    assert text == read_first.with_list(folder), "`make reference` writes it again"


def test_the_folder_has_no_other_page() -> None:
    assert written().keys() == PAGES.keys()


def page(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def test_every_setting_has_a_row() -> None:
    paths = {leaf.path for tree, _ in TREES.values() for leaf in leaves(tree)}
    assert len(paths) > 130
    assert [path for path in paths if f"\n| `{path}` | " not in page("settings.md")] == []


def test_every_command_has_a_section() -> None:
    names = [command.name for command in COMMANDS]
    assert len(names) > 40
    assert [name for name in names if f"\n### raymill {name}\n" not in page("commands.md")] == []


def test_every_metric_and_every_named_error_has_a_row() -> None:
    assert [name for name in metrics() if f"| `{name}` |" not in page("metrics.md")] == []
    known = read_table(errors.__file__, "errors")
    codes = {entry.get("code", name) for name, entry in known.items()}
    codes |= {drop.value for drop in Drop}
    assert [code for code in codes if f"| `{code}` |" not in page("errors.md")] == []


@pytest.mark.parametrize("title", BODIES)
def test_the_words_of_a_request_are_those_of_its_fields(title: str) -> None:
    request, model, _ = BODIES[title]
    assert all(meaning(request, name) for name in model.model_fields)
    assert words().get(request, {}).keys() <= model.model_fields.keys()


def test_words_that_requests_share_are_of_a_field() -> None:
    names = set[str]().union(*(model.model_fields for _, model, _ in BODIES.values()))
    assert words()["all"].keys() <= names


def told(source: str) -> Iterator[tuple[str, set[str]]]:
    """Yields the name of each event that the code writes into the ledger, and its fields."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        match node.func:
            case ast.Attribute(attr=function) | ast.Name(id=function):
                pass
            case _:
                continue
        texts: list[object] = []
        for argument in node.args:
            match argument:
                case ast.Constant(value=text):
                    texts.append(text)
                case ast.Attribute(value=ast.Name(id="End"), attr=end):
                    texts.append(End[end].value)
        is_told = function in TELLING or (function == "partial" and "note" in ast.unparse(node))
        if is_told and texts and isinstance(texts[0], str):
            yield texts[0], {keyword.arg for keyword in node.keywords if keyword.arg}


def test_the_syntax_tree_shows_what_is_told() -> None:
    source = 'self._ledger.event("skip", step=1, **more)\nwrite = partial(note, run, "spares", a=2)'
    source += "\nself.tell(End.GAVE_UP, step=2)"
    assert list(told(source)) == [("skip", {"step"}), ("spares", {"a"}), ("gave_up", {"step"})]


def test_every_event_of_the_ledger_is_described_with_its_fields() -> None:
    known, names = fields(), set()
    for path in sorted((REPOSITORY / "jobs").rglob("*.py")):
        for name, given in told(path.read_text(encoding="utf-8")):
            names.add(name)
            assert given <= known[name].keys(), f"{path}: {name} has fields without words"
    # A run that forgets begins with that line
    assert names == known.keys() - {"step", FORGOTTEN}


def test_every_field_of_a_step_is_described() -> None:
    source = (REPOSITORY / "jobs/training/step_record.py").read_text(encoding="utf-8")
    keys = set[str]()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Assign(targets=[ast.Attribute(attr="line")], value=ast.Dict(keys=names)):
                keys |= {name.value for name in names if isinstance(name, ast.Constant)}
    assert len(keys) > 10
    assert keys - {"time"} <= fields()["step"].keys()
