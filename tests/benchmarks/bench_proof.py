"""What proof costs: a line of the ledger, a checkpoint's save, and `raymill verify` of a large state.

    python -m tests.benchmarks.bench_proof [--folder FOLDER] [--rounds N]

Processor seconds of a save have everything that its thread does: copy, files, hashes, reading back. To
compare with a state before, run the file there in turn: it asks for no newer names.
"""

import argparse
import hashlib
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from cluster.settings.run import CheckpointConfig, RunConfig, to_yaml
from cluster.settings.train import TrainConfig
from cluster.storage.uris import open_storage
from jobs.exact.run_state import run_state
from jobs.proof.verify_run import verify
from jobs.run.checkpoints import RunCheckpoints
from jobs.run.ledger import LedgerWriter
from jobs.run.writer_generation import Fence
from jobs.saving.checkpoint_writer import CheckpointWriter
from jobs.saving.publisher import Publisher
from model.config import GPTConfig, preset_fields
from model.files.checkpoint_folder import Metadata
from model.gpt import GPT
from model.text.tokenizer import train_bpe
from raymill.state.train_state import TrainState

LAYERS = 12
"""Of GPT-2's width: 85 million parameters, whose state of AdamW is a gigabyte."""
NUM_LINES = 2000
_PIECE_BYTES = 1 << 20


def made_state() -> TrainState:
    fields = preset_fields({"preset": "gpt2-124m", "n_layer": LAYERS, "vocab_size": 257})
    model = GPT(GPTConfig(**fields))
    model.init_weights(0)
    state = run_state(model, TrainConfig(precision="fp32"), device=torch.device("cpu"))
    state.gradient.normal_()
    state.apply(norm=1.0, learning_rate=1e-3)
    return state


def save(state: TrainState, folder: Path) -> tuple[float, float]:
    """Returns processor and wall seconds of two saves into a run's folder, by their sum."""
    run = open_storage(str(folder / "runs/r"))
    fence = Fence(run, launcher=0)
    ledger, checkpoints = LedgerWriter(run, fence), RunCheckpoints(run, fence)
    publisher = Publisher(checkpoints, ledger, CheckpointConfig(), pinned=set, val_losses={})
    writer = CheckpointWriter(publisher, train_bpe(["to be or not to be"], vocab_size=257))
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    for step in (1, 2):
        metadata = Metadata(
            run_id="r",
            step=step,
            tokens_seen=step,
            data_manifest_hash=None,
            code_version="c",
            generation=fence.generation,
        )
        writer.save(metadata, state, must=True)
        while writer._pending or writer._begun or not writer._free:
            time.sleep(0.01)
    writer.finish()
    took = time.process_time() - start_cpu_s, time.perf_counter() - start_s
    ledger.close()
    run.write_bytes("config.yaml", to_yaml(RunConfig()).encode())
    return took


def line_us(folder: Path) -> float:
    """Returns processor microseconds of a step's line."""
    run = open_storage(str(folder / "runs/lines"))
    ledger = LedgerWriter(run)
    seconds = dict.fromkeys(("load", "forward", "backward", "sync", "update"), 0.1)
    start_s = time.process_time()
    for step in range(NUM_LINES):
        ledger.step(step=step, loss=2.5, grad_norm=1.0, lr=1e-3, seconds=seconds, wall_s=1.0)
    taken_s = time.process_time() - start_s
    ledger.close()
    return taken_s / NUM_LINES * 1e6


def hashing_s(folder: Path) -> float:
    """Returns wall seconds in which all files of the checkpoints are hashed once, one by one."""
    start_s = time.perf_counter()
    for path in sorted((folder / "runs/r/checkpoints").rglob("*.safetensors")):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
    return time.perf_counter() - start_s


def verifying_s(folder: Path) -> float:
    start_s = time.perf_counter()
    verify(open_storage(str(folder / "runs/r")))
    return time.perf_counter() - start_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=None, help="where the run is written")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    state = made_state()
    num_bytes = sum(flat.nbytes for flat in state.parts.values())
    print(f"a state of {num_bytes / 1e9:.2f} GB, {asked.rounds} rounds, medians")
    rows: dict[str, list[float]] = {}
    for _ in range(asked.rounds):
        folder = Path(tempfile.mkdtemp(prefix="raymill-bench-proof-", dir=asked.folder))
        try:
            cpu_s, wall_s = save(state, folder)
            hashing, verifying = hashing_s(folder), verifying_s(folder)
            for name, value in {
                "a line, microseconds of a processor": line_us(folder),
                "a save, seconds of a processor": cpu_s / 2,
                "a save, seconds": wall_s / 2,
                "hashing two checkpoints once, seconds": hashing,
                "verifying them, seconds": verifying,
                "verifying over hashing": verifying / hashing,
            }.items():
                rows.setdefault(name, []).append(value)
        finally:
            shutil.rmtree(folder)
    for name, values in rows.items():
        spread = f"{min(values):.3f} to {max(values):.3f}"
        print(f"{name:40} {statistics.median(values):9.3f}   ({spread})")


if __name__ == "__main__":
    main()
