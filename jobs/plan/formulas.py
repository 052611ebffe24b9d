"""Computes operations, time, failures and the exchange of a run. Pure functions, each with its source.

N parameters, D tokens, W workers of one GPU each, P values of the flat buffers (N, and the padding between parameters).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.settings.plan import PlanConfig
from jobs.exact.exact_reduce import subtrees_of_ranks
from jobs.exact.flat_layout import FlatLayout

DAY_S = 86_400
FP32_BYTES = 4

STATE_BYTES = 3 * FP32_BYTES
"""Bytes of a checkpoint or a snapshot for each parameter: the weight and AdamW's two moments."""

MESSAGE_S = 5e-6
"""Seconds that a message between two GPUs takes besides its bytes: an assumption, of the order of InfiniBand's."""

TEXT_BYTES_PER_TOKEN = 4.3
"""Bytes of English web text for each token of GPT-2's tokenizer, about."""


def parameter_flops(num_parameters: float, num_tokens: float, *, recompute: bool = False) -> float:
    """Returns 6 N D: a multiplication and an addition for each parameter and token in the forward pass, twice that in
    backward (Kaplan et al., 2020, section 2.1; the GPT-3 paper's count, appendix D). With activations computed again,
    8 N D (Narayanan et al., 2021, section 5.1)."""
    return (8.0 if recompute else 6.0) * num_parameters * num_tokens


def gpu_days(flops: float, flops_per_s: float) -> float:
    """Returns the days that one GPU takes which sustains so many FLOP/s."""
    return flops / (flops_per_s * DAY_S)


def mean_time_between_failures_s(mtbf_gpu_hours: float, num_gpus: int) -> float:
    """Returns the seconds between failures of the run: those of single GPUs are independent and each interrupts it."""
    return 3600 * mtbf_gpu_hours / num_gpus


def checkpoint_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Returns the seconds of training between checkpoints that lose the least time, to their `cost_s` and to repeated
    steps: Young's (1974) sqrt(2 cost mtbf) with Daly's (2006, equation 37) terms of higher order, and the MTBF itself
    where a checkpoint takes more than twice that.
    """
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = cost_s / (2 * mtbf_s)
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_s


def goodput(*, interval_s: float, cost_s: float, restart_s: float, mtbf_s: float) -> float:
    """Returns the share of the time that goes into steps that count, by Young's first-order model: an interval ends
    with a cost, and every failure loses half an interval and a restart. It is 0 where failures come faster."""
    return max(0.0, interval_s / (interval_s + cost_s) * (1 - (interval_s / 2 + restart_s) / mtbf_s))


@dataclass(frozen=True)
class Exchange:
    """The gradient exchange of a step, of the rank that sends most."""

    num_bytes: float
    num_messages: int
    seconds: float  # with those that overlap with backward


def exchange(layout: FlatLayout, options: PlanConfig, *, world_size: int, num_lanes: int) -> Exchange:
    """Returns the exchange of a step. (W - g)/(W - 1) of the bytes leave a node of g GPUs, and both links work at the
    same time; the K + 1 messages of each bucket to each other rank are sent one after another."""
    if world_size == 1:
        return Exchange(0, 0, 0.0)
    num_subtrees = max(num_subtrees_of_rank(num_lanes, world_size=world_size))
    num_bytes = sent_bytes(layout.size, world_size=world_size, num_subtrees=num_subtrees)
    num_messages = len(layout.buckets) * (world_size - 1) * (num_subtrees + 1)
    outside = max(0, world_size - options.gpus_per_node) / (world_size - 1)
    inside_s = num_bytes * (1 - outside) / options.hardware.link_bytes_per_s
    seconds = max(inside_s, num_bytes * outside / options.network_bytes_per_s)
    return Exchange(num_bytes, num_messages, seconds + num_messages * MESSAGE_S)


def sent_bytes(num_values: int, *, world_size: int, num_subtrees: int) -> float:
    """Returns the bytes that one rank sends in a step: to the others their parts of its K subtree sums, then its own
    finished part to all, so 4 (K (P - P/W) + (W - 1) P/W), without the rounding of parts to blocks and the few bytes of
    norms (`bucket_exchange`). With K = 1 that is a ring all-reduce's 8 P (W - 1)/W. ZeRO-1 sends as much: the updated
    weights instead of the sums."""
    part = num_values / world_size
    return FP32_BYTES * (num_subtrees * (num_values - part) + (world_size - 1) * part)


def num_subtrees_of_rank(num_lanes: int, *, world_size: int) -> Sequence[int]:
    """Returns how many sums each rank that has a lane holds before the exchange."""
    return [len(nodes) for nodes in subtrees_of_ranks(num_lanes, min(world_size, num_lanes))]
