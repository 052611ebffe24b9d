"""Computes the memory of data-parallel training, part by part, from a model's shape: of a GPU and
of its host.

B sequences in a lane, T tokens of each, C width, F feed-forward width, V vocabulary, P values of
the flat buffers.
"""

from collections import Counter
from dataclasses import replace
from typing import Any

from cluster.settings.run import (
    RunConfig,
    batch_schedule,
    planned_vocabulary,
    run_storage,
    seq_len,
    state_scaling,
    way_to_compute,
    with_precision,
)
from jobs.exact.run_values import run_sharding, update_rule
from jobs.plan.bucket_sizes import bucket_sizes, sizes_of_bundles
from jobs.plan.exchange import product_bytes
from jobs.plan.formulas import FP32_BYTES
from jobs.plan.update import most_optimizer_bytes, most_values, state_bytes
from jobs.run.costs.budget import why_over_budget
from jobs.run.history import why_not_resumed
from jobs.snapshots.slots import NUM_SLOTS
from model.numerics import NUMERICS
from model.shapes import CHUNK_TOKENS, GPU_CHUNK_TOKENS, hidden_matrices, parameter_shapes
from raymill.rules.rules import matrix_costs
from raymill.state.flat_layout import PIECE_VALUES, FlatLayout
from raymill.state.sharding import Sharding
from raymill.sums.exact_reduce import subtrees_of_ranks
from raymill.sums.step_plan import StepPlan
from raymill.sums.teams import TeamPlan, team_plan

PROCESS_BYTES = 0.5e9
"""Memory of Python, PyTorch and Ray in a worker that trains a tiny model (measured: 0.4 to 0.5
GB)."""


def layout_of(config: RunConfig) -> FlatLayout:
    """Returns the flat layout of a run without making its model: no machine may be able to hold
    it."""
    costs = matrix_costs(update_rule(config.train), hidden_matrices(config.model))
    return FlatLayout.of(parameter_shapes(config.model), matrix_costs=costs)


def gpu_memory(config: RunConfig, layout: FlatLayout, *, world_size: int) -> dict[str, float]:
    """Returns the bytes by part of the rank that holds most, at the peak of a step: the loss, or
    the last layer's backward. The GB or two that the GPU's allocator and libraries usually take are
    not included.

    With g GPUs to one copy, what passes through them is the fp32 embeddings and their gradient, the
    weights of two decoder blocks, and, as gradients on their way to their owners, about those of
    one.
    """
    sharding = run_sharding(state_scaling(config), rank=0, world_size=world_size)
    per_lane = config.train.micro_batches_per_lane
    width = product_bytes(config)
    group = sharding.group_size
    num_lanes = batch_schedule(config).full_lanes
    num_groups = min(sharding.num_groups, num_lanes)
    num_buffers = 0
    for number in range(num_groups):
        first_rank = replace(sharding, rank=number * group, world_size=num_groups * group)
        num_buffers = max(num_buffers, StepPlan(first_rank, num_lanes, per_lane).num_buffers)
    own_values = most_values(layout, num_holders=group)
    second = 0
    if group == 1 and per_lane > 1:
        second = layout.size  # what autograd adds the lane's micro-batches up in
    elif way_to_compute(config) == "cpu" and num_lanes > num_groups:
        second = max(map(len, layout.places.values()))
    is_whole = not sharding.divided.values
    block = max(map(len, layout.decoder_blocks))
    rest = layout.boundary - sum(map(len, layout.decoder_blocks))  # the embeddings
    rounded = config.train.numerics.rounded_bytes * (layout.boundary if is_whole else rest)
    return {
        "weights": FP32_BYTES * (layout.size if is_whole else own_values),
        # Of blocks for good, and of embeddings in autocast's cache
        "bf16_weights": float(rounded),
        "gradients": FP32_BYTES * own_values,
        "lane_sums": FP32_BYTES * ((num_buffers - 1) * own_values + second),
        "optimizer": most_optimizer_bytes(config, layout, num_holders=sharding.num_holders),
        "embeddings": float(FP32_BYTES * rest * ((group > 1) + (not is_whole))),
        "two_blocks": float(0 if is_whole else 2 * width * block),
        "block_gradients": float(width * block if group > 1 else 0),
        "activations": activation_bytes(config),
        "logits_chunk": logits_chunk_bytes(config),
        "exchange": _received_bytes(layout, sharding, num_lanes=num_lanes),
        **_frozen(config, world_size=world_size),
    }


