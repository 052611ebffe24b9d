"""Tokens and seconds to AdamW's final loss: raymill with AdamW and with Muon, beside nanoGPT's and
nanochat's recipes as plain loops, on the same rows, shape and seeds.

    python -m tests.benchmarks.bench_loss [--task 1m] [--steps N] [--seeds 3] [--shares 0.5 0.7]
        [--ours] [--folder build/bench-loss]
    python -m tests.benchmarks.bench_loss --step-cost

The rates of raymill's two optimizers are tuned first, on seed 0, over the same grid of factors of 2.
Then every contender trains with every seed. Muon trains with several shares of the tokens too, each
with the whole schedule: tokens to a loss are read between them, as a run that ended there would
have had. nanoGPT's and nanochat's rates are theirs. The text is the demo's, as characters, or
`--text FILE...`. Every finished run is a file of the folder, so a run that was cut off goes on. Writes
`table.md`, `curves.png` and `figures.json` there. Seconds are of this process's processor time, in
steps alone.

`--step-cost` measures instead what a step of Muon takes over one of AdamW, at the batch of presets,
taking turns, in fp32 and in what the processor computes fast.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from matplotlib.figure import Figure

from cluster.commands.demo_run import fetch_corpus
from cluster.output.progress import say
from cluster.settings.train import TrainConfig
from model.config import PRESETS
from model.hardware.memory import keep_freed_memory
from model.hardware.processor import fast_precision
from model.numerics import Precision
from tests.benchmarks.loss_runs import (
    Contender,
    Corpus,
    Curve,
    Ours,
    Task,
    nanochat,
    nanogpt,
    trained,
)

TASKS = {
    # nanoGPT's published setting for a CPU: 0.8M parameters
    "1m": Task(n_layer=4, n_head=4, n_embd=128, seq_len=64, batch_size=12, num_steps=2000),
    # The shape and the batch of its setting for a GPU: 10.7M parameters
    "10m": Task(n_layer=6, n_head=6, n_embd=384, seq_len=256, batch_size=64, num_steps=5000),
    # The same shape with the rows and the batch of the first, for a processor
    "10m-short": Task(6, 6, 384, seq_len=64, batch_size=12, num_steps=1000, precision="bf16"),
}

FIRST_PEAKS = (2e-3, 4e-3)
"""Tried first; then a larger or a smaller one by a factor of 2, as long as the best is at an end."""

SHARES = (0.5, 0.6, 0.7, 1.0)
"""Of the tokens, with each of which Muon trains unless others are asked for."""

NANOGPT = {"peak": 1e-3, "beta2": 0.99}
"""What its recipe has otherwise than raymill by default: the same loop must have the same loss."""

# Preset, sequences of a step, tokens of each: the default batch, and the demo's own
STEP_COSTS = (("demo", 64, 128), ("demo", 8, 128), ("small-10m", 64, 256))


_NUM_TURNS = 9


class Runs:
    """Runs that are kept in a folder, each as soon as it is over."""

    def __init__(self, folder: Path, corpus: Corpus) -> None:
        self._folder = folder / "runs"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._corpus = corpus

    def curve(self, name: str, task: Task, make: Callable[[Corpus, Task], Contender]) -> Curve:
        path = self._folder / f"{name}, {task.num_steps} steps.json"
        if not path.exists():
            curve = trained(make(self._corpus, task), self._corpus, task)
            path.write_text(json.dumps(asdict(curve)), encoding="utf-8")
            say(f"{name}, {task.num_steps:,} steps: {curve.losses[-1]:.4f} nats a character")
        return Curve(**json.loads(path.read_text(encoding="utf-8")))

    def ours(self, task: Task, seed: int, *, optimizer: str, peak: float) -> Curve:
        def make(corpus: Corpus, task: Task) -> Contender:
            return Ours(corpus, task, seed, optimizer=optimizer, peak=peak)

        return self.curve(f"raymill, {optimizer}, {peak:g}, seed {seed}", task, make)

    def tuned(self, task: Task, *, optimizer: str) -> float:
        """Returns the peak that ends with the lowest loss on seed 0."""
        losses: dict[float, float] = {}
        untried = [*FIRST_PEAKS]
        while True:
            for peak in untried:
                losses[peak] = self.ours(task, 0, optimizer=optimizer, peak=peak).losses[-1]
            best = min(losses, key=lambda peak: losses[peak])
            if best == max(losses):
                untried = [2 * best]
            elif best == min(losses):
                untried = [best / 2]
            else:
                return best


def measured(
    runs: Runs, task: Task, seeds: range, *, shares: Sequence[float], with_peers: bool
) -> dict[str, Any]:
    """Returns the figures of all contenders, and the curves of whole runs by contender."""
    peaks = {optimizer: runs.tuned(task, optimizer=optimizer) for optimizer in ("adamw", "muon")}
    curves: dict[str, list[Curve]] = {}
    curves["raymill, AdamW"] = [
        runs.ours(task, seed, optimizer="adamw", peak=peaks["adamw"]) for seed in seeds
    ]
    if with_peers:
        curves["raymill, nanoGPT's numbers"] = [
            runs.curve(
                f"raymill with nanoGPT's numbers, seed {seed}",
                task,
                lambda c, t, seed=seed: Ours(c, t, seed, optimizer="adamw", **NANOGPT),
            )
            for seed in seeds
        ]
        curves["nanoGPT's recipe"] = [
            runs.curve(f"nanogpt, seed {seed}", task, lambda c, t, seed=seed: nanogpt(c, t, seed))
            for seed in seeds
        ]
        curves["nanochat's recipe"] = [
            runs.curve(f"nanochat, seed {seed}", task, lambda c, t, seed=seed: nanochat(c, t, seed))
            for seed in seeds
        ]
    target = fmean(curve.losses[-1] for curve in curves["raymill, AdamW"])
    points: list[tuple[float, float]] = []  # share of the tokens, and the mean loss
    for share in shares:
        shorter = replace(task, num_steps=round(task.num_steps * share))
        ended = [runs.ours(shorter, seed, optimizer="muon", peak=peaks["muon"]) for seed in seeds]
        points.append((share, fmean(curve.losses[-1] for curve in ended)))
        curves["raymill, Muon"] = ended
    share_of_tokens = crossing(points, target)
    return {
        "peaks": peaks,
        "target": target,
        "muon_by_share": points,
        "share_of_tokens": share_of_tokens,
        "contenders": {name: figures(runs, target) for name, runs in curves.items()},
        "curves": {name: asdict(ended[0]) for name, ended in curves.items()},
    }


def crossing(points: Sequence[tuple[float, float]], target: float) -> float | None:
    """Returns the share of the tokens at which the loss is the target, on straight lines between
    neighboring points: the first share itself if it is reached there, None if it never is."""
    (share, loss), *others = points
    if loss <= target:
        return share
    for next_share, next_loss in others:
        if next_loss <= target:
            return share + (next_share - share) * (loss - target) / (loss - next_loss)
        share, loss = next_share, next_loss
    return None


def figures(ended: Sequence[Curve], target: float) -> dict[str, Any]:
    """Returns the last losses of whole runs, and where the mean curve first reaches the target."""
    losses = [curve.losses[-1] for curve in ended]
    means = [fmean(at_once) for at_once in zip(*(curve.losses for curve in ended), strict=True)]
    reached = [number for number, loss in enumerate(means) if loss <= target + 1e-9]
    seconds = median(curve.seconds[-1] for curve in ended)
    tokens = ended[0].tokens
    return {
        "losses": losses,
        "mean_loss": fmean(losses),
        "spread": max(losses) - min(losses),
        "tokens_to_target": tokens[reached[0]] if reached else None,
        "seconds_to_target": seconds * tokens[reached[0]] / tokens[-1] if reached else None,
        "seconds": seconds,
        "tokens": tokens[-1],
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        "| contender | peak | final loss, mean | spread | tokens to the target | seconds to it | seconds in all |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    peaks = {
        "raymill, AdamW": result["peaks"]["adamw"],
        "raymill, Muon": result["peaks"]["muon"],
    }
    for name, row in result["contenders"].items():
        reached = row["tokens_to_target"]
        cells = [
            name,
            f"{peaks[name]:g}" if name in peaks else "its own",
            f"{row['mean_loss']:.4f}",
            f"{row['spread']:.4f}",
            f"{reached:,}" if reached else "not reached",
            f"{row['seconds_to_target']:,.0f}" if reached else "not reached",
            f"{row['seconds']:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    share = result["share_of_tokens"]
    found = f"{share:.2f} of them" if share is not None else "never"
    first = min(point for point, _ in result["muon_by_share"])
    if share == first:
        found = f"{share:.2f} of them or fewer"
    of_shares = "; ".join(f"{part:g}: {loss:.4f}" for part, loss in result["muon_by_share"])
    lines += [
        "",
        f"The target is {result['target']:.4f} nats a character, AdamW's mean final loss. Runs with Muon that "
        f"end there take {found} (share of the tokens: mean final loss {of_shares}).",
    ]
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws seed 0's validation losses over tokens."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, curve in result["curves"].items():
        axes.plot([tokens / 1e6 for tokens in curve["tokens"]], curve["losses"], label=name)
    axes.axhline(result["target"], color="gray", linewidth=0.8, linestyle="dashed")
    axes.set_xlabel("million tokens")
    axes.set_ylabel("validation loss, nats a character")
    axes.set_yscale("log")
    axes.legend()
    figure.savefig(path, dpi=150)


def step_cost(
    preset: str, batch_size: int, seq_len: int, *, precision: Precision
) -> dict[str, Any]:
    """Returns the milliseconds of a step by optimizer, and their ratio, from turns of one step
    each."""
    shape = PRESETS[preset]
    task = Task(
        shape["n_layer"],
        shape["n_head"],
        shape["n_embd"],
        seq_len,
        batch_size,
        num_steps=1000,
        precision=precision,
    )
    corpus = Corpus.of("".join(chr(97 + number * number % 61) for number in range(100_000)))
    at_once = {"micro_batch_size": min(batch_size, TrainConfig().micro_batch_size)}
    contenders = {
        optimizer: Ours(corpus, task, 0, optimizer=optimizer, peak=1e-3, **at_once)
        for optimizer in ("adamw", "muon")
    }
    seconds: dict[str, list[float]] = {optimizer: [] for optimizer in contenders}
    ratios: list[float] = []
    for step in range(1, _NUM_TURNS + 1):
        for optimizer, contender in contenders.items():
            start_s = time.process_time()
            contender.step(step)
            seconds[optimizer].append(time.process_time() - start_s)
        ratios.append(seconds["muon"][-1] / seconds["adamw"][-1])
    warm = {optimizer: median(times[2:]) for optimizer, times in seconds.items()}
    return {
        "preset": preset,
        "precision": precision,
        "step_tokens": task.step_tokens,
        "adamw_ms": round(1e3 * warm["adamw"], 2),
        "muon_ms": round(1e3 * warm["muon"], 2),
        "ratio": round(median(ratios[2:]), 3),
    }


def texts(paths: Sequence[Path], folder: Path) -> Iterator[str]:
    if not paths:
        corpus, source = fetch_corpus(folder)
        say(f"text: {source}")
        paths = sorted(corpus.iterdir())
    for path in paths:
        yield path.read_text(encoding="utf-8", errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=TASKS, default="1m")
    parser.add_argument("--steps", type=int, help="the task's own when left out")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--ours", action="store_true", help="leave out others' recipes")
    parser.add_argument("--text", type=Path, nargs="+", default=[])
    parser.add_argument(
        "--max-chars", type=int, default=1_115_394, help="as many as nanoGPT's text has"
    )
    parser.add_argument("--folder", type=Path, default=Path("build/bench-loss"))
    parser.add_argument("--step-cost", action="store_true")
    arguments = parser.parse_args()
    keep_freed_memory()  # as a worker does
    if arguments.step_cost:
        for precision in sorted({"fp32", fast_precision("cpu")}):
            for preset, batch_size, seq_len in STEP_COSTS:
                cost = step_cost(preset, batch_size, seq_len, precision=precision)
                print(json.dumps(cost), flush=True)
        return
    task = TASKS[arguments.task]
    if arguments.steps:
        task = replace(task, num_steps=arguments.steps)
    folder: Path = arguments.folder / arguments.task
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        text = "".join(texts(arguments.text, Path(scratch)))
    corpus = Corpus.of(text[: arguments.max_chars])
    say(
        f"{len(corpus.train):,} characters of {corpus.vocab_size} kinds to train on, "
        f"{task.num_steps:,} steps of {task.step_tokens:,}, {torch.get_num_threads()} threads"
    )
    result = measured(
        Runs(folder, corpus),
        task,
        range(arguments.seeds),
        shares=arguments.shares,
        with_peers=not arguments.ours,
    )
    (folder / "figures.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    (folder / "table.md").write_text(table(result), encoding="utf-8")
    draw(result, folder / "curves.png")
    print(table(result))


if __name__ == "__main__":
    main()
