"""Saving beside the training: it copies and goes on; the newest wins; outages are told of once and
end nothing."""

import logging
import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cluster.settings.run import CheckpointConfig
from cluster.settings.train import TrainConfig
from cluster.storage.lease import LeaseLostError
from cluster.storage.uris import Storage, open_storage
from jobs.exact.run_state import run_state
from jobs.run.checkpoints import RunCheckpoints, checkpoint_name, step_of
from jobs.run.ledger import Ledger, LedgerWriter
from jobs.run.writer_generation import Fence
from jobs.saving.checkpoint_writer import CheckpointWriter
from jobs.saving.publisher import Publisher
from model.config import GPTConfig, preset_fields
from model.files.checkpoint import load_model
from model.files.checkpoint_folder import verify_checkpoint
from model.gpt import GPT
from model.text.tokenizer import train_bpe
from raymill.files.safetensors_file import parameter_hash
from tests.checkpoints import metadata_of
from tests.cluster.fault_proxy import running_proxy
from tests.jobs.train_states import moments as moments_of
from tests.time_limits import limit_s
from tests.waiting import wait_until

TOKENIZER = train_bpe(["to be or not to be"], vocab_size=257)


class Saving:
    """One writer of a run, and a state that each step changes."""

    def __init__(
        self, run: Storage, keep: CheckpointConfig | None = None, *, pinned: set[str] = frozenset()
    ) -> None:  # type: ignore[assignment]
        model = GPT(
            GPTConfig(
                **preset_fields(
                    {"preset": "tiny", "n_layer": 1, "vocab_size": TOKENIZER.vocab_size}
                )
            )
        )
        model.init_weights(0)
        self.run = run
        self.state = run_state(model, TrainConfig(precision="fp32"), device=torch.device("cpu"))
        self.fence = Fence(run, launcher=0)
        self.ledger = LedgerWriter(run, self.fence)
        self.checkpoints = RunCheckpoints(run, self.fence)
        keep = keep or CheckpointConfig()
        publisher = Publisher(
            self.checkpoints, self.ledger, keep, pinned=lambda: pinned, val_losses={}
        )
        self.writer = CheckpointWriter(publisher, TOKENIZER)

    def step(self, step: int, *, val_loss: float | None = None) -> str:
        """Takes a step and saves; gives the hash of the weights at that moment."""
        self.state.gradient.normal_()
        self.state.apply(norm=1.0, learning_rate=1e-2)
        self.ledger.step(step=step, loss=1.0)
        metadata = metadata_of(step, generation=self.fence.generation, val_loss=val_loss)
        self.writer.save(metadata, self.state, must=False)
        return parameter_hash(self.state.model.state_dict())

    def finish(self) -> Ledger:
        self.writer.finish()
        self.ledger.close()
        return Ledger.read(self.run)

    def wait_for(self, step: int) -> None:
        wait_until(lambda: any(step_of(name) == step for name in self.checkpoints.names))


