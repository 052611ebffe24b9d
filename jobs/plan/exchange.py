"""Computes what the exchange of a step sends within a node and through network cards, and what
computing hides of it.

P values of the flat buffers, W GPUs in groups of g members. Where no gradients are sharded each GPU
is a group, and the groups' exchange is all there is. Its messages are those that the code counts
before it sends them (`exact/sums/teams`, `exact/state/doubling`).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

from cluster.settings.plan import PlanConfig
from cluster.settings.run import RunConfig, state_scaling
from jobs.exact.run_values import run_sharding
from jobs.plan.bucket_sizes import bucket_sizes, sizes_of_bundles
from jobs.plan.formulas import FP32_BYTES
from jobs.plan.update import update_bytes, update_flops
from raymill.state.division import seats_of
from raymill.state.doubling import gather_messages, teams_to_gather
from raymill.state.flat_layout import NUM_SENDINGS, FlatLayout
from raymill.state.messages import (
    Message,
    joined,
    numbers_of_sendings,
)
from raymill.state.sharding import Sharding
from raymill.sums.exact_reduce import subtrees_of_ranks
from raymill.sums.teams import TeamPlan, team_plan

MESSAGE_S = 5e-6
"""Seconds that a message between two GPUs takes besides its bytes: an assumption, of the order of
InfiniBand's."""


@dataclass(frozen=True)
class Traffic:
    """The bytes and messages of a GPU that sends most."""

    link_bytes: float = 0.0  # within its node
    card_bytes: float = 0.0  # through its network card
    num_messages: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        links = self.link_bytes + other.link_bytes
        cards = self.card_bytes + other.card_bytes
        return Traffic(links, cards, self.num_messages + other.num_messages)

    def __mul__(self, times: int) -> "Traffic":
        return Traffic(self.link_bytes * times, self.card_bytes * times, self.num_messages * times)

    @property
    def messages_s(self) -> float:
        return self.num_messages * MESSAGE_S

    def seconds(self, options: PlanConfig) -> float:
        """Links and network work at the same time, messages are sent one after another."""
        links_s = self.link_bytes / options.hardware.link_bytes_per_s
        return max(links_s, self.card_bytes / options.network_bytes_per_s) + self.messages_s


def between_all(num_bytes: float, *, size: int, near: int, num_calls: int) -> Traffic:
    """Returns what sends the parts of so many bytes to their owners, or from each owner to all
    others (`exact/state/peers`), among `size` ranks, `near` of them on each node."""
    on_links, on_cards = (num_bytes * count / size for count in (near - 1, size - near))
    return Traffic(on_links, on_cards, num_calls * (size - 1))


def of_busiest(
    messages: Iterable[Message],
    num_bytes: float,
    *,
    num_calls: int,
    nodes: Sequence[int],
    options: PlanConfig,
) -> Traffic:
    """Returns what the GPU sends that takes longest, if its messages, each a share of so many
    bytes, are sent in as many calls; `nodes` has the node of each sender and receiver."""
    near_shares = [0.0] * len(nodes)
    far_shares = [0.0] * len(nodes)
    counts = [0] * len(nodes)
    for sender, receiver, share in messages:
        shares = near_shares if nodes[sender] == nodes[receiver] else far_shares
        shares[sender] += share
        counts[sender] += num_calls
    senders = set(zip(near_shares, far_shares, counts, strict=True))
    traffics = [Traffic(num_bytes * near, num_bytes * far, count) for near, far, count in senders]
    return max(traffics, key=lambda traffic: traffic.seconds(options))


@dataclass(frozen=True)
class Exchange:
    """The exchange of a step, and the computing beside it."""

    traffic: Traffic
    seconds: float  # hidden or not
    exposed_s: float  # not hidden by computing
    compute_s: float  # of the GPU with most lanes
    least_sequences: int  # from so many on, computing takes as long as the exchange
    counted_in: str  # the setting that has them
    way: str  # in words: how groups finish their sums

    @property
    def step_s(self) -> float:
        return self.compute_s + self.exposed_s


