"""Draws a replay: the nodes that were there and the workers that trained, for each contender, and the
tokens of all."""

from collections.abc import Mapping

from matplotlib.axes import Axes

from jobs.report.page import PHASES, SERIES, new_figure, png, style
from tests.benchmarks.goodput.accounting import standing_steps
from tests.benchmarks.goodput.records import Record

_LINES = ("-", "--", "-.", ":")


def picture(
    records: Mapping[str, Record], *, title: str, factor: float, row_s: float, row_tokens: int
) -> bytes:
    """Returns a PNG with time in hours of the trace, which ran `factor` times as fast."""
    figure = new_figure(height_inches=1.4 * len(records) + 3.0)
    ratios = [1.0] * len(records) + [2.0]
    panels = figure.subplots(len(records) + 1, sharex=True, height_ratios=ratios)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    for axes, (name, record) in zip(panels, records.items(), strict=False):
        style(axes)
        _draw_nodes(axes, record, factor=factor)
        _draw_workers(axes, record, factor=factor, row_s=row_s)
        axes.set_ylabel(name)
    style(panels[-1])
    for number, (name, record) in enumerate(records.items()):
        _draw_tokens(panels[-1], name, record, number, factor=factor, row_tokens=row_tokens)
    _draw_possible(
        panels[-1], next(iter(records.values())), factor=factor, row_s=row_s, row_tokens=row_tokens
    )
    panels[-1].set_ylabel("thousand tokens")
    panels[-1].set_xlabel("hours of the trace")
    return png(figure)


def _hours(record: Record, time_s: float, factor: float) -> float:
    return (time_s - record.start_s) * factor / 3600


def _draw_nodes(axes: Axes, record: Record, *, factor: float) -> None:
    times = [_hours(record, count.time_s, factor) for count in record.nodes]
    counts = [count.nodes for count in record.nodes]
    times.append(_hours(record, record.end_s, factor))
    axes.fill_between(times, [*counts, counts[-1]], step="post", color="#dddddd", linewidth=0)
    axes.set_ylim(0, max(counts) + 0.3)


def _draw_workers(axes: Axes, record: Record, *, factor: float, row_s: float) -> None:
    """Draws a stroke for each step that stands, as high as its workers. After an interruption it is as
    long as the step's rows take."""
    before_s = record.start_s
    for step in standing_steps(record.steps):
        if record.start_s < step.time_s <= record.end_s:
            rows_s = len(step.samples) * row_s / step.world_size
            is_next = step.time_s - before_s < 2 * rows_s
            began_s = before_s if is_next else step.time_s - rows_s
            span = [_hours(record, time_s, factor) for time_s in (began_s, step.time_s)]
            axes.plot(span, [step.world_size] * 2, color=SERIES, linewidth=1.5)
        before_s = max(record.start_s, step.time_s)


def _draw_tokens(
    axes: Axes, name: str, record: Record, number: int, *, factor: float, row_tokens: int
) -> None:
    times, totals = [0.0], [0.0]
    for step in standing_steps(record.steps):
        if record.start_s < step.time_s <= record.end_s:
            times.append(_hours(record, step.time_s, factor))
            totals.append(totals[-1] + len(step.samples) * row_tokens / 1000)
    color, line = PHASES[number + 1], _LINES[number % len(_LINES)]
    axes.plot(times, totals, color=color, linestyle=line, label=name)


def _draw_possible(
    axes: Axes, record: Record, *, factor: float, row_s: float, row_tokens: int
) -> None:
    times, totals = [0.0], [0.0]
    ends_s = [count.time_s for count in record.nodes[1:]] + [record.end_s]
    for count, end_s in zip(record.nodes, ends_s, strict=True):
        times.append(_hours(record, end_s, factor))
        rows = (end_s - count.time_s) * count.nodes / row_s
        totals.append(totals[-1] + rows * row_tokens / 1000)
    axes.plot(times, totals, color="#bbbbbb", label="the nodes could have done")