@pytest.fixture(params=["local", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # the node's spool
    if request.param == "local":
        return open_storage(str(tmp_path / "runs/r"))
    return open_storage(f"s3://{request.getfixturevalue('s3_bucket')}/runs/r")


def test_the_copy_of_its_moment_is_stored_while_the_state_changes(
    run: Storage, tmp_path: Path
) -> None:
    saving = Saving(run)
    hashes, moments = {}, {}
    for step in (1, 2, 3):
        hashes[step] = saving.step(step)
        moments[step] = {name: tensor.clone() for name, tensor in moments_of(saving.state).items()}
        saving.state.values.zero_()  # the next step, as early as it could be
        for flat in saving.state.vectors.values():
            flat.fill_(step)
        saving.wait_for(step)
    ledger = saving.finish()
    assert [line["step"] for line in ledger.events("checkpoint")] == [1, 2, 3]
    for line in ledger.events("checkpoint"):
        step = line["step"]
        folder = saving.checkpoints.fetch(checkpoint_name(step, 1), tmp_path / "scratch")
        assert verify_checkpoint(folder) == []
        assert (
            line["parameter_hash"]
            == hashes[step]
            == parameter_hash(load_model(folder).state_dict())
        )
        saved = load_file(folder / "train_state.safetensors")
        assert saved.keys() == moments[step].keys()
        assert all(torch.equal(saved[name], tensor) for name, tensor in moments[step].items())
        assert line["exposed_seconds"] <= line["seconds"]
    assert list(saving.checkpoints.spool.iterdir()) == []


def test_the_newest_takes_the_place_of_what_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving, go = Saving(open_storage(str(tmp_path))), threading.Event()
    publish = saving.checkpoints.publish

    def held_up(folder: Path) -> None:
        go.wait()
        publish(folder)

    monkeypatch.setattr(saving.checkpoints, "publish", held_up)
    saving.step(1)
    wait_until(lambda: any(saving.checkpoints.spool.glob("step-*")))
    hashes = {step: saving.step(step) for step in range(2, 30)}
    go.set()
    ledger = saving.finish()
    assert [line["step"] for line in ledger.events("checkpoint")] == [1, 29]
    assert ledger.events("checkpoint")[-1]["parameter_hash"] == hashes[29]


def test_the_best_and_the_pinned_are_kept_and_two_at_least(tmp_path: Path) -> None:
    keep = CheckpointConfig(num_to_keep=1, keep_best=1, keep_every_steps=4)
    saving = Saving(open_storage(str(tmp_path)), keep, pinned={checkpoint_name(3, 1)})
    for step in range(1, 10):
        saving.step(step, val_loss={2: 0.5, 6: 0.7}.get(step, 1.0))
        saving.wait_for(step)
    saving.finish()
    assert [step_of(name) for name in saving.checkpoints.names] == [2, 3, 4, 8, 9]


def test_weights_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    saving = Saving(open_storage(str(tmp_path)))
    saving.step(1)
    saving.wait_for(1)
    saving.state.values[5] = float("nan")
    saving.step(2)
    wait_until(lambda: bool(Ledger.read(saving.run).events("checkpoint_refused")))
    saving.state.values.nan_to_num_()
    saving.state.vectors["exp_avg"][7] = float("inf")
    saving.step(3)
    ledger = saving.finish()
    assert [step_of(name) for name in saving.checkpoints.names] == [1]
    refused = ledger.events("checkpoint_refused")
    assert [line["step"] for line in refused] == [2, 3]
    assert "hold NaN or infinity" in refused[0]["reason"]


def test_a_stale_writer_publishes_nothing_and_is_told(run: Storage) -> None:
    """It was stopped between its copy and its publication, and goes on once its successor is at
    work."""
    saving = Saving(run)
    saving.step(1)
    saving.wait_for(1)
    saving.ledger.mirror()
    publish, go = saving.checkpoints.publish, threading.Event()

    def stopped(folder: Path) -> None:
        go.wait()
        publish(folder)

    saving.checkpoints.publish = stopped  # type: ignore[method-assign]
    saving.step(2)
    wait_until(lambda: any(saving.checkpoints.spool.glob("step-*")))
    successor = Saving(run)
    go.set()
    with pytest.raises(LeaseLostError, match="replaced by writer 2"):
        saving.writer.finish()
    with pytest.raises(LeaseLostError):
        saving.checkpoints.quarantine(checkpoint_name(1, 1), ["said the stale one"])
    with pytest.raises(LeaseLostError):
        saving.step(3)
    assert saving.checkpoints.names == [checkpoint_name(1, 1)]
    successor.step(2)
    ledger = successor.finish()
    assert successor.checkpoints.names == [checkpoint_name(1, 1), checkpoint_name(2, 2)]
    assert [line["generation"] for line in ledger.events("checkpoint")] == [1, 2]


@pytest.mark.more
def test_a_store_that_is_down_is_told_of_once_and_has_the_newest_soon_after(
    s3_bucket: str,
    s3_server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with running_proxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        saving = Saving(open_storage(f"s3://{s3_bucket}/runs/r"))
        saving.step(1)
        saving.wait_for(1)
        saving.ledger.mirror()
        proxy.down = True
        slowest_s, spool = 0.0, saving.checkpoints.spool
        with caplog.at_level(logging.WARNING):
            for step in range(2, 60):
                start_s = time.monotonic()
                saving.step(step)
                slowest_s = max(slowest_s, time.monotonic() - start_s)
                assert len(list(spool.glob("step-*"))) <= 2
                time.sleep(0.05)
            wait_until(lambda: [step_of(path.name) for path in spool.glob("step-*")] == [59])
            proxy.down = False
            back_s = wait_until(lambda: step_of(saving.checkpoints.names[-1]) == 59)
        ledger = saving.finish()
        names = saving.checkpoints.names
    print(f"slowest step of an outage {slowest_s:.4f} s, newest checkpoint {back_s:.2f} s after it")
    assert slowest_s < limit_s(1)
    assert back_s < limit_s(30)
    assert [step_of(name) for name in names] == [1, 59]
    outages = [
        line["event"]
        for line in ledger.events("storage_down", "storage_back")
        if line["what"] == "checkpoints"
    ]
    assert outages == ["storage_down", "storage_back"]
    assert caplog.text.count("checkpoints: the storage is down") == 1
    assert [line["step"] for line in ledger.steps] == list(range(1, 60))


def test_what_an_outage_left_in_the_spool_is_found_by_the_next_attempt(
    s3_bucket: str, s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run = open_storage(f"s3://{s3_bucket}/runs/r")
    with running_proxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        killed = Saving(run)
        proxy.down = True
        expected = killed.step(7)
        wait_until(lambda: any(killed.checkpoints.spool.glob("step-*")))
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    killed.checkpoints.publish = lambda folder: threading.Event().wait()  # type: ignore[method-assign]
    following = Saving(run)
    unsent = Ledger.parse(b"".join(following.ledger.blocks(start=0)), "the spool")
    assert [line["step"] for line in unsent.steps] == [7], "lines that never reached the store"
    following.checkpoints.recover()
    folder = following.checkpoints.find(tmp_path / "scratch")[0]
    assert folder is not None
    assert (folder.name, parameter_hash(load_model(folder).state_dict())) == (
        checkpoint_name(7, 1),
        expected,
    )
    assert list(following.checkpoints.spool.glob("step-*")) == []
    following.finish()


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A tmpfs of 3 MB where this process may mount one, else a limit on the size of its files."""
    folder.mkdir()
    if os.system(f"mount -t tmpfs -o size=3m none {folder} 2>/dev/null") == 0:
        try:
            yield
        finally:
            os.system(f"umount -l {folder}")
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.chaos
def test_a_full_disk_costs_checkpoints_and_nothing_else(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk"):
        saving = Saving(open_storage(str(tmp_path / "disk")))
        saving.step(1)
        saving.wait_for(1)
        filler = tmp_path / "disk" / "filler"
        with filler.open("wb", buffering=0) as file:
            while True:
                try:
                    file.write(bytes(4096))
                except OSError:
                    break
        for step in range(2, 40):
            saving.step(step)
            time.sleep(0.01)
        assert saving.checkpoints.names == [checkpoint_name(1, 1)], "nothing half"
        filler.unlink()
        saving.wait_for(39)
        ledger, names = saving.finish(), saving.checkpoints.names
        for name in names:
            assert verify_checkpoint(saving.checkpoints.fetch(name, tmp_path)) == []
    assert step_of(names[-1]) == 39
    assert [line["step"] for line in ledger.steps] == list(range(1, 40)), "lines wait for the space"
    down = [line for line in ledger.events("storage_down") if line["what"] == "checkpoints"]
    assert len(down) == 1
    assert "No space left" in down[0]["reason"] or "too large" in down[0]["reason"]


@pytest.mark.chaos
@pytest.mark.skipif(os.getuid() != 0, reason="mounts")
def test_a_folder_that_is_read_only_for_a_while_is_waited_for(tmp_path: Path) -> None:
    saving, folder = Saving(open_storage(str(tmp_path))), tmp_path / "checkpoints"
    saving.step(1)
    saving.wait_for(1)
    if os.system(f"mount --bind {folder} {folder} 2>/dev/null"):
        pytest.skip("mount is not allowed here")
    try:
        wait_until(lambda: os.system(f"mount -o remount,ro,bind {folder} 2>/dev/null") == 0)
        for step in range(2, 6):
            saving.step(step)
        wait_until(lambda: bool(Ledger.read(saving.run).events("storage_down")))
        os.system(f"mount -o remount,rw,bind {folder}")
        saving.wait_for(5)
    finally:
        os.system(f"umount -l {folder}")
    ledger = saving.finish()
    assert [line["event"] for line in ledger.events("storage_down", "storage_back")] == [
        "storage_down",
        "storage_back",
    ]
    assert "Read-only file system" in ledger.events("storage_down")[0]["reason"]
    assert [line["step"] for line in ledger.steps] == [1, 2, 3, 4, 5]


def test_an_error_that_no_storage_caused_reaches_the_training(tmp_path: Path) -> None:
    saving = Saving(open_storage(str(tmp_path)))
    saving.checkpoints.publish = lambda folder: 1 // 0  # type: ignore[method-assign]
    saving.step(1)
    with pytest.raises(ZeroDivisionError):
        saving.writer.finish()