def exchange(
    config: RunConfig,
    layout: FlatLayout,
    options: PlanConfig,
    *,
    world_size: int,
    num_lanes: int,
    lane_s: float,
) -> Exchange:
    """Returns the exchange of a step of so many lanes, each of which computes for `lane_s`.

    The gradients of a micro-batch go to their owners during its own backward pass, and weights come
    during the pass that needs them. Groups finish their sums during the last backward pass. Updated
    weights go round while later ones are updated, which hides little; where the weights are
    sharded, nothing hides what is sent for the next step.
    """
    train = config.train
    sharding = run_sharding(state_scaling(config), rank=0, world_size=world_size)
    group = sharding.group_size
    lanes_of_group = math.ceil(num_lanes / sharding.num_groups)
    passes = math.ceil(lanes_of_group * train.micro_batches_per_lane / group)
    sent = _sendings(config, layout, options, sharding, num_lanes=num_lanes)

    micro_batch_s = lane_s / train.micro_batches_per_lane
    forward_share = 1 / 4 if train.recompute else 1 / 3
    forward_s = forward_share * micro_batch_s
    backward_s = (1 - forward_share) * micro_batch_s
    beside_update_s = 0.0
    # All but the first stretch of an update is computed beside the sending of another one
    if sharding.sends_values:
        share_s = _update_s(config, options) / sharding.num_holders
        beside_update_s = share_s * (1 - 1 / NUM_SENDINGS)
    sums_s = sent.sums.seconds(options)
    # The last bundle is final when backward is over
    before_last_s = sums_s - sums_s / _num_bundles(layout, sharding)
    last_backward_s = min(backward_s, sent.backward.seconds(options) + before_last_s)
    parts = [  # what is sent, the seconds that hide it, and how many times
        (sent.first_weights, forward_s, 1),
        (sent.weights, forward_s, passes - 1),
        (sent.backward, backward_s, passes - 1),
        (sent.backward + sent.sums, last_backward_s, 1),
        (sent.updated, beside_update_s, 1),
    ]
    total_s = 0.0
    exposed_s = 0.0
    for traffic, hiding_s, times in parts:
        seconds = traffic.seconds(options)
        total_s += seconds * times
        exposed_s += max(0.0, seconds - hiding_s) * times
    sequence_s = micro_batch_s / train.micro_batch_size * (passes if group > 1 else 1)
    of_each_gpu = "train.global_batch_size for each GPU"
    return Exchange(
        traffic=sum((traffic * times for traffic, _, times in parts), Traffic()),
        seconds=total_s,
        exposed_s=exposed_s,
        compute_s=passes * micro_batch_s,
        least_sequences=math.ceil(total_s / sequence_s),
        counted_in="train.micro_batch_size" if group > 1 else of_each_gpu,
        way=_way_in_words(_teams(num_lanes, min(sharding.num_groups, num_lanes))),
    )


@lru_cache(maxsize=64)
def _teams(num_lanes: int, num_groups: int) -> TeamPlan:
    return team_plan([range(num_lanes)], subtrees_of_ranks(num_lanes, num_groups))


def _way_in_words(teams: TeamPlan) -> str:
    others = teams.num_peers - 1
    if not others:
        return "their group alone"
    if not teams.levels:
        return f"a message to each of {others:,} others"
    if not teams.unfinished:
        return f"halving {len(teams.levels)} times, neighbors first"
    [left_over] = teams.left_over.values()
    size = max(len(team.members) for team in left_over)
    return f"halving in teams of up to {size:,}, then a message to the owners of parts"


def _num_bundles(layout: FlatLayout, sharding: Sharding) -> int:
    sizes = sizes_of_bundles(layout, group_size=sharding.group_size, num_groups=sharding.num_groups)
    return len(sizes)


