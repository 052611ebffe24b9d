"""Stage: a checkpoint's loss, perplexity and bits per byte on held-out text, computed by several
workers.

B sequences in a batch, T tokens of each. A batch's loss does not depend on which worker computes
it, and the driver adds the batches in their order: the result is the same for any number of
workers.
"""

import math
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError

from cluster.output.progress import progress, say
from cluster.settings.data import DataConfig
from cluster.settings.parser import ConfigError
from cluster.settings.run import RunConfig, StorageConfig, seq_len
from cluster.settings.stages import EvaluateConfig
from cluster.stages.stage import stage_main
from cluster.storage.bases import find_base
from cluster.storage.registry import find_checkpoint
from cluster.storage.uris import Storage, absolute_uri, open_storage, split_uri
from jobs.exact.compute import autocast, micro_batch, num_counted
from jobs.run.find_run import division, find_tokens, last_start
from jobs.run.history import CONFIG_FILE, recorded_config
from jobs.run.ledger import Ledger
from jobs.tokens.build_store import tokenize
from jobs.tokens.division import BY_DOCUMENTS, Division, HeldOut, texts_of, token_count
from jobs.tokens.token_store import Split, TokenStoreError, read_manifest
from jobs.tokens.token_stream import TokenStream
from jobs.tokens.train_tokenizer import TOKENIZER_FILE
from model.decoder import Decoder
from model.files.checkpoint import load_decoder
from model.files.checkpoint_folder import StoredModel
from model.files.hf_config import read_shape
from model.files.stored_tokenizer import load_tokenizer
from model.hardware.processor import Device, emulates
from model.numerics import FP32
from raymill.errors import CheckpointError, UserError
from raymill.files.safetensors_file import parameter_hash

_CHECKPOINT_PLACE = re.compile(r"(?P<storage>.+)/runs/[^/]+/checkpoints/step-[^/]+")

GATE_ROWS, GATE_TOKENS = 8, 8192
"""The most rows, and the most tokens in all, that a promotion is judged by."""


@dataclass(frozen=True)
class HeldOutText:
    """A text to measure: a split of a token store, as a run divides it."""

    tokens: Storage
    split: Split
    division: Division = BY_DOCUMENTS

    @property
    def num_tokens(self) -> int:
        manifest = read_manifest(self.tokens, opens_lists=False)
        return sum(token_count(text) for text in texts_of(manifest, self.split, self.division))

    def open(self, *, seq_len: int) -> TokenStream:
        return TokenStream(self.tokens, split=self.split, seq_len=seq_len, division=self.division)


