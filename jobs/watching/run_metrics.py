"""Keeps a run's figures up to date as metrics, line by line from its ledger: no worker does
anything for them."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from cluster.settings.run import RunConfig, max_steps
from jobs.run.costs.run_cost import RunCost, devices
from jobs.run.end import is_pause
from jobs.run.ledger import Line
from jobs.run.storage_retry import StoredPart

_STEP_FIELDS = {
    **{name: name for name in ("step", "tokens_seen", "loss", "grad_norm", "mfu")},
    **{"learning_rate": "lr", "tokens_per_second": "tokens_per_s", "step_seconds": "wall_s"},
}
"""The field of a step's line by metric."""


class Sample(NamedTuple):
    """A value of a metric in `cluster.metrics.metric_table`; `label` is the value of its own
    label, if any."""

    name: str
    value: float
    label: str = ""

    @property
    def curve(self) -> str:
        """Returns its name among a run's curves: `train_phase_seconds` of load is
        `train/phase_seconds/load`."""
        return "/".join([*self.name.split("_", 1), *([self.label] if self.label else [])])


class RunFigures:
    """Sums up the lines of a ledger, which it must be given from the first one on."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._wall_s: dict[int, float] = {}  # of the steps that count
        self._useful_s = self._paused_s = 0.0
        self._cost = RunCost()
        # Since when the run stands still, as it was asked to stop
        self._saved_s: float | None = None
        self._counts: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._first_s = self._last_s = 0.0
        self._world_size = 0
        self._last_times: dict[str, float] = {}
        self._curves: dict[tuple[str, str], Sample] = {}  # the last sample of each
        self.stored = StoredPart()

    def add(self, line: Line) -> None:
        event, now_s = line.get("event"), line["time"]
        self._first_s = self._first_s or now_s
        self.stored.add(line)
        self._cost.add(line)
        self._last_s = max(self._last_s, now_s)
        self._curves |= {(sample.name, sample.label): sample for sample in curve_samples(line)}
        match event:
            case None:
                self._lose(line["step"])  # one that is taken again
                self._wall_s[line["step"]] = line["wall_s"]
                self._useful_s += line["wall_s"]
                self._last_times["train_last_step_timestamp_seconds"] = now_s
            case "preempted" | "spent" if is_pause(line):
                self._saved_s = now_s
            case "start":
                self._counts["train_restarts"] += self._world_size > 0 and self._saved_s is None
                self._paused_s += 0.0 if self._saved_s is None else now_s - self._saved_s
                self._saved_s = None
                self._counts["train_resizes"] += self._world_size not in (0, line["world_size"])
                self._world_size = line["world_size"]
            case "rollback":
                self._counts["train_rollbacks"] += 1
                for step in range(line["first"], line["last"] + 1):
                    self._lose(step)
            case "skip":
                self._counts["train_skipped_steps"] += 1
            case "corruption" | "undecided":
                self._counts["train_corruptions"] += 1
            case "asked_again":
                self._counts["train_corruptions"] += line["differs"]
            case "failure" | "hang":
                self._failures[line.get("kind", "hang")] += 1
            case "checkpoint":
                self._last_times["train_last_checkpoint_timestamp_seconds"] = now_s

    def samples(self) -> Iterator[Sample]:
        """Yields what is known so far, under the table's names without their `raymill_`."""
        yield from self._curves.values()
        yield Sample("train_planned_steps", max_steps(self._config))
        yield Sample("train_world_size", self._world_size)
        yield Sample("train_storage_down", bool(self.stored.refusal))
        for name in (
            "restarts",
            "resizes",
            "lost_steps",
            "skipped_steps",
            "rollbacks",
            "corruptions",
        ):
            yield Sample(f"train_{name}", self._counts[f"train_{name}"])
        yield from (Sample("train_failures", count, kind) for kind, count in self._failures.items())
        yield from (Sample(name, at_s) for name, at_s in self._last_times.items())
        if (wall_s := self._last_s - self._first_s - self._paused_s) > 0:
            yield Sample("train_goodput", self._useful_s / wall_s)
        scaling = self._config.scaling
        device_s = devices(scaling) * sum(self._cost.worker_s.values())
        yield Sample("cost_device_seconds", device_s, "gpu" if scaling.use_gpu else "cpu")
        if scaling.price_per_device_hour is not None:
            yield Sample("cost_money_per_hour", self._cost.money_per_hour(scaling))
            yield Sample("cost_money", self._cost.money(scaling))

    def _lose(self, step: int) -> None:
        if step in self._wall_s:
            self._counts["train_lost_steps"] += 1
            self._useful_s -= self._wall_s.pop(step)


def curve_samples(line: Line) -> list[Sample]:
    """Returns what a line of the ledger adds to a run's curves; only steps and validations add
    something."""
    match line.get("event"):
        case None:
            fields = {
                name: field for name, field in _STEP_FIELDS.items() if line[field] is not None
            }
            return [
                *(Sample(f"train_{name}", line[field]) for name, field in fields.items()),
                *(
                    Sample("train_phase_seconds", seconds, phase)
                    for phase, seconds in line["seconds"].items()
                ),
                Sample("train_world_size", line["world_size"]),
            ]
        case "validation":
            return [
                Sample(f"train_validation_{name}", measured[f"val_{name}"], of)
                for of, measured in [("val", line), *line.get("sets", {}).items()]
                for name in ("loss", "bits_per_byte")
            ]
        case _:
            return []
