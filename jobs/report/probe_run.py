"""Probes what each kept checkpoint of a run can do in context: copying, induction, few-shot."""

import tempfile
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator, PercentFormatter

from cluster.output.progress import say
from cluster.output.result_text import counted
from cluster.settings.run import seq_len
from cluster.storage.bases import find_base
from cluster.storage.uris import Storage, join_uri
from jobs.report.page import PHASES, TEXT, new_figure, png, titled
from jobs.run.checkpoints import RunCheckpoints
from jobs.run.history import recorded_config
from model.files.checkpoint import load_decoder
from model.files.checkpoint_folder import read_metadata
from model.insight.probes import TASKS, probe
from raymill.errors import UserError

_LOOKS = {
    "copy": ("o-", PHASES[1]),
    "induction": ("s--", PHASES[4]),
    "few-shot": ("D-.", PHASES[3]),
}


def probe_run(run: Storage) -> dict[str, Any]:
    """Returns `checkpoints`, oldest first, each with its step, tokens, validation figures and
    accuracy by task, and draws them into the run's report. Raises `UserError` where the run keeps
    no checkpoint."""
    checkpoints, config = RunCheckpoints(run), recorded_config(run)
    names = checkpoints.names
    if not names:
        raise UserError(f"{run.uri} keeps no checkpoint yet; try again once it has one")
    probed = []
    for number, name in enumerate(names, start=1):
        with tempfile.TemporaryDirectory(prefix="raymill-probe-") as scratch:
            folder = checkpoints.fetch(name, Path(scratch))
            metadata, base = read_metadata(folder), find_base(folder, config.storage.uri)
            model = load_decoder(folder, base=base)
        figures: dict[str, Any] = {
            "step": metadata.step,
            "tokens_seen": metadata.tokens_seen,
            "val_loss": metadata.val_loss,
            "val_bits_per_byte": metadata.val_bits_per_byte,
        }
        for task, accuracy in probe(model, seq_len=seq_len(config)).items():
            figures[task] = round(accuracy, 4)
        probed.append(figures)
        say(f"probed {number} of {counted(len(names), 'checkpoint')}")
    run.write_bytes("report/probes.png", draw(probed))
    return {"checkpoints": probed, "figure": join_uri(run.uri, "report/probes.png")}


def draw(checkpoints: list[dict[str, Any]]) -> bytes:
    figure = new_figure()
    axes = titled(figure, "What checkpoints do in context", x="optimizer step", y="accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    steps = [checkpoint["step"] for checkpoint in checkpoints]
    for task in TASKS:
        look, color = _LOOKS[task]
        accuracies = [checkpoint[task] for checkpoint in checkpoints]
        axes.plot(steps, accuracies, look, color=color, label=task)
    axes.axhline(0.25, color=TEXT, linewidth=0.8, linestyle=":", label="a guess at few-shot")
    axes.set_ylim(-0.02, 1.02)
    return png(figure)
