"""The commands of `raymill` that begin, plan, train and evaluate. Each imports what it alone
needs."""

import math
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.commands.arguments import (
    CONFIG,
    CONFIG_FLAG,
    END_LOAN,
    EVALUATE_SETTINGS,
    FAULTS,
    LOAN_S,
    MAP_DOCUMENTS,
    NAMED,
    NO_PUBLISH,
    NUM_LENT,
    PLAN_SETTINGS,
    RUN_ID,
    RUN_SETTINGS,
    STORAGE,
    TRACE_SETTINGS,
    named_once,
)
from cluster.commands.command import (
    Argument,
    Arguments,
    Command,
    CommandSection,
    OneOf,
    Result,
    Switch,
)
from cluster.output.progress import say
from cluster.settings.parser import ConfigError
from cluster.stages.stage_module import STAGES, OverBudgetError
from cluster.storage.uris import open_storage, storage_flag
from raymill.errors import UserError

if TYPE_CHECKING:
    from cluster.commands.chaos import Fault
    from cluster.settings.run import RunConfig
    from cluster.settings.serve import ServeConfig
    from cluster.settings.stages import EvaluateConfig
    from model.shapes import Stage

_FILE = Argument[Path](
    "file", "run.yaml when unset", nargs="?", parse=Path, default=Path("run.yaml")
)
_KEEP = Switch("--keep", "keep the endpoint up until Ctrl-C")
_QUICK = Switch(
    "--quick",
    "end in a minute or two: fewer steps, one node, a worker killed, no evaluation, no report",
)
_PORTABLE = Switch(
    "--portable", "train with the same bits on every kind of processor; README has the hash"
)
_PRESET = Argument[str](
    "--preset",
    "the model's shape: Llama's, or GPT-2's of as many parameters",
    choices=("demo-llama", "demo"),
    default="demo-llama",
)
_SIMULATE = Switch(
    "--simulate", "at 8 to 4,096 GPUs instead: exchange, snapshots, checkpoints, data"
)
_ALL_FIGURES = Switch("--all", "all figures after the three lines: work, memory by part, data")
_NO_MEASURE = Switch(
    "--no-measure", "on CPUs, take no steps here where no run in the storage tells their time"
)
_SHAPES = Switch("--shapes", "each stage's shape and bytes", required=True)
_SHAPES_ROW = "  {:<28}{:<15}{:<24}{:>14}{:>7}  {}"


def demo(arguments: Arguments) -> Result:
    is_quick, storage_uri = arguments[_QUICK], arguments[STORAGE]
    between = "" if is_quick else "an evaluation, a report, "
    say(
        f"demo: a corpus, its tokens, training with a kill on purpose, {between}an endpoint, and the steps around "
        "the kill again"
    )

    from cluster.commands.demo import run_demo

    values = run_demo(
        storage_uri,
        preset=arguments[_PRESET],
        is_quick=is_quick,
        is_portable=arguments[_PORTABLE],
        keep=arguments[_KEEP],
    )
    serving = as_typed(storage_uri, "raymill serve latest --port 8000")
    after = f"{serving}, then open http://127.0.0.1:8000 in a browser to talk to it"
    return Result(values, text="", next=after)


def init(arguments: Arguments) -> Result:
    """Writes the file of settings, and never over one that is there."""
    from cluster.settings.leaves import first_settings

    path = arguments[_FILE]
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(first_settings())
    except FileExistsError:
        raise UserError(f"{path} is there already and stays as it is; name another file") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    typed = shlex.quote(str(path))
    after = f"set data.source in {path}, then `raymill plan {typed}` and `raymill pretrain {typed}`"
    return Result({"file": str(path)}, next=after)


def tokenize(arguments: Arguments) -> Result:
    values, _ = _run_stage(arguments, "tokenize", faults=[])
    words = ["pretrain" if word == "tokenize" else word for word in arguments.words]
    words = [word for word in words if word != MAP_DOCUMENTS.name]
    return Result(values, next=f"`raymill {shlex.join(words)}`")


def pretrain(arguments: Arguments) -> Result:
    from cluster.commands.chaos import parse_faults

    words = arguments[FAULTS]
    return _trained(*_run_stage(arguments, "pretrain", faults=parse_faults(words)))


