"""The mean step as a waterfall: its phases one after another, and in one sentence what bounds the run."""

import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import StrMethodFormatter

from jobs.ledger import Ledger
from jobs.report_theme import Theme
from jobs.run_history import seconds_by_phase

_LINE_CHARS = 90


def waterfall(axes: Axes, ledger: Ledger, theme: Theme, *, verdict: str) -> None:
    means = {name: float(np.mean(seconds)) for name, seconds in seconds_by_phase(ledger).items()}
    total = sum(means.values())
    unit, factor = ("ms", 1000.0) if total < 1 else ("s", 1.0)
    start = 0.0
    for row, seconds in enumerate(means.values()):
        axes.barh(row, factor * seconds, left=factor * start, color=theme.series, height=0.65)
        start += seconds
        text = f"{factor * seconds:.3g} {unit}, {seconds / total:.0%}"
        is_late = start > 0.8 * total  # then there is no room to the right of the bar
        at = factor * (start - seconds if is_late else start)
        axes.annotate(
            text,
            (at, row),
            (-5 if is_late else 5, 0),
            textcoords="offset points",
            ha="right" if is_late else "left",
            va="center",
            color=theme.text,
            fontsize="small",
            bbox={"facecolor": theme.background, "edgecolor": "none", "pad": 1.0},
        )
    axes.set_yticks(range(len(means)), list(means))
    axes.invert_yaxis()
    axes.set_xlim(0, factor * total)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    label = "\n".join(textwrap.wrap(verdict, _LINE_CHARS))
    axes.set_xlabel(f"time since the step began ({unit})\n{label}", color=theme.text)
