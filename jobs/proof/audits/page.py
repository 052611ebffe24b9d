"""Shows an audit as a page: what was asked, what was computed again and where, what may be unseen, and
what no audit looks at."""

from collections.abc import Iterable
from html import escape

from jobs.proof.audits.record import AuditRecord
from jobs.report.page import document, grid, pairs


def page_of(record: AuditRecord) -> str:
    title = f"Audit of {record.run}"
    verdict = record.verdict or "This audit has not ended."
    parts = [
        f"<h1>{escape(title)}</h1>\n<p>{escape(verdict)}</p>",
        pairs(_asked(record)),
        f"<h2>Computed again</h2>\n{_intervals(record)}",
        _tokenized(record),
        _unseen(record),
        f"<h2>What an audit does not cover</h2>\n{_listed(record.uncovered)}",
    ]
    return document(title, "\n".join(part for part in parts if part))


def _asked(record: AuditRecord) -> list[tuple[str, str]]:
    signed = record.signed_lines
    rows = [
        ("Date", f"{record.begun} to {record.ended or 'now'} (UTC)"),
        ("Must have been signed by", str(record.signed_by)),
        ("Root of their time stamps", str(record.timestamped_by)),
        ("Lines of the ledger that are signed", f"1 to {signed}" if signed else "none"),
        ("The last of them (SHA-256)", record.head),
        ("Nonce of the auditor", record.nonce),
        ("Intervals of the run", str(record.intervals_of_run)),
        ("The auditor's workers", str(record.workers)),
        ("The auditor's hardware", _facts(record.hardware)),
        ("The run's hardware", "; ".join(map(_facts, record.hardware_of_run))),
        ("The auditor's code", record.code_version),
        ("The run's code", _code_of_run(record)),
    ]
    return [(name, value) for name, value in rows if value != "None"]


def _facts(hardware: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in hardware.items())


def _code_of_run(record: AuditRecord) -> str:
    if record.code_of_run == [record.code_version]:
        return "the same"
    return f"{', '.join(record.code_of_run)}: another one than the auditor's"


def _intervals(record: AuditRecord) -> str:
    rows = [
        [
            f"{at.first}..{at.last}",
            f"{at.computed}{'' if at.now else ' (before an interruption)'}",
            str(at.hashes),
            str(at.validations),
            f"{at.seconds:.1f}",
            at.verdict,
        ]
        for at in record.intervals
    ]
    heads = ("Steps", "At (UTC)", "Hashes compared", "Validations compared", "Seconds", "Verdict")
    return grid("Intervals that were drawn", heads, rows)


def _tokenized(record: AuditRecord) -> str:
    made = record.tokenized
    if made is None:
        return ""
    rows = [
        ("Shards drawn", ", ".join(made.drawn)),
        ("Made again", str(made.made_again)),
        ("Equal", str(made.equal)),
        ("Seconds", f"{made.seconds:.1f}"),
    ]
    return f"<h2>Token store made again</h2>\n{pairs(rows)}"


def _unseen(record: AuditRecord) -> str:
    if record.unseen is None:
        return ""
    rows = [[share, f"{chance:.1%}"] for share, chance in record.unseen.items()]
    caption = "If so many intervals were forged, the chance that none was drawn"
    return f"<h2>What may be unseen</h2>\n{grid(caption, ('Share forged', 'Unseen'), rows)}"


def _listed(texts: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>"
