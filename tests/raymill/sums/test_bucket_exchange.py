"""Exact training over real gloo processes: one parameter hash and one loss column for any number of
them."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from cluster.settings.plan import PlanConfig
from jobs.exact.compute import autocast, micro_batch, num_counted
from jobs.exact.run_values import run_sharding
from jobs.plan.exchange import Traffic, between_groups, exchange
from jobs.plan.memory import layout_of
from raymill.dropout import dropout_seed
from raymill.state.doubling import gather_messages, teams_to_gather
from raymill.sums.exact_reduce import subtrees_of_ranks, tree_sum
from raymill.sums.step_totals import block_square_sums, norm_of
from raymill.sums.teams import team_plan
from raymill.workers.worker_group import WorkerGroup
from tests.jobs.reference_reduce import reduce_worlds
from tests.jobs.train_worlds import (
    CASES,
    CPU,
    EOT,
    MORE_CASES,
    NUM_STEPS,
    OTHER_CASES,
    SEQ_LEN,
    SUITES,
    Case,
    MadeRows,
    Trainer,
    whole_hash,
)
from tests.jobs.world_runs import Outcome, run_worlds

MAX_WORLD_SIZE = 5
EXACT = [case for case in CASES + OTHER_CASES + MORE_CASES if case.exact]
EVEN = [case for case in EXACT if not case.one_block and case.optimizer == "adamw"]
"""Cases whose workers have parts of about the same size."""
WHOLE = [case for case in EVEN if case.shard in ("none", "optimizer")]
"""Those whose workers sum whole gradients."""


MARKS = {
    "short": [],
    "others": [pytest.mark.more],
    "more": [pytest.mark.slow],
}


def suite_of(case: Case) -> str:
    return next(name for name in MARKS if case in SUITES[name])


def each(cases: Iterable[Case]) -> pytest.MarkDecorator:
    params = [pytest.param(case, marks=MARKS[suite_of(case)], id=str(case)) for case in cases]
    return pytest.mark.parametrize("case", params)


@pytest.fixture(scope="module")
def runs_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], list[Outcome]]:
    """Returns the results of real processes, in worlds of 1 to 5 and in one of changing size."""

    @functools.cache
    def outcomes(suite: str) -> list[Outcome]:
        folder = tmp_path_factory.mktemp("worlds")
        return run_worlds(folder, str(MAX_WORLD_SIZE), suite, within_s=120)

    def runs(case: Case) -> list[Outcome]:
        return [outcome for outcome in outcomes(suite_of(case)) if outcome["case"] == asdict(case)]

    return runs


@functools.cache
def reference(case: Case) -> tuple[str, list[float]]:
    """Returns the hash and losses of one process that follows the definition: each lane's gradient,
    then the tree. Its weights are fp32, which autocast rounds at each use."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trainer, config = Trainer(replace(case, exact=False), WorkerGroup(0, 1)), case.config()
    torch.use_deterministic_algorithms(True)
    state, losses, first_sample = trainer.state, [], 0
    for step in range(1, NUM_STEPS + 1):
        num_lanes = {1: 5, 2: 7, 3: 9, 4: 13}[step] if case.start_lanes else case.num_lanes
        lane_losses: dict[range, Tensor] = {}
        counts: list[int] = []

        def lane_value(
            lane: int,
            step: int = step,
            first_sample: int = first_sample,
            num_lanes: int = num_lanes,
            lane_losses: dict[range, Tensor] = lane_losses,
            counts: list[int] = counts,
        ) -> Tensor:
            state.gradient.zero_()
            of_lane = []
            for number in range(lane * case.micro_batches, (lane + 1) * case.micro_batches):
                first = first_sample + number * 2
                rows = MadeRows(chat=case.chat).samples(range(first, first + 2))
                counts.append(num_counted(rows[1]))
                batch = micro_batch(rows, config, CPU, eot_id=EOT if case.documents else None)
                torch.manual_seed(dropout_seed(config.train.seed, step=step, micro_batch=number))
                with autocast(config, CPU):
                    scale = 1.0 / (num_lanes * case.micro_batches * batch.inputs.numel())
                    loss = state.model.loss(*batch, scale=scale)
                loss.backward()
                of_lane.append(loss.detach())
            lane_losses[range(lane, lane + 1)] = functools.reduce(torch.add, of_lane)
            return state.gradient.clone()

        summed = reduce_worlds(1, num_lanes=num_lanes, lane_value=lane_value)
        # The mean is over counted tokens
        of_counted = num_lanes * case.micro_batches * 2 * SEQ_LEN / sum(counts)
        losses.append(float(tree_sum(range(num_lanes), lane_losses.get)) * of_counted)
        first_sample += num_lanes * case.micro_batches * 2
        state.gradient.copy_(summed * of_counted)
        state.apply(norm=norm_of(block_square_sums(summed)) * of_counted, learning_rate=1e-2)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    return whole_hash(state, WorkerGroup(0, 1)), losses


