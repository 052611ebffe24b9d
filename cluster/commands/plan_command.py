"""`raymill plan`: its flags, and the plan that it prints."""

import argparse
import sys
from pathlib import Path
from typing import Any

from cluster.settings.flags import add_config_arguments, config_from_arguments, settings_from_flags, validate_config
from cluster.settings.parser import ConfigError
from cluster.settings.plan import PlanConfig
from cluster.settings.run import RunConfig
from cluster.storage.uris import absolute_uri


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", type=Path, help="YAML file of the run; flags override its settings")
    parser.add_argument("--demo", action="store_true", help="plan the run of `raymill demo`, with its faults")
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="rehearse the run on a small scale on a local cluster, and estimate from that how long it would take here",
    )
    parser.add_argument(
        "--simulate",
        action="store_true",
        help="plan the run at 8 to 4,096 GPUs instead: exchange, snapshots, checkpoints, data, where each saturates",
    )
    parser.add_argument("--recompute", action="store_true", help=PlanConfig.model_fields["recompute"].description)
    add_config_arguments(parser, PlanConfig, leave_out=("recompute",))
    add_config_arguments(parser, RunConfig)


def plan(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Prints the table, or returns the figures with --json."""
    from jobs.plan.make_plan import planned, simulated

    flags = settings_from_flags(arguments, PlanConfig) | {"recompute": arguments.recompute}
    options = validate_config(flags, PlanConfig)
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
