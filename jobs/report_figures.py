"""The figures of a run over its steps, as PNG, for light and for dark pages.

The colours are Okabe and Ito's, which people who see fewer colours can tell apart; what differs in colour differs in
shape or line too.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, StrMethodFormatter

from jobs.ledger import Ledger
from jobs.run_history import interruptions, lost_ranges, seconds_by_phase, segments

Array = npt.NDArray[np.float64]

_SIZE_INCHES = (9.0, 3.8)
_DOTS_PER_INCH = 150
_SMOOTHED_SHARE = 1 / 50  # of the steps, averaged into one point


@dataclass(frozen=True)
class Theme:
    background: str
    text: str
    grid: str
    series: str
    accent: str
    restart: str
    resize: str
    phases: tuple[str, ...]


LIGHT = Theme(
    *("#ffffff", "#222222", "#dddddd"),
    *("#0072b2", "#d55e00", "#d55e00", "#7a3b69"),
    ("#56b4e9", "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#999999", "#f0e442"),
)
DARK = Theme(
    *("#16181c", "#e6e6e6", "#3a3d44"),
    *("#56b4e9", "#e69f00", "#e69f00", "#cc79a7"),
    ("#56b4e9", "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#999999", "#f0e442"),
)


@dataclass(frozen=True)
class Picture:
    title: str
    description: str  # for those who do not see it
    draw: Callable[[Axes, Ledger, Theme], None]


def draw(picture: Picture, ledger: Ledger, theme: Theme) -> bytes:
    """The picture as PNG."""
    figure = Figure(figsize=_SIZE_INCHES, dpi=_DOTS_PER_INCH, layout="constrained", facecolor=theme.background)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _style(axes, ledger, picture.title, theme)
    picture.draw(axes, ledger, theme)
    _mark_interruptions(axes, ledger, theme)
    # Below the axes, where no line is.
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower left", ncols=4, frameon=False, labelcolor=theme.text, fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=theme.background)
    return buffer.getvalue()


def pictures(ledger: Ledger) -> dict[str, Picture]:
    """What there is to draw, by name."""
    first, last = ledger.steps[0], ledger.steps[-1]
    validations = ledger.events("validation")
    span = f"steps {first['step']} to {last['step']}"
    stops = "; ".join(f"{stop.label} after step {stop.step}" for stop in interruptions(ledger)) or "no interruption"
    phases = {name: float(np.mean(seconds)) for name, seconds in seconds_by_phase(ledger).items()}
    shares = ", ".join(f"{name} {seconds / sum(phases.values()):.0%}" for name, seconds in phases.items())
    rates = [line["lr"] for line in ledger.steps]
    loss = f"Training loss over {span}, from {first['loss']:.3f} to {last['loss']:.3f} nats per token"
    if validations:
        loss += f", and validation loss, {validations[-1]['val_loss']:.3f} at its end"
        sets = validations[-1].get("sets", {})
        loss += "".join(f", {name} {figures['val_loss']:.3f}" for name, figures in sets.items())
    return {
        "loss": Picture("Loss", f"{loss}. Marked: {stops}, {len(ledger.events('checkpoint'))} checkpoints.", _loss),
        "learning_rate": Picture(
            "Learning rate",
            f"Learning rate over {span}: first {rates[0]:.3g}, peak {max(rates):.3g}, last {rates[-1]:.3g}.",
            _learning_rate,
        ),
        "throughput": Picture(
            "Throughput",
            f"Training tokens per second over {span}; the median is "
            f"{np.median([line['tokens_per_s'] for line in ledger.steps]):,.0f}. Marked: {stops}.",
            _throughput,
        ),
        "world_size": Picture(
            "Workers",
            f"Number of workers over {span}, by attempt: {', '.join(map(str, ledger.world_sizes))}. Marked: {stops}.",
            _world_size,
        ),
        "step_time": Picture(
            "Time of a step", f"Mean time of a step by phase, stacked, over {span}: {shares}.", _step_time
        ),
        **(_layer_pictures(span) if ledger.events("layers") else {}),
    }


def _layer_pictures(span: str) -> dict[str, Picture]:
    return {
        f"layer_{field}": Picture(
            f"{title} of each layer",
            f"{title} of each layer over {span}, as a heat map on a logarithmic scale, the embeddings lowest.",
            partial(_layers, field=field),
        )
        for field, title in (
            ("gradient_norm", "Gradient norm"),
            ("weight_norm", "Weight norm"),
            ("update_ratio", "Update ratio"),
        )
    }


def smoothed(values: Sequence[float], ledger: Ledger) -> Array:
    """The mean over a window around each step's value, cut at the ends of the run and of each attempt: another
    number of workers is a step in the curve, not a slope."""
    half = int(len(values) * _SMOOTHED_SHARE / 2)
    attempts = np.array([line["attempt"] for line in ledger.steps])
    parts = np.split(np.asarray(values, dtype=np.float64), np.flatnonzero(np.diff(attempts)) + 1)
    return np.concatenate([_window_means(part, half) for part in parts])


def _window_means(values: Array, half: int) -> Array:
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(len(values))
    low, high = np.maximum(ends - half, 0), np.minimum(ends + half + 1, len(values))
    return np.asarray((sums[high] - sums[low]) / (high - low), dtype=np.float64)


def _style(axes: Axes, ledger: Ledger, title: str, theme: Theme) -> None:
    steps = ledger.steps
    margin = max(0.5, 0.01 * (steps[-1]["step"] - steps[0]["step"]))
    axes.set_xlim(steps[0]["step"] - margin, steps[-1]["step"] + margin)
    axes.set_title(title, loc="left", color=theme.text, fontweight="bold")
    axes.set_xlabel("optimizer step", color=theme.text)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_facecolor(theme.background)
    axes.grid(color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.text)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.text)


def _mark_interruptions(axes: Axes, ledger: Ledger, theme: Theme) -> None:
    for number, (first, last) in enumerate(lost_ranges(ledger)):
        label = "steps lost, taken again" if number == 0 else None
        span = (first - 0.5, last + 0.5)
        axes.axvspan(*span, facecolor=theme.restart, edgecolor=theme.text, alpha=0.25, hatch="////", lw=0, label=label)
    labelled: set[bool] = set()
    for stop in interruptions(ledger):
        label = None if stop.is_resize in labelled else "resize" if stop.is_resize else "restart"
        labelled.add(stop.is_resize)
        color, style = (theme.resize, "-.") if stop.is_resize else (theme.restart, "--")
        axes.axvline(stop.step + 0.5, color=color, linestyle=style, linewidth=1.4, label=label)


def _plot_smoothed(axes: Axes, ledger: Ledger, field: str, theme: Theme, *, label: str) -> None:
    steps, values = [line["step"] for line in ledger.steps], [line[field] for line in ledger.steps]
    axes.plot(steps, values, ".", color=theme.series, alpha=0.3, markersize=3, label=f"{label}, each step")
    axes.plot(steps, smoothed(values, ledger), color=theme.series, linewidth=1.8, label=f"{label}, smoothed")


def _loss(axes: Axes, ledger: Ledger, theme: Theme) -> None:
    axes.set_ylabel("loss (nats/token)", color=theme.text)
    _plot_smoothed(axes, ledger, "loss", theme, label="training")
    if validations := {line["step"]: line["val_loss"] for line in ledger.events("validation")}:
        axes.plot(*zip(*sorted(validations.items()), strict=True), "D-", color=theme.accent, ms=5, label="validation")
    sets = {line["step"]: line.get("sets", {}) for line in ledger.events("validation")}
    for number, name in enumerate(dict.fromkeys(name for measured in sets.values() for name in measured)):
        points = [(step, measured[name]["val_loss"]) for step, measured in sorted(sets.items()) if name in measured]
        color = theme.phases[(2 + number) % len(theme.phases)]
        axes.plot(*zip(*points, strict=True), "s--", color=color, ms=4, label=f"validation, {name}")
    if saved := sorted({line["step"] for line in ledger.events("checkpoint")}):
        floor = axes.get_xaxis_transform()  # y in shares of the axes
        axes.plot(saved, [0.02] * len(saved), "^", color=theme.text, ms=5, transform=floor, label="checkpoint")


def _learning_rate(axes: Axes, ledger: Ledger, theme: Theme) -> None:
    axes.set_ylabel("learning rate (dimensionless)", color=theme.text)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    rates = [line["lr"] for line in ledger.steps]
    axes.plot([line["step"] for line in ledger.steps], rates, ".-", color=theme.series, ms=3, label="learning rate")
    axes.set_ylim(0, 1.1 * max(rates))


def _throughput(axes: Axes, ledger: Ledger, theme: Theme) -> None:
    axes.set_ylabel("throughput (tokens/s)", color=theme.text)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _plot_smoothed(axes, ledger, "tokens_per_s", theme, label="all workers")
    axes.set_ylim(0, 1.1 * max(line["tokens_per_s"] for line in ledger.steps))


def _world_size(axes: Axes, ledger: Ledger, theme: Theme) -> None:
    axes.set_ylabel("workers (count)", color=theme.text)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    parts = segments(ledger)
    width = parts[-1].last_step - parts[0].first_step + 1
    for part in parts:
        ends, height = (part.first_step - 0.5, part.last_step + 0.5), part.world_size
        label = "workers" if part is parts[0] else None
        axes.plot(ends, (height, height), color=theme.series, linewidth=5, solid_capstyle="butt", label=label)
        if part.last_step - part.first_step > width / 10:  # else labels could meet
            middle, text = ((ends[0] + ends[1]) / 2, height), f"attempt {part.attempt}"
            axes.annotate(text, middle, (0, 6), textcoords="offset points", ha="center", color=theme.text)
    axes.set_ylim(0, max(part.world_size for part in parts) + 0.8)


def _step_time(axes: Axes, ledger: Ledger, theme: Theme) -> None:
    phases = {name: smoothed(seconds, ledger) for name, seconds in seconds_by_phase(ledger).items()}
    unit, factor = ("ms", 1000.0) if np.sum([seconds.mean() for seconds in phases.values()]) < 1 else ("s", 1.0)
    axes.set_ylabel(f"time per step ({unit})", color=theme.text)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    steps = [line["step"] for line in ledger.steps]
    axes.stackplot(
        [steps[0] - 0.5, *steps, steps[-1] + 0.5],  # a step is as wide as one, also where it is the only one
        [factor * np.pad(seconds, 1, mode="edge") for seconds in phases.values()],
        labels=list(phases),
        colors=[theme.phases[index % len(theme.phases)] for index in range(len(phases))],
        hatch=["" if index < len(theme.phases) else "////" for index in range(len(phases))],
        edgecolor=theme.background,
        linewidth=0.4,
    )
    axes.set_ylim(bottom=0)


def _layers(axes: Axes, ledger: Ledger, theme: Theme, *, field: str) -> None:
    measured = {line["step"]: line for line in ledger.events("layers")}  # of steps taken again the last counts
    steps = sorted(measured)
    names = measured[steps[-1]]["layers"]
    values = np.array([measured[step][field] for step in steps], dtype=np.float64).T  # (layer, step)
    values[~(values > 0)] = np.nan  # has no logarithm
    middles = (np.array(steps[1:]) + steps[:-1]) / 2
    edges = np.concatenate([[ledger.steps[0]["step"] - 0.5], middles, [ledger.steps[-1]["step"] + 0.5]])
    low, high = (np.nanmin(values), np.nanmax(values)) if np.isfinite(values).any() else (1.0, 10.0)
    scale = LogNorm(low, max(high, 1.01 * low))
    mesh = axes.pcolormesh(edges, np.arange(len(names) + 1) - 0.5, values, norm=scale, cmap="cividis")
    axes.set_yticks(range(len(names)), names, fontsize=min(8.0, 160 / len(names)))
    axes.grid(visible=False)
    bar = axes.figure.colorbar(mesh, ax=axes)
    bar.ax.tick_params(which="both", colors=theme.text)
