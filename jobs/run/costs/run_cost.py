"""Sums up what a run costs, line by line from its ledger: for how long its workers held devices, on
which kind of node, and the money for that."""

from collections import Counter, defaultdict
from typing import Any, NamedTuple

from cluster.settings.run import ScalingConfig
from jobs.run.end import End, is_pause

Line = dict[str, Any]

SPOT = "spot"
"""What Ray labels a spot node with, under `ray.io/market-type`."""

_BY_WORKERS = (
    *(None, "skip", "rollback", "validation", "phases", "layers"),
    *("failure", "hang", End.STOPPED, End.SPENT, End.FINISHED),
)
"""Events up to whose time the workers of an attempt lived, and lines of steps. Others may be written
when the next attempt is about to start, hours later."""


class HeldDevice(NamedTuple):
    """A device's place: the node, None where Ray does not know it, and its kind, empty where it has
    no label."""

    node_id: str | None
    market: str


class RunCost:
    """The cost of the lines so far, which it must be given from the first one on; of steps between
    two events the last is enough.

    From the last line of an attempt to the next start, those workers count whose node was the
    same: it was held meanwhile. A node that is gone does not count, nor one that came before the
    start. No time counts in which nobody trained the run: after a stop on request or the end of a
    budget, and between two launches.
    """

    def __init__(self) -> None:
        self._worker_s: defaultdict[str, float] = defaultdict(float)  # by kind of node
        self._workers: Counter[HeldDevice] = Counter()  # of the last attempt
        self._last_s = 0.0
        self._launcher: int | None = None
        self._is_paused = False

    def add(self, line: Line) -> None:
        event = line.get("event")
        if event == "start":
            self._start(line)
        elif event in _BY_WORKERS:
            self._count(self._workers, line["time"])
        if is_pause(line) or event in (End.FINISHED, End.GAVE_UP):
            self._is_paused = True

    def _start(self, line: Line) -> None:
        held = [
            HeldDevice(worker.get("node_id"), worker.get("market") or "")
            for worker in line.get("workers", [])
        ]
        workers = Counter(held or [HeldDevice(None, "")] * line["world_size"])
        launcher = line.get("launcher")
        if launcher == self._launcher and not self._is_paused:
            staying = self._workers & workers
            known = {place: number for place, number in staying.items() if place.node_id}
            self._count(Counter(known), line["time"])
        self._workers, self._last_s = workers, max(self._last_s, line["time"])
        self._launcher, self._is_paused = launcher, False

    def _count(self, workers: Counter[HeldDevice], until_s: float) -> None:
        seconds = max(0.0, until_s - self._last_s)
        for place, number in workers.items():
            self._worker_s[place.market] += number * seconds
        self._last_s = max(self._last_s, until_s)

    @property
    def worker_s(self) -> dict[str, float]:
        """The seconds of all workers together, by the kind of their nodes."""
        return {market: seconds for market, seconds in self._worker_s.items() if seconds}

    def money(self, scaling: ScalingConfig, *, now_s: float | None = None) -> float:
        """Returns what it costs at the prices of the settings, up to its last line, or up to now,
        while its workers live; nothing without prices."""
        money = sum(
            seconds * worker_price(scaling, market) / 3600
            for market, seconds in self._worker_s.items()
        )
        if now_s is not None:
            money += max(0.0, now_s - self._last_s) * self.money_per_hour(scaling) / 3600
        return money

    def money_per_hour(self, scaling: ScalingConfig) -> float:
        """Returns what an hour of the last attempt's workers costs."""
        return sum(
            number * worker_price(scaling, place.market) for place, number in self._workers.items()
        )


def run_cost(lines: list[Line]) -> RunCost:
    """Returns the cost of a run with these lines."""
    cost = RunCost()
    for line in lines:
        cost.add(line)
    return cost


def devices(scaling: ScalingConfig) -> int:
    """Returns the GPUs of a worker, or its CPUs where it has none."""
    return 1 if scaling.use_gpu else scaling.threads_per_worker


def device_price(scaling: ScalingConfig, market: str) -> float | None:
    """Returns the price of an hour of a device on such a node; None where the settings have none."""
    if market == SPOT and scaling.spot_price_per_device_hour is not None:
        return scaling.spot_price_per_device_hour
    return scaling.price_per_device_hour


def worker_price(scaling: ScalingConfig, market: str) -> float:
    """Returns the price of a worker's hour; 0 without prices."""
    return devices(scaling) * (device_price(scaling, market) or 0.0)
