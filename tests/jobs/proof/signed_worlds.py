"""Honest, signed runs of several kinds, and what strangers and trainers may do to a copy of one."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.settings.run import RunConfig, to_yaml
from cluster.storage.registry import publish
from cluster.storage.uris import Storage, open_storage
from jobs.exact.stored_state import checksum_of
from jobs.proof.audit_run import Audit, audit
from jobs.proof.sign_checkpoint import sign_checkpoint
from jobs.proof.verify_run import verify
from jobs.run.base import recorded_base
from jobs.run.checkpoints import RunCheckpoints
from jobs.run.ledger import LEDGER, Line
from jobs.run.ledger_chain import KEY, encoded, hash_of
from jobs.run.run_plan import RunPlan
from jobs.saving.checkpoint_writer import CheckpointWriter
from jobs.saving.publisher import checkpoint_fields, published_in
from jobs.tokens.token_store import MANIFEST as STORE_MANIFEST
from jobs.training.train_loop import train
from jobs.training.warm_start import begin, like_its_source
from model.files.checkpoint_folder import MANIFEST, fingerprint, manifest_files
from model.files.state_hash import state_in
from model.signing.signature import SigningKey, TrustedSigner
from model.text.tokenizer import Tokenizer
from tests.jobs.failpoint_runs import save_and_wait
from tests.jobs.mapped_runs import mapped_plan
from tests.jobs.runs import tiny_plan
from tests.jobs.runs_in_rounds import run_in_rounds
from tests.signing_keys import made_keys

NUM_STEPS, SAVES = 12, (3, 6, 9, 12)
TRAIN: dict[str, Any] = {"eval_every_steps": 4, "sample_prompts": ["10 a"]}
CHECKPOINT: dict[str, Any] = {"save_every_steps": 3, "num_to_keep": 100}

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class World:
    """A storage with one signed run, and the trainer's keys."""

    folder: Path
    plan: RunPlan
    keys: tuple[Path, Path]

    @property
    def run(self) -> Storage:
        return self.plan.run

    @property
    def storage(self) -> Path:
        return self.folder / "storage"

    @property
    def tokens(self) -> Path:
        (store,) = (path.parent for path in self.storage.glob(f"tokens/*/{STORE_MANIFEST}"))
        return store

    @property
    def signer(self) -> TrustedSigner:
        return TrustedSigner(self.keys[1])

    def checkpoint(self, step: int) -> Path:
        (folder,) = (self.run_folder / "checkpoints").glob(f"step-{step:09d}*")
        return folder

    @property
    def run_folder(self) -> Path:
        folder = self.run.local_path("")
        assert folder is not None
        return folder

    def lines(self) -> list[Line]:
        lines = [json.loads(line) for line in self.run.read_bytes(LEDGER).splitlines()]
        return [{name: line[name] for name in line if name != KEY} for line in lines]

    def write(self, lines: list[Line], *, is_chained: bool = True) -> None:
        """Writes a ledger whose lines fit each other."""
        written: list[bytes] = []
        head: str | None = None
        for line in lines:
            written.append(encoded(line, head) if is_chained else json.dumps(line).encode())
            head = hash_of(written[-1])
        self.run.write_bytes(LEDGER, b"".join(line + b"\n" for line in written))

    def change(self, edit: Callable[[Line], object]) -> None:
        lines = self.lines()
        for line in lines:
            edit(line)
        self.write(lines)

    def append(self, *lines: Line) -> None:
        """Adds lines that fit those before."""
        content = self.run.read_bytes(LEDGER)
        head: str | None = hash_of(content.splitlines()[-1])
        for line in lines:
            written = encoded({name: line[name] for name in line if name != KEY}, head)
            content, head = content + written + b"\n", hash_of(written)
        self.run.write_bytes(LEDGER, content)

    def edit_json(self, path: Path, edit: Callable[[Any], object]) -> None:
        content = json.loads(path.read_bytes())
        edit(content)
        path.write_text(json.dumps(content))

    def edit_tensors(self, step: int, file: str, edit: Callable[[Tensors], object]) -> None:
        """Changes tensors of a checkpoint, and makes its manifest fit."""
        [path] = self.checkpoint(step).glob(file)
        with safe_open(path, "pt") as opened:
            about = opened.metadata()
        tensors = load_file(path)
        edit(tensors)
        save_file({name: tensors[name].contiguous() for name in tensors}, path, metadata=about)
        self.remanifest(step)

    def remanifest(self, step: int) -> None:
        """Makes a checkpoint's manifest, and what its metadata says of the state, fit its files."""
        folder = self.checkpoint(step)
        state = state_in(folder)

        def renew(fields: Line) -> None:
            fields["parameter_hash"] = state.hashes.parameters
            fields["state_checksum"] = checksum_of(state.words)

        self.edit_json(folder / "raymill.json", renew)
        files = {name: fingerprint(folder / name) for name in manifest_files(folder)}
        self.edit_json(folder / MANIFEST, lambda manifest: manifest.update(files=files))

    def sign(self, key: Path | None = None) -> None:
        """Signs the newest checkpoint."""
        checkpoints = RunCheckpoints(self.run)
        uri = checkpoints.uri(checkpoints.names[-1])
        sign_checkpoint(uri, SigningKey.at(key or self.keys[0]), storage_uri=str(self.storage))

    def record(self) -> None:
        """Has the trainer's ledger say of all checkpoints what lies there, and signs it."""
        checkpoints = RunCheckpoints(self.run)

        def renew(line: Line) -> None:
            if line.get("event") == "checkpoint":
                name = line["checkpoint"].rpartition("/")[2]
                folder = checkpoints.fetch(name, Path())
                if folder.exists():
                    line |= checkpoint_fields(line["checkpoint"], published_in(folder))

        self.change(renew)
        self.sign()

    def go_on_from(self, step: int) -> None:
        """Has the honest program go on from a kept checkpoint, as if a cluster had been lost behind
        it, and the trainer sign the end."""
        lines = self.lines()
        saved = [
            number
            for number, line in enumerate(lines, start=1)
            if line.get("event") == "checkpoint" and line["step"] == step
        ]
        for later in SAVES:
            if later > step:
                shutil.rmtree(self.checkpoint(later))
        self.write(lines[: saved[-1]])
        self.record()
        train_storing(self.plan)
        self.sign()

    # What finds a forgery: each returns the problems in words, "" where nothing is found

    def verified(self, signer: TrustedSigner | None) -> str:
        return "; ".join(verify(self.run, signed_by=signer)["problems"])

    def audited(self, *, num_shards: int = 0) -> str:
        """Audits every interval, as somebody who has the trainer's public key."""
        asked = Audit(100, "a nonce", 1, self.signer, num_shards=num_shards)
        return "; ".join(audit(self.run, asked, self.folder / "audit").record.problems)


