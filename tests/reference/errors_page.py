"""The page of errors, with what to do about each."""

import ast
import inspect
import re
from pathlib import Path
from typing import Any

from jobs.corpus.documents import Drop
from model.tables import read_table
from serving.protocol import errors
from tests.reference.markdown import MADE, cell, code, sentence, table, template
from tests.repository import REPOSITORY

_FORMAT = re.compile(
    r"(?:![ra])?(?::[^{}\s]*)?\}"
)  # how a value is written, which a reader need not know
_INTRODUCTION = """\
# Errors

Every message says what was wrong, what was expected and what to do. `{…}` and `…` stand for values.

## The endpoint

The body of an error is OpenAI's: `{"error": {"message", "type", "param", "code"}}`. After the first byte of a stream an
error is an event, and no `[DONE]` follows it. [The threat and fault page](../explanation/serving-faults.md) says who refuses
when.

"""
_OF_REQUESTS = """\
### Errors of a request's fields

These have the status 400 unless another one is named. `param` is the field.

"""
_STORAGE = """\
## Storage

Why a storage or the Hugging Face hub cannot be used as asked. `raymill storage check URI` tries everything that a run needs.

"""
_DROPS = """\
## Why a document is dropped

`raymill data report` counts the documents by these reasons, with samples.

"""
_LIMITS = """\
## Why a run is slow

`raymill why-slow RUN` answers with one of these sentences.

"""


def _named(name: str, known: dict[str, Any]) -> list[str]:
    headers = ", ".join(f"{key}: {value}" for key, value in known.get("headers", {}).items())
    code_of = known.get("code", name)
    message = _FORMAT.sub("}", known["message"]).replace("{{", "{").replace("}}", "}")
    return [str(known["status"]), code(code_of), cell(message), code(headers)]


def _made_in_place() -> list[list[str]]:
    """Returns the errors whose words stand where they are raised."""
    rows = set()
    for file in sorted((REPOSITORY / "serving").rglob("*.py")):
        rows |= _api_errors(file)
    return [list(row) for row in sorted(rows)]


def _api_errors(file: Path) -> set[tuple[str, str, str]]:
    rows = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        match node:
            case ast.Call(func=ast.Name(id="ApiError"), args=[message]):
                given = {keyword.arg: keyword.value for keyword in node.keywords}
                rows.add(_row(message, given, status="400"))
            case ast.Call(func=ast.Name(id="overloaded"), args=[message]):
                rows.add(_row(message, {"code": ast.Constant("overloaded")}, status="429"))
    return {row for row in rows if len(row[2]) > len("…")}


def _row(
    message: ast.expr, given: dict[str | None, ast.expr], *, status: str
) -> tuple[str, str, str]:
    match given.get("status"):
        case ast.Constant(value=number):
            status = str(number)
    kind = given.get("code")
    name = kind.value if isinstance(kind, ast.Constant) else ""
    return status, code(str(name)), cell(template(message))


def _reasons(kind: str) -> list[list[str]]:
    table_of = read_table(str(REPOSITORY / "cluster/storage/uris.py"), "reasons")[kind]
    return [
        [", ".join(map(code, entry["of"])), cell(sentence(entry["reason"]))] for entry in table_of
    ]


def _drops() -> list[list[str]]:
    """Returns the reasons to drop a document, with the comments that stand beside them."""
    source = inspect.getsource(Drop)
    rows, above = [], ""
    for line in source.splitlines():
        comment = line.partition("# ")[2]
        match = re.match(r"    [A-Z_0-9]+ = \"(\w+)\"", line)
        if match:
            about = comment or above or f"fails the rule `{match[1]}` of `data.quality_rules`"
            rows.append([code(match[1]), cell(sentence(about))])
        above = "" if match else comment
    return rows


def _sentences() -> list[list[str]]:
    known = read_table(str(REPOSITORY / "jobs/report/why_slow.py"), "why_slow")
    return [
        [code(cause), cell(f"{who} {verb} the run: {rest}")]
        for cause, (who, verb, rest) in known.items()
    ]


def page() -> str:
    known = read_table(errors.__file__, "errors")
    rows = sorted(_named(name, entry) for name, entry in known.items())
    text = MADE + _INTRODUCTION + table(("status", "code", "message", "headers"), rows)
    text += _OF_REQUESTS + table(("status", "code", "message"), _made_in_place())
    text += (
        _STORAGE + "### S3\n\n" + table(("the store's word", "reason and remedy"), _reasons("s3"))
    )
    text += "### Hugging Face\n\n" + table(("the hub's word", "reason and remedy"), _reasons("hub"))
    text += _DROPS + table(("reason", "meaning"), _drops())
    return text + _LIMITS + table(("cause", "sentence"), _sentences())
