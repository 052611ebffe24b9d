"""Says what an hour of a worker costs in a plan, and who says so."""

from cluster.settings.plan import PlanConfig
from cluster.settings.run import RunConfig
from jobs.run.costs.cost_rows import ASSUMED_PRICES
from jobs.run.costs.run_cost import SPOT, device_price, devices


def worker_price(config: RunConfig, options: PlanConfig, *, is_gpu: bool) -> tuple[float, str]:
    """Returns the price and where it is from, empty where it is assumed: what `--price` says, else
    the run's own price of a spot node's device, else of another one's."""
    scaling = config.scaling
    if options.price is not None:
        return options.price, "--price"
    price = device_price(scaling, SPOT)
    if price is not None and scaling.use_gpu == is_gpu:
        is_spot = scaling.spot_price_per_device_hour is not None
        name = "spot_price_per_device_hour" if is_spot else "price_per_device_hour"
        return devices(scaling) * price, f"scaling.{name}"
    if is_gpu:
        return options.hardware.price_per_hour, ""
    return devices(scaling) * ASSUMED_PRICES["CPU"], ""
