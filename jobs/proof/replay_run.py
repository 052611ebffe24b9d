"""Takes steps of a run again, on any number of workers, and compares their bits with the ledger."""

import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException, start_processes

from cluster.output.json_result import JsonResult
from cluster.output.progress import say
from cluster.output.result_text import counted
from cluster.settings.code_folders import code_version
from cluster.settings.parser import ConfigError
from cluster.settings.run import RunConfig, batch_schedule, to_yaml
from cluster.storage.uris import Storage
from jobs.proof.diff_runs import first_difference, step_values
from jobs.proof.recorded.checkpoint import CheckpointRecord, state_problem
from jobs.run.base import recorded_base
from jobs.run.checkpoints import RunCheckpoints, step_of
from jobs.run.find_run import (
    begun_ledger,
    data_identity,
    division,
    find_tokens,
    holes_of,
    last_start,
)
from jobs.run.history import CONFIG_FILE, recorded_config
from jobs.run.ledger import LEDGER, Ledger, Line
from jobs.run.run_plan import Replay, RunPlan
from jobs.tokens.token_store import TOKENIZER, TokenStoreError
from jobs.training.guards import GuardState
from jobs.training.train_loop import train
from jobs.workers.rendezvous import backend
from raymill.errors import UserError


@dataclass(frozen=True)
class Replayed(JsonResult):
    """The result of steps that were taken again."""

    verdict: str
    equal: bool
    step: int | None  # the first one whose bits are others than the ledger's
    fields: dict[str, tuple[Any, Any]]  # of that step: what was recorded, and what came of it again
    from_checkpoint: str | None
    workers: int
    hashes: int  # of weights, that were compared
    states: list[int]  # the steps after which the training state's hash was compared
    validations: int  # that were compared
    parameter_hash: str | None  # of the weights after the last step
    same_code: bool


def replay_steps(run: Storage, *, steps: str, workers: int) -> Replayed:
    """Is `raymill replay`: `replay`, with the steps as a user writes them."""
    return replay(run, steps=parse_steps(steps, begun_ledger(run)), num_workers=workers)


def replay(
    run: Storage, *, steps: range, num_workers: int = 1, ledger: Ledger | None = None
) -> Replayed:
    """Takes the steps again in a scratch folder, from the nearest checkpoint before them, with the
    recorded settings, and the validations between them. `ledger` has the lines that count, where
    not all do.

    Raises `UserError` for steps that the ledger does not have, and where the state to begin from is
    not the one that it recorded; `TokenStoreError` where the data is gone.
    """
    config = recorded_config(run)
    ledger = ledger or begun_ledger(run)
    recorded = step_values(ledger)
    if steps[0] not in recorded or steps[-1] not in recorded:
        raise UserError(
            f"steps {steps[0]}..{steps[-1]} are not in the ledger of {run.uri}, which has "
            f"{min(recorded, default=0)}..{max(recorded, default=0)}"
        )
    num_lanes = batch_schedule(config).num_lanes(1)  # no later step has fewer
    if not 1 <= num_workers <= num_lanes:
        raise ConfigError(
            f"--workers {num_workers}: the run has {num_lanes} lanes, and each worker needs one"
        )
    with tempfile.TemporaryDirectory(prefix="raymill-replay-") as folder:
        plan = scratch_plan(run, config, ledger, folder=folder, until=steps[-1])
        rollbacks = ledger.standing.events("rollback")
        start = lay_out(run, ledger, plan, before=steps[0], rollbacks=rollbacks)
        first = step_of(start) + 1 if start else 1
        say(f"taking steps {first} to {steps[-1]} again, {counted(num_workers, 'worker')}")
        _train(plan, num_workers=num_workers, folder=Path(folder))
        replayed = step_values(Ledger.read(plan.run))
    compared = [step for step in steps if step in recorded]  # a rollback may have left some out
    parted = first_difference(recorded, replayed, steps=compared, is_repeated=True)
    is_same_code = all(
        event.get("code_version") == plan.code_version for event in ledger.events("start")
    )
    verdict = f"bits equal for steps {steps[0]}..{steps[-1]}"
    if parted:
        verdict = f"bits part at {parted}"
        if not is_same_code:
            verdict += "; this is not the code that trained the run"
    alike = [recorded[step].keys() & replayed.get(step, {}).keys() for step in compared]
    return Replayed(
        verdict=verdict,
        equal=parted is None,
        step=parted.step if parted else None,
        fields=parted.fields if parted else {},
        from_checkpoint=start,
        workers=num_workers,
        hashes=sum("parameter_hash" in names for names in alike),
        states=[step for step, names in zip(compared, alike, strict=True) if "state_hash" in names],
        validations=sum("val_loss" in names for names in alike),
        parameter_hash=replayed.get(steps[-1], {}).get("parameter_hash"),
        same_code=is_same_code,
    )


