"""Computes what the exchange of a step sends within a node and through network cards, and what
computing hides of it.

P values of the flat buffers, W GPUs in groups of g members, K subtree sums that a group has before
it meets the others. Where no gradients are sharded each GPU is a group, and the groups' exchange is
all there is.
"""

import math
from dataclasses import dataclass
from functools import partial

from cluster.settings.plan import PlanConfig
from cluster.settings.run import RunConfig
from jobs.exact.state.flat_layout import NUM_SENDINGS, FlatLayout
from jobs.exact.state.rules import update_rule
from jobs.exact.state.sharding import Sharding
from jobs.exact.sums.exact_reduce import subtrees_of_ranks
from jobs.plan.formulas import FP32_BYTES
from model.shapes import parameter_shapes

MESSAGE_S = 5e-6
"""Seconds that a message between two GPUs takes besides its bytes: an assumption, of the order of
InfiniBand's."""


@dataclass(frozen=True)
class Traffic:
    """What a GPU sends, of those that send most."""

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


@dataclass(frozen=True)
class Exchange:
    """The exchange of a step, and the computing beside it."""

    traffic: Traffic
    seconds: float  # hidden or not
    exposed_s: float  # not hidden by computing
    compute_s: float  # of the GPU with most lanes
    least_sequences: int  # from so many on, computing takes as long as the exchange
    counted_in: str  # the setting that has them

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
    during the pass that needs them. Groups send 4 (K + 1) (P - P/W) bytes where each is one GPU,
    which the last backward pass alone hides: to the owners of parts, and what these have summed to
    all. Updated weights go round while later ones are updated, which hides little; where the
    weights are sharded, nothing hides what is sent for the next step.
    """
    train = config.train
    sharding = Sharding.of(config.scaling, rank=0, world_size=world_size)
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
        share_s = _update_s(config, layout, options) / sharding.num_holders
        beside_update_s = share_s * (1 - 1 / NUM_SENDINGS)
    parts = [  # what is sent, the seconds that hide it, and how many times
        (sent.first_weights, forward_s, 1),
        (sent.weights, forward_s, passes - 1),
        (sent.backward, backward_s, passes - 1),
        (sent.backward + sent.sums, backward_s, 1),
        (sent.updated, beside_update_s, 1),
    ]
    seconds = [(traffic.seconds(options), hiding_s, times) for traffic, hiding_s, times in parts]
    total_s = sum(each_s * times for each_s, _, times in seconds)
    sequence_s = micro_batch_s / train.micro_batch_size * (passes if group > 1 else 1)
    return Exchange(
        traffic=sum((traffic * times for traffic, _, times in parts), Traffic()),
        seconds=total_s,
        exposed_s=sum(max(0.0, each_s - hiding_s) * times for each_s, hiding_s, times in seconds),
        compute_s=passes * micro_batch_s,
        least_sequences=math.ceil(total_s / sequence_s),
        counted_in="train.micro_batch_size"
        if group > 1
        else "train.global_batch_size for each GPU",
    )


@dataclass(frozen=True)
class _Sendings:
    """What a GPU sends, by the part of a step that may hide it."""

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
    group, num_groups, num_holders = sharding.group_size, sharding.num_groups, sharding.num_holders
    near = min(sharding.world_size, options.gpus_per_node)
    within = partial(between_all, size=group, near=min(group, near))
    between = partial(between_all, size=num_groups, near=max(1, near // group))
    subtrees = subtrees_of_ranks(num_lanes, min(num_groups, num_lanes))

    matrices = sum(map(len, layout.decoder_blocks))
    num_buckets = len(layout.buckets)
    num_calls = round(num_buckets * matrices / layout.size)
    products = within(product_bytes(config) * matrices, num_calls=num_calls)
    others = within(FP32_BYTES * (layout.size - matrices), num_calls=num_buckets - num_calls)
    whole = between(FP32_BYTES * layout.size / group, num_calls=num_buckets)
    sums = whole * (max(map(len, subtrees)) + sharding.sends_sums)
    updated = Traffic()
    if sharding.sends_values:
        num_bytes = FP32_BYTES * layout.size
        updated = between_all(
            num_bytes, size=num_holders, near=min(num_holders, near), num_calls=num_buckets
        )
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
        sums=sums,
        updated=updated,
    )


def _update_s(config: RunConfig, layout: FlatLayout, options: PlanConfig) -> float:
    """Returns the seconds in which one GPU would update all parameters: those of what the rule
    reads and writes, or of its operations."""
    rule = update_rule(config.train)
    bytes_s = rule.bytes_per_value * layout.size / options.hardware.memory_bytes_per_s
    flops = sum(rule.flops(shape) for shape in parameter_shapes(config.model).values())
    return max(bytes_s, flops / (options.mfu * options.hardware.peak_flops_per_s))


def product_bytes(config: RunConfig) -> int:
    """Returns the bytes of a weight as lanes compute with it, and of its gradient, which is a
    product."""
    return config.train.numerics.product_bytes
