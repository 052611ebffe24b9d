"""Draws the figures of a run over its steps, as PNG."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from cluster.output.result_text import counted
from jobs.report.page import ACCENT, PHASES, RESIZE, RESTART, SERIES, TEXT, new_figure, png, style
from jobs.report.why_slow import shares, why_slow
from jobs.run.history import duration, lost_ranges, seconds_by_phase
from jobs.run.ledger import Ledger

Array = npt.NDArray[np.float64]

_SMOOTHED_SHARE = 1 / 50  # the share of the steps that is averaged into one point
# In short runs the smaller of these two, or nothing is smooth
_LEAST_SMOOTHED_SHARE, _LEAST_SMOOTHED_STEPS = 1 / 6, 7
_STRIP_SHARE = 1 / 80  # the share of the steps at which one measurement is wide enough to be seen


@dataclass(frozen=True)
class Picture:
    title: str
    description: str  # for readers who cannot see it
    draw: Callable[[Axes, Ledger], None]
    below: Callable[[Axes, Ledger], None] | None = None  # a strip below it, over the same steps
    is_over_steps: bool = True


def draw(picture: Picture, ledger: Ledger) -> bytes:
    """Returns the picture as PNG."""
    figure = new_figure(height_inches=5.0 if picture.below else 3.8)
    draws = [picture.draw, picture.below] if picture.below else [picture.draw]
    panels = figure.subplots(
        len(draws), squeeze=False, sharex=True, height_ratios=(4, 1)[: len(draws)]
    )[:, 0]
    panels[0].set_title(picture.title, loc="left", fontweight="bold")
    for axes, drawn in zip(panels, draws, strict=True):
        style(axes)
        if picture.is_over_steps:
            _over_steps(axes, ledger, is_lowest=axes is panels[-1])
        drawn(axes, ledger)
        if picture.is_over_steps:
            _mark_interruptions(axes, ledger)
    return png(figure)


def pictures(ledger: Ledger) -> dict[str, Picture]:
    """Returns what there is to draw, by name."""
    span = f"steps {ledger.steps[0]['step']} to {ledger.steps[-1]['step']}"
    labels = [f"{stop.label} after step {stop.step}" for stop in ledger.interruptions()]
    stops = "; ".join(labels) or "no interruption"
    verdict = why_slow(ledger).verdict
    rates = [line["lr"] for line in ledger.steps]
    by_name = {
        "loss": Picture(
            "Loss, and workers",
            f"{_losses_in_words(ledger, span)}; below it the number of workers, by attempt "
            f"{', '.join(map(str, ledger.world_sizes))}. "
            f"Marked: {stops}, {counted(len(ledger.events('checkpoint')), 'checkpoint')}.",
            _loss,
            below=_world_size,
        ),
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
        "step_time": Picture(
            "Time of a step",
            f"Mean time of a step of rank 0 by phase, stacked, over {span}: "
            f"{_phases_in_words(ledger)}.",
            _step_time,
        ),
        "waterfall": Picture(
            "Where the wall time of the run goes",
            f"The parts of the wall time, one after another from left to right: "
            f"{_in_words(parts(ledger))}. {verdict}",
            partial(waterfall, verdict=verdict),
            is_over_steps=False,
        ),
    }
    known = [line["mfu"] for line in ledger.steps if line["mfu"] is not None]
    if known:
        text = f"Model FLOPs utilization over {span}; the median is {np.median(known):.1%} of the GPUs' bf16 peak."
        by_name["mfu"] = Picture("Model FLOPs utilization", text, _mfu)
    return by_name | _pictures_of_layers(ledger, span)


def _losses_in_words(ledger: Ledger, span: str) -> str:
    first, last = ledger.steps[0]["loss"], ledger.steps[-1]["loss"]
    words = f"Training loss over {span}, from {first:.3f} to {last:.3f} nats per token"
    validations = ledger.events("validation")
    if validations:
        words += f", and validation loss, {validations[-1]['val_loss']:.3f} at its end"
        for name, figures in validations[-1].get("sets", {}).items():
            words += f", {name} {figures['val_loss']:.3f}"
    return words


def _phases_in_words(ledger: Ledger) -> str:
    means = {name: float(np.mean(seconds)) for name, seconds in seconds_by_phase(ledger).items()}
    step_s = sum(means.values())
    return _in_words({name: mean_s / step_s for name, mean_s in means.items()})


def _in_words(shares_by_name: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in shares_by_name.items())


def _pictures_of_layers(ledger: Ledger, span: str) -> dict[str, Picture]:
    by_name: dict[str, Picture] = {}
    if not ledger.events("layers"):
        return by_name
    for field in ("gradient_norm", "weight_norm", "update_ratio"):
        title = f"{field.replace('_', ' ').capitalize()} of each layer"
        text = (
            f"{title} over {span}, as a heat map on a logarithmic scale: a strip at each step that was measured, "
            "the embeddings lowest."
        )
        by_name[f"layer_{field}"] = Picture(title, text, partial(_layers, field=field))
    return by_name


def smoothed(values: Sequence[float], ledger: Ledger) -> Array:
    """Returns the mean over a window around each step's value, cut at the ends of the run and of
    each attempt, so that another number of workers is a step in the curve, not a slope."""
    count = len(values)
    least = min(_LEAST_SMOOTHED_STEPS, count * _LEAST_SMOOTHED_SHARE)
    half = int(max(least, count * _SMOOTHED_SHARE) / 2)
    attempts = np.array([line["attempt"] for line in ledger.steps])
    starts = np.flatnonzero(np.diff(attempts)) + 1
    by_attempt = np.split(np.asarray(values, dtype=np.float64), starts)
    return np.concatenate([_window_means(part, half) for part in by_attempt])


def _window_means(values: Array, half: int) -> Array:
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(len(values))
    low = np.maximum(ends - half, 0)
    high = np.minimum(ends + half + 1, len(values))
    means = (sums[high] - sums[low]) / (high - low)
    return np.asarray(means, dtype=np.float64)


def _over_steps(axes: Axes, ledger: Ledger, *, is_lowest: bool) -> None:
    steps = ledger.steps
    margin = max(0.5, 0.01 * (steps[-1]["step"] - steps[0]["step"]))
    axes.set_xlim(steps[0]["step"] - margin, steps[-1]["step"] + margin)
    if is_lowest:
        axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _mark_interruptions(axes: Axes, ledger: Ledger) -> None:
    for number, (first, last) in enumerate(lost_ranges(ledger)):
        label = "steps lost, taken again" if number == 0 else None
        span = (first - 0.5, last + 0.5)
        axes.axvspan(
            *span, facecolor=RESTART, edgecolor=TEXT, alpha=0.25, hatch="////", lw=0, label=label
        )
    styles = {"resize": (RESIZE, "-."), "restart": (RESTART, "--"), "resume": (TEXT, ":")}
    for kind, (color, line) in styles.items():
        places = [stop.step + 0.5 for stop in ledger.interruptions() if stop.label.startswith(kind)]
        if places:
            whole = axes.get_xaxis_transform()  # y in shares of the axes
            axes.vlines(places, 0, 1, color=color, ls=line, lw=1.4, label=kind, transform=whole)


def _plot_smoothed(axes: Axes, ledger: Ledger, field: str, *, label: str) -> None:
    steps = [line["step"] for line in ledger.steps]
    values = [line[field] for line in ledger.steps]
    alpha, size = (0.3, 3) if len(steps) > 300 else (0.6, 5)
    axes.plot(
        steps, values, ".", color=SERIES, alpha=alpha, markersize=size, label=f"{label}, each step"
    )
    axes.plot(
        steps, smoothed(values, ledger), color=SERIES, linewidth=1.8, label=f"{label}, smoothed"
    )


def _loss(axes: Axes, ledger: Ledger) -> None:
    axes.set_ylabel("loss (nats/token)")
    _plot_smoothed(axes, ledger, "loss", label="training")
    validations = {line["step"]: line for line in ledger.events("validation")}
    whole: list[tuple[int, float]] = []
    by_set: dict[str, list[tuple[int, float]]] = {}
    for step, line in sorted(validations.items()):
        whole.append((step, line["val_loss"]))
        for name, figures in line.get("sets", {}).items():
            by_set.setdefault(name, []).append((step, figures["val_loss"]))
    if whole:
        axes.plot(*zip(*whole, strict=True), "D-", color=ACCENT, ms=5, label="validation")
    for number, (name, points) in enumerate(by_set.items()):
        color = PHASES[(2 + number) % len(PHASES)]
        axes.plot(*zip(*points, strict=True), "s--", color=color, ms=4, label=f"validation, {name}")
    saved = sorted({line["step"] for line in ledger.events("checkpoint")})
    if saved:
        floor = axes.get_xaxis_transform()  # y in shares of the axes
        axes.plot(
            saved, [0.02] * len(saved), "^", color=TEXT, ms=5, transform=floor, label="checkpoint"
        )


def _learning_rate(axes: Axes, ledger: Ledger) -> None:
    axes.set_ylabel("learning rate (dimensionless)")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    steps = [line["step"] for line in ledger.steps]
    rates = [line["lr"] for line in ledger.steps]
    axes.plot(steps, rates, ".-", color=SERIES, ms=3, label="learning rate")
    axes.set_ylim(0, 1.1 * max(rates))


def _throughput(axes: Axes, ledger: Ledger) -> None:
    axes.set_ylabel("throughput (tokens/s)")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _plot_smoothed(axes, ledger, "tokens_per_s", label="all workers")
    axes.set_ylim(0, 1.1 * max(line["tokens_per_s"] for line in ledger.steps))


def _mfu(axes: Axes, ledger: Ledger) -> None:
    axes.set_ylabel("share of the bf16 peak (%)")
    known = [line for line in ledger.steps if line["mfu"] is not None]
    steps = [line["step"] for line in known]
    values = [100 * line["mfu"] for line in known]
    axes.plot(steps, values, ".", color=SERIES, markersize=3, label="MFU, each step")
    axes.set_ylim(0, 1.1 * max(values))


def _world_size(axes: Axes, ledger: Ledger) -> None:
    axes.set_ylabel("workers")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    steps, sizes = np.array([(line["step"], line["world_size"]) for line in ledger.steps]).T
    axes.hlines(sizes, steps - 0.5, steps + 0.5, color=TEXT, linewidth=4, label="workers")
    axes.set_ylim(0, max(sizes) + 0.5)


def _step_time(axes: Axes, ledger: Ledger) -> None:
    phases = {name: smoothed(seconds, ledger) for name, seconds in seconds_by_phase(ledger).items()}
    step_s = sum(seconds.mean() for seconds in phases.values())
    unit, factor = ("ms", 1000.0) if step_s < 1 else ("s", 1.0)
    axes.set_ylabel(f"time per step ({unit})")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    steps = [line["step"] for line in ledger.steps]
    axes.stackplot(
        # A step has its width, even if it is the only one
        [steps[0] - 0.5, *steps, steps[-1] + 0.5],
        [factor * np.pad(seconds, 1, mode="edge") for seconds in phases.values()],
        labels=list(phases),
        colors=[PHASES[index % len(PHASES)] for index in range(len(phases))],
        hatch=["" if index < len(PHASES) else "////" for index in range(len(phases))],
        edgecolor="white",
        linewidth=0.4,
    )
    axes.set_ylim(bottom=0)


def _layers(axes: Axes, ledger: Ledger, *, field: str) -> None:
    # The last counts of steps taken again
    measured = {line["step"]: line for line in ledger.events("layers")}
    steps = sorted(measured)
    names = measured[steps[-1]]["layers"]
    # (layer, step)
    values = np.array([measured[step][field] for step in steps], dtype=np.float64).T
    values[~(values > 0)] = np.nan  # which has no logarithm
    # Each measurement is a strip at its step: as wide as a step, or wide enough to be seen where
    # the next leaves room.
    width = max(1.0, _STRIP_SHARE * (ledger.steps[-1]["step"] - ledger.steps[0]["step"]))
    half = min([width, *np.diff(steps)]) / 2
    edges = np.array([(step - half, step + half) for step in steps]).reshape(-1)
    # Every second one is what lies between two measurements
    strips = np.full((len(names), len(edges) - 1), np.nan)
    strips[:, ::2] = values
    low, high = 1.0, 10.0
    if np.isfinite(values).any():
        low, high = np.nanmin(values), np.nanmax(values)
    scale = LogNorm(low, max(high, 1.01 * low))
    mesh = axes.pcolormesh(
        edges, np.arange(len(names) + 1) - 0.5, strips, norm=scale, cmap="cividis"
    )
    axes.set_yticks(range(len(names)), names, fontsize=min(8.0, 160 / len(names)))
    axes.grid(visible=False)
    bar = axes.figure.colorbar(mesh, ax=axes)
    bar.set_label(f"{field.replace('_', ' ')} (no unit)")


_LINE_CHARS = 90
_LEAST_SHARE = 0.0005


def parts(ledger: Ledger) -> dict[str, float]:
    """Returns the shares of the wall time by what it went into: the figures by which `why-slow`
    judges."""
    measured = shares(ledger)
    spent = {f"computing: {phase}": share for phase, share in measured.computing.items()}
    spent |= {cause: share for cause, share in measured.by_cause.items() if cause != "compute"}
    return {name: share for name, share in spent.items() if share >= _LEAST_SHARE}


def waterfall(axes: Axes, ledger: Ledger, *, verdict: str) -> None:
    wall_s, drawn = shares(ledger).wall_s, parts(ledger)
    start = 0.0
    for row, share in enumerate(drawn.values()):
        axes.barh(row, 100 * share, left=100 * start, color=SERIES, height=0.65)
        start += share
        is_late = start > 0.8  # then there is no room to the right of the bar
        axes.annotate(
            f"{duration(share * wall_s)}, {share:.0%}",
            (100 * (start - share if is_late else start), row),
            (-5 if is_late else 5, 0),
            textcoords="offset points",
            ha="right" if is_late else "left",
            va="center",
            fontsize="small",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )
    axes.set_yticks(range(len(drawn)), list(drawn))
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    label = "\n".join(textwrap.wrap(verdict, _LINE_CHARS))
    axes.set_xlabel(f"wall time of the run (% of {duration(wall_s)})\n{label}")