def _frozen(config: RunConfig, *, world_size: int) -> dict[str, float]:
    """Returns the bytes of what an adapter stands on, if there is one: whole, or a GPU's own parts
    with what it gathers, the embeddings and two blocks."""
    if not (shapes := config.model.frozen_shapes):
        return {}
    base = FlatLayout.of(shapes)
    sharding = run_sharding(config.scaling, rank=0, world_size=world_size)
    if not sharding.divided.values:
        return {"frozen": float(FP32_BYTES * base.size)}
    blocks = [*map(len, base.decoder_blocks)]
    gathered = base.size - sum(blocks) + 2 * max(blocks)
    own_values = most_values(base, num_holders=sharding.num_holders)
    return {"frozen": float(FP32_BYTES * (own_values + gathered))}


def activation_bytes(config: RunConfig) -> float:
    """Returns the bytes that forward keeps for backward of one micro-batch. With `train.recompute`
    that is each block's input, and all of one block at a time. Fused kernels may keep less."""
    model, tokens = config.model, config.train.micro_batch_size * seq_len(config)
    block, stream = block_bytes(config), FP32_BYTES * model.n_embd
    blocks = model.n_layer * stream + block if config.train.recompute else model.n_layer * block
    # The last LayerNorm's input, and the gradient of its output
    return float(tokens * (blocks + 2 * stream))


def block_bytes(config: RunConfig) -> int:
    """Returns the bytes that a block keeps of each token: in fp32 the two LayerNorms' inputs and
    outputs, query, key and value, the attention's output (8 C), and the feed-forward layer before
    and after its activation (2 F); with bf16 all but the LayerNorms' inputs have half the size.
    Attention's scores are never kept (FlashAttention), only a number for each head; LayerNorms keep
    two."""
    model, numerics = config.model, config.train.numerics
    kept, c = model.kept, model.n_embd
    own_inputs = kept.own_inputs if numerics.is_rounded else 0
    values = (4 + own_inputs) * c + 2 * _kept_key_width(config) + kept.of_ffn * model.ffn_width
    numbers = model.n_head + kept.norm_numbers
    return (
        FP32_BYTES * (kept.of_norms * c + numbers)
        + numerics.product_bytes * values
        + 2 * c * bool(model.dropout)
    )


def _kept_key_width(config: RunConfig) -> int:
    """Returns the width of the keys, and of the values, that attention keeps: FlashAttention on
    GPUs keeps those heads once that several heads share (`model.attention`)."""
    train, model = config.train, config.model
    has_mask = train.document_mask and bool(model.dropout)
    is_flash = config.scaling.use_gpu and train.numerics.has_flash_attention and not has_mask
    return model.kv_width if is_flash else model.n_embd


def logits_chunk_bytes(config: RunConfig) -> float:
    """Returns the bytes of the scores (V, K) of a chunk of tokens, from which the cross-entropy
    makes their gradients, and of the head's gradient (V, C) where the activations are still there:
    all scores (B, T, V) never exist."""
    model, numerics = config.model, config.train.numerics
    tokens = config.train.micro_batch_size * seq_len(config)
    compute = way_to_compute(config)
    rounded = numerics.rounded_bytes
    # Fused kernels read the scores and write their gradients. Plain operations have five copies in
    # fp32 at a time, and a mask; those for CPUs write over the scores; portable products pack both of
    # their factors.
    score = {
        "compiled": 2 * numerics.product_bytes,
        "plain": 21 + rounded,
        "cpu": FP32_BYTES + rounded,
        "portable": 3 * FP32_BYTES,
    }[compute]
    head = {
        "compiled": FP32_BYTES + rounded,
        "plain": FP32_BYTES + rounded,
        "cpu": rounded,
        "portable": 2 * FP32_BYTES,
    }[compute]
    is_on_cpu = compute in ("cpu", "portable")
    chunk_tokens = min(CHUNK_TOKENS if is_on_cpu else GPU_CHUNK_TOKENS, tokens)
    return float(model.vocab_size * (score * chunk_tokens + head * model.n_embd))


