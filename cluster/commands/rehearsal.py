"""A small-scale run on this machine for `raymill plan --calibrate`: real stages, real steps, in about a minute."""

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from cluster.commands.all_stages import river
from cluster.commands.chaos import Fault, Kind
from cluster.output.progress import say
from cluster.settings.parser import ConfigError
from cluster.settings.run import RunConfig, StorageConfig, batch_schedule, max_steps, seq_len
from cluster.settings.serve import ServeConfig
from jobs.corpus.listing import list_corpus
from jobs.plan.prediction import FIRST_STEPS
from jobs.tokens.train_tokenizer import sample_texts
from model.config import flops_per_token

STEPS_S = 20.0
"""Seconds of steps that a rehearsal without faults aims at; it has at least `_MIN_STEPS` of them."""

_MIN_STEPS, _MAX_STEPS = 8, 240
_MAX_LANE_S = 15.0
_FLOPS_PER_S = {"cpu": 20e9, "gpu": 50e12}
"""A low guess for a thread and a GPU, which decides only the size of the rehearsal."""

_VALIDATION_ROWS = 512
MAX_CORPUS_BYTES = 8 << 20

# The rehearsal's steps to which faults are moved. A node takes some ten seconds to join.
_KILL_AT, _ADD_AT, _STEPS_WITH_FAULTS = 60, 66, 240


def in_small(config: RunConfig, *, faults: Sequence[Fault] = ()) -> tuple[RunConfig, list[Fault]]:
    """Returns the run with fewer steps, and fewer lanes per step if a lane takes seconds, and the faults in it.
    Raises `ConfigError` if a single lane would take too long to be measured in a minute."""
    scaling, train = config.scaling, config.train
    rate = _FLOPS_PER_S["gpu"] if scaling.use_gpu else _FLOPS_PER_S["cpu"] * scaling.threads_per_worker
    lane_s = flops_per_token(config.model, seq_len(config)) * train.lane_size * seq_len(config) / rate
    if lane_s > _MAX_LANE_S:
        raise ConfigError(
            f"a lane of {train.lane_size} x {seq_len(config)} tokens may take {lane_s:,.0f} s here, too long "
            "for a rehearsal; calibrate on the hardware that the run is for, or with a smaller "
            "--train.micro-batch-size or model"
        )
    workers, lanes = scaling.max_workers, batch_schedule(config).full_lanes
    fitting = int(STEPS_S / _MIN_STEPS / lane_s) * workers
    lanes = min(lanes, max(workers, fitting))
    step_s = -(-lanes // workers) * lane_s
    steps = _STEPS_WITH_FAULTS if faults else max(_MIN_STEPS, min(_MAX_STEPS, int(STEPS_S / step_s)))
    steps = min(steps, max_steps(config))
    if faults and steps < _STEPS_WITH_FAULTS:
        raise ConfigError(f"a run of {steps} steps is too short for a rehearsal of its faults")
    if steps <= FIRST_STEPS:
        raise ConfigError(
            f"a run of {steps} steps is too short for a rehearsal, which leaves out the first {FIRST_STEPS} as slower "
            "ones; run it, or raise train.max_tokens"
        )
    small = train.model_copy(
        update={
            "global_batch_size": lanes * train.lane_size,
            "batch_ramp_tokens": 0,
            "batch_ramp_start": None,
            "max_tokens": steps * lanes * train.lane_size * seq_len(config),
            "warmup_tokens": None,
            "decay_tokens": None,
            "cooldown_tokens": None,
            "eval_every_steps": max(1, min(train.eval_every_steps, steps // 2)),
            "eval_max_tokens": min(train.eval_max_tokens, _VALIDATION_ROWS * seq_len(config)),
        }
    )
    moved = {Kind.KILL_NODE: _KILL_AT, Kind.KILL_WORKER: _KILL_AT, Kind.ADD_NODE: _ADD_AT}
    rehearsed_faults = [Fault(fault.kind, moved[fault.kind]) for fault in faults]
    return config.model_copy(update={"train": small, "run_id": "rehearsal"}), rehearsed_faults


@contextmanager
def rehearsed(
    config: RunConfig, *, faults: Sequence[Fault] = (), serving: ServeConfig | None = None
) -> Iterator[dict[str, Any]]:
    """Runs the rehearsal and gives its measurements for `jobs.plan.prediction`; its storage lasts for the context."""
    small, small_faults = in_small(config, faults=faults)
    busy_before = psutil.cpu_percent(interval=1.0) / 100
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="raymill-rehearsal-") as folder:
        storage = StorageConfig(uri=folder)
        if not config.data.source:
            raise ConfigError("--calibrate trains on the run's own text: give --data.source, or plan the --demo")
        corpus = rehearsal_corpus(config, Path(folder, "corpus.jsonl"))
        data = config.data.model_copy(update={"source": corpus["source"], "weights": []})
        run = small.model_copy(update={"data": data, "storage": storage})
        if serving is not None:
            key = str(Path(folder, "api_key"))
            serving = serving.model_copy(update={"storage": storage, "api_key_file": key})
        say(f"rehearsing {max_steps(run)} of {max_steps(config)} steps, and every stage around them")
        with river(run, faults=small_faults, serving=serving) as found:
            pass
        yield {
            "stage_s": found.stage_s,
            "run_dir": found.run["run_dir"],
            "evaluation": found.evaluation,
            **corpus,
            "faults": [vars(fault) for fault in faults],
            "rehearsed_faults": [vars(fault) for fault in small_faults],
            "busy_before": busy_before,
            "took_s": round(time.monotonic() - start, 1),
        }


def rehearsal_corpus(config: RunConfig, path: Path) -> dict[str, Any]:
    """Returns `source`, a small corpus as it is, else a sample of each of its sources in one file, with the bytes of
    the corpus and those of its sample. Raises `CorpusError`."""
    data = config.data
    listing = list_corpus(data.source)
    if listing.token_stores:
        raise ConfigError("--calibrate measures tokenizing too: name texts with --data.source, not token stores")
    total = sum(file.size for file in listing.files)
    if total <= MAX_CORPUS_BYTES:
        return {"source": data.source, "source_bytes": total, "rehearsed_bytes": total}
    sampled = data.model_copy(update={"tokenizer_sample_bytes": MAX_CORPUS_BYTES})
    with path.open("w", encoding="utf-8") as file:
        for text in sample_texts(listing.files, sampled, piece_chars=data.max_document_bytes):
            file.write(json.dumps({data.text_field: text}, ensure_ascii=False) + "\n")
    return {"source": [str(path)], "source_bytes": total, "rehearsed_bytes": path.stat().st_size}
