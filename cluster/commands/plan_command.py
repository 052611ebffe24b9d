"""`raymill plan`: the plan that it prints."""

import argparse
from typing import Any

from cluster.settings.flags import config_from_arguments, settings_from_flags, validate_config
from cluster.settings.parser import ConfigError
from cluster.settings.plan import PlanConfig
from cluster.settings.run import RunConfig
from cluster.storage.uris import absolute_uri


def plan(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures, to be printed as a table."""
    from jobs.plan.make_plan import planned, simulated

    options = validate_config(settings_from_flags(arguments, PlanConfig), PlanConfig)
    if arguments.demo:
        from cluster.commands.demo_run import demo_config

        config, _ = demo_config(absolute_uri(getattr(arguments, "storage.uri") or ".raymill"))
    else:
        config = config_from_arguments(arguments, RunConfig, needs_source=False)
    if arguments.simulate:
        found = simulated(config, options)
    elif not arguments.calibrate:
        found = planned(config, options)
    elif config.cluster.address is not None:
        raise ConfigError("--calibrate measures on a local cluster; leave out --cluster.address")
    else:
        from cluster.commands.demo_run import demo_faults, demo_serving
        from cluster.commands.rehearsal import rehearsed

        faults = demo_faults(config) if arguments.demo else []
        with rehearsed(config, faults=faults, serving=demo_serving(config) if arguments.demo else None) as rehearsal:
            found = planned(config, options, rehearsal=rehearsal)
    arguments.text = f"{found.pop('table')}\n"
    return found
