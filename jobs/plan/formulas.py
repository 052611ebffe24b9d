"""Computes operations, time and failures of a run. Pure functions, each with its source.

N parameters, D tokens.
"""

import math

from cluster.settings.plan import PlanConfig

DAY_S = 86_400
FP32_BYTES = 4

TEXT_BYTES_PER_TOKEN = 4.3
"""Bytes of English web text for each token of GPT-2's tokenizer, about."""


def parameter_flops(num_parameters: float, num_tokens: float, *, recompute: bool = False) -> float:
    """Returns 6 N D: a multiplication and an addition for each parameter and token in the forward
    pass, twice that in backward (Kaplan et al., 2020, section 2.1; the GPT-3 paper's count,
    appendix D). With activations computed again, 8 N D (Narayanan et al., 2021, section 5.1)."""
    return (8.0 if recompute else 6.0) * num_parameters * num_tokens


def gpu_days(flops: float, flops_per_s: float) -> float:
    """Returns the days that one GPU needs if it sustains so many FLOP/s."""
    return flops / (flops_per_s * DAY_S)


def mean_time_between_failures_s(mtbf_gpu_hours: float, num_gpus: int) -> float:
    """Returns the seconds between failures of the run: single GPUs fail independently and each
    failure interrupts it."""
    return 3600 * mtbf_gpu_hours / num_gpus


def checkpoint_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Returns the seconds of training between checkpoints that lose the least time, to their
    `cost_s` and to repeated steps: Young's (1974) sqrt(2 cost mtbf) with Daly's (2006, equation 37)
    terms of higher order, and the MTBF itself where a checkpoint takes more than twice that.
    """
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = cost_s / (2 * mtbf_s)
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_s


def goodput(*, interval_s: float, cost_s: float, restart_s: float, mtbf_s: float) -> float:
    """Returns the share of the time that goes into steps that count, by Young's first-order model:
    an interval ends with a cost, and every failure loses half an interval and a restart. It is 0
    where failures come faster."""
    without_failures = interval_s / (interval_s + cost_s)
    return max(0.0, without_failures * (1 - (interval_s / 2 + restart_s) / mtbf_s))


def storing_s(num_bytes: float, options: PlanConfig, *, writers: int) -> float:
    """Returns the seconds in which storage takes a checkpoint, from the nodes of all writers at
    once."""
    num_nodes = math.ceil(writers / options.gpus_per_node)
    return num_bytes / (options.storage_bytes_per_s * num_nodes)