def pipeline(arguments: Arguments) -> Result:
    return _trained(*_run_stage(arguments, "pipeline", faults=[]))


def _trained(values: dict[str, Any], config: "RunConfig") -> Result:
    served = "latest" if config.checkpoint.publish else config.run_id
    after = as_typed(
        config.storage.uri, f"raymill report {config.run_id}", f"raymill serve {served}"
    )
    return Result(values, next=after)


def _run_stage(
    arguments: Arguments, stage: str, *, faults: "list[Fault]"
) -> tuple[dict[str, Any], "RunConfig"]:
    """Runs the stage with the settings of the command line. Returns its result, and the settings
    that it had."""
    from cluster.settings.run import RunConfig

    config = arguments.config(RunConfig)
    if faults and config.cluster.address is not None:
        raise ConfigError("--chaos kills nodes of the local cluster; leave out --cluster.address")
    if config.cluster.num_nodes == 1 and any(fault.takes_a_node for fault in faults):
        raise ConfigError(
            "--chaos kill-node leaves no node of a local cluster of one; give it --cluster.num-nodes 3"
        )
    known = [] if "--run-id" in arguments.words else ["--run-id", str(config.run_id)]
    command = f"raymill {shlex.join([*arguments.words, *known])}" if stage != "tokenize" else ""
    return run_to_end(config, stage, faults=faults, command=command), config


def run_to_end(
    config: "RunConfig", stage: str, *, command: str, faults: "Sequence[Fault]" = ()
) -> dict[str, Any]:
    """Submits the stage as a job, follows it, and returns its result. `command` is what a person
    types to continue it, if that is possible."""
    from cluster.commands.chaos import chaos
    from cluster.local.local_cluster import cpus_per_node
    from cluster.submission.first_checks import starting

    _check(config, stage)
    _say_stage(config, stage)

    from cluster.stages.stage import connected, run_stage  # imports Ray, which takes a second

    try:
        with (
            starting(config, stage) as start,
            connected(config.cluster, cpus_per_node=cpus_per_node(config)) as connection,
            chaos(faults, cluster=connection.local, config=config),
        ):
            return run_stage(
                connection, STAGES[stage], config, command=command, when_submitted=start.close
            )
    except (KeyboardInterrupt, SystemExit):
        if command:
            _say_unsaved(config)
            say(f"continue with: {command}")
        raise


def _say_unsaved(config: "RunConfig") -> None:
    """Says which steps are lost of a run that was not given the time to save, or the place."""
    from cluster.output.result_text import counted
    from cluster.settings.run import run_storage
    from jobs.run.ledger import Ledger

    with suppress(UserError):  # of a storage that is gone
        ledger = Ledger.read(run_storage(config))
        saved = max((line["step"] for line in ledger.events("checkpoint")), default=0)
        last = max((line["step"] for line in ledger.steps), default=0)
        if last > saved:
            lost = counted(last - saved, "step")
            say(
                f"not saved: the last {lost}; the run goes on after step {saved:,}, and takes them again"
            )


def _check(config: "RunConfig", stage: str) -> None:
    """Raises `UserError` for what a minute later would end the stage in words that name no
    setting."""
    from cluster.settings.run import run_storage
    from cluster.submission.first_checks import check_room, check_stage
    from cluster.submission.preflight import check_sources, folders_at
    from jobs.plan.memory import worker_needs
    from jobs.run.costs.budget import why_over_budget
    from jobs.run.history import why_not_resumed

    is_training = stage != "tokenize"
    check_sources(config.data, folders_at(config.cluster.address))
    if is_training and (reason := why_not_resumed(run_storage(config), config)):
        raise ConfigError(reason)
    if is_training and (reason := why_over_budget(run_storage(config), config)):
        raise OverBudgetError(reason)
    check_stage(config, stage)
    check_room(config, stage, worker_needs(config) if is_training else {})


def _say_stage(config: "RunConfig", stage: str) -> None:
    from cluster.output.result_text import counted
    from cluster.settings.run import max_steps

    steps = "" if stage == "tokenize" else f", {counted(max_steps(config), 'step')}"
    sources = config.data.source
    more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
    say(f"{stage}: run {config.run_id}{steps}, on {sources[0]}{more}")


