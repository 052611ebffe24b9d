"""`raymill plan`: its flags, and from them to the plan that is printed."""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from cluster.config import RunConfig, write_config
from cluster.flags import add_config_arguments, config_from_arguments, settings_from_flags, validate_config
from cluster.plan_config import PlanConfig
from cluster.stage import run_module


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", type=Path, help="YAML file of the run; flags override its settings")
    parser.add_argument("--recompute", action="store_true", help=PlanConfig.model_fields["recompute"].description)
    add_config_arguments(parser, PlanConfig, leave_out=("recompute",))
    add_config_arguments(parser, RunConfig)


def plan(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Prints the table, or returns the figures with --json."""
    flags = settings_from_flags(arguments, PlanConfig) | {"recompute": arguments.recompute}
    options = validate_config(flags, PlanConfig)
    config = config_from_arguments(arguments, RunConfig, needs_source=False)
    with tempfile.TemporaryDirectory(prefix="raymill-plan-") as folder:
        run, own = Path(folder, "run.yaml"), Path(folder, "plan.yaml")
        write_config(config, run)
        write_config(options, own)
        found = run_module("jobs.plan", str(run), str(own))
    text = found.pop("table")
    if arguments.json:
        return found
    sys.stdout.write(f"{text}\n")
    return None
