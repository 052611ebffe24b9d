"""Summarizes a run from its settings and its ledger: attempts, interruptions, lost steps and final
figures."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from cluster.output.result_text import counted
from cluster.settings.data import DataConfig
from cluster.settings.flags import validate_config
from cluster.settings.run import RunConfig, max_steps, with_precision
from cluster.settings.setting import Shapes, ShapingSettings, names_shaping
from cluster.settings.train import TrainConfig
from cluster.storage.registry import LATEST
from cluster.storage.uris import Storage
from jobs.run.costs.cost_rows import device_hours
from jobs.run.ledger import Interruption, Ledger, Line
from model.config import GPTConfig, shape_differences
from raymill.phases import PHASES, REST

CONFIG_FILE = "config.yaml"
_REVISION = re.compile(r"^(hf://.+?)@[^/]+")
_COMMIT = re.compile("^hf://.+?@[0-9a-f]{40}")
UNTIMED = "step"
"""The only phase of a step that an earlier version did not time."""
_SHAPING: dict[str, type[ShapingSettings]] = {"data": DataConfig, "train": TrainConfig}
"""The branches of settings of which some shape the run."""
_MEASUREMENTS = ("phases", "layers")  # events that a run has hundreds of


def recorded_config(run: Storage) -> RunConfig:
    """Returns the settings that the run was started with. Raises `NotFoundError`, or `ConfigError`
    on unknown ones."""
    return validate_config(yaml.safe_load(run.read_bytes(CONFIG_FILE)), RunConfig)


def changed_settings(run: Storage, now: RunConfig) -> list[str]:
    """Describes each changed setting on which the weights depend. Precision `auto` means the run's
    earlier one, and a branch of the Hub, a run or `latest` in `train.init_from` the weights that
    they named when the run began."""
    before = recorded_config(run)
    if before.train.precision != "auto":
        now = with_precision(now, before.train.precision)
    # The shape is that of the weights that it began from
    if now.train.init_from and now.model == GPTConfig():
        now = now.model_copy(update={"model": before.model})
    start = before.train.init_from
    if start and _may_have_named(str(now.train.init_from), start):
        now = now.model_copy(update={"train": now.train.model_copy(update={"init_from": start})})
    return [
        f"{name} was {old}, now {new}"
        for name, (old, new) in training_differences(before, now).items()
    ]


def _may_have_named(reference: str, checkpoint: str) -> bool:
    at_head = "" if _COMMIT.search(reference) else _REVISION.sub(r"\1", reference)
    return (
        reference == LATEST
        or checkpoint.startswith(f"{reference}/")
        or _REVISION.sub(r"\1", checkpoint) == at_head
    )


def training_differences(before: RunConfig, now: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Returns both values of each setting that differs, among the settings of the model and of the
    run's shape."""
    differences = {}
    for name, values in shape_differences(before.model, now.model).items():
        differences[f"model.{name}"] = values
    for branch, tree in _SHAPING.items():
        names = names_shaping(tree, Shapes.RUN)
        old, new = (getattr(config, branch).model_dump(mode="json") for config in (before, now))
        for name in new:
            if name in names and old[name] != new[name]:
                differences[f"{branch}.{name}"] = old[name], new[name]
    return differences


def why_not_resumed(run: Storage, config: RunConfig) -> str:
    """Returns why the run cannot be resumed with these settings; empty where it can be, or is
    new."""
    if not run.exists(CONFIG_FILE):
        return ""
    # The recorded vocabulary is the tokenizer's, which may not be there yet for these settings.
    changes = changed_settings(run, config)
    changes = [text for text in changes if not text.startswith("model.vocab_size ")]
    if not changes:
        return ""
    return f"run {config.run_id} has other settings: {'; '.join(changes)}. Choose another --run-id"


def lost_steps(ledger: Ledger) -> list[Line]:
    """Returns the lines of steps that were lost and taken again."""
    ids_that_count = {id(line) for line in ledger.steps}
    return [line for line in _step_lines(ledger) if id(line) not in ids_that_count]


def seconds_by_phase(ledger: Ledger) -> dict[str, list[float]]:
    """Returns rank 0's seconds in each phase, of each step that counts; the phases sum to the
    step's wall time."""
    by_phase = {}
    for phase in (*PHASES, REST, UNTIMED):
        seconds = [line["seconds"].get(phase, 0.0) for line in ledger.steps]
        if any(seconds):
            by_phase[phase] = seconds
    return by_phase


