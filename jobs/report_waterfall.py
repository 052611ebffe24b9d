"""The wall time of a run as a waterfall: its parts one after another, and in one sentence what bounds the run."""

import textwrap

from matplotlib.axes import Axes
from matplotlib.ticker import StrMethodFormatter

from jobs.ledger import Ledger
from jobs.report_theme import Theme
from jobs.run_history import duration
from jobs.why_slow import shares

_LINE_CHARS = 90
_LEAST_SHARE = 0.0005


def parts(ledger: Ledger) -> dict[str, float]:
    """Returns what the wall time went into, as shares of it: the figures that `why-slow` judges by."""
    found = shares(ledger)
    spent = {f"computing: {phase}": share for phase, share in found.computing.items()}
    spent |= {cause: share for cause, share in found.by_cause.items() if cause != "compute"}
    return {name: share for name, share in spent.items() if share >= _LEAST_SHARE}


def waterfall(axes: Axes, ledger: Ledger, theme: Theme, *, verdict: str) -> None:
    wall_s, drawn = shares(ledger).wall_s, parts(ledger)
    start = 0.0
    for row, share in enumerate(drawn.values()):
        axes.barh(row, 100 * share, left=100 * start, color=theme.series, height=0.65)
        start += share
        is_late = start > 0.8  # then there is no room to the right of the bar
        axes.annotate(
            f"{duration(share * wall_s)}, {share:.0%}",
            (100 * (start - share if is_late else start), row),
            (-5 if is_late else 5, 0),
            textcoords="offset points",
            ha="right" if is_late else "left",
            va="center",
            color=theme.text,
            fontsize="small",
            bbox={"facecolor": theme.background, "edgecolor": "none", "pad": 1.0},
        )
    axes.set_yticks(range(len(drawn)), list(drawn))
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    label = "\n".join(textwrap.wrap(verdict, _LINE_CHARS))
    axes.set_xlabel(f"wall time of the run (% of {duration(wall_s)})\n{label}", color=theme.text)
