"""The READMEs are true: the program takes every command in them, and every link, folder and file
exists.

`e2e/test_readme.py` runs the commands.
"""

import argparse
import json
import re
from pathlib import Path

import pytest

from cluster.cli import command_parser
from cluster.settings.code_folders import CODE_FOLDERS
from cluster.settings.flags import read_config
from cluster.settings.parser import ConfigError
from cluster.settings.run import RunConfig
from tests.drawings.processes_picture import PICTURE, draw
from tests.reading_figures import read_first_files
from tests.readmes import READMES, Command, all_commands, blocks_of_commands
from tests.repository import REPOSITORY

PARSER = command_parser()
MOST_WORDS = 1200  # of a README
MOST_CHARACTERS_OF_A_LINE = 160
MOST_LINES_READ_FIRST = 5200
MOST_WORDS_OF_A_PARAGRAPH = 120
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")


def place(command: Command) -> str:
    return command.place


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


@pytest.mark.parametrize("command", all_commands("raymill"), ids=place)
def test_each_command_is_taken_as_it_stands(command: Command) -> None:
    PARSER.parse_args(command.words[1:])


ASKING = [
    (serve, curl)
    for readme in READMES
    for block in blocks_of_commands(readme)
    for serve in block
    if serve.program == "raymill" and serve.words[1] == "serve"
    for curl in block
    if curl.program == "curl"
]


@pytest.mark.parametrize(("serve", "curl"), ASKING, ids=lambda command: command.place)
def test_each_curl_asks_for_the_model_that_is_served_above_it(
    serve: Command, curl: Command
) -> None:
    assert len(ASKING) == 4
    arguments = PARSER.parse_args(serve.words[1:])
    body = json.loads(curl.words[curl.words.index("-d") + 1])
    assert body["model"] == arguments.model_name
    assert curl.words[1].startswith(f"http://127.0.0.1:{arguments.port}/v1/")
    assert ("$(cat key)" in curl.line) == (arguments.api_key_file == "key")


@pytest.mark.parametrize("command", all_commands("make"), ids=place)
def test_each_target_is_one_of_the_makefile(command: Command) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    asked = {word for word in command.words[1:] if "=" not in word}
    assert asked <= targets


@pytest.mark.parametrize("command", all_commands("kubectl"), ids=place)
def test_each_manifest_that_is_to_be_applied_is_there(command: Command) -> None:
    for folder in [word for word in command.words if word.startswith("k8s/")]:
        assert (REPOSITORY / folder / "kustomization.yaml").is_file()


def setting_names() -> set[str]:
    """Returns the settings of all commands, as a YAML file has them."""
    parsers = list(subcommands(PARSER).values())
    options = {
        option
        for parser in parsers
        for action in parser._actions
        for option in action.option_strings
    }
    return {option.removeprefix("--").replace("-", "_") for option in options if "." in option}


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_each_setting_that_is_named_exists(readme: Path) -> None:
    names = setting_names()
    # Which begins file names, too
    sections = "|".join({name.split(".")[0] for name in names} - {"model"})
    assert {"train.exact", "data.source", "replicas.max_replicas"} <= names
    named = re.findall(
        rf"(?<![\w/.-])(?<!-m )(?:{sections})\.[a-z_]{{3,}}\b(?![(/.-])", readme.read_text()
    )
    assert {name for name in named if name not in names} == set()


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_each_link_leads_somewhere(readme: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", readme.read_text())
    gone = [link for link in links if "://" not in link and not (readme.parent / link).exists()]
    assert not gone


def paragraphs(text: str) -> list[str]:
    """Returns the paragraphs and the items of lists, without code, tables and headings."""
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*] |\d+\. ))", prose)
    return [block for block in blocks if not block.lstrip().startswith(("|", "#", "<!--"))]


PROSE = [path for path in READMES if path.name != "scale.md"]  # figures, with words between them