@dataclass(frozen=True)
class Rows:
    """The rows that are evaluated, from the front of each text, and their batches."""

    texts: tuple[HeldOutText, ...]
    seq_len: int
    num_rows: tuple[int, ...]  # of each text
    batch_size: int
    run: RunConfig  # as its trainer validates

    @property
    def device(self) -> Device:
        return "cuda" if self.run.scaling.use_gpu else "cpu"

    @property
    def num_tokens(self) -> int:
        return sum(self.num_rows) * self.seq_len

    @property
    def batches(self) -> list[tuple[int, range]]:
        """Each batch's text and its rows there."""
        batches = []
        for text, num_rows in enumerate(self.num_rows):
            rows, size = range(num_rows), self.batch_size
            batches += [(text, rows[start : start + size]) for start in rows[::size]]
        return batches

    def streams(self) -> list[TokenStream]:
        return [text.open(seq_len=self.seq_len) for text in self.texts]


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Returns the loss in nats per token and what follows from it. Needs Ray.

    Raises `CheckpointError` for the checkpoint, `TokenStoreError` for the text to evaluate on.
    """
    checkpoint, folder = find_checkpoint(
        config.checkpoint, config.storage.uri, signed_by=config.storage.signer
    )
    say(f"evaluating {checkpoint}")
    base = find_base(folder, config.storage.uri)
    model = load_decoder(folder, base=base, verify=False)  # `find_checkpoint` has verified it
    rows = _rows(folder, model, config.model_copy(update={"checkpoint": checkpoint}))
    numerics = rows.run.train.numerics
    if rows.device == "cpu" and emulates(numerics):
        say(
            f"this processor emulates {numerics.name}, in which the checkpoint's run computed, and is slow at it "
            f"(--precision {FP32.name} is faster, but gives another loss than the trainer's)"
        )
    start = time.perf_counter()
    losses = _batch_losses(model, rows, config)
    seconds = time.perf_counter() - start
    num_tokens = sum(count for _, count in losses)
    total = sum(loss for loss, _ in losses)
    loss = total / max(1, num_tokens)
    counts = zip(rows.streams(), rows.num_rows, strict=True)
    num_bytes = sum(
        count * rows.seq_len * stream.bytes_per_token(count) for stream, count in counts
    )
    return {
        "checkpoint": checkpoint,
        "parameter_hash": parameter_hash(dict(model.named_parameters())),
        "tokens": num_tokens,
        "bytes": round(num_bytes),
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": total / math.log(2) / num_bytes,
        "tokens_per_s": round(rows.num_tokens / seconds, 1),
    }


def perplexity(loss: float) -> float | None:
    """Returns the perplexity of a loss in nats; None where it is no number, or one beyond the range
    of a float and of JSON."""
    return math.exp(loss) if loss <= math.log(sys.float_info.max) else None


def _rows(folder: Path, model: Decoder, config: EvaluateConfig) -> Rows:
    trained: RunConfig | None = None  # the settings of the checkpoint's run, where it is known
    if metadata := StoredModel(folder).metadata:
        run = storage_of(config).child(f"runs/{metadata.run_id}")
        trained = recorded_config(run) if run.exists(CONFIG_FILE) else None
    # Positions that were never trained would spoil the loss, and in another precision it is not the
    # trainer's.
    row_tokens = config.seq_len or (seq_len(trained) if trained else model.config.n_positions)
    if row_tokens > model.config.n_positions:
        raise ConfigError(
            f"seq_len={row_tokens} exceeds the model's n_positions={model.config.n_positions}"
        )
    texts = [_documents(folder, config)] if config.data.source else validation_texts(folder, config)
    manifest = read_manifest(texts[0].tokens, opens_lists=False)
    if manifest.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {manifest.vocab_size} ids, the model only {model.config.vocab_size}: they don't match"
        )
    if (shortest := min(text.num_tokens for text in texts)) <= row_tokens:
        raise TokenStoreError(
            f"the text has {shortest} tokens, a row needs {row_tokens + 1}; add text or lower seq_len"
        )
    most_rows = max(1, config.max_tokens // row_tokens)
    num_rows = tuple(min((text.num_tokens - 1) // row_tokens, most_rows) for text in texts)
    return Rows(
        tuple(texts), row_tokens, num_rows, config.batch_size, _as_trained(trained, model, config)
    )


def _as_trained(trained: RunConfig | None, model: Decoder, config: EvaluateConfig) -> RunConfig:
    """Returns the run with the evaluation's precision, and without a GPU where this cluster has
    none."""
    if trained is None:
        plain = {"precision": FP32.name if config.precision == "auto" else config.precision}
        return RunConfig.model_validate({"model": model.config, "train": plain})
    if config.precision != "auto":
        trained = trained.model_copy(
            update={"train": trained.train.model_copy(update={"precision": config.precision})}
        )
    if trained.scaling.use_gpu and ray.cluster_resources().get("GPU", 0) < 1:
        say(
            "the checkpoint's run trained on GPUs and this cluster has none: CPUs round differently, and are slower"
        )
        trained = trained.model_copy(
            update={"scaling": trained.scaling.model_copy(update={"use_gpu": False})}
        )
    return trained


def storage_of(config: EvaluateConfig) -> Storage:
    """Returns the storage that holds the run of a checkpoint, named by its own place, or else the
    configured one, as for weights that others wrote, which may lie in a folder of a folder `runs`
    too."""
    place = _CHECKPOINT_PLACE.fullmatch(absolute_uri(config.checkpoint))
    return open_storage(place["storage"] if place else config.storage.uri)


def validation_texts(folder: Path, config: EvaluateConfig) -> list[HeldOutText]:
    """Returns what the checkpoint's run validated on, found by the identity that the checkpoint
    records: what it held out, or else all texts of `data.validation`."""
    metadata = StoredModel(folder).metadata
    if metadata is None:
        raise CheckpointError(
            f"checkpoint {folder} records no validation split; name a text with --data.source"
        )
    run = storage_of(config).child(f"runs/{metadata.run_id}")
    try:
        start = last_start(Ledger.read(run), metadata.data_identity)
        if (way := division(start)).held_out is HeldOut.NOTHING:
            return [
                HeldOutText(find_tokens(run, identity), "train")
                for identity in start["validated_on"].values()
            ]
        return [HeldOutText(find_tokens(run, metadata.data_identity), "val", way)]
    except TokenStoreError as error:
        raise TokenStoreError(
            f"{error}; or name its storage with --storage.uri, or a text with --data.source"
        ) from error


def _documents(folder: Path, config: EvaluateConfig) -> HeldOutText:
    """Makes all of `data.source` a token store, with the checkpoint's tokenizer."""
    tokenizer, storage = load_tokenizer(folder), storage_of(config)
    if tokenizer is None:
        raise CheckpointError(f"checkpoint {folder} has no tokenizer; add its tokenizer.json")
    location = str(folder)
    if not (folder / TOKENIZER_FILE).exists():
        place = storage.child(f"tokenizers/{tokenizer.hash[:12]}")
        place.write_bytes(TOKENIZER_FILE, tokenizer.to_json())
        location = place.uri
    data = DataConfig(**config.data.model_dump(), tokenizer=location, val_fraction=0.0)
    store = tokenize(
        RunConfig(data=data, storage=config.storage.model_copy(update={"uri": storage.uri}))
    )
    return HeldOutText(split_uri(store["manifest"])[0], "train")