def statistics(ledger: Ledger, config: RunConfig) -> list[tuple[str, str]]:
    """Returns (name, value with its unit) of the run's summary, all of it from the ledger but the
    planned steps."""
    steps, wall_s = ledger.steps, ledger.wall_s
    last = steps[-1]
    end = "" if ledger.is_finished else ", unfinished"
    useful_s = sum(line["wall_s"] for line in steps)
    kind, hours = device_hours(ledger, config)
    rows = [
        ("Tokens trained on", f"{last['tokens_seen']:,}"),
        ("Steps", f"{last['step']:,} of {max_steps(config):,}{end}"),
        ("Wall time", duration(wall_s)),
        (f"{kind}-hours", f"{hours:,.4g}"),
        ("Workers, by attempt", ", ".join(map(str, ledger.world_sizes))),
        *_rows_of_losses(ledger),
        ("Goodput", f"{useful_s / wall_s:.1%} of the wall time went into steps that count"),
    ]
    pauses = ledger.pauses.values()
    if pauses:
        rows.append(("Paused", f"{duration(sum(pauses))} on request, not in the wall time"))
    rows += [
        ("Precision", config.train.precision),
        ("Throughput", f"{last['tokens_seen'] / useful_s:,.0f} tokens/s"),
        ("Training loss", f"{steps[0]['loss']:.4f} → {last['loss']:.4f} nats/token"),
    ]
    known = [line["mfu"] for line in steps if line["mfu"] is not None]
    if known:
        rows.append(("Model FLOPs utilization", f"{sum(known) / len(known):.1%} of the GPUs' peak"))
    for validation in ledger.events("validation")[-1:]:
        rows.append(("Validation loss", f"{validation['val_loss']:.4f} nats/token"))
        rows.append(("Bits per byte", f"{validation['val_bits_per_byte']:.4f}"))
        for name, figures in validation.get("sets", {}).items():
            rows.append((f"Validation set {name}", _figures(figures)))
    for checkpoint in ledger.events("checkpoint")[-1:]:
        rows.append(("Checkpoint", checkpoint["checkpoint"]))
        rows.append(("Parameter hash", checkpoint["parameter_hash"]))
    return rows


def _rows_of_losses(ledger: Ledger) -> list[tuple[str, str]]:
    """Returns what failures and resizes cost the run."""
    stops = [stop for stop in ledger.interruptions() if stop.pause_s is None]
    num_resizes = sum(stop.is_resize for stop in stops)
    again = lost_steps(ledger)
    numbers = [f"{first}–{last}" if last > first else f"{first}" for first, last in _ranges(again)]
    where = f" ({', '.join(numbers)})" if again else ""
    again_s = sum(line["wall_s"] for line in again)
    lost_s = again_s + sum(stop.seconds or 0.0 for stop in stops)
    return [
        ("Restarts", f"{len(stops)}, {num_resizes} of them with another number of workers"),
        ("Steps lost and taken again", f"{len(again)}{where}"),
        ("Time lost", f"{lost_s:,.1f} s, {again_s:,.1f} s of it in steps taken again"),
    ]


def lost_ranges(ledger: Ledger) -> list[tuple[int, int]]:
    """Returns the first and last step of each stretch of steps that were lost together."""
    return _ranges(lost_steps(ledger))


def _ranges(lines: Sequence[Line]) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for line in lines:
        if ranges and line["step"] == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], line["step"])
        else:
            ranges.append((line["step"], line["step"]))
    return ranges


def event_rows(ledger: Ledger) -> list[tuple[Line, str, str]]:
    """Returns (line, name, description) of each event, in order."""
    stops = {stop.attempt: stop for stop in ledger.interruptions()}
    rows = []
    for line in ledger.events():
        if line["event"] in _MEASUREMENTS:
            continue
        name, text = line["event"], _described(line)
        if name == "start" and line["attempt"] in stops:
            stop = stops[line["attempt"]]
            name = stop.label
            text += f"; {_what_it_cost(stop)}"
        rows.append((line, name, text))
    return rows


def _what_it_cost(stop: Interruption) -> str:
    if stop.pause_s is not None:
        return f"the run had been asked to stop {duration(stop.pause_s)} before"
    lost = f"{counted(stop.lost_steps, 'step')} lost"
    if stop.seconds is None:
        return f"{lost}, no step completed"
    return f"{lost}, {stop.seconds:.1f} s between steps"


def duration(seconds: float) -> str:
    """Formats seconds, such as `1 h 02 min 03 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02} min {rest:02} s"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


def _described(line: Line) -> str:
    match line["event"]:
        case "start":
            nodes = Counter(worker["node"] for worker in line["workers"])
            place = ", ".join(f"{count} on {node}" for node, count in nodes.items())
            source = f"checkpoint {line['checkpoint']}" if line["checkpoint"] else "fresh weights"
            return f"attempt {line['attempt']}: workers {place}; from {source}"
        case "validation":
            words = [_figures(line)]
            for name, figures in line.get("sets", {}).items():
                words.append(f"{name} {_figures(figures)}")
            return "; ".join(words)
        case "checkpoint":
            saved = f"{line['checkpoint']}, parameter hash {line['parameter_hash'][:12]}…, {line['seconds']:.2f} s"
            proven = line.get("proven_to")
            return saved if proven is None else f"{saved}; the run is proven to step {proven:,}"
    fields = {name: line[name] for name in line if name not in ("event", "time", "step")}
    return ", ".join(f"{name} {value}" for name, value in fields.items())


def _figures(measured: Mapping[str, Any]) -> str:
    return f"{measured['val_loss']:.4f} nats/token, {measured['val_bits_per_byte']:.4f} bits/byte"


def _step_lines(ledger: Ledger) -> list[dict[str, Any]]:
    return [line for line in ledger.lines if "event" not in line]


def flattened(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields (dotted name, value as it is shown) of each setting."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _shown(value)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
