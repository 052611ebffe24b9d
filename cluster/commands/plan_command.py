"""`raymill plan`: the plan that it prints."""

import argparse
import sys
from typing import Any

from cluster.settings.flags import config_from_arguments, settings_from_flags, validate_config
from cluster.settings.parser import ConfigError
from cluster.settings.plan import PlanConfig
from cluster.settings.run import RunConfig
from cluster.storage.uris import absolute_uri


def plan(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Prints the table, or returns the figures with --json."""
    from jobs.plan.make_plan import planned, simulated

    options = validate_config(settings_from_flags(arguments, PlanConfig), PlanConfig)
    if arguments.demo:
        from cluster.commands.demo_run import demo_config

        if arguments.config is not None:
            raise ConfigError("--demo has a configuration of its own; leave out the file, or --demo")
        config, _ = demo_config(absolute_uri(getattr(arguments, "storage.uri") or ".raymill"))
    else:
        config = config_from_arguments(arguments, RunConfig, needs_source=False)
    if arguments.simulate:
        return _shown(simulated(config, options), as_json=arguments.json)
    if not arguments.calibrate:
        return _shown(planned(config, options), as_json=arguments.json)
    if config.cluster.address is not None:
        raise ConfigError("--calibrate measures on a local cluster; leave out --cluster.address")
    from cluster.commands.demo_run import demo_faults, demo_serving
    from cluster.commands.rehearsal import rehearsed

    faults = demo_faults(config) if arguments.demo else []
    with rehearsed(config, faults=faults, serving=demo_serving(config) if arguments.demo else None) as found:
        return _shown(planned(config, options, rehearsal=found), as_json=arguments.json)


def _shown(found: dict[str, Any], *, as_json: bool) -> dict[str, Any] | None:
    text = found.pop("table")
    if as_json:
        return found
    sys.stdout.write(f"{text}\n")
    return None
