"""Says in one sentence what bounds a run, with the numbers that show it, from its ledger alone."""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from cluster.output.json_result import JsonResult
from cluster.storage.uris import Storage
from jobs.run.find_run import begun_ledger
from jobs.run.history import lost_steps
from jobs.run.ledger import Ledger
from jobs.run.storage_retry import not_stored
from jobs.training.rank_phases import RankTime, from_fields, stragglers
from model.hardware.processor import processor_share
from model.tables import read_table
from raymill.phases import COMPUTING, PHASES, REST

LEAST_SHARE = 0.1
"""Share of the wall time from which something other than computing is worth fixing."""

_OWN_PROCESSOR = 0.8
"""Share of a processor, while a worker computes, below which other programs are spoken of."""

_PHASE_OF = {
    "data": "load",
    "snapshots": "snapshot",
    "checkpoints": "checkpoint",
    "validation": "validation",
}

_SENTENCES: dict[str, list[str]] = read_table(__file__, "why_slow")
"""The subject, the verb and the rest of the sentence for each cause, in the order of `shares`."""


@dataclass(frozen=True)
class Window:
    """Consecutive steps of one attempt, on all ranks."""

    num_steps: int
    world_size: int
    ranks: list[RankTime]  # rank 0 alone where no event records the others

    @property
    def lanes(self) -> list[float]:
        return [rank.num_lanes for rank in self.ranks]

    @property
    def exposed_s(self) -> float:
        """The seconds in the exchange after the last rank has arrived, when none waits for
        another."""
        return self.num_steps * min(rank.seconds.get("sync", 0.0) for rank in self.ranks)

    def usual_s(self, slow: Collection[int]) -> dict[str, float]:
        """Returns the seconds by phase in the mean of the ranks, without the slow ones."""
        usual = [rank.seconds for number, rank in enumerate(self.ranks) if number not in slow]
        means = {}
        for phase in (*PHASES, REST):
            seconds = [by_phase.get(phase, 0.0) for by_phase in usual]
            means[phase] = self.num_steps * float(np.mean(seconds))
        return means

    def processor_shares(self) -> list[float]:
        """Returns for each rank which share of a processor it had while it computed: all of it
        where that was not recorded."""
        return [processor_share(rank.processor_s, rank.seconds) for rank in self.ranks]


@dataclass(frozen=True)
class Shares:
    """Shares of the wall time, which sum to 1: what fixing each cause would save."""

    by_cause: dict[str, float]
    computing: dict[str, float]  # by phase: the parts of `compute`
    wall_s: float
    # The rank most waited for, and its time for a lane over the median
    straggler: tuple[int, float] | None
    # Of a processor, by rank, while it computed; the mean of the windows' steps
    processor: list[float]
    lanes: list[float]  # of each rank, in the last window

    @property
    def bound(self) -> str:
        """Returns the largest cause."""
        return max(self.by_cause, key=self.by_cause.__getitem__)

    @property
    def fix_first(self) -> str | None:
        """Returns the largest cause besides computing, as these can be saved; None where all are
        small."""
        others = {cause: share for cause, share in self.by_cause.items() if cause != "compute"}
        worst = max(others, key=others.__getitem__)
        return worst if others[worst] >= LEAST_SHARE else None