def host_memory(
    config: RunConfig, layout: FlatLayout, *, world_size: int, gpus_per_node: int
) -> dict[str, float]:
    """Returns the bytes by part of a node's own memory: two slots of its GPUs' shares of the state,
    one of them being written (`snapshots/slots`); where no other node has the same, a third, and
    two of another node's shares (`snapshots/choice`); a checkpoint that is being stored and one
    that waits, on rank 0's node, or its GPUs' shards of them where the state is sharded; and two
    pieces of each GPU's copies (`exact/state/host_copies`)."""
    state = state_bytes(config, layout)
    num_ranks = min(world_size, gpus_per_node)
    holders = run_sharding(state_scaling(config), rank=0, world_size=world_size).num_holders
    shares = state * (num_ranks / holders if holders > 1 else 1.0)
    are_copied = holders == world_size > gpus_per_node
    return {
        "snapshots": shares * (NUM_SLOTS + are_copied),
        "copies_of_another_node": shares * NUM_SLOTS * are_copied,
        "checkpoints": 2 * state * min(1.0, num_ranks / holders),
        "pieces": float(2 * FP32_BYTES * PIECE_VALUES * num_ranks),
    }


def _received_bytes(layout: FlatLayout, sharding: Sharding, *, num_lanes: int) -> float:
    """Returns the bytes of what comes from other ranks, for the longest bundle of buckets: half of
    it, or this rank's part of each team's sum; for the longest bucket, each member's gradient; and
    with a sharded optimizer the bundle itself, packed for each subtree sum."""
    size = sharding.group_size
    num_groups = min(sharding.num_groups, num_lanes)
    bucket = int(bucket_sizes(layout).max())
    received = bucket if size > 1 else 0
    if num_groups > 1:
        bundle = max(sizes_of_bundles(layout, group_size=size, num_groups=num_groups))
        subtrees = subtrees_of_ranks(num_lanes, num_groups)
        teams = team_plan([range(num_lanes)], subtrees)
        received += round(bundle * _most_received(teams))
        if not sharding.sends_sums and num_groups > 2:
            received += bundle * max(map(len, subtrees))
    return float(FP32_BYTES * received)


def worker_needs(config: RunConfig) -> dict[str, Any]:
    """Returns `worker_bytes` of a node's memory and `device_bytes` of a GPU's, which a worker
    needs, and `problems` in words: settings that differ from those that the run began with, and a
    budget that is spent."""
    planned, scaling = planned_vocabulary(config), config.scaling
    layout = layout_of(planned)
    training = 0.0
    # As precision `auto` is settled where the workers run, there must be room for either
    for numerics in NUMERICS.values():
        settled = with_precision(planned, numerics.name)
        parts = gpu_memory(settled, layout, world_size=scaling.min_workers)
        training = max(training, sum(parts.values()))
    on_device = training if scaling.use_gpu else 0.0
    run = run_storage(config)
    reasons = [why_not_resumed(run, config), why_over_budget(run, config)]
    return {
        "worker_bytes": round(PROCESS_BYTES + training - on_device),
        "device_bytes": round(on_device),
        "problems": [*filter(None, reasons)],
    }


def _most_received(teams: TeamPlan) -> float:
    """Returns the share of a bucket that arrives at a peer at a time, at most."""
    num_rows = sum(len(teams.left_over[root]) for root in teams.unfinished.values())
    shares = [num_rows / teams.num_peers]
    for pairings in teams.levels:
        arriving: Counter[int] = Counter()
        for left, right in pairings:
            arriving.update(member.peer for member in (*left.members, *right.members))
        half = 0.5 / len(pairings[0][0].members)
        shares.append(half * max(arriving.values()))
    return max(shares)