def as_typed(storage: str, *commands: str) -> str:
    """Returns the commands as they are typed, with the storage if it is not the default."""
    return ", or ".join(f"`{command}{storage_flag(storage)}`" for command in commands)


def plan(arguments: Arguments) -> Result:
    """Returns the figures, with three lines to be printed, or all of them as a table. Without GPUs
    they are for this machine."""
    from cluster.settings.flags import settings_from_flags, validate_config
    from cluster.settings.plan import PlanConfig, TraceConfig
    from cluster.settings.run import RunConfig, planned_vocabulary
    from jobs.plan.cpu_plan import asks_for_gpus, planned_here
    from jobs.plan.make_plan import planned
    from jobs.plan.scale_simulation import scale_table, scales
    from jobs.plan.traces.plan_on_trace import planned_on

    options = validate_config(settings_from_flags(arguments.values, PlanConfig), PlanConfig)
    config = arguments.config(RunConfig, needs_source=False)
    if arguments[_SIMULATE]:
        rows = scales(planned_vocabulary(config), options)
        return Result({"scales": rows}, text=f"{scale_table(rows)}\n")
    is_whole, measures = arguments[_ALL_FIGURES], not arguments[_NO_MEASURE]
    asked = validate_config(settings_from_flags(arguments.values, TraceConfig), TraceConfig)
    if asked.trace is not None:
        figures = planned_on(config, options, asked, measures=measures)
        return Result(figures, text=f"{figures.pop('table')}\n")
    if asks_for_gpus(config, options):
        figures = planned(config, options, is_whole=is_whole)
    else:
        figures = planned_here(config, measures=measures, is_whole=is_whole)
    table = figures.pop("table")
    rest = f"`raymill {shlex.join([*arguments.words, _ALL_FIGURES.names])}` has all figures"
    return Result(figures, text=f"{table}\n", next="" if is_whole else rest)


def inspect(arguments: Arguments) -> Result:
    """Shows the shapes of one lane: train.micro_batch_size sequences of train.seq_len tokens."""
    from cluster.settings.run import RunConfig, planned_vocabulary, seq_len, with_precision
    from model.hardware.processor import fast_precision
    from model.numerics import BF16
    from model.shapes import stages, weights

    config = planned_vocabulary(arguments.config(RunConfig, needs_source=False))
    config = with_precision(config, BF16.name if config.scaling.use_gpu else fast_precision("cpu"))
    batch_size, tokens = config.train.micro_batch_size, seq_len(config)
    value_bytes = config.train.numerics.product_bytes
    batch = stages(config.model, batch_size=batch_size, seq_len=tokens, bytes_per_value=value_bytes)
    parameters = weights(config.model)
    size = config.model.num_parameters
    title = f"A lane of {batch_size} x {tokens:,} tokens, {config.train.precision}"
    active = config.model.num_active_parameters
    of_a_token = f", {active:,} of them for each token" if active < size else ""
    text = _shapes(title, batch) + _shapes(f"\n{size:,} parameters{of_a_token}", parameters)
    return Result(
        {
            "parameters": size,
            "active_parameters": active,
            "stages": _values(batch),
            "weights": _values(parameters),
        },
        text=text,
    )


def _values(stages: "Sequence[Stage]") -> list[dict[str, Any]]:
    return [
        vars(stage) | {"shape": list(stage.shape), "num_bytes": stage.num_bytes} for stage in stages
    ]


def _shapes(title: str, stages: "Sequence[Stage]") -> str:
    rows = [("stage", "dimensions", "shape", "bytes", "times", "")]
    for stage in stages:
        shape = " x ".join(f"{length:,}" for length in stage.shape)
        num_bytes = f"{stage.num_bytes / 1e6:,.3f} MB"
        rows.append((stage.name, stage.dims, shape, num_bytes, f"{stage.times}", stage.note))
    lines = [_SHAPES_ROW.format(*row).rstrip() for row in rows]
    return "\n".join([title, *lines]) + "\n"


