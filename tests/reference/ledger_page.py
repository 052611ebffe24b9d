"""The page of a run's ledger: its lines and their fields."""

from typing import Any

from model.tables import read_table
from raymill.phases import PHASES, REST
from tests.reference.markdown import MADE, cell, code, sentence, table
from tests.repository import REPOSITORY

_INTRODUCTION = """\
# Ledger

`runs/RUN/ledger.jsonl` gets a line of JSON for each step and each event, appended and never rewritten. An unfinished last line
is ignored. Every number of the report and of `pretrain`'s result comes from these lines. Every line has `time`, in seconds of
Unix time; the line of an event has its name under `event`, and the line of a step has none.

Every line has the SHA-256 of the line before under `prev`, in hexadecimal and null in the first, so that a line that was
changed, removed, added or moved is found by `raymill verify`. What was cut off at the end shows by the hash of the last line,
which `raymill verify --json` prints as `ledger_head`. A ledger of an earlier version has a chain from its next line on.

Steps that a failure cost are repeated and recorded again: of the lines of one step the last one counts. The time between a save
that was requested (`preempted` with the notice `stop`) and the next `start` is a pause. A pause is no failure, no restart, and
no part of wall time or goodput.

"""


def fields() -> dict[str, dict[str, str]]:
    """Returns the words for each line's fields, by the event's name; `about` is the line's own."""
    known: dict[str, Any] = read_table(str(REPOSITORY / "jobs/run/ledger.py"), "ledger_fields")
    return known


def page() -> str:
    text = MADE + _INTRODUCTION
    messages = read_table(str(REPOSITORY / "jobs/watching/run_watcher.py"), "run_events")
    for name, words in fields().items():
        title = "A step" if name == "step" else name
        text += f"## {title}\n\n{words['about']}\n\n"
        if message := messages.get(name, {}).get("message"):
            text += f"The log says: {code(message)}.\n\n"
        rows = [
            (code(key), cell(sentence(about))) for key, about in words.items() if key != "about"
        ]
        text += table(("field", "meaning"), rows)
        if name == "step":
            phases = ", ".join(map(code, PHASES))
            text += f"The phases of `seconds` are {phases}, and {code(REST)}, the rest. `loss` is the head, its "
            text += "cross-entropy and their gradient; `sync` is the part of the exchange that is not overlapped; "
            text += "`checkpoint` and `snapshot` belong to the step before.\n\n"
    return text
