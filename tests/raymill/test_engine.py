"""The exact engine as a library: one hash for any number of workers, and refusals by name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from raymill import AdamW, ExactEngine
from raymill.errors import UserError
from tests.jobs.engine_worlds import ADAPTERS, CASES, NUM_STEPS, base, new_engine, take_step
from tests.json_program import last_line_of

RULE = AdamW(0.9, 0.95, 0.1)
MAX_WORLD_SIZE = 4


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return results_of(tmp_path_factory.mktemp("worlds"))


def results_of(folder: Path, *words: str) -> dict[str, Any]:
    program = ("-m", "tests.jobs.engine_worlds", str(MAX_WORLD_SIZE))
    return last_line_of(*program, str(folder), *words, seconds=120)


@pytest.mark.parametrize("case", CASES)
def test_every_world_ends_with_the_same_bits_and_losses(worlds: dict[str, Any], case: str) -> None:
    results = {name: found for name, found in worlds[case].items() if name != "ddp"}
    assert [*results] == ["1", "2", "3", "4", "resized"]
    for name, found in results.items():
        assert found == results["1"], name
    losses = results["1"]["losses"]
    assert len(losses) == NUM_STEPS == len(set(losses))


@pytest.mark.slow
def test_adapters_of_a_frozen_model_have_one_hash_too(tmp_path: Path) -> None:
    results = results_of(tmp_path, "adapters")
    hashes = {
        found["hash"] for case in results.values() for name, found in case.items() if name != "ddp"
    }
    assert len(hashes) == 1
    assert len(results) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("deterministic")
def test_peft_stores_and_reads_a_trained_adapter(tmp_path: Path) -> None:
    from peft import PeftModel

    engine = new_engine(ADAPTERS["adapter"])
    for _ in range(NUM_STEPS):
        take_step(engine)
    trained = engine.model
    trained.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(0)
    read = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    ids = torch.arange(10)[None]
    assert torch.equal(read.eval()(ids).logits, trained.eval()(ids).logits)
    engine.save(tmp_path)
    [file] = tmp_path.glob("*.safetensors")
    assert file.stat().st_size < 40_000, "the state is that of the adapter alone"


def test_sharding_changes_no_bit(worlds: dict[str, Any]) -> None:
    assert worlds["convolutions"]["1"] == worlds["convolutions, sharded"]["4"]


def test_stock_data_parallel_training_ends_with_others_in_each_world(
    worlds: dict[str, Any],
) -> None:
    hashes = worlds["convolutions"]["ddp"].values()
    assert len(set(hashes)) == MAX_WORLD_SIZE


@pytest.fixture
def deterministic() -> Iterator[None]:
    """The engine turns it on for its process."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def engine_of(
    module: nn.Module, loss: Any = None, *, num_lanes: int = 3, **settings: Any
) -> ExactEngine[Any]:
    torch.manual_seed(0)
    return ExactEngine(module, loss or squares, num_lanes=num_lanes, rule=RULE, **settings)


def squares(module: nn.Module, batch: Tensor) -> Tensor:
    return mse_loss(module(batch), batch)


def batch_of(lane: int) -> Tensor:
    return torch.rand(4, 6, generator=torch.Generator().manual_seed(lane))


def refused(module: nn.Module, loss: Any = None, batches: Any = batch_of, **settings: Any) -> str:
    with pytest.raises(UserError) as refusal:
        engine_of(module, loss, **settings).step(batches, learning_rate=1e-2)
    return str(refusal.value)


