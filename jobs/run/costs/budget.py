"""Keeps a run within `scaling.max_cost`: what it has cost while it trains, which step is its last one,
and whether it may begin."""

import time
from collections.abc import Callable
from typing import Any

from cluster.settings.run import RunConfig, ScalingConfig
from cluster.storage.uris import Storage
from jobs.run.costs.run_cost import RunCost, run_cost
from jobs.run.end import End
from jobs.run.ledger import Ledger


class Budget:
    """Rank 0's account of its run. The other ranks learn from it which step is the last one."""

    def __init__(self, scaling: ScalingConfig, *, clock: Callable[[], float] = time.time) -> None:
        self._scaling, self._clock = scaling, clock
        self._cost = RunCost()
        self._asked_s = self._step_s = 0.0

    def begin(self, ledger: Ledger) -> None:
        """Takes what the run had cost up to the start of its attempt, which the ledger has."""
        self._cost = run_cost(ledger.lines)
        self._asked_s = 0.0
        steps = [line for line in ledger.lines if "event" not in line]
        self._step_s = steps[-1].get("wall_s", 0.0) if steps else 0.0

    def ends_with_this_step(self) -> bool:
        """Reports at the start of each step whether the run will have cost all that it may by the
        step's end, if it takes as long as the one before: then it is the last one. So the run costs
        at most one step more, and what saving takes."""
        now_s = self._clock()
        self._step_s = now_s - self._asked_s if self._asked_s else self._step_s
        self._asked_s = now_s
        most = self._scaling.max_cost
        return most is not None and self._money(now_s + self._step_s) >= most

    def fields(self) -> dict[str, float]:
        """Returns what the ledger says of money; nothing without a price."""
        if self._scaling.price_per_device_hour is None:
            return {}
        most = self._scaling.max_cost
        limit = {} if most is None else {"max_cost": most}
        return {"cost": round(self._money(self._clock()), 6), **limit}

    def _money(self, now_s: float) -> float:
        return self._cost.money(self._scaling, now_s=now_s)


def why_over_budget(run: Storage, config: RunConfig) -> str:
    """Returns why the run may not continue, since it has cost what it may; empty where it may, is
    finished, or has not begun."""
    most = config.scaling.max_cost
    if most is None:
        return ""
    ledger = Ledger.read(run)
    if ledger.is_finished or not ledger.lines:
        return ""
    cost = run_cost(ledger.lines).money(config.scaling)
    ended = ledger.events(End.SPENT) if ledger.end is End.SPENT else []
    if cost < most and not (ended and ended[-1]["max_cost"] >= most):
        return ""
    return (
        f"run {config.run_id} has cost {in_money(cost)}, and scaling.max_cost={most:g} allows no more: raise it, and "
        f"the same --run-id continues after step {saved_step(ledger):,} with the same weights"
    )


def spent_in_words(config: RunConfig, ledger: Ledger, *, steps: int) -> str:
    """Returns what the user is told of a run that has ended as its budget was spent."""
    cost = run_cost(ledger.lines).money(config.scaling)
    return (
        f"run {config.run_id} has cost {in_money(cost)}, what scaling.max_cost={config.scaling.max_cost:g} allows: it "
        f"is saved at step {saved_step(ledger):,} of {steps:,} and has ended; the same --run-id with a higher "
        "scaling.max_cost continues it"
    )


def saved_step(ledger: Ledger) -> int:
    """Returns the step of the last checkpoint, 0 without one."""
    saved: dict[str, Any] = next(iter(reversed(ledger.events("checkpoint"))), {})
    return int(saved.get("step", 0))


def in_money(amount: float) -> str:
    """Formats money with cents, or with two digits where it is less than one."""
    return f"{amount:,.2f}" if amount >= 1 else f"{amount:.2g}"