@pytest.mark.parametrize("readme", PROSE, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_paragraph_is_longer_than_a_reader_keeps_in_mind(readme: Path) -> None:
    long = [
        (len(block.split()), block[:60])
        for block in paragraphs(readme.read_text(encoding="utf-8"))
        if len(block.split()) > MOST_WORDS_OF_A_PARAGRAPH
    ]
    assert long == []


def headings(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as the repository's page and the site name them."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_each_anchor_is_a_heading(readme: Path) -> None:
    links = re.findall(r"\]\(([^)#:]*\.md)?#([\w-]+)\)", readme.read_text(encoding="utf-8"))
    gone = []
    for file, anchor in links:
        page = (readme.parent / file).resolve() if file else readme
        if anchor not in headings(page):
            gone.append(f"{file}#{anchor}")
    assert gone == []


# Of objects in Kubernetes, which look like files of the package
LABELS = {f"raymill/{name}" for name in ("run", "run-id", "capacity", "computes-wrong")}

OF_THE_CODE = [path for path in READMES if path.parent.name != "tests"]  # which names its own


@pytest.mark.parametrize("readme", OF_THE_CODE, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_each_file_of_the_code_that_is_named_is_there(readme: Path) -> None:
    folders = "|".join((*CODE_FOLDERS, "tests", "k8s", "docs"))
    named = re.findall(rf"`((?:{folders})/[\w./-]+)`", readme.read_text(encoding="utf-8"))
    files = [name for name in named if name not in LABELS]
    assert [name for name in files if not (REPOSITORY / name).exists()] == []


def test_the_tree_names_every_folder_of_code_and_no_other() -> None:
    [tree] = re.findall(r"^## The tree\n+```\n(.*?)^```", CONTRIBUTING, re.MULTILINE | re.DOTALL)
    named: set[str] = set()
    path: list[str] = []
    for indent, name in re.findall(r"^( *)([\w.]+)/ ", tree, re.MULTILINE):
        path = [*path[: len(indent) // 2], name]
        named.add("/".join(path))
    there = {
        path.parent.relative_to(REPOSITORY).as_posix()
        for folder in CODE_FOLDERS
        for path in (REPOSITORY / folder).rglob("__init__.py")
    }
    assert len(there) > 25
    assert named - {"docs", "k8s", "tests"} == there


def test_what_to_read_first_is_there_and_short() -> None:
    files = read_first_files()
    assert 10 < len(files) <= 25 and all(path.exists() for path in files)
    assert sum(path.read_bytes().count(b"\n") for path in files) <= MOST_LINES_READ_FIRST


def test_the_root_readme_is_short() -> None:
    """Words are counted, as a limit of lines makes long lines."""
    assert len(README.split()) <= MOST_WORDS
    assert max(map(len, README.splitlines())) <= MOST_CHARACTERS_OF_A_LINE


FOLDER_READMES = [REPOSITORY / folder / "README.md" for folder in (*CODE_FOLDERS, "k8s")]


@pytest.mark.parametrize("readme", FOLDER_READMES, ids=lambda path: path.parent.name)
def test_a_folders_readme_is_its_picture_its_table_and_what_to_read_first(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    assert len(text.split()) < MOST_WORDS
    assert re.search(r"read first", text, re.IGNORECASE)
    assert "](../docs/" in text, "the rest is in docs/"


def test_the_settings_file_of_the_how_to_page_is_taken(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs/how-to/run-file.md").read_text(encoding="utf-8")
    [text] = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    config = read_config(tmp_path / "run.yaml", RunConfig)
    assert config.train.max_tokens == 20_000_000
    # What stands there as a comment is taken too.
    (tmp_path / "all.yaml").write_text(re.sub(r"# (?=[a-z_]+: )", "", text), encoding="utf-8")
    with pytest.raises(ConfigError, match="2 weights for 1 source"):
        read_config(tmp_path / "all.yaml", RunConfig)


def test_every_page_is_reached_from_the_readme_in_two_clicks() -> None:
    reached = set(links_of(REPOSITORY / "README.md"))
    for page in [page for page in reached if page.suffix == ".md"]:
        reached |= set(links_of(page))
    pages = set((REPOSITORY / "docs").rglob("*.md"))
    assert len(pages) > 30
    assert pages - reached == set()


def links_of(page: Path) -> list[Path]:
    links = re.findall(r"\]\(([^)#:]+)[^)]*\)", page.read_text(encoding="utf-8"))
    return [(page.parent / link).resolve() for link in links]


def test_the_picture_of_the_processes_is_the_one_that_the_code_draws() -> None:
    assert PICTURE.read_text(encoding="utf-8") == draw(), "`make pictures` draws it again"
    assert f"]({PICTURE.relative_to(REPOSITORY)})" in README