def _nodes_by_seat(num_groups: int, size: int, options: PlanConfig) -> list[int]:
    """Returns the node of the first GPU of each group, in the order in which groups halve sums."""
    nodes = [group * size // options.gpus_per_node for group in range(num_groups)]
    return [nodes[group] for group in seats_of(nodes)]


def between_groups(
    layout: FlatLayout, sharding: Sharding, options: PlanConfig, *, num_lanes: int
) -> Traffic:
    """Returns the bytes that one GPU sends to the GPUs in the same place of other groups."""
    num_groups, size = min(sharding.num_groups, num_lanes), sharding.group_size
    busiest = partial(
        of_busiest,
        num_bytes=FP32_BYTES * layout.size / size,
        num_calls=_num_bundles(layout, sharding),
        nodes=_nodes_by_seat(num_groups, size, options),
        options=options,
    )
    sums = busiest(_teams(num_lanes, num_groups).messages())
    if not sharding.sends_sums:
        return sums
    return sums + busiest(gather_messages(num_groups, teams_to_gather(num_groups)))


def between_holders(layout: FlatLayout, sharding: Sharding, options: PlanConfig) -> Traffic:
    """Returns what one GPU sends so that all holders of a copy have the updated weights."""
    num_holders = sharding.num_holders
    num_calls = 0
    for numbers in numbers_of_sendings(len(layout.buckets)):
        sizes = bucket_sizes(layout)[numbers.start : numbers.stop]
        num_calls += len(joined(sizes, num_holders))
    return of_busiest(
        gather_messages(num_holders, teams_to_gather(num_holders)),
        FP32_BYTES * layout.size,
        num_calls=num_calls,
        nodes=_nodes_by_seat(num_holders, 1, options),
        options=options,
    )


@dataclass(frozen=True)
class _Sendings:
    """The traffic of a GPU, by the part of a step that may hide it."""

    first_weights: Traffic  # during the first forward pass
    weights: Traffic  # during each later one
    backward: Traffic  # during each backward pass
    sums: Traffic  # during the last one, besides
    updated: Traffic  # during the update


def _sendings(
    config: RunConfig,
    layout: FlatLayout,
    options: PlanConfig,
    sharding: Sharding,
    *,
    num_lanes: int,
) -> _Sendings:
    group = sharding.group_size
    near = min(sharding.world_size, options.gpus_per_node)
    within = partial(between_all, size=group, near=min(group, near))

    matrices = sum(map(len, layout.decoder_blocks))
    num_buckets = len(layout.buckets)
    num_calls = round(num_buckets * matrices / layout.size)
    products = within(product_bytes(config) * matrices, num_calls=num_calls)
    others = within(FP32_BYTES * (layout.size - matrices), num_calls=num_buckets - num_calls)
    updated = Traffic()
    if sharding.sends_values:
        updated = between_holders(layout, sharding, options)
    elif sharding.divided.values:
        updated = others
    first_weights = weights = Traffic()
    if sharding.divided.values:
        # The last two blocks are there when a pass turns round
        share = max(0.0, 1 - 2 / config.model.n_layer)
        weights = within(
            product_bytes(config) * matrices * share, num_calls=round(num_calls * share)
        )
        first_weights = products
    return _Sendings(
        first_weights=first_weights,
        weights=weights,
        backward=weights + products + others,
        sums=between_groups(layout, sharding, options, num_lanes=num_lanes),
        updated=updated,
    )


def _update_s(config: RunConfig, options: PlanConfig) -> float:
    """Returns the seconds in which one GPU would update all parameters: those of what the rule
    reads and writes, or of its operations."""
    bytes_s = update_bytes(config) / options.hardware.memory_bytes_per_s
    return max(bytes_s, update_flops(config) / (options.mfu * options.hardware.peak_flops_per_s))


def product_bytes(config: RunConfig) -> int:
    """Returns the bytes of a weight as lanes compute with it, and of its gradient, which is a
    product."""
    return config.train.numerics.product_bytes
