"""`raymill plan`: its flags, and from them to the plan that is printed."""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.config import RunConfig, write_config
from cluster.demo import demo_config, demo_faults, demo_serving
from cluster.flags import ConfigError, add_config_arguments, config_from_arguments, settings_from_flags, validate_config
from cluster.plan_config import PlanConfig
from cluster.rehearsal import rehearsed
from cluster.stage import run_module
from cluster.storage import absolute_uri


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", type=Path, help="YAML file of the run; flags override its settings")
    parser.add_argument("--demo", action="store_true", help="plan the run of `raymill demo`, with its faults")
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="rehearse the run in small on a local cluster, and say from that how long all of it would take here",
    )
    parser.add_argument(
        "--simulate",
        action="store_true",
        help="the run at 8 to 4,096 GPUs instead: exchange, snapshots, checkpoints, data, and where each saturates",
    )
    parser.add_argument("--recompute", action="store_true", help=PlanConfig.model_fields["recompute"].description)
    add_config_arguments(parser, PlanConfig, leave_out=("recompute",))
    add_config_arguments(parser, RunConfig)


def plan(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Prints the table, or returns the figures with --json."""
    flags = settings_from_flags(arguments, PlanConfig) | {"recompute": arguments.recompute}
    options = validate_config(flags, PlanConfig)
    if arguments.demo:
        if arguments.config is not None:
            raise ConfigError("--demo has a configuration of its own; leave out the file, or --demo")
        config, _ = demo_config(absolute_uri(getattr(arguments, "storage.uri") or ".raymill"))
    else:
        config = config_from_arguments(arguments, RunConfig, needs_source=False)
    if arguments.simulate:
        return _shown(_planned(config, options, more=["--simulate"]), as_json=arguments.json)
    if not arguments.calibrate:
        return _shown(_planned(config, options), as_json=arguments.json)
    if config.cluster.address is not None:
        raise ConfigError("--calibrate measures on a local cluster; leave out --cluster.address")
    faults = demo_faults(config) if arguments.demo else []
    with rehearsed(config, faults=faults, serving=demo_serving(config) if arguments.demo else None) as found:
        return _shown(_planned(config, options, rehearsal=found), as_json=arguments.json)


def _planned(
    config: RunConfig, options: PlanConfig, *, rehearsal: dict[str, Any] | None = None, more: Sequence[str] = ()
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="raymill-plan-") as name:
        folder = Path(name)
        write_config(config, folder / "run.yaml")
        said = options.model_dump(mode="json", exclude_unset=True)  # a default is nobody's wish for a GPU
        (folder / "plan.yaml").write_text(json.dumps(said), encoding="utf-8")
        words = [str(folder / "run.yaml"), str(folder / "plan.yaml"), *more]
        if rehearsal is not None:
            (folder / "rehearsal.json").write_text(json.dumps(rehearsal), encoding="utf-8")
            words += ["--rehearsal", str(folder / "rehearsal.json")]
        return run_module("jobs.plan", *words)


def _shown(found: dict[str, Any], *, as_json: bool) -> dict[str, Any] | None:
    text = found.pop("table")
    if as_json:
        return found
    sys.stdout.write(f"{text}\n")
    return None