@pytest.mark.usefixtures("deterministic")
def test_a_step_equals_torchs_own_over_the_mean_of_all_lanes() -> None:
    torch.manual_seed(3)
    module = nn.Linear(6, 6)
    expected = nn.Linear(6, 6)
    expected.load_state_dict(module.state_dict())
    engine = engine_of(module, grad_clip=0.1)
    # Biases have no decay
    groups = [
        {"params": [expected.weight], "weight_decay": 0.1},
        {"params": [expected.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for _ in range(3):
        optimizer.zero_grad()
        loss = torch.stack([squares(expected, batch_of(lane)) for lane in range(3)]).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.1)
        optimizer.step()
        figures = engine.step(batch_of, learning_rate=1e-2)
        assert figures.loss == pytest.approx(loss.item(), rel=1e-6)
        assert figures.gradient_norm == pytest.approx(float(norm), rel=1e-5)
    for ours, theirs in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert engine.num_steps == 3
    assert engine.lanes == [0, 1, 2]
    assert sum(figures.time.seconds.values()) == pytest.approx(figures.time.wall_s, rel=1e-6)
    engine.close()


@pytest.mark.usefixtures("deterministic")
def test_frozen_parameters_are_no_part_of_the_state(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    module[0].requires_grad_(False)
    frozen = module[0].weight.clone()
    engine = engine_of(module)
    engine.step(batch_of, learning_rate=1e-2)
    engine.save(tmp_path)
    assert torch.equal(module[0].weight, frozen)
    [file] = tmp_path.glob("*.safetensors")
    assert b"1.weight" in file.read_bytes() and b'"0.weight' not in file.read_bytes()
    engine.close()


class _Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, batch: Tensor) -> Tensor:
        return self.used(batch)


@pytest.mark.usefixtures("deterministic")
def test_what_cannot_be_exact_is_refused_by_name() -> None:
    linear = nn.Linear(6, 6)
    assert "unused.weight no gradient" in refused(_Unused())
    averaged = nn.Sequential(linear, nn.BatchNorm1d(6))
    assert "changes the buffer 1.running_mean" in refused(averaged)
    averaged[1].eval()
    engine_of(averaged).step(batch_of, learning_rate=1e-2)
    own = torch.Generator().manual_seed(1)
    noisy = lambda module, batch: squares(module, batch + torch.rand(4, 6, generator=own))  # noqa: E731
    assert "lane 0 gave weight another gradient" in refused(nn.Linear(6, 6), noisy)
    many = lambda module, batch: module(batch).sum(dim=1)  # noqa: E731
    assert "has the shape (4,), expected a scalar" in refused(nn.Linear(6, 6), many)
    assert "weight is torch.bfloat16" in refused(nn.Linear(6, 6).bfloat16())
    assert "on the device meta" in refused(nn.Linear(6, 6, device="meta"))
    assert "nothing to train" in refused(nn.Linear(6, 6).requires_grad_(False))
    assert 'use "gradients"' in refused(nn.Linear(6, 6), shard="parameters")


@pytest.mark.usefixtures("deterministic")
def test_reentrant_checkpointing_is_refused() -> None:
    def in_parts(module: nn.Module, batch: Tensor) -> Tensor:
        inputs = batch.requires_grad_()
        halves = [
            torch.utils.checkpoint.checkpoint(module, half, use_reentrant=True)
            for half in inputs.chunk(2)
        ]
        return torch.cat(halves).square().mean()

    assert "weight its gradient in 2 parts" in refused(nn.Linear(6, 6), in_parts)


@pytest.mark.usefixtures("deterministic")
def test_a_state_of_other_lanes_is_refused(tmp_path: Path) -> None:
    engine_of(nn.Linear(6, 6)).save(tmp_path)
    with pytest.raises(UserError, match="was trained with num_lanes 3, and this engine has 4"):
        engine_of(nn.Linear(6, 6), num_lanes=4).load(tmp_path)
    [file] = tmp_path.glob("*.safetensors")
    file.unlink()
    with pytest.raises(UserError, match=f"has no {file.name}, one of the 1 files"):
        engine_of(nn.Linear(6, 6)).load(tmp_path)
    with pytest.raises(UserError, match="is no folder of"):
        engine_of(nn.Linear(6, 6)).load(tmp_path / "elsewhere")


@pytest.mark.usefixtures("deterministic")
def test_a_wrapped_module_is_refused(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        assert "pass the module itself" in refused(DistributedDataParallel(nn.Linear(6, 6)))
    finally:
        torch.distributed.destroy_process_group()