def train_storing(plan: RunPlan) -> None:
    """Trains to the end, and stores each checkpoint on the way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointWriter, "save", save_and_wait)
        train(plan, rank=0, world_size=1)


def made(kind: str, folder: Path) -> World:
    """Trains and signs a run of a kind; its last checkpoint is published."""
    plan = _KINDS[kind](folder)
    world = World(folder, plan, made_keys(folder, "release"))
    world.sign()
    publish(open_storage(str(world.storage)), RunCheckpoints(plan.run).uri(_newest(plan)))
    return world


def _newest(plan: RunPlan) -> str:
    return RunCheckpoints(plan.run).names[-1]


def copied(world: World, folder: Path) -> World:
    """Returns a copy, to be spoiled."""
    folder.mkdir(exist_ok=True)
    shutil.copytree(world.storage, folder / "storage")

    def moved(uri: str) -> str:
        return uri.replace(str(world.folder), str(folder))

    for path in (folder / "storage/registry").glob("*.json"):
        path.write_text(moved(path.read_text()))
    storage = world.plan.config.storage.model_copy(update={"uri": str(folder / "storage")})
    config = world.plan.config.model_copy(update={"storage": storage})
    plan = replace(world.plan, config=config, tokens_uri=moved(world.plan.tokens_uri))
    return World(folder, replace(plan, base=recorded_base(plan.run)), world.keys)


def _mapped(folder: Path) -> RunPlan:
    """On a corpus that was tokenized for real, with a map of its documents, and a guard that
    remembers losses."""
    settings = TRAIN | {"max_tokens": 12 * 6 * 16, "spike_factor": 50.0, "batch_ramp_start": None}
    settings |= {"batch_ramp_tokens": 0}
    plan = mapped_plan(folder, train=settings)
    train_storing(plan)
    return plan


def _muon(folder: Path) -> RunPlan:
    settings = TRAIN | {"optimizer": "muon"}
    plan = tiny_plan(
        str(folder / "storage"), num_steps=NUM_STEPS, train=settings, checkpoint=CHECKPOINT
    )
    train_storing(plan)
    return plan


def _sharded(folder: Path) -> RunPlan:
    """Its state lies in the shards of two workers."""
    plan = tiny_plan(
        str(folder / "storage"),
        num_steps=NUM_STEPS,
        train=TRAIN,
        checkpoint=CHECKPOINT,
        scaling={"shard": "parameters"},
    )
    run_in_rounds(plan, folder, [])
    return plan


def _warm(folder: Path) -> RunPlan:
    return _begun_from_another(folder, {})


def _adapter(folder: Path) -> RunPlan:
    return _begun_from_another(folder, {"lora_rank": 4})


def _begun_from_another(folder: Path, settings: dict[str, Any]) -> RunPlan:
    """Begins from the weights of another run, which lies elsewhere."""
    other = tiny_plan(str(folder / "other"), num_steps=2, checkpoint=CHECKPOINT)
    train_storing(other)
    source = RunCheckpoints(other.run).uri(_newest(other))
    plan = tiny_plan(
        str(folder / "storage"),
        num_steps=NUM_STEPS,
        train=TRAIN | {"init_from": source} | settings,
        checkpoint=CHECKPOINT,
    )
    plan.run.delete("config.yaml")  # it begins here, and takes its shape from the other one
    values = plan.config.model_dump() | ({"model": {}} if settings else {})
    config = like_its_source(RunConfig.model_validate(values))
    begin(plan.run, config, Tokenizer.from_json(plan.tokenizer_json))
    plan.run.write_bytes("config.yaml", to_yaml(config).encode())
    plan = replace(plan, config=config, base=recorded_base(plan.run))
    train_storing(plan)
    return plan


_KINDS: dict[str, Callable[[Path], RunPlan]] = {
    "mapped": _mapped,
    "muon": _muon,
    "sharded": _sharded,
    "warm": _warm,
    "adapter": _adapter,
}