def scratch_plan(
    run: Storage, config: RunConfig, ledger: Ledger, *, folder: str, until: int
) -> RunPlan:
    """Returns the plan of a run in a scratch folder, which takes the run's steps on the tokens of
    its last attempt. Raises `TokenStoreError` where these are gone."""
    identity = data_identity(ledger)
    start = last_start(ledger, identity)
    tokens = find_tokens(run, identity)
    branches = {
        "storage": config.storage.model_copy(update={"uri": folder}),
        # Whether this hardware computes the same bits is what is asked.
        "scaling": config.scaling.model_copy(update={"mixed_hardware": "allow"}),
    }
    return RunPlan(
        config=config.model_copy(update=branches),
        tokens_uri=tokens.uri,
        tokenizer_json=tokens.read_bytes(TOKENIZER),
        code_version=code_version(),
        until=until,
        replay=Replay(
            hashed=frozenset(
                line["step"]
                for line in ledger.lines
                if line.get("event") == "checkpoint" or "parameter_hash" in line
            ),
            validated=frozenset(line["step"] for line in ledger.events("validation")),
        ),
        validation_uris=_validation_uris(run, start),
        division=division(start),
        holes=holes_of(run, config),
        base=recorded_base(run),
    )


def _validation_uris(run: Storage, start: Line) -> dict[str, str]:
    """Returns where the sets are that an attempt was validated on, without those that are gone."""
    uris: dict[str, str] = {}
    for name, identity in start.get("validated_on", {}).items():
        with suppress(TokenStoreError):
            uris[name] = find_tokens(run, identity).uri
    return uris


def lay_out(
    run: Storage,
    ledger: Ledger,
    plan: RunPlan,
    *,
    before: int,
    rollbacks: Sequence[Line] = (),
) -> str | None:
    """Makes the scratch run look like the run killed after its newest valid checkpoint before the
    step. Returns that checkpoint's name, or None where there is none.

    It leaves out what these rollbacks have left out; others it has to decide on again. Raises
    `UserError` where that checkpoint's state is not the one that the ledger recorded.
    """
    plan.run.write_bytes(CONFIG_FILE, to_yaml(plan.config).encode())
    num_lines = 0
    guard = GuardState(rollbacks=ledger.rollbacks)
    with tempfile.TemporaryDirectory(prefix="raymill-fetch-") as scratch:
        newest, _ = RunCheckpoints(run).find(
            Path(scratch), left_out=lambda step: step >= before or guard.leaves_out(step)
        )
        if newest is not None:
            record = CheckpointRecord.in_ledger(newest.name, ledger)
            if problem := state_problem(newest, record):
                raise UserError(f"no step can be taken again from {newest.name}: {problem}")
            place = plan.run.local_path(f"checkpoints/{newest.name}")
            assert place is not None
            shutil.copytree(newest, place)
            num_lines = _num_lines_to(ledger, step_of(newest.name))
    # The steps before a rollback may have been taken again after it
    lines = [line for line in ledger.lines[:num_lines] if line.get("event") != "rollback"]
    _write_ledger(plan.run, [*lines, *rollbacks])
    return newest.name if newest else None


def _num_lines_to(ledger: Ledger, step: int) -> int:
    """Returns the number of the line of a step, of the last one if it was taken again."""
    return max(
        (
            number
            for number, line in enumerate(ledger.lines, start=1)
            if line.get("event") in (None, "skip") and line["step"] == step
        ),
        default=0,
    )


def _write_ledger(run: Storage, lines: Sequence[Line]) -> None:
    if lines:
        run.write_bytes(LEDGER, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _train(plan: RunPlan, *, num_workers: int, folder: Path) -> None:
    if num_workers == 1 and plan.config.train.exact:
        train(plan, rank=0, world_size=1)
        return
    # A server forks the workers, so that PyTorch is imported once and not once each, which takes 3
    # s of a processor.
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    arguments = (plan, num_workers, f"file://{folder}/meeting")
    try:
        start_processes(_train_rank, arguments, nprocs=num_workers, start_method="forkserver")
    except ProcessException as error:  # after which the others were ended
        raise UserError(
            f"a worker of the replay failed: {str(error).strip().splitlines()[-1]}"
        ) from error


def _train_rank(rank: int, plan: RunPlan, world_size: int, meeting: str) -> None:
    if plan.config.scaling.use_gpu:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend(use_gpu=plan.config.scaling.use_gpu),
        init_method=meeting,
        rank=rank,
        world_size=world_size,
    )
    train(plan, rank=rank, world_size=world_size)
    dist.destroy_process_group()
    # Everything is written. An interpreter that ends may abort on a thread of gloo's or of ours
    # that still runs.
    sys.stderr.flush()
    os._exit(0)


def parse_steps(text: str, ledger: Ledger) -> range:
    """Parses `A..B`, `A..`, `..B` or `A`, both ends included, of a run with a step. Raises
    `ConfigError`."""
    match = re.fullmatch(r"(\d*)(\.\.)?(\d*)", text)
    if not text or match is None:
        raise ConfigError(f"--steps {text}: expected A..B, such as 1..20")
    first = int(match[1] or ledger.steps[0]["step"])
    last = int(match[3] or (ledger.steps[-1]["step"] if match[2] else first))
    if not 1 <= first <= last:
        raise ConfigError(f"--steps {text}: expected A..B with 1 <= A <= B")
    return range(first, last + 1)
