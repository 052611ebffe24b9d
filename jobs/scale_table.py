"""A simulation of scale as Markdown, which also reads well at a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from jobs.plan_table import size
from jobs.run_history import duration

_COLUMNS = (
    ("GPUs", lambda row: f"{row['num_gpus']:,}"),
    ("lanes each", lambda row: f"{row['lanes_per_gpu']:g}"),
    ("computing", lambda row: seconds(row["compute_s"])),
    ("exchange", lambda row: seconds(row["exchange_s"])),
    ("not hidden", lambda row: seconds(row["exposed_s"])),
    ("step", lambda row: seconds(row["step_s"])),
    ("efficiency", lambda row: f"{row['efficiency']:.0%}"),
)
_STATE_COLUMNS = (
    ("GPUs", lambda row: f"{row['num_gpus']:,}"),
    ("failure every", lambda row: f"{row['mtbf_s'] / 3600:,.4g} h"),
    ("snapshot", lambda row: seconds(row["snapshot_s"])),
    ("every", lambda row: f"{row['snapshot_every']} steps"),
    ("checkpoint waits", lambda row: seconds(row["checkpoint_wait_s"])),
    ("stored in", lambda row: seconds(row["checkpoint_store_s"])),
    ("every", lambda row: duration(row["checkpoint_every_s"])),
    ("goodput", lambda row: f"{row['goodput']:.2%}"),
    ("without snapshots", lambda row: f"{row['goodput_elastic']:.2%}"),
    ("and waiting", lambda row: f"{row['goodput_waiting']:.2%}"),
)
_DATA_COLUMNS = (
    ("GPUs", lambda row: f"{row['num_gpus']:,}"),
    ("token ids read", lambda row: size(row["read_bytes_per_s"], "/s")),
    ("text for tokenizing", lambda row: size(row["text_bytes_per_s"], "/s")),
    ("health answers", lambda row: f"{row['health_calls_per_s']:,.0f}/s"),
    ("messages a step", lambda row: f"{row['messages']:,}"),
)


def scale_table(found: Mapping[str, Any]) -> str:
    """Three tables over the numbers of GPUs, and where each part saturates."""
    parts = [
        _table([name for name, _ in columns], [[of(row) for _, of in columns] for row in found["scales"]])
        for columns in (_COLUMNS, _STATE_COLUMNS, _DATA_COLUMNS)
    ]
    limits = [
        [limit["part"], f"{num:,} GPUs" if (num := limit["num_gpus"]) else "not here", limit["sign"], limit["then"]]
        for limit in found["limits"]
    ]
    return "\n\n".join([*parts, _table(["part", "saturates at", "when", "what then"], limits)])


def seconds(value: float) -> str:
    """Such as `12 ms`."""
    return f"{value:,.3g} s" if value >= 1 else f"{1000 * value:,.3g} ms"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    lines = [heads, ["-" * width for width in widths], *rows]
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines
    )