def _batch_losses(model: Decoder, rows: Rows, config: EvaluateConfig) -> list[tuple[float, int]]:
    """Returns the summed loss of each batch and how many tokens it counts, in order. A task whose
    worker dies is run again."""
    num_batches = len(rows.batches)
    task = ray.remote(_worker_losses).options(
        num_cpus=config.threads_per_worker,
        num_gpus=int(rows.device == "cuda"),
        num_returns="streaming",
    )
    shared = ray.put(model)  # once, for all workers of a node
    # Tasks and not actors: where fewer CPUs or GPUs are free, they run one after another, with the
    # same result.
    running = [
        task.remote(
            shared, rows, range(number, num_batches, config.num_workers), config.threads_per_worker
        )
        for number in range(min(config.num_workers, num_batches))
    ]
    losses: dict[int, tuple[float, int]] = {}
    with progress("evaluating", total=num_batches, unit="batches") as advance:
        while running:
            ready: Any = ray.wait(running)[0][0]
            try:
                batch, losses[batch] = ray.get(next(ready))
                advance(1)
            except StopIteration:
                running.remove(ready)
            except RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise error.cause from error
                raise
    return [losses[batch] for batch in range(num_batches)]


def _worker_losses(
    model: Decoder, rows: Rows, batches: range, num_threads: int
) -> Iterator[tuple[int, tuple[float, int]]]:
    """Yields the number of each of the worker's batches, its summed loss and how many tokens that
    counts."""
    torch.set_num_threads(num_threads)
    device = torch.device(rows.device)
    model, streams = model.to(device), rows.streams()
    eot_id = streams[0].manifest.start_id if rows.run.train.document_mask else None
    for number in batches:
        text, indices = rows.batches[number]
        read = streams[text].rows(indices)
        batch = micro_batch(read, rows.run, device, eot_id=eot_id)
        with torch.inference_mode(), autocast(rows.run, device):
            yield number, (float(model.loss(*batch)), num_counted(read[1]))


def gate_rows(checkpoint: str, storage_uri: str) -> dict[str, Any]:
    """Returns validation rows by which a promotion is judged, as long as the model's context, or as
    the split where that is shorter; or none and the `reason`, where the checkpoint's validation
    split is unknown or not here."""
    try:
        found, folder = find_checkpoint(checkpoint, storage_uri)
        config = EvaluateConfig(checkpoint=found, storage=StorageConfig(uri=storage_uri))
        text = validation_texts(folder, config)[0]
        row_tokens = min(read_shape(folder).n_positions, GATE_TOKENS, text.num_tokens - 1)
        stream = text.open(seq_len=row_tokens)
    except UserError as error:
        return {"rows": [], "reason": str(error)}
    num_rows = stream.count_rows(at_most=min(GATE_ROWS, max(1, GATE_TOKENS // row_tokens)))
    return {"rows": stream.rows(range(num_rows))[0].tolist(), "reason": ""}


if __name__ == "__main__":
    sys.exit(stage_main(evaluate, EvaluateConfig))