@pytest.mark.more
@each(EXACT)
def test_any_world_and_any_resizes_give_the_reference_bits(
    runs_of: Callable[[Case], list[Outcome]], case: Case
) -> None:
    runs = runs_of(case)
    assert {run["world"] for run in runs} == {*map(str, range(1, MAX_WORLD_SIZE + 1)), "resized"}
    expected_hash, expected_losses = reference(case.numbers)
    for run in runs:
        assert {*run["hashes"]} == {expected_hash}, run["world"]
        assert run["losses"] == expected_losses, run["world"]


@pytest.mark.parametrize("chat", [False, pytest.param(True, marks=pytest.mark.more)])
def test_stock_ddp_has_other_bits_in_each_world(
    runs_of: Callable[[Case], list[Outcome]], chat: bool
) -> None:
    """Shows that the test above can fail; the losses are the same up to rounding."""
    runs = runs_of(Case(exact=False, chat=chat))
    assert len({run["hashes"][0] for run in runs}) > 2
    for run in runs:
        assert run["losses"] == pytest.approx(reference(Case(chat=chat))[1], rel=1e-5)


@pytest.mark.more
def test_cases_differ() -> None:
    numbers = {case.numbers for case in CASES + OTHER_CASES}
    assert len({reference(case)[0] for case in numbers}) == len(numbers)


@each(WHOLE)
def test_powers_of_two_send_a_rings_bytes(
    runs_of: Callable[[Case], list[Outcome]], case: Case
) -> None:
    for run in runs_of(case):
        if run["world"] in "245":
            overhead = run["bytes_per_step"] / run["ring_bytes"] - 1
            print(f"{run['world']} ranks: {overhead:+.1%} of a ring's bytes")
            assert overhead >= 0
            assert overhead <= 0.02 or run["world"] not in "24"


@each(case for case in EVEN if case.start_lanes is None)
def test_the_planner_knows_what_is_sent(
    runs_of: Callable[[Case], list[Outcome]], case: Case
) -> None:
    config = case.config()
    layout = layout_of(config)
    for run in runs_of(case):
        if run["world"] not in "2345":
            continue
        world_size, num_lanes = int(run["world"]), case.num_lanes
        sharding = run_sharding(config.scaling, rank=0, world_size=world_size)
        group, groups = sharding.group_size, sharding.num_groups
        if group > 1 and num_lanes % world_size:
            continue  # some compute again what another one sends
        options = PlanConfig()
        busiest = exchange(
            config, layout, options, world_size=world_size, num_lanes=num_lanes, lane_s=1.0
        )
        between = between_groups(layout, sharding, options, num_lanes=num_lanes)
        subtrees = subtrees_of_ranks(num_lanes, groups)
        messages = [*team_plan([range(num_lanes)], subtrees).messages()]
        if sharding.sends_sums:
            messages += gather_messages(groups, teams_to_gather(groups))
        mean = sum(message.share for message in messages) / groups * 4 * layout.size / group
        planned = num_bytes(busiest.traffic) - num_bytes(between) + mean
        assert run["bytes_per_step"] == pytest.approx(planned, rel=0.03), run["world"]


def num_bytes(traffic: Traffic) -> float:
    return traffic.link_bytes + traffic.card_bytes
