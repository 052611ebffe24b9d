"""Says in words what a run has cost: device-hours, money and budget."""

from cluster.settings.run import RunConfig
from jobs.run.costs.budget import in_money
from jobs.run.costs.run_cost import SPOT, devices, run_cost
from jobs.run.end import End
from jobs.run.ledger import Ledger

ASSUMED_PRICES = {"GPU": 2.0, "CPU": 0.05}  # dollars per hour: round numbers near what clouds ask


def device_hours(ledger: Ledger, config: RunConfig) -> tuple[str, float]:
    """Returns the kind of device, `GPU` or `CPU`, and the hours for which workers held one."""
    return _kind(config), sum(_hours(ledger, config).values())


def cost_rows(ledger: Ledger, config: RunConfig, *, price: float | None) -> list[tuple[str, str]]:
    """Returns (name, value) of the run's cost: at this price of a device's hour, else as the run
    itself has counted it at its own prices, else at an assumed price."""
    kind, hours = device_hours(ledger, config)
    spot = _hours(ledger, config).get(SPOT, 0.0)
    rows = [(f"{kind}-hours on spot nodes", f"{spot:,.4g}")] if spot else []
    counted = [line for line in ledger.lines if "cost" in line]
    if price is None and counted:
        money = in_money(counted[-1]["cost"])
        rows.append(("Cost", f"${money} at the run's own prices (scaling.price_per_device_hour)"))
    else:
        hourly = ASSUMED_PRICES[kind] if price is None else price
        note = ", an assumption (--price)" if price is None else ""
        rows.append(("Cost", f"${in_money(hours * hourly)} at ${hourly:g} for a {kind}-hour{note}"))
    most = counted[-1].get("max_cost") if counted else None
    if most is not None:
        end = ", which is spent" if ledger.end is End.SPENT else ""
        rows.append(("Budget", f"${most:g} (scaling.max_cost){end}"))
    return rows


def _hours(ledger: Ledger, config: RunConfig) -> dict[str, float]:
    """Returns the devices' hours by the kind of their nodes."""
    of_a_second = devices(config.scaling) / 3600
    worker_s = run_cost(ledger.lines).worker_s
    return {market: seconds * of_a_second for market, seconds in worker_s.items()}


def _kind(config: RunConfig) -> str:
    return "GPU" if config.scaling.use_gpu else "CPU"