def shares(ledger: Ledger) -> Shares:
    """Divides the time from the first line to the last among its causes.

    It counts the mean of the ranks that are no stragglers. Of the time in the exchange, what the
    slowest rank waits is communication, as all others have arrived by then. What the others wait
    beyond that is due to a straggler, or, where a lane takes all ranks as long, to ranks with more
    lanes.
    """
    windows = _windows(ledger)
    sums = dict.fromkeys(_SENTENCES, 0.0)
    computing = dict.fromkeys((*COMPUTING, "sync"), 0.0)
    # Seconds for which others waited, by rank
    held_up: defaultdict[int, float] = defaultdict(float)
    ratios: dict[int, float] = {}
    for window in windows:
        slow = stragglers(window.ranks)
        usual_s = window.usual_s(slow)
        waited_s = usual_s["sync"] - window.exposed_s
        had = window.processor_shares()
        share = float(np.mean([had[rank] for rank in range(len(had)) if rank not in slow]))
        for phase in COMPUTING:
            computing[phase] += share * usual_s[phase]
            sums["processor"] += (1 - share) * usual_s[phase]
        for cause, phase in _PHASE_OF.items():
            sums[cause] += usual_s[phase]
        sums["other"] += usual_s["statistics"] + usual_s[REST]
        if window.world_size == 1:  # nothing is exchanged
            computing["sync"] += window.exposed_s
            continue
        sums["communication"] += window.exposed_s
        if slow:
            rank = max(slow, key=slow.__getitem__)
            sums["straggler"] += waited_s
            held_up[rank] += waited_s
            ratios[rank] = max(ratios.get(rank, 0.0), slow[rank])
        elif max(window.lanes) > min(window.lanes):
            sums["lanes"] += waited_s
        else:
            sums["communication"] += waited_s
    sums["compute"] = sum(computing.values())
    between_s = sum(max(0.0, stop.seconds or 0.0) for stop in ledger.recoveries())
    sums["restarts"] = between_s + sum(line["wall_s"] for line in lost_steps(ledger))
    for finish in ledger.events("finish")[-1:]:  # which waits for the last checkpoint
        sums["checkpoints"] += max(0.0, finish["time"] - ledger.steps[-1]["time"])
    wall_s = max(ledger.wall_s, sum(sums.values()))
    sums["other"] += wall_s - sum(sums.values())
    slowest = max(held_up, key=held_up.__getitem__, default=None)
    return Shares(
        {cause: seconds / wall_s for cause, seconds in sums.items()},
        {phase: seconds / wall_s for phase, seconds in computing.items()},
        wall_s,
        None if slowest is None else (slowest, ratios[slowest]),
        _processor(windows),
        windows[-1].lanes,
    )


def _processor(windows: list[Window]) -> list[float]:
    """Returns for each rank of the last window's the mean share of a processor that it had."""
    shares_of: list[list[float]] = [[] for _ in windows[-1].ranks]
    for window in windows:
        for rank, share in enumerate(window.processor_shares()[: len(shares_of)]):
            shares_of[rank] += [share] * window.num_steps
    return [float(np.mean(shares)) for shares in shares_of]


@dataclass(frozen=True)
class SlowRank(JsonResult):
    """The rank most waited for."""

    rank: int
    node: str | None
    ratio: float  # its time for a lane over the median


@dataclass(frozen=True)
class Evidence(JsonResult):
    """The figures that a verdict stands on."""

    share: float  # of the wall time, of the largest cause
    median_step_s: float
    mean_step_s: float
    steps: int
    share_of_peak: float | None
    world_size: int
    lanes: list[float]  # of each rank
    processor: list[float]  # the share of one that each rank had while it computed
    restarts: int
    lost_steps: int
    checkpoints: int
    straggler: SlowRank | None  # where it is worth fixing

    def json(self) -> dict[str, Any]:
        shown = super().json()
        if self.straggler is None:
            del shown["straggler"]
        return shown


@dataclass(frozen=True)
class Slowness(JsonResult):
    """The causes that bound a run."""

    verdict: str  # a sentence
    bound: str  # the largest cause
    fix_first: str | None  # the largest one besides computing; None where that is small
    evidence: Evidence
    shares: dict[str, float]  # of the wall time, by cause


def why_run_is_slow(run: Storage) -> Slowness:
    """Is `raymill why-slow`. Raises `UserError` for a run without a step."""
    return why_slow(begun_ledger(run))


def why_slow(ledger: Ledger) -> Slowness:
    """Returns what bounds a run that has taken a step."""
    measured = shares(ledger)
    evidence = _evidence(ledger, measured)
    verdict = _sentence(measured, evidence, advice=_validation_advice(ledger))
    verdict += _shared(measured)
    if problem := not_stored(ledger.lines):
        verdict += f" And {problem}."
    by_cause = {cause: round(share, 4) for cause, share in measured.by_cause.items()}
    return Slowness(verdict, measured.bound, measured.fix_first, evidence, by_cause)


