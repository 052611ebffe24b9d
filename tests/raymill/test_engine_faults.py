"""The exact engine refuses what shows only in a later step with one sentence on all workers, and files
that are not the ones it has saved."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from raymill import AdamW, ExactEngine
from raymill.errors import UserError
from raymill.state_files import FACTS, write_beside
from tests.jobs.engine_faults import SHARDS
from tests.json_program import last_line_of

Outcomes = dict[str, dict[str, list[dict[str, Any]]]]


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """The engine turns it on for its process."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(
    scope="module",
    params=["-q", pytest.param("-O", marks=pytest.mark.more)],
    ids=["assertions", "without assertions"],
)
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Returns how the workers of a world ended, by fault and way to shard: also as `python -O` leaves
    assertions out."""
    folder = tmp_path_factory.mktemp("world")
    return last_line_of(request.param, "-m", "tests.jobs.engine_faults", "2", str(folder))


@pytest.mark.more
@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize(
    ("fault", "beginning"),
    [
        ("missing", "step 3 on worker 1: the loss of lane 3 gives expert.weight no gradient."),
        (
            "in parts",
            "step 3 on worker 1: the loss of lane 3 gives expert.weight its gradient in 2",
        ),
        ("rates", "step 3: worker 1 has the learning rate 0.02, and worker 0 has 0.01: nothing"),
        ("nan", "step 3: the loss of lane 3 is nan, and nothing was applied."),
    ],
)
def test_a_fault_of_a_later_step__ends_all_workers_with_one_sentence_and_the_weights_before_it(
    fault: str, beginning: str, shard: str, outcomes: Outcomes
) -> None:
    found = outcomes[fault][shard]
    assert len(found) == 2
    [error] = {outcome["error"] for outcome in found}
    assert error.startswith(beginning)
    assert {outcome["num_steps"] for outcome in found} == {2}
    [digest] = {digest for outcome in found for digest in outcome["hashes"]}
    assert digest != outcomes["none"][shard][0]["hashes"][1]


def test_without_a_fault__all_steps_are_taken_with_the_same_bits(outcomes: Outcomes) -> None:
    found = [outcome for of_shard in outcomes["none"].values() for outcome in of_shard]
    assert {(outcome["error"], outcome["num_steps"]) for outcome in found} == {("", 4)}
    assert len({outcome["hashes"][1] for outcome in found}) == 1


RULE = AdamW(0.9, 0.95, 0.1)


def squares(module: nn.Module, batch: Tensor) -> Tensor:
    return mse_loss(module(batch), batch)


def batch_of(lane: int) -> Tensor:
    return torch.rand(4, 6, generator=torch.Generator().manual_seed(lane))


def engine_of(module: nn.Module, loss: Any = squares, **settings: Any) -> ExactEngine[Any]:
    return ExactEngine(module, loss, num_lanes=3, rule=RULE, **settings)


def linear(**settings: Any) -> ExactEngine[Any]:
    torch.manual_seed(0)
    return engine_of(nn.Linear(6, 6), **settings)


@pytest.mark.parametrize("factor", [torch.nan, torch.inf])
def test_a_step__that_is_not_finite__leaves_the_state_unless_it_may_be(factor: float) -> None:
    wrong = lambda module, batch: squares(module, batch) * factor  # noqa: E731
    engine = linear(loss=wrong)
    before = engine.weights_hash()
    with pytest.raises(UserError, match=r"step 1: the loss of lane 0 is (nan|inf), and nothing"):
        engine.step(batch_of, learning_rate=1e-2)
    assert (engine.num_steps, engine.weights_hash()) == (0, before)
    engine = linear(loss=wrong, may_be_not_finite=True)
    engine.step(batch_of, learning_rate=1e-2)
    assert engine.num_steps == 1


def test_a_gradient__that_is_not_finite_though_the_loss_is__is_refused() -> None:
    """The root of zero has no slope."""
    engine = linear(loss=lambda module, batch: (module(batch) * 0).square().sum().sqrt())
    with pytest.raises(UserError, match="step 1: the gradient has the norm nan"):
        engine.step(batch_of, learning_rate=1e-2)


def test_a_step__after_one_that_was_refused__has_the_bits_of_one_without_it() -> None:
    clean, engine = linear(), linear()
    with pytest.raises(UserError, match="is nan"):
        engine.step(lambda lane: batch_of(lane) * torch.nan, learning_rate=1e-2)
    for one in (clean, engine):
        one.step(batch_of, learning_rate=1e-2)
    assert clean.weights_hash() == engine.weights_hash()


def test_a_sparse_gradient__is_refused_by_name() -> None:
    module = nn.Sequential(nn.Embedding(9, 6, sparse=True), nn.Linear(6, 6))
    engine = engine_of(module, lambda module, batch: module(batch).square().mean())
    with pytest.raises(UserError, match=r"the gradient of 0\.weight is sparse.*sparse=True"):
        engine.step(lambda lane: torch.arange(5), learning_rate=1e-2)


class _Averaged(nn.Module):
    """Moves a buffer in its later calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.num_calls = nn.Linear(6, 6), 0
        self.register_buffer("mean", torch.ones(()))

    def forward(self, batch: Tensor) -> Tensor:
        self.num_calls += 1
        if self.num_calls > 8:
            self.mean.mul_(0.99)
        return self.inner(batch) * self.mean