def evaluate(arguments: Arguments) -> Result:
    from cluster.local.local_cluster import cpus_per_node
    from cluster.settings.stages import EvaluateConfig
    from cluster.submission.preflight import check_sources, folders_at

    config = arguments.config(
        EvaluateConfig, checkpoint=named_once(arguments, NAMED, flag="checkpoint")
    )
    checkpoint = named_by(config)
    check_sources(config.data, folders_at(config.cluster.address))
    say(f"evaluate: {checkpoint}")

    from cluster.stages.stage import connected, run_stage  # imports Ray, which takes a second

    with connected(config.cluster, cpus_per_node=cpus_per_node(config)) as connection:
        values = run_stage(connection, "jobs.evaluate", config)
    return Result(
        values,
        next=as_typed(config.storage.uri, f"raymill serve {shlex.quote(values['checkpoint'])}"),
    )


def named_by(config: "EvaluateConfig | ServeConfig") -> str:
    """Returns the URI of the settings' checkpoint, judged by file names alone, before a cluster is
    started."""
    from cluster.storage.registry import LATEST, named_checkpoint

    place = config.storage.uri if config.checkpoint == LATEST else config.checkpoint
    if config.cluster.address is not None and open_storage(place).local_path("") is not None:
        return config.checkpoint  # that cluster may see other folders
    return named_checkpoint(config.checkpoint, config.storage.uri)


def lend(arguments: Arguments) -> Result:
    from cluster.storage import lending

    run_id, storage_uri = arguments[RUN_ID], arguments[STORAGE]
    num_workers, duration_s = arguments[NUM_LENT], arguments[LOAN_S]
    run = open_storage(storage_uri).child(f"runs/{run_id}")
    if not any(run.list()):
        raise UserError(f"no run {run_id} in {storage_uri}: `raymill lend` takes a run id")
    if arguments[END_LOAN]:
        lending.give_back(run)
    elif num_workers < 1:
        raise ConfigError(f"--workers {num_workers}: expected at least 1; --return ends a loan")
    elif not 0 < duration_s < math.inf:
        raise ConfigError(f"--for {duration_s:g}: expected seconds above 0; --return ends a loan")
    else:
        lending.lend(run, lending.Loan(num_workers, duration_s))
    loan = lending.read_loan(run)
    return Result(
        {
            "run_id": run_id,
            "lent_workers": loan.num_workers if loan else 0,
            "for_s": loan and loan.for_s,
        }
    )


BEGIN = CommandSection(
    "to begin with",
    (
        Command(
            "demo",
            "train and serve a small model on a local cluster, with a node killed on purpose",
            demo,
            [_QUICK, _PORTABLE, _KEEP, _PRESET, STORAGE],
        ),
        Command(
            "init",
            "write a commented file of the settings that are changed first; never over one that is there",
            init,
            [_FILE],
        ),
    ),
)

TRAIN = CommandSection(
    "train: from tokens to a checkpoint",
    (
        Command(
            "plan",
            "estimate what a run will take, on this machine or on GPUs: time, memory, disk or cost",
            plan,
            [
                CONFIG,
                _ALL_FIGURES,
                _NO_MEASURE,
                _SIMULATE,
                PLAN_SETTINGS,
                TRACE_SETTINGS,
                RUN_SETTINGS,
            ],
        ),
        Command(
            "pretrain",
            "train on token shards, made first where missing, and publish the checkpoint",
            pretrain,
            [CONFIG, FAULTS, RUN_SETTINGS, NO_PUBLISH],
        ),
        Command(
            "pipeline",
            "tokenize, train, evaluate and report, all stages in one job",
            pipeline,
            [CONFIG, RUN_SETTINGS, NO_PUBLISH],
        ),
        Command(
            "evaluate",
            "measure loss, perplexity and bits per byte of a checkpoint",
            evaluate,
            [NAMED, CONFIG_FLAG, EVALUATE_SETTINGS],
        ),
        Command(
            "inspect",
            "show the shape and bytes of a batch at every stage of the model",
            inspect,
            [CONFIG, _SHAPES, RUN_SETTINGS],
        ),
        Command(
            "lend",
            "shrink a running elastic run for a while; it grows again",
            lend,
            [RUN_ID, OneOf((NUM_LENT, END_LOAN), required=True), LOAN_S, STORAGE],
        ),
    ),
)