def _evidence(ledger: Ledger, measured: Shares) -> Evidence:
    steps = ledger.steps
    walls_s = [line["wall_s"] for line in steps]
    peak = [line["mfu"] for line in steps if line["mfu"] is not None]
    slow = None
    if measured.straggler and measured.by_cause["straggler"] >= LEAST_SHARE:
        rank, ratio = measured.straggler
        workers = ledger.events("start")[-1]["workers"]
        node = workers[rank]["node"] if rank < len(workers) else None
        slow = SlowRank(rank, node, round(ratio, 2))
    return Evidence(
        share=round(measured.by_cause[measured.bound], 4),
        median_step_s=round(float(np.median(walls_s)), 6),
        mean_step_s=round(float(np.mean(walls_s)), 6),
        steps=len(steps),
        share_of_peak=round(float(np.median(peak)), 4) if peak else None,
        world_size=steps[-1]["world_size"],
        lanes=measured.lanes,
        processor=[round(share, 4) for share in measured.processor],
        restarts=len(ledger.world_sizes) - 1 - len(ledger.pauses),
        lost_steps=len(lost_steps(ledger)),
        checkpoints=len(ledger.events("checkpoint")),
        straggler=slow,
    )


def _validation_advice(ledger: Ledger) -> str:
    """Returns what makes validation shorter. A run always validates at its end, however rarely it
    does before."""
    last = ledger.steps[-1]["step"]
    validated = {event["step"] for event in ledger.events("validation")}
    if validated == {last}:
        return "lower train.eval_max_tokens (there was one validation, at the end, which every run has)"
    return "raise train.eval_every_steps or lower train.eval_max_tokens"


def _sentence(measured: Shares, evidence: Evidence, *, advice: str) -> str:
    """Writes the verdict. It begins with the largest part of the wall time; where that is
    computing, the largest other part follows."""
    peak = evidence.share_of_peak
    cause = measured.fix_first or measured.bound
    slow = {} if evidence.straggler is None else evidence.straggler.json()
    values = evidence.json() | slow
    values |= {
        "advice": advice,
        "share": f"{measured.by_cause[cause]:.0%} of the wall time",
        "peak": "an unknown share of the peak" if peak is None else f"{peak:.0%} of the peak",
        "processor": f"{np.mean(measured.processor):.0%}",
        "most": f"{max(evidence.lanes):g}",
        "least": f"{min(evidence.lanes):g}",
    }
    who, verb, how = (part.format(**values) for part in _SENTENCES[cause])
    step = f"a step takes {_duration(evidence.median_step_s)} in the median, "
    step += f"{_duration(evidence.mean_step_s)} in the mean"
    if measured.bound == cause:
        return f"{who} {verb} the run: {how}; {step}."
    computing = f"{measured.by_cause['compute']:.0%} of the wall time"
    after_it = f"{who[0].lower()}{who[1:]}: {how}"
    return f"Computing takes the largest part, {computing}; after it {after_it}; {step}."


def _shared(measured: Shares) -> str:
    """Returns a sentence on the worker that has least of a processor, where the verdict does not
    say it: a straggler may be one for want of it."""
    least = min(measured.processor)
    if least >= _OWN_PROCESSOR or "processor" in (measured.fix_first, measured.bound):
        return ""
    rank = measured.processor.index(least)
    return f" Rank {rank} has {least:.0%} of a processor while it computes: other programs take the rest."


def _windows(ledger: Ledger) -> list[Window]:
    """Returns the steps that count, in the windows that all ranks recorded; others in rank 0's
    lines."""
    recorded = {(event["step"], event["attempt"]): event for event in ledger.events("phases")}
    windows: list[Window] = []
    for attempt, lines in groupby(ledger.steps, key=lambda line: line["attempt"]):
        waiting = []
        for line in lines:
            waiting.append(line)
            event = recorded.get((line["step"], attempt))
            if event:
                windows.append(Window(len(waiting), line["world_size"], from_fields(event)))
                waiting = []
        for line in waiting:
            rank_0 = RankTime(line["seconds"], 0.0, line.get("processor_s"))
            windows.append(Window(1, line["world_size"], [rank_0]))
    return windows


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