def test_a_buffer__that_changes_later__is_refused_by_name_before_anything_is_saved(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    engine = engine_of(_Averaged())
    engine.save(tmp_path)
    engine.step(batch_of, learning_rate=1e-2)
    engine.save(tmp_path)
    content = (tmp_path / FACTS).read_bytes()
    engine.step(batch_of, learning_rate=1e-2)
    with pytest.raises(UserError, match="step 2: the buffer mean has changed since the first step"):
        engine.save(tmp_path)
    assert (tmp_path / FACTS).read_bytes() == content


def test_a_state__of_another_grad_clip__is_refused(tmp_path: Path) -> None:
    linear(grad_clip=0.1).save(tmp_path)
    with pytest.raises(
        UserError, match=r"was trained with grad_clip 0\.1, and this engine has 0\.0: with"
    ):
        linear().load(tmp_path)
    linear(grad_clip=0.1).load(tmp_path)


def flipped(content: bytes) -> bytes:
    return content[:-40] + bytes([content[-40] ^ 0x40]) + content[-39:]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (flipped, "it is damaged, or of another save"),
        (lambda content: content[:-40], "it is damaged, or of another save"),
        (lambda content: b"", "it is damaged, or of another save"),
    ],
    ids=["flipped", "cut", "empty"],
)
def test_a_file__that_is_not_what_was_saved__is_refused(
    damage: Callable[[bytes], bytes], problem: str, tmp_path: Path
) -> None:
    linear().save(tmp_path)
    [file] = tmp_path.glob("*.safetensors")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=problem) as refusal:
        linear().load(tmp_path)
    assert str(file) in str(refusal.value)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda content: content[:30], "exact.json is damaged"),
        (lambda content: b"\xff" + content, "exact.json is damaged"),
        (lambda content: b"[]", "exact.json is damaged"),
        (lambda content: content.replace(b"exact-00000", b"../exact-00000"), "does not list"),
        (lambda content: content.replace(b'"files"', b'"num_files"'), "does not list the files"),
        (lambda content: content.replace(b'"grad_clip"', b'"clip"'), "has no grad_clip: another"),
    ],
    ids=["cut", "no text", "no object", "elsewhere", "without files", "of an earlier version"],
)
def test_facts__that_are_not_what_was_saved__are_refused(
    damage: Callable[[bytes], bytes], problem: str, tmp_path: Path
) -> None:
    linear().save(tmp_path)
    facts = tmp_path / FACTS
    facts.write_bytes(damage(facts.read_bytes()))
    with pytest.raises(UserError, match=problem):
        linear().load(tmp_path)


def test_a_file__of_which_a_part_was_written__does_not_have_its_name(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"half"
        raise OSError("no space left")

    path = tmp_path / "state"
    path.write_bytes(b"whole")
    with pytest.raises(OSError, match="no space"):
        write_beside(path, pieces())
    assert path.read_bytes() == b"whole"


def test_a_save__that_broke_off_over_an_earlier_one__is_refused(tmp_path: Path) -> None:
    engine = linear()
    engine.step(batch_of, learning_rate=1e-2)
    engine.save(tmp_path)
    [file] = tmp_path.glob("*.safetensors")
    earlier = file.read_bytes()
    engine.step(batch_of, learning_rate=1e-2)
    engine.save(tmp_path)
    file.write_bytes(earlier)
    with pytest.raises(UserError, match="of another save"):
        linear().load(tmp_path)
